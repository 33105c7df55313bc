"""Trains a model towards itself: the same model, after a prompt that tells more."""
