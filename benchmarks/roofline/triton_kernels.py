"""Counts launches of TRL's Triton kernels: fake tensors have no memory to launch them on.

`KERNELS` says what each kernel touches, by the names of its arguments, as its source loads and stores them. The rest
of TRL's head runs as it is: its loops, its products, its sums. What ours touch is in
`trl_fast/planning/roofline/launches.py`, which the planner goes by too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

from trl.kernels import chunked_divergence, chunked_logprob

from trl_fast.planning.roofline.bytes_moved import extent

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
)


@contextmanager
def counted_kernels(counter: Counter) -> Iterator[None]:
    """Lets TRL's kernels, within, count what they touch and do nothing else."""
    with ExitStack() as stack:
        for touched in KERNELS:
            kernel = getattr(touched.module, touched.kernel)
            stack.enter_context(
                patch.multiple(touched.module, **{touched.kernel: _Launches(kernel, touched, counter)})
            )
        yield


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
        self._counter.add(f"{self._library}::{self._touched.kernel}", read, written)
