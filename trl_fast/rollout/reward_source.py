"""Defines what gives completions their rewards."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Any, Protocol

import torch


class RewardSource(Protocol):
    """Gives each completion of a batch a reward: a user's function, a reward model on texts or one on tokens.

    A source is called with keywords, each a list with one element a completion: `prompts`, `completions` and
    `completion_ids`, the dataset's columns, and with `trainer_state`, `log_extra` and `log_metric`. It gets those that
    its signature names, all of them where the signature has `**kwargs`.
    """

    def __call__(self, **arguments: Any) -> Iterable[float | None] | Awaitable[Iterable[float | None]]:
        """Returns a number or None for each completion, or an awaitable of them."""


# What users may give for a source: the source, a sequence classifier with one label, or the name of one.
GivenReward = RewardSource | str | torch.nn.Module
