"""Stands in for the launchers of our Triton kernels on fake tensors, and says what each kernel reads and writes.

A launcher's tensors are read once, but for those that the table has it write, as its source loads and stores them. The
head's fused kernel is a product: it is taken to run at the rate of other large ones, with what is behind it in a tile
hidden (on an H200 a sketch of it took 1.02 to 1.04 times as long as the product alone, docs/benchmarks.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# What a launcher's kernels write, by the names of its arguments.
WRITES: dict[str, tuple[str, ...]] = {
    "merge": ("merged", "merged_lse"),
    "row_divergence": ("results", "gradient"),
    # The loss that is counted is the whole loss, so the factor is 1 and all that is looked at.
    "scale": (),
    "rms_norm": ("out", "total", "rstd"),
    "rms_norm_backward": ("grad_x", "partials"),
    "gated_activation": ("out",),
    "gated_activation_backward": ("grad_gate", "grad_up"),
    "rotary": ("out",),
    "norm_rotary": ("out", "rstd"),
    "norm_rotary_backward": ("grad_x", "partials"),
    "row_scores": ("state",),
    "row_scores_packed": ("state", "words", "tops"),
    "row_grad": ("out",),
    "row_grad_packed": ("out",),
}
# What they look at no more than they say: written tensors that are read first, and tensors that are not looked at.
_READS_FIRST = {"state"}
_UNREAD = {"scale": ("gradient",)}


@dataclass(frozen=True)
class Launch:
    """Holds what a launch of a kernel comes to: the tensors, of any shape, that it reads and writes.

    factors: those read as the factors of a product of 16-bit numbers, of so many operations.
    """

    name: str
    read: tuple[torch.Tensor, ...]
    written: tuple[torch.Tensor, ...]
    factors: tuple[torch.Tensor, ...] = ()
    flops: float = 0.0


def stand_in(see: Callable[[Launch], None]) -> Callable[..., None]:
    """Returns a function for `DeviceFacts.launches`: it shows launches to `see`, and takes the memory of launchers."""

    def run(launcher: Callable, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(launcher).bind(*args, **kwargs).arguments
        special = _SPECIAL.get(launcher.__name__)
        if special is not None:
            special(given, see)
            return
        names = WRITES[launcher.__name__]
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        unread = ({*names} - _READS_FIRST).union(_UNREAD.get(launcher.__name__, ()))
        read = tuple(tensor for name, tensor in tensors.items() if name not in unread)
        see(Launch(launcher.__name__, read, tuple(tensors[name] for name in names if name in tensors)))

    return run


def _embedding_sums(given: Mapping[str, Any], see: Callable[[Launch], None]) -> None:
    """Shows a sum of rows (N, H): of `out` (V, H) no more rows are touched than there are tokens, taken to differ."""
    touched = given["out"][: len(given["grad"])]
    read = (given["grad"], given["order"], given["tokens"])
    see(Launch("embedding_sums", (*read, touched) if given["adds"] else read, (touched,)))


def _linear_scores(given: Mapping[str, Any], see: Callable[[Launch], None]) -> None:
    """Shows the launches of `kernels.linear_scores.linear_scores`, and takes what it holds between its kernels."""
    hidden, targets, bias, kept, tops = (given[name] for name in ("hidden", "targets", "bias", "kept", "tops"))
    if len(hidden) == 0:
        return
    slots, columns = 2 + given["outputs"].bit_count(), given["tiles"].columns
    parts = hidden.new_empty(slots, -(-given["vocab_size"] // columns), len(hidden), dtype=torch.float32)
    start = 0
    for weight in given["weights"]:
        stop = start + len(weight)
        read = (targets,) if bias is None else (targets, bias[start:stop])
        own = parts[:, start // columns : -(-stop // columns)]
        written = (own,) if kept is None else (own, kept[:, start:stop])
        flops = 2.0 * len(weight) * hidden.numel()
        see(Launch("linear_scores", read, written, (hidden, weight), flops))
        start = stop
    written = (given["state"],) if tops is None else (given["state"], tops)
    see(Launch("merge_tiles", (parts,), written))


_SPECIAL: dict[str, Callable[[Mapping[str, Any], Callable[[Launch], None]], None]] = {
    "embedding_sums": _embedding_sums,
    "linear_scores": _linear_scores,
}
