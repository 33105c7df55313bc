"""A trainer that trains on a CPU keeps what a step frees for the next, and gives it back when it ends."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import trl_fast
from support.forks import fresh
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.ops.heap import _glibc

MIB = 1 << 20


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // MIB


class Freeing(TrainerCallback):
    """Takes and frees a large tensor after a step, and reads what the process then holds."""

    def __init__(self):
        self.held = []

    def on_step_end(self, args, state, control, **kwargs):
        before = resident_mib()
        torch.empty(200 * MIB, dtype=torch.uint8).fill_(1)
        self.held.append(resident_mib() - before)


def train(model_path: str, folder: str) -> None:
    freeing = Freeing()
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 16), "callbacks": [freeing]}
    make_trainer(trl_fast, Path(folder), method="SFT", arguments=arguments, max_steps=2).train()
    first, second = freeing.held
    assert first > 150, freeing.held
    assert second < 100, freeing.held
    held = resident_mib()
    freeing.on_step_end(None, None, None)
    assert freeing.held[-1] < 100, freeing.held
    assert resident_mib() < held + 100


@pytest.mark.skipif(sys.platform != "linux" or _glibc() is None, reason="the C library is not glibc")
def test_freed_memory_is_kept_from_step_to_step_and_no_longer(model_path, tmp_path, monkeypatch):
    for name in ("GLIBC_TUNABLES", "TRL_FAST_HELD_BYTES", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    fresh(__name__, "train", str(model_path), str(tmp_path))
