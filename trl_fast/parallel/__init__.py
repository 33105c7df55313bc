"""Tells the engines apart that share a model among processes, and holds what all processes agree on."""
