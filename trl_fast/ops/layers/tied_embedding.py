"""Looks up the rows of tokens in a weight that the head shares, with one gradient for both uses.

Autograd would make a gradient as large as the weight for the rows and add it to the head's. Here the head gets the
weight from the same node of the graph: its gradient is there when the rows' is, and the rows are added to it in place.
"""

from __future__ import annotations

from typing import Any

import torch

from ..named_gradients import AutogradContext, first_derivative
from .embedding import add_gradient_of_rows, check_embedding, gradient_of_rows, look_up


class _Context(AutogradContext):
    choices: tuple[int, str | None]
    rows: int


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, backend: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.choices, ctx.rows = (padding_idx, backend), weight.shape[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input_ids)
        return look_up(input_ids, weight, padding_idx, backend), weight.view_as(weight)

    @staticmethod
    @first_derivative("tied_embedding")
    def backward(
        ctx: _Context, grad: torch.Tensor | None, by_head: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        if grad is None or by_head is None:
            by_weight = by_head if grad is None else gradient_of_rows(grad, input_ids, ctx.rows, *ctx.choices)
            return None, by_weight, None, None
        total = by_head.contiguous()
        add_gradient_of_rows(total, grad, input_ids, *ctx.choices)
        return None, total, None, None


def tied_embedding(
    input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight's rows of tokens, and the weight for the head.

    The gradient by the weight for the head is written to: it has to be the head's alone, as that of a matrix product
    or of the ops of `trl_fast.ops` is. (Addition hands one gradient to both of its terms.)

    Args:
        input_ids, weight, padding_idx, backend: those of `embedding`.

    Returns:
        (..., H), dtype of weight, contiguous; and a view of the weight (V, H). Differentiable by weight, once: through
        both, either or none. Gradients are the same in every run.

    Raises:
        ValueError: a shape, dtype or the padding token is not as above.
        IndexError: a token is none of the weight's.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    padding = check_embedding(input_ids, weight, padding_idx)
    rows, head_weight = _TiedEmbedding.apply(input_ids, weight, padding, backend)
    return rows, head_weight
