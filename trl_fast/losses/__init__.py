"""Computes losses and their metrics from per-token log-probabilities: pure functions, one module a family."""
