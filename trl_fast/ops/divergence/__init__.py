"""Computes divergences between two heads' next-token distributions; linear_divergence.py is the way in."""
