"""Defines what is known of a run at its start, and the four lines that say it."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .forecast import Forecast
from .quantities import count_text, share_text, size_text
from .resident_memory import ResidentMemory


@dataclass(frozen=True)
class ModelFacts:
    """Describes the trained model: parameters counted, `trained` of them; `adapter` for peft's name of its kind."""

    name: str
    parameters: int
    trained: int
    dtype: str
    adapter: str | None = None


@dataclass(frozen=True)
class KernelFacts:
    """Describes what serves the head, and the rows of a batch.

    - `backend`: None where the method has no head over the vocabulary.
    - `backend_reason`: what the backend is, or why a faster one is not it.
    - `layout_reason`: why the method's best layout is not it; None where it is.
    - `saved`: the share of padded rows' positions that is not computed; None: unknown.
    - `counted_rows`: rows of the data from which `saved` and `tokens_a_row` (num_tokens) come.
    """

    backend: str | None
    backend_reason: str
    layout: str
    layout_reason: str | None = None
    saved: float | None = None
    counted_rows: int = 0
    tokens_a_row: float | None = None


@dataclass(frozen=True)
class StepFacts:
    """Describes the steps: their number, where they begin, and the rows of one, over all processes.

    - `unit`: what a row is: "rows", "pairs", "completions".
    - `mini_batches`: updates of a step, each of so many rows as the other factors say.
    - `completions`: of a prompt, and `new_tokens`: of a completion at most, where the policy samples them; else None.
    """

    steps: int
    first_step: int
    epochs: float | None
    per_device: int
    accumulation: int
    processes: int
    unit: str
    mini_batches: int = 1
    completions: int | None = None
    new_tokens: int | None = None

    @property
    def rows(self) -> int:
        """Returns the rows of a step."""
        return self.per_device * self.accumulation * self.processes * self.mini_batches


@dataclass(frozen=True)
class RunFacts:
    """Holds what is known of a run at its start."""

    version: str
    method: str
    model: ModelFacts
    kernels: KernelFacts
    checkpointing: str
    resident: ResidentMemory
    is_sharded: bool
    forecast: Forecast | None
    steps: StepFacts


def start_lines(facts: RunFacts) -> list[tuple[str, str]]:
    """Returns the four lines (label, text) at the start of a run."""
    return [
        ("trl_fast", _what(facts)),
        ("kernels", _kernels(facts.kernels, facts.steps.completions)),
        ("memory", f"{facts.checkpointing}; {_memory(facts)}"),
        ("steps", _steps(facts.steps, facts.kernels.tokens_a_row)),
    ]


def _what(facts: RunFacts) -> str:
    model = facts.model
    trained = f"{share_text(model.trained, model.parameters)} trained"
    if model.adapter is not None:
        trained = f"{model.adapter} of {count_text(model.trained)} ({trained})"
    name = f"{facts.version}, {facts.method}: {model.name}, {count_text(model.parameters)} parameters"
    return f"{name}, {model.dtype}, {trained}"


def _kernels(facts: KernelFacts, completions: int | None) -> str:
    head = f"head by {facts.backend} ({facts.backend_reason}), " if facts.backend is not None else ""
    text = f"{head}rows {facts.layout}"
    if facts.layout_reason is not None:
        text += f", because {facts.layout_reason}"
    if completions is not None and BATCH_LAYOUTS[facts.layout].shares_prompts:
        return f"{text}: a prompt stands once for its {completions} completions"
    if facts.saved is None:
        return text
    saved = round(100 * facts.saved)
    found = f"{saved}% fewer tokens than padded rows" if saved > 0 else "as many tokens as padded rows"
    return f"{text}: {found} (first {facts.counted_rows} rows)"


def _memory(facts: RunFacts) -> str:
    forecast, resident = facts.forecast, facts.resident
    if forecast is not None and forecast.peak_bytes is not None:
        return f"{size_text(forecast.peak_bytes)} expected ({forecast.note})"
    names = "weights, gradients and optimizer states"
    if resident.optimizer is None:
        names = "weights and gradients, without optimizer states"
    shards = ", before they are sharded" if facts.is_sharded else ""
    why = f" ({forecast.note})" if forecast is not None else ""
    return f"{size_text(resident.total)} for {names}{shards}; activations come on top{why}"


def _steps(facts: StepFacts, tokens_a_row: float | None) -> str:
    begun = f", from step {facts.first_step}" if facts.first_step else ""
    epochs = "" if facts.epochs is None else f" in {facts.epochs:g} epoch{'s' if facts.epochs != 1 else ''}"
    parts = f"{facts.per_device} × {facts.accumulation} × {facts.processes}"
    parts += f" × {facts.mini_batches}" if facts.mini_batches > 1 else ""
    unit = facts.unit.removesuffix("s") if facts.rows == 1 else facts.unit
    text = f"{facts.steps:,}{epochs}{begun}; a step: {facts.rows} {unit} ({parts})"
    if facts.completions is not None:
        text += f", {facts.completions} of a prompt"
    if facts.new_tokens is not None:
        text += f", each of at most {facts.new_tokens} tokens"
    if tokens_a_row is None:
        return text
    step = tokens_a_row * facts.rows
    return f"{text}, about {count_text(step)} tokens; in all {count_text(step * (facts.steps - facts.first_step))}"
