"""Completions that cannot be dealt stay where they are, and the run says why, once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from trl_fast.data.balanced_batches import CostModel
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS
from trl_fast.trainers.online import dealing
from trl_fast.trainers.online.micro_batches import UpdateMaker


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


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_completions_cost_what_their_update_computes(layout):
    system, turn = [*range(100, 140)], [*range(200, 230)]
    # Two prompts of one system message, the second one's completions with a tool's turn that both begin with.
    prompts = [[*system, 1, 2], [*system, 3], [*system, 1, 2], [*system, 3]]
    samples = Samples.of(prompts, [[5, 6], [*turn, 7], [8], [*turn, 9, 9]])
    update = UpdateMaker(layout, 0, None, torch.device("cpu")).update(samples, [0, 1, 2, 3], torch.ones(4))
    row = update.batch.input_ids.numel()
    shares = BATCH_LAYOUTS[layout].shares_prompts
    assert row == (40 + 2 + 2 + 2 + 1 + 1 + 30 + 1 + 2 if shares else 44 + 43 + 72 + 73)
    assert dealing.completions_cost(CostModel(token=1, pair=0), samples, shares_prompts=shares) == row
    pairs = int(sum(sequence.shape[0] ** 2 / 2 for sequence in update.batch.sequences()))
    if not shares:
        assert dealing.completions_cost(CostModel(token=1, pair=1), samples, shares_prompts=False) == row + pairs


class SimpleTrainer(SimpleNamespace):
    """Holds all that a deal looks at of a trainer; it can be remembered, as a trainer can."""

    __hash__ = object.__hash__
