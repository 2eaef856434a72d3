"""Output projections added to the selected tokens; under `selected_heads`."""
