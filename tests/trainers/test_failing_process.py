"""One of two processes fails while the other one trains or waits: both end, with the error of the one that failed."""

from __future__ import annotations

import time

import pytest

import trl_fast
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.ops.validation import NotFiniteError


class FailsAlone(trl_fast.SFTTrainer):
    """Finds in its second step, in process 1, that the loss is no number."""

    def compute_loss(self, *args, **kwargs):
        """Computes the loss, or fails."""
        if self.state.global_step == 1 and self.accelerator.process_index == 1:
            raise NotFiniteError("the loss is nan")
        return super().compute_loss(*args, **kwargs)


def outcome(work):
    """Returns how a work ends: a value, or an error's type and text."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def make(model_path, folder, rows=None, **settings):
    """Makes an SFT trainer of four rows a step and process."""
    arguments = {"model": model_path, "train_dataset": sft_rows("prompt and completion", 16) if rows is None else rows}
    return make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_error_within_a_step_of_one_process_ends_both(engine, model_path, tmp_path, monkeypatch):
    def train():
        monkeypatch.setattr(trl_fast, "SFTTrainer", FailsAlone)
        trainer = make(model_path, tmp_path)
        began = time.monotonic()
        return outcome(trainer.train), time.monotonic() - began

    (first, first_seconds), (second, second_seconds) = run_on_ranks(train, engine=engine)
    assert first == "NotFiniteError: process 1 failed: step 2: the loss is nan"
    assert second == "NotFiniteError: step 2: the loss is nan"
    assert max(first_seconds, second_seconds) < 30
