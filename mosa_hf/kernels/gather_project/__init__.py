"""Projections of the selected tokens alone: x[I] W, rotated; under `selected_heads`."""
