"""`trl-fast kto`: optimisation from single labelled completions, from the command line."""

from __future__ import annotations

from collections.abc import Callable

from trl_fast.trainers import KTOConfig, KTOTrainer

from .training import prepare_training


def prepare(arguments: list[str]) -> Callable[[], int]:
    """What runs the command; errors in its arguments are raised at once."""
    return prepare_training("kto", KTOConfig, KTOTrainer, arguments)
