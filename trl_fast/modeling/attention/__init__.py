"""Computes attention over a row of token trees."""
