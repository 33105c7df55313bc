"""Stands for linear layers whose weights bitsandbytes keeps in 4 or 8 bits: their sizes, and what products take.

Written from bitsandbytes' source (`Linear4bit`, `MatMul4Bit`, `Linear8bitLt`, `MatMul8bitLt`), for memory on fake
tensors only: no number is computed. A layer's whole weight is dequantized for its product, forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

# Weights that share a constant, and constants that share one of theirs where these are quantized too.
BLOCK, NESTED_BLOCK = 64, 256


class QuantizedLinear(nn.Linear):
    """Takes the memory of a quantized linear layer.

    kind: "4bit" or "8bit"; nested: whether the constants of 4 bits are quantized too.
    """

    def __init__(self, linear: nn.Linear, kind: str, nested: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.kind, self.dtype = linear.bias, kind, linear.weight.dtype
        count = linear.weight.numel()
        stored = (-(-count // 2), 1) if kind == "4bit" else (self.out_features, self.in_features)
        with torch.device("meta"):
            self.weight = nn.Parameter(torch.empty(stored, dtype=torch.uint8), requires_grad=False)
            for name, size, dtype in _constants(count, self.out_features, kind, nested):
                self.register_buffer(name, torch.empty(size, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes a product of the shape that the layer's has, x (..., in_features) of any dtype."""
        product = _Product.apply(x, self.weight, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Takes the memory of the whole weight (out_features, in_features), and returns it in `dtype`."""
        blocks = -(-self.in_features * self.out_features // BLOCK)
        constants = torch.empty(blocks if self.kind == "4bit" else self.out_features, dtype=torch.float32)
        # Not left empty, so that its bytes count as written.
        weight = torch.zeros(self.out_features, self.in_features, dtype=self.dtype)
        del constants
        return weight.to(dtype)


def _constants(count: int, rows: int, kind: str, nested: bool) -> list[tuple[str, int, torch.dtype]]:
    """Lists what is kept beside the weights: names, numbers and dtypes."""
    if kind == "8bit":
        return [("SCB", rows, torch.float32)]
    blocks = -(-count // BLOCK)
    code = ("code", 16, torch.float32)
    if not nested:
        return [("absmax", blocks, torch.float32), code]
    of_constants = [("nested_absmax", -(-blocks // NESTED_BLOCK), torch.float32), ("nested_code", 256, torch.float32)]
    return [("absmax", blocks, torch.uint8), ("offset", 1, torch.float32), *of_constants, code]


class _Product(torch.autograd.Function):
    """Multiplies by the dequantized weight; of the weight only its 4 or 8 bits are kept for backward."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        if layer.kind == "8bit":
            # The activations in 8 bits, and a constant a row.
            narrow = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1], dtype=torch.float32)
            sums = torch.empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
            del narrow
            # A product by name, so that checkpointing may keep it, of a weight that takes no memory.
            out = F.linear(x, torch.zeros(1, dtype=x.dtype).expand(layer.out_features, layer.in_features))
            del sums
            return out.to(_product_dtype(x.dtype))
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return (grad @ ctx.layer.dequantized(grad.dtype)).to(ctx.dtype), None, None


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


def quantize(model: PreTrainedModel, kind: str, nested: bool) -> None:
    """Puts quantized layers in the place of a model's linear ones on the meta device; its head stays as it is."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and name != "score":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, kind, nested))
    setattr(model, f"is_loaded_in_{kind}", True)
