"""Rows of ORPO, CPO and TPO, and TRL's experimental trainers with means of logits over completions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import trl.experimental.cpo
import trl.experimental.orpo
import trl.experimental.tpo
from datasets import Dataset

from support.training import color_pairs


def color_triples(count: int = 24) -> Dataset:
    """Plain preference pairs with a third, gold completion."""
    golds = [f" It is gold {number}" * (1 + number % 2) for number in range(count)]
    return color_pairs(count).add_column("reference", golds)


def _over_completions(trainer_class: Any) -> Any:
    """Returns TRL's trainer whose logits are those before completion tokens, instead of all, those of padding too.

    Nothing but the metrics logits/chosen and logits/rejected reads them.
    """

    class Mended(trainer_class):
        def concatenated_forward(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple:
            chosen_logps, rejected_logps, *logits, nll_loss = super().concatenated_forward(model, batch)[:5]
            rest = super().concatenated_forward(model, batch)[5:] if self.aux_loss_enabled else ()
            for number, side in enumerate(("chosen", "rejected")):
                marked = batch[f"{side}_labels"][:, 1:] != -100
                logits[number] = logits[number][:, : marked.shape[1]][marked]
            return (chosen_logps, rejected_logps, *logits, nll_loss, *rest)

    return Mended


def trls(method: str) -> SimpleNamespace:
    """Returns TRL's config and trainer of a method, as `support.training.make_trainer` takes them."""
    module: Any = getattr(trl.experimental, method.lower())
    trainer = getattr(module, f"{method}Trainer")
    names = {f"{method}Config": getattr(module, f"{method}Config")}
    return SimpleNamespace(**names, **{f"{method}Trainer": trainer if method == "TPO" else _over_completions(trainer)})
