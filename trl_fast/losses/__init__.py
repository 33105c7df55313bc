"""Pure functions from per-token log-probabilities to a loss and its metrics, one module a family."""
