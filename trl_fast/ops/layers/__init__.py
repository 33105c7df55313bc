"""Computes the row-wise parts of a transformer's layer, each in one pass: norms, gated activations, rotary embeddings.

Numbers are rounded where transformers' code rounds them, so that a model computes what it did; backward keeps no more
than inputs that are there anyway. The C++ kernels are csrc/cpu/layer_kernels.cpp, and PyTorch serves everything else.
"""

from .gated_activation import ACTIVATIONS, gated_activation
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = ["ACTIVATIONS", "gated_activation", "rms_norm", "rotary"]
