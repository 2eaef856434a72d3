"""One more token in the memory of a sparse store. `reference` is the specification."""
