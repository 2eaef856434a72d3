"""The selected tokens of each group as slots, in ascending position."""
