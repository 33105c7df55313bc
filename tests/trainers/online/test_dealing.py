"""Completions that cannot be dealt stay where they are, and the run says why, once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from trl_fast.trainers.online import dealing


@pytest.mark.parametrize(
    ("layout", "completions", "said"),
    [
        (
            "packed",
            6,
            "balance_batches='step' has no effect: a process has 6 completions of a generation",
        ),
        ("padded", 8, "balance_batches='step' has no effect: rows are padded"),
    ],
)
def test_what_is_not_dealt_is_said_once(layout, completions, said, monkeypatch, caplog):
    monkeypatch.setattr(dealing, "chosen_balance", lambda trainer: "step")
    trainer = SimpleTrainer(
        args=SimpleNamespace(num_generations=4),
        updates=SimpleNamespace(layout=layout),
        accelerator=SimpleNamespace(num_processes=2),
        model=SimpleNamespace(training=True),
    )
    samples = list(range(completions))
    with caplog.at_level(logging.WARNING, logger=dealing.__name__):
        for _ in range(2):
            assert dealing.deal_completions(trainer, samples) is samples
    (record,) = caplog.records
    assert record.getMessage().startswith(said)


class SimpleTrainer(SimpleNamespace):
    """Holds all that a deal looks at of a trainer; it can be remembered, as a trainer can."""

    __hash__ = object.__hash__
