"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, or a line that says that there is none."""

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

import trl_fast
from support.killing import forked, wait
from support.resuming import assert_same_state, flat_state
from support.supervised import sft_rows
from support.training import make_trainer

SETTINGS = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 100, "max_steps": 5}
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Signals(TrainerCallback):
    """Sends signals to this process in the middle of a step."""

    def __init__(self, number, step=2, times=1):
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def make(model_path, folder, *callbacks, **settings):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16), "callbacks": [*callbacks]}
    return make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **{**SETTINGS, **settings})


@pytest.fixture(autouse=True)
def _handlers_are_as_they_were():
    yield
    assert {number: signal.getsignal(number) for number in USUAL} == USUAL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_one_ends_with_a_checkpoint_from_which_the_run_goes_on(number, model_path, tmp_path, caplog):
    whole = make(model_path, tmp_path / "whole", save_strategy="no")
    whole.train()
    trainer = make(model_path, tmp_path / "run", Signals(number))
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as end:
        trainer.train()
    assert number == signal.SIGINT or end.value.code == 143
    assert trainer.state.global_step == 2
    assert [record.getMessage() for record in caplog.records if "SIG" in record.getMessage()] == [
        f"{number.name}: training ends with a checkpoint after this step; a second signal ends it at once.",
        f"{number.name}: training has ended; go on from {tmp_path}/run/checkpoint-2.",
    ]
    resumed = make(model_path, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(flat_state(resumed), flat_state(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_one_ends_at_once(number, model_path, tmp_path, caplog):
    trainer = make(model_path, tmp_path, Signals(number, times=2))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.train()
    assert trainer.state.global_step == 1 and not list(tmp_path.glob("*checkpoint-*"))
    assert f"{number.name}: training ends at once; no checkpoint is written." in caplog.text


def test_without_checkpoints_it_ends_at_once_and_says_why(model_path, tmp_path, caplog):
    trainer = make(model_path, tmp_path, Signals(signal.SIGINT), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "SIGINT: training ends at once; no checkpoint is written, since save_strategy='no'." in caplog.text


def test_somebody_elses_handler_stays(model_path, tmp_path):
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        trainer = make(model_path, tmp_path, Signals(signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == ["mine"] and trainer.state.global_step == 5


def test_outside_the_main_thread_nothing_is_caught(model_path, tmp_path):
    trainer = make(model_path, tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_of_the_command(number, status, model_path, tmp_path, monkeypatch):
    from trl_fast.cli import training

    trainer = make(model_path, tmp_path, Signals(number))
    process = forked(lambda: os._exit(training.train(trainer, None)), tmp_path / "log")
    assert wait(process) == status, (tmp_path / "log").read_text()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "model.safetensors").exists()
    assert "Traceback" not in (tmp_path / "log").read_text()
