"""Output projections added to the selected tokens; Triton only, under `selected_heads`."""
