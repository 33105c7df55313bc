"""Tells what a trainer's step on a CPU spends its time on, by kind of work; see `benchmarks.step --profile`."""

from __future__ import annotations

import re
import resource
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

# The first kind whose pattern is found in an operator's name has its time. What fits none is elementwise arithmetic of
# torch's, unless it is no operator at all: autograd's own work, functions in Python, views.
_KINDS = {
    "attention": r"attention|_TreeAttention",
    "optimizer": r"adam|foreach|linalg_vector_norm|Optimizer",
    "products": r"::(mm|addmm_?|bmm|baddbmm|_linear_pointwise|(lora_)?(linear|product))(_backward)?$",
    "copies, fills, pages": (
        r"::(copy_|fill_|zero_|cat|clone|_to_copy|embedding_dense_backward|index_select|gather|pooled_empty)$"
    ),
    "row kernels": r"trl_fast::(row|linear|selective|policy|pair|sparse)_",
    "layer kernels": r"trl_fast::",
    "host": (
        r"^(?!\w+::)|autograd::|PythonDispatchMode|::(empty\w*|view|as_strided|slice|transpose|t|reshape|expand|select"
        r"|unsqueeze|squeeze|detach\w*|resize_\w*|alias|result_type|to|narrow|split\w*|permute|contiguous|set_data|item"
        r"|_local_scalar_dense|lift_fresh|is_nonzero|zeros\w*|ones\w*|full\w*)$"
    ),
}
ELEMENTWISE, HOST = "elementwise", "host"


def kind_of(operator: str) -> str:
    """Returns the kind of work of an operator, by the name that torch's profiler gives it."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, operator)), ELEMENTWISE)


@dataclass
class StepProfile:
    """Holds one step: seconds in all, of CPU time for the process and for the system; pages that were made.

    operators: seconds of each operator's own, without those that it calls, by kind and name.
    """

    seconds: float
    user: float
    system: float
    page_faults: int
    operators: dict[str, Counter[str]] = field(default_factory=dict)

    def by_kind(self) -> dict[str, float]:
        """Returns seconds by kind, largest first. The host also has what no operator accounts for."""
        sums = Counter({kind: sum(found.values()) for kind, found in self.operators.items()})
        sums[HOST] += max(0.0, self.seconds - sum(sums.values()))
        return dict(sums.most_common())

    def print(self, console: Console, title: str) -> None:
        """Prints a table of the kinds with their dearest operators, and a line on the process."""
        table = Table("", "s", "share", "of it", title=title)
        for kind, seconds in self.by_kind().items():
            dearest = [f"{name} {own:.3f}" for name, own in self.operators.get(kind, Counter()).most_common(3)]
            table.add_row(kind, f"{seconds:.3f}", f"{seconds / self.seconds:.1%}", ", ".join(dearest))
        console.print(table)
        console.print(
            f"{self.seconds:.2f} s; CPU time {self.user:.2f} s, of the system {self.system:.2f} s; "
            f"{self.page_faults} page faults"
        )


class StepProfiler(TrainerCallback):
    """Profiles the last step of a run, whole: from the end of the step before to its own end."""

    result: StepProfile | None = None

    def __init__(self) -> None:
        self._profiler: profile | None = None
        self._start = (0.0, resource.getrusage(resource.RUSAGE_SELF))

    def on_step_end(self, _args: object, state: object, _control: object, **_: object) -> None:
        now, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            began, before = self._start
            self.result = StepProfile(
                now - began,
                usage.ru_utime - before.ru_utime,
                usage.ru_stime - before.ru_stime,
                usage.ru_minflt - before.ru_minflt,
                _own_seconds(self._profiler),
            )
            self._profiler = None
        elif state.global_step == state.max_steps - 1:
            self._profiler = profile(activities=[ProfilerActivity.CPU])
            self._profiler.__enter__()
            self._start = (time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF))


def _own_seconds(profiler: profile) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for event in profiler.key_averages():
        if event.self_cpu_time_total:
            found[kind_of(event.key)][event.key] += event.self_cpu_time_total / 1e6
    return dict(found)


def profile_last_step(trainer: Trainer) -> StepProfile:
    """Trains, and returns the profile of the last of at least two steps."""
    profiler = StepProfiler()
    trainer.add_callback(profiler)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(profiler)
    assert profiler.result is not None, "a run of one step has no step that began and ended"
    return profiler.result
