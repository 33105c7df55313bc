"""Counts the work of a step on fake tensors, operator by operator: operations, bytes, launches."""
