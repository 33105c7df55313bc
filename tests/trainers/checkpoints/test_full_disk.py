"""No room for a checkpoint: one line that names path and remedy, and older checkpoints stay as they are."""

import errno
import resource
import signal

import pytest
import torch

import trl_fast
from support.killing import forked, wait
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.trainers.checkpoints.files import find_fault
from trl_fast.trainers.checkpoints.writer import CheckpointError

SETTINGS = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def make(model_path, folder, **settings):
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16)}
    return make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **{**SETTINGS, **settings})


def assert_said(message, folder, step):
    assert message.startswith(f"{folder}/checkpoint-{step} could not be written (")
    assert "MiB are free there). Make room, or set save_total_limit, save_only_model=True or another" in message
    assert "\n" not in message


@pytest.mark.parametrize("limit", [20_000, 110_000], ids=["weights", "optimizer"])
def test_files_that_may_not_grow(limit, model_path, tmp_path):
    """The system itself stops the writing, of weights or of the optimizer's state."""
    folder = tmp_path / "run"
    make(model_path, folder, max_steps=1).train()
    sizes = {path.name: path.stat().st_size for path in (folder / "checkpoint-1").iterdir()}
    assert sizes["model.safetensors"] > 20_000 and sizes["optimizer.pt"] > 110_000
    trainer = make(model_path, folder)

    def train():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            trainer.train(resume_from_checkpoint=True)
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (tmp_path / "said").write_text(str(error))

    assert wait(forked(train, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    message = (tmp_path / "said").read_text()
    assert_said(message, folder, 2)
    assert message.endswith(f"The last whole checkpoint is {folder}/checkpoint-1; nothing half-written was left.")
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert find_fault(folder / "checkpoint-1") is None
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("place", ["_save_rng_state", "create_model_card", "_save_scaler"])
def test_wherever_it_happens(place, model_path, tmp_path, monkeypatch):
    trainer = make(model_path, tmp_path)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, place, fail)
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    assert_said(str(error.value), tmp_path, 1)
    assert "There is no older checkpoint" in str(error.value)
    assert not list(tmp_path.glob("*checkpoint-*"))


def test_other_failures_stay_what_they_are(model_path, tmp_path, monkeypatch):
    trainer = make(model_path, tmp_path)

    def fail(*_, **__):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match="^CUDA error$"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint-*"))
    assert torch.isfinite(trainer.model.lm_head.weight).all()
