"""Checks settings, the fields of configs: their numbers (ranges), their names (choices, batch_layouts), older names."""
