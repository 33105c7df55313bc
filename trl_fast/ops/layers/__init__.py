"""Computes the row-wise parts of a transformer's layer, each in one pass: norms, gated activations, rotary embeddings.

Numbers are rounded where transformers' code rounds them, so that a model computes what it did; backward keeps no more
than inputs that are there anyway. The C++ kernels are csrc/cpu/layer_kernels.cpp, and PyTorch serves everything else.
"""

from trl_fast.kernels.shared_constants import ACTIVATIONS, NORM_CASTS, PAIRS, NormCast, Pairs

from .chunked_gated_activation import chunked_gated_activation
from .embedding import embedding
from .gated_activation import gated_activation
from .joint_linear import Adapter, joint_linear
from .lora_linear import lora_linear
from .norm_and_residual import norm_and_residual
from .qk_norm_rotary import qk_norm_rotary
from .residual_rms_norm import residual_rms_norm
from .rms_norm import rms_norm
from .rotary import rotary
from .tied_embedding import tied_embedding

__all__ = [
    "ACTIVATIONS",
    "NORM_CASTS",
    "PAIRS",
    "Adapter",
    "NormCast",
    "Pairs",
    "chunked_gated_activation",
    "embedding",
    "gated_activation",
    "joint_linear",
    "lora_linear",
    "norm_and_residual",
    "qk_norm_rotary",
    "residual_rms_norm",
    "rms_norm",
    "rotary",
    "tied_embedding",
]
