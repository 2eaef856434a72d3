"""Projections of the selected tokens alone: x[I] W, rotated; Triton only, under `selected_heads`."""
