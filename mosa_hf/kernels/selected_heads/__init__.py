"""The paper's heads: selected tokens attend to each other. `reference` is the specification."""
