"""Tells how much memory a training step takes, by simulation on fake tensors: no weights, no GPU, seconds.

`simulate` runs one step and gives its `Timeline`; `estimate` gives a step's peak from two shallow models;
`longest_context` searches for the longest sequences that fit.
"""
