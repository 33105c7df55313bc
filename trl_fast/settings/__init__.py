"""Checks settings, the fields of configs: their numbers, their names, and the names that older scripts use."""
