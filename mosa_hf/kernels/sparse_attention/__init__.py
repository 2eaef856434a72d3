"""Attention of sparse groups over several tokens. `reference` is the specification."""
