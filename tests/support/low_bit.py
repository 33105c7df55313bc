"""How bitsandbytes is asked for weights of 4 and 8 bits."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel


def quantization(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> BitsAndBytesConfig:
    """The configuration of nf4, fp4 or int8; dtype: of products with weights of 4 bits."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, **more)


def low_bit_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The linear layers of 4 and 8 bits."""
    return [module for module in model.modules() if type(module).__module__ == "bitsandbytes.nn.modules"]
