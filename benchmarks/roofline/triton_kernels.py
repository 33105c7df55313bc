"""Counts launches of Triton kernels: fake tensors have no memory to launch them on.

`KERNELS` says what each kernel touches, by the names of its arguments, as its source loads and stores them. The rest
of TRL's head runs as it is: its loops, its products, its sums. Of ours, what the fused kernel of the head launches is
counted, the gradient of logits that it kept, and the merging of attention. The fused kernel's product is taken to run
at the rate of other large products, what is behind it in a tile as hidden: on an H200 a sketch of it took 1.02 to 1.04
times as long as the product alone (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from trl.kernels import chunked_divergence, chunked_logprob

from trl_fast.kernels import attention_merge, gradient_scale, linear_scores, row_kernels
from trl_fast.ops.backends import HEAD_OPS, TRITON_OPS
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.planning.roofline.bytes_moved import extent

from .fake_devices import CUDA
from .operator_counter import Counter


@dataclass(frozen=True)
class Touched:
    """Names the tensors that a kernel reads and writes; `flagged`: written if the flag is on."""

    module: ModuleType
    kernel: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    flagged: tuple[tuple[str, str], ...] = ()


_DIVERGENCE_SUMS = (
    *("s_max_ptr", "s_sum_ptr", "s_x_sum_ptr", "t_max_ptr", "t_sum_ptr"),
    *("t_weighted_gap_ptr", "s_weighted_gap_ptr"),
)
KERNELS = (
    # trl/kernels/chunked_logprob.py, _forward_kernel: one program a row; loads the tile and all of the row's numbers,
    # stores those that were asked for.
    Touched(
        chunked_logprob,
        "_forward_kernel",
        reads=(
            "mm_ptr",
            "targets_ptr",
            "max_ptr",
            "sum_exp_ptr",
            "x_sum_exp_ptr",
            "sq_sum_exp_ptr",
            "z_sum_ptr",
            "max_before_target_ptr",
        ),
        writes=("max_ptr", "sum_exp_ptr", "target_logit_ptr"),
        flagged=(
            ("HAS_ENTROPY", "x_sum_exp_ptr"),
            ("HAS_LOG_SUM_SQ_PROBS", "sq_sum_exp_ptr"),
            ("HAS_MEAN_LOGITS", "z_sum_ptr"),
            ("HAS_IS_TOP1", "max_before_target_ptr"),
        ),
    ),
    # trl/kernels/chunked_logprob.py, _backward_kernel: loads the tile, stores the gradient in its place.
    Touched(
        chunked_logprob,
        "_backward_kernel",
        reads=("mm_ptr", "targets_ptr", "log_z_ptr", "entropy_ptr", "grad_logprobs_ptr", "grad_entropy_ptr"),
        writes=("mm_ptr",),
    ),
    # trl/kernels/chunked_divergence.py, _stats_kernel and _jsd_kernel: one program a row; load both tiles and the
    # row's numbers, store these again.
    Touched(
        chunked_divergence,
        "_stats_kernel",
        reads=("s_ptr", "t_ptr", *_DIVERGENCE_SUMS),
        writes=_DIVERGENCE_SUMS,
    ),
    Touched(
        chunked_divergence,
        "_jsd_kernel",
        reads=("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "jsd_ptr", "kl_student_ptr"),
        writes=("jsd_ptr", "kl_student_ptr"),
    ),
    # The same, _backward_kernel: loads both tiles, stores the gradient in the student's place.
    Touched(
        chunked_divergence,
        "_backward_kernel",
        reads=("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "aux_ptr", "grad_ptr"),
        writes=("s_ptr",),
    ),
    # kernels/attention_merge.py: every row of both outputs is loaded once, every merged one stored once.
    Touched(
        attention_merge,
        "merge_kernel",
        reads=("out", "lse", "other", "other_lse", "place"),
        writes=("merged", "merged_lse"),
    ),
    # kernels/linear_scores.py: reads the parts of all tiles, writes states, and the largest logits of kept ones.
    Touched(
        linear_scores,
        "merge_tiles_kernel",
        reads=("parts",),
        writes=("state",),
        flagged=(("KEEP", "tops"),),
    ),
    # kernels/row_kernels.py: reads words and tops once, writes a gradient each.
    Touched(
        row_kernels,
        "row_grad_packed_kernel",
        reads=("words", "tops", "targets", "lse", "coefficients"),
        writes=("out",),
    ),
    # kernels/gradient_scale.py: the loss that is counted is the whole loss, so the factor is 1 and all that is read.
    Touched(gradient_scale, "scale_kernel", reads=("factor",), writes=()),
)


@contextmanager
def counted_kernels(counter: Counter) -> Iterator[None]:
    """Lets these kernels, within, count what they touch and do nothing else."""
    facts = device_facts(CUDA)
    with ExitStack() as stack:
        stack.enter_context(simulated_device(replace(facts, serves=_with_triton_ops(facts.serves)), on="cuda"))
        for touched in KERNELS:
            kernel = getattr(touched.module, touched.kernel)
            stack.enter_context(
                patch.multiple(touched.module, **{touched.kernel: _Launches(kernel, touched, counter)})
            )
        stack.enter_context(patch.multiple(linear_scores, score_slice=functools.partial(_count_product, counter)))
        yield


def _with_triton_ops(serves: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    return lambda op, backend: serves(op, backend) or (op in (*TRITON_OPS, *HEAD_OPS) and backend == "triton")


def _count_product(
    counter: Counter,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: object,
    outputs: int,
    kept: torch.Tensor | None,
    parts: torch.Tensor,
    strides: tuple,
    tiles: linear_scores.Tiles,
) -> None:
    """Counts a launch of linear_scores_kernel, with the arguments of `linear_scores.score_slice`.

    It reads both factors, targets and bias, and writes what is kept and the sums of its tiles.
    """
    own_parts = parts[:, : linear_scores.num_tiles(len(weight), tiles)]
    read = [targets, *([] if bias is None else [bias])]
    written = [own_parts, *([] if kept is None else [kept])]
    counter.product(
        "trl_fast::linear_scores_kernel", [hidden, weight], read, written, 2.0 * len(weight) * hidden.numel()
    )


class _Launches:
    """Stands in the place of a Triton kernel."""

    def __init__(self, kernel: Any, touched: Touched, counter: Counter) -> None:
        self._signature = inspect.signature(kernel.fn)
        self._library = touched.module.__name__.partition(".")[0]
        self._touched = touched
        self._counter = counter

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        # Others, such as num_warps, are Triton's.
        kwargs = {name: value for name, value in kwargs.items() if name in self._signature.parameters}
        given = self._signature.bind(*args, **kwargs).arguments
        writes = [*self._touched.writes, *(name for flag, name in self._touched.flagged if given[flag])]
        read, written = (extent([given[name] for name in names]) for names in (self._touched.reads, writes))
        self._counter.launch(f"{self._library}::{self._touched.kernel}", read, written)
