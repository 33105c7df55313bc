"""Scores tokens with the language-modelling head, and takes the gradients, without ever holding all logits."""
