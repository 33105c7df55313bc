"""Runs that go on from their checkpoints, held against the unbroken run: everything, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from support.training import NOT_COMPARED

# Clocks, and how many steps this process has made.
_CLOCKS = (*NOT_COMPARED, "step_time", "eps", "train_loss")


def logs_after(trainer, step: int) -> list[dict]:
    """Returns what was logged after a step, without clocks; those of a resumed run have their names sorted."""
    return [
        {name: log[name] for name in sorted(log) if not any(part in name for part in _CLOCKS)}
        for log in trainer.state.log_history
        if log["step"] > step
    ]


def flat_state(trainer) -> dict[str, torch.Tensor | float]:
    """Returns weights, optimizer, schedule and random states of a trainer, by name."""
    found = {f"model {name}": weight.detach() for name, weight in trainer.model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {name}": value for name, value in state.items()}
    for index, group in enumerate(trainer.optimizer.state_dict()["param_groups"]):
        found[f"learning rate {index}"] = group["lr"]
    found["schedule"] = float(trainer.lr_scheduler.state_dict()["last_epoch"])
    found["random"] = torch.get_rng_state()
    for part in ("value_model", "ref_model"):
        model = getattr(trainer, part, None)
        if model is not None:
            found |= {f"{part} {name}": weight.detach() for name, weight in model.named_parameters()}
    return found


def assert_same_state(got: dict, wanted: dict) -> None:
    """Every tensor and number, bit for bit."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


def assert_resumes(make, folder: Path, steps: tuple[int, ...]) -> None:
    """Trains once, then from the checkpoint of each of the steps.

    make: from the output folder, and settings that differ, to a trainer.
    """
    whole = make(folder)
    whole.train()
    wanted = flat_state(whole)
    # Logs are compared with NaN equal to NaN.
    logs = repr(logs_after(whole, 0))
    assert logs != "[]"
    for step in steps:
        resumed = make(folder, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step
        assert_same_state(flat_state(resumed), wanted)
        assert repr(logs_after(resumed, step)) == repr(logs_after(whole, step)), step
