"""Checks the inputs of ops, before anything is computed: what is refused is named, with what was expected."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

from .head.vocabulary_shard import VocabularyShard

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOGPROB_DTYPES = (torch.float32, torch.float64)
CHECK_VARIABLE = "TRL_FAST_CHECK"


def checks_requested() -> bool:
    """Tells whether TRL_FAST_CHECK=1 asks for the checks that cost a read of the tensors."""
    return os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


def _expect(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_head_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    same_dtype: bool,
) -> None:
    """Checks shapes, dtypes and devices: hidden (N, H), weight (V, H), targets (N,) integer, bias (V,) or None.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    check_head_matrices(hidden, weight, bias, same_dtype=same_dtype)
    _check_targets_type(targets, (hidden.shape[0],), "targets", hidden.device)


def check_head_matrices(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, same_dtype: bool, prefix: str = ""
) -> None:
    """Checks shapes, dtypes and devices: hidden (N, H), weight (V, H), bias (V,) or None.

    prefix: of the arguments' names in messages.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    names = hidden_name, weight_name, bias_name = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    _expect(hidden.dim() == 2, hidden_name, f"shape {tuple(hidden.shape)}", "shape (N, H)")
    _expect(weight.dim() == 2, weight_name, f"shape {tuple(weight.shape)}", "shape (V, H)")
    hidden_size = hidden.shape[1]
    _expect(weight.shape[1] == hidden_size, weight_name, f"shape {tuple(weight.shape)}", f"shape (V, {hidden_size})")
    _expect(weight.shape[0] > 0, weight_name, "an empty vocabulary", "at least one row")
    for name, tensor in zip(names, (hidden, weight, bias), strict=True):
        if tensor is None:
            continue
        _expect(tensor.dtype in FLOATS, name, tensor.dtype, "a floating-point dtype")
        _expect(tensor.device == hidden.device, name, tensor.device, f"device {hidden.device} as {hidden_name} has")
    if same_dtype:
        remedy = f"{hidden.dtype} as {hidden_name} has (cast one of them, or run under torch.autocast)"
        _expect(weight.dtype == hidden.dtype, weight_name, weight.dtype, remedy)
    if bias is not None:
        _expect(
            tuple(bias.shape) == (weight.shape[0],), bias_name, f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)"
        )


def check_head_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Checks the tensors of a head op as check_head_inputs does; returns hidden in autocast's dtype if autocast is on.

    hidden: (N, H); weight: (V, H); targets: (N,) integer; bias: (V,) or None. Under autocast the weight may have
    another dtype: it is cast later, tile by tile.
    """
    refuse_forward_mode("the head (linear_logprob)", hidden, weight, bias)
    hidden, autocast = _autocast(hidden)
    check_head_inputs(hidden, weight, targets, bias, same_dtype=not autocast)
    return hidden


def check_untargeted_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str = ""
) -> torch.Tensor:
    """Checks the tensors of a head without targets as check_head_call does; returns the same hidden (N, H).

    weight: (V, H); bias: (V,) or None; prefix: of the arguments' names in messages.
    """
    hidden, autocast = _autocast(hidden)
    check_head_matrices(hidden, weight, bias, same_dtype=not autocast, prefix=prefix)
    check_finite(hidden, f"{prefix}hidden")
    return hidden


def _autocast(hidden: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Returns hidden of any shape in autocast's dtype if autocast is on, and whether it is."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    return hidden.to(torch.get_autocast_dtype(device)) if autocast else hidden, autocast


def check_head_call(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    shard: VocabularyShard | None = None,
) -> torch.Tensor:
    """Checks all that a head op is given, values too where that costs little; returns what check_head_tensors does.

    hidden: (N, H); weight: (V, H); targets: (N,) integer; bias: (V,) or None; shard: which columns the V are.
    """
    hidden = check_head_tensors(hidden, weight, targets, bias)
    if shard is None:
        check_target_range(targets, weight.shape[0])
    else:
        check_shard(shard, weight.shape[0])
        check_target_range(targets, shard.vocab_size)
    check_finite(hidden)
    return hidden


def check_shard(shard: VocabularyShard, num_columns: int) -> None:
    """Checks that a process's shard of the vocabulary has the columns that its weight has.

    Raises:
        ValueError: it has others.
    """
    last = shard.first + num_columns
    if not (shard.first >= 0 and last <= shard.vocab_size and num_columns <= shard.widest <= shard.vocab_size):
        raise ValueError(
            f"shard: expected the place of a weight of {num_columns} columns in a vocabulary, got columns from "
            f"{shard.first} of {shard.vocab_size} where a process has at most {shard.widest}"
        )


def check_sparse(shard: VocabularyShard | None) -> None:
    """Refuses the sparse gradient of a head whose vocabulary is dealt to several processes.

    Raises:
        ValueError: it is; with the remedy.
    """
    if shard is not None:
        raise ValueError(
            "head_grad='sparse' is not there for a head whose vocabulary is dealt to several processes (tensor "
            "parallelism); use head_grad='exact'"
        )


def _check_targets_type(targets: torch.Tensor, shape: tuple[int, ...], name: str, device: torch.device) -> None:
    _expect(tuple(targets.shape) == shape, name, f"shape {tuple(targets.shape)}", f"shape {shape}")
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    _expect(integer, name, targets.dtype, "an integer dtype")
    _expect(targets.device == device, name, targets.device, f"device {device}")


def check_selective_inputs(logits: torch.Tensor, index: torch.Tensor) -> None:
    """Checks shapes, dtypes and devices of the selective ops: logits (..., V), index (...) integer.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    refuse_forward_mode("selective_log_softmax", logits)
    _expect(logits.dim() >= 1, "logits", f"shape {tuple(logits.shape)}", "shape (..., V)")
    _expect(logits.dtype in FLOATS, "logits", logits.dtype, "a floating-point dtype")
    _check_targets_type(index, tuple(logits.shape[:-1]), "index", logits.device)


def check_target_range(targets: torch.Tensor, vocab_size: int, name: str = "targets") -> None:
    """Checks that every target lies in [0, vocab_size).

    On a GPU only when TRL_FAST_CHECK=1, since it makes the host wait; without it, a row whose target lies outside is
    NaN.

    Raises:
        ValueError: naming the first bad row, its value and the vocabulary.
    """
    if targets.device.type != "cpu" and not checks_requested():
        return
    bad = ((targets < 0) | (targets >= vocab_size)).flatten().nonzero()
    if bad.numel():
        row = int(bad[0])
        raise ValueError(
            f"{name}: row {row} is {int(targets.flatten()[row])}, outside the head's vocabulary [0, {vocab_size}); "
            "the tokenizer and the model do not match, or an ignored position was not filtered out"
        )


class NotFiniteError(ValueError):
    """Reports NaN or infinity where numbers were expected."""


def check_finite(hidden: torch.Tensor, name: str = "hidden", *, masked: bool = False) -> None:
    """Refuses `hidden` (N, H) that is not finite, with TRL_FAST_CHECK=1. masked: -inf rules a token out.

    Raises:
        NotFiniteError: naming how many rows are not finite and the first of them.
    """
    if not checks_requested():
        return
    good = hidden < float("inf") if masked else torch.isfinite(hidden)
    bad = (~good.all(dim=-1)).nonzero()
    if bad.numel():
        raise NotFiniteError(
            f"{name}: {bad.shape[0]} of {hidden.shape[0]} rows are not finite (NaN or infinity), first row "
            f"{int(bad[0, 0])}; the model has diverged: lower the learning rate, or check the input and the weights"
        )


def check_logprobs(logprobs: torch.Tensor) -> None:
    """Checks logprobs (N,): float32, or float64 for the reference.

    Raises:
        ValueError: saying what it was and what was expected.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs: expected shape (N,), got shape {tuple(logprobs.shape)}")
    if logprobs.dtype not in LOGPROB_DTYPES:
        raise ValueError(f"logprobs: expected torch.float32, got {logprobs.dtype}; cast it with .float()")


def check_vector(
    name: str, vector: torch.Tensor, size: int, logprobs: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Checks that `vector` has shape (size,), the device of logprobs and `dtype` (None: that of logprobs).

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    dtype = dtype or logprobs.dtype
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got shape {tuple(vector.shape)}")
    if vector.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {vector.dtype}")
    if vector.device != logprobs.device:
        raise ValueError(f"{name}: expected device {logprobs.device} as logprobs has, got {vector.device}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Checks that `value` is one of `choices`.

    Raises:
        ValueError: naming the field, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}: unknown name {value!r}; expected one of {', '.join(choices)}")


def values_are_checked(vector: torch.Tensor) -> bool:
    """Tells whether to look into `vector` (N,): on a GPU only when TRL_FAST_CHECK=1, since it makes the host wait."""
    return vector.device.type == "cpu" or checks_requested()


def refuse_forward_mode(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuses tensors of any shape that carry a tangent of forward-mode differentiation, which would be lost.

    Raises:
        RuntimeError: naming the op.
    """
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use backward, or "
            "compute that part with plain PyTorch"
        )
