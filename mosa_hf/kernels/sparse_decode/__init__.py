"""Attention of one token a row over what a cache holds. `reference` is the specification."""
