"""Looks up the rows of tokens, and sums the gradients of equal tokens once, in the order in which they come.

PyTorch fills a gradient as large as the weight with zeros and adds rows to it, in an order of its own on a GPU. Here
every row of the gradient is written once, by C++; on a GPU, Triton's kernel writes those of tokens over zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext


def _groups(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the places of N tokens sorted by token (N,), where each token's start (U + 1,), and the tokens (U,)."""
    ordered, order = torch.sort(ids, stable=True)
    tokens, counts = torch.unique_consecutive(ordered, return_counts=True)
    return order, torch.cat((counts.new_zeros(1), counts.cumsum(0))), tokens


def _sum_in_torch(grad: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)


def _sum_in_cpp(grad: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    out = reused_empty((rows, grad.shape[1]), grad.dtype, grad.device)
    torch.ops.trl_fast.layer_embedding_gradient(grad.contiguous(), *_groups(ids), False, out)
    return out


def _sum_in_triton(grad: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    out = grad.new_zeros(rows, grad.shape[1])
    _add_sums(out, grad, ids, adds=False)
    return out


def _add_sums(out: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor, *, adds: bool) -> None:
    from trl_fast.kernels.embedding_kernels import embedding_sums

    tokens, order = torch.sort(ids, stable=True)
    embedding_sums(grad.contiguous(), order, tokens, adds, out)


# By backend: (grad (N, H), ids (N,), rows) to the sums, (rows, H).
_SUM = {"torch": _sum_in_torch, "cpp": _sum_in_cpp, "triton": _sum_in_triton}


def _add_in_torch(total: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor) -> None:
    tokens, places = torch.unique(ids, return_inverse=True)
    total[tokens] += _sum_in_torch(grad, places, len(tokens))


def _add_in_cpp(total: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor) -> None:
    torch.ops.trl_fast.layer_embedding_gradient(grad.contiguous(), *_groups(ids), True, total)


def _add_in_triton(total: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor) -> None:
    _add_sums(total, grad, ids, adds=True)


# By backend: (total (V, H), grad (N, H), ids (N,)), of which the first is added to.
_ADD = {"torch": _add_in_torch, "cpp": _add_in_cpp, "triton": _add_in_triton}


@torch.library.custom_op("trl_fast::embedding", mutates_args=())
def look_up(input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, backend: str | None) -> torch.Tensor:
    """Returns the rows (..., H) of tokens, without checks. padding_idx: -1 for none."""
    out = reused_empty((input_ids.numel(), weight.shape[1]), weight.dtype, weight.device)
    torch.index_select(weight, 0, input_ids.reshape(-1), out=out)
    return out.view(*input_ids.shape, weight.shape[1])


@look_up.register_fake
def _(input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, backend: str | None) -> torch.Tensor:
    return weight.new_empty(*input_ids.shape, weight.shape[1])


def rows_and_ids(grad: torch.Tensor, input_ids: torch.Tensor, padding_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows (N, H) of the gradient and their tokens (N,) without those of padding, which are 0 on a GPU."""
    rows, ids = grad.reshape(-1, grad.shape[-1]), input_ids.reshape(-1).long()
    if padding_idx < 0:
        return rows, ids
    kept = ids != padding_idx
    if device_facts(grad.device).is_cuda:
        # How many are left is not known without a wait of the host.
        return rows.masked_fill(~kept[:, None], 0.0), ids
    return rows[kept], ids[kept]


@torch.library.custom_op("trl_fast::embedding_backward", mutates_args=())
def gradient_of_rows(
    grad: torch.Tensor, input_ids: torch.Tensor, rows: int, padding_idx: int, backend: str | None
) -> torch.Tensor:
    """Returns the gradient (V, H) by the weight, V being `rows`. grad: (..., H), by the rows of tokens."""
    chosen = choose_backend("embedding", backend, device_facts(grad.device), grad.dtype)
    return _SUM[chosen](*rows_and_ids(grad, input_ids, padding_idx), rows)


@gradient_of_rows.register_fake
def _(grad: torch.Tensor, input_ids: torch.Tensor, rows: int, padding_idx: int, backend: str | None) -> torch.Tensor:
    return grad.new_empty(rows, grad.shape[-1])


@torch.library.custom_op("trl_fast::embedding_add_gradient", mutates_args=("total",))
def add_gradient_of_rows(
    total: torch.Tensor, grad: torch.Tensor, input_ids: torch.Tensor, padding_idx: int, backend: str | None
) -> None:
    """Adds that gradient to `total`, (V, H) and contiguous, dtype of grad: only rows of tokens are read or written."""
    chosen = choose_backend("embedding", backend, device_facts(grad.device), grad.dtype)
    _ADD[chosen](total, *rows_and_ids(grad, input_ids, padding_idx))


@add_gradient_of_rows.register_fake
def _(
    total: torch.Tensor, grad: torch.Tensor, input_ids: torch.Tensor, padding_idx: int, backend: str | None
) -> None: ...


class _Context(AutogradContext):
    choices: tuple[int, str | None]
    rows: int


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input_ids, weight, *choices = inputs
    ctx.choices, ctx.rows = (choices[0], choices[1]), weight.shape[0]
    ctx.save_for_backward(input_ids)


def _backward(ctx: _Context, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (input_ids,) = ctx.saved_tensors
    return None, gradient_of_rows(grad, input_ids, ctx.rows, *ctx.choices), None, None


look_up.register_autograd(_backward, setup_context=_setup_context)


def check_embedding(input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> int:
    """Checks tokens of any shape and a weight (V, H); returns the padding token, -1 for none.

    Raises:
        ValueError: a shape, dtype or the padding token is not as it has to be.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected floats of shape (V, H), got {weight.dtype} {tuple(weight.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: expected int64 or int32, got {input_ids.dtype}")
    if padding_idx is not None and not -len(weight) <= padding_idx < len(weight):
        raise ValueError(f"padding_idx: expected a row of {len(weight)}, got {padding_idx}")
    return -1 if padding_idx is None else padding_idx % len(weight)


def embedding(
    input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Returns the weight's rows of tokens.

    Args:
        input_ids: any shape, integers of 0 to V - 1; weight: (V, H) of any float dtype.
        padding_idx: a token whose row gets no gradient; negative ones count from V, as in `torch.nn.Embedding`.
        backend: what sums gradients: "cpp" or "torch"; None: the first that serves.

    Returns:
        (..., H), dtype of weight, contiguous; differentiable by weight, once. Gradients are the same in every run.

    Raises:
        ValueError: a shape, dtype or the padding token is not as above.
        IndexError: a token is none of the weight's.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    return look_up(input_ids, weight, check_embedding(input_ids, weight, padding_idx), backend)
