"""Calls the public ops on random inputs, and holds what they give to float64 and to PyTorch in the same dtype.

A case is a line, `seed/index`: whatever is drawn in it comes from these two numbers alone, so that the line repeats
it: `python -m support.fuzz --case 0/123` with `tests` on the path.
"""
