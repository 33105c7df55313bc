"""Checks settings, the fields of configs: numbers (ranges), names (choices, batch_layouts) and older names."""
