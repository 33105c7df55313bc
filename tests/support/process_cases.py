"""Lists what two processes learn as one does: by case a method, its rows, and settings of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

from support.supervised import sft_rows
from support.training import color_labels, color_pairs


class Case(NamedTuple):
    """Holds a method, what makes its rows, and its settings."""

    method: str
    make_rows: Callable[[], Dataset]
    settings: dict[str, Any] = {}


def even_triples(count: int) -> Dataset:
    """Pairs with a gold completion; only rejected ones are of different lengths.

    A likelihood is a mean over the learned tokens of each process, so that they have to be as many in both.
    """
    number = "{:02d}".format
    return color_pairs(count).map(
        lambda _, i: {
            "prompt": f"What color is {number(i)}?",
            "chosen": f" It is blue {number(i)}",
            "reference": f" It is gold now {number(i)}",
        },
        with_indices=True,
    )


_COUNT = 16
_PAIRS, _TRIPLES, _LABELS = (partial(make, _COUNT) for make in (color_pairs, even_triples, color_labels))
CASES = {
    "SFT": Case("SFT", partial(sft_rows, "prompt and completion", _COUNT)),
    "DPO": Case("DPO", _PAIRS),
    "KTO": Case("KTO", _LABELS),
    # The estimate of the KL reads the completions of a device's batch, so that two devices have another one.
    "KTO without KL": Case("KTO", _LABELS, {"loss_type": "apo_zero_unpaired"}),
    "BCO": Case("BCO", _LABELS),
    "Reward": Case("Reward", _PAIRS),
    "ORPO": Case("ORPO", _TRIPLES),
    "CPO": Case("CPO", _TRIPLES),
    "SimPO": Case("CPO", _PAIRS, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "TPO": Case("TPO", _TRIPLES),
}
