"""Holds that training leaves nothing behind in a process: a long one stays as fast as it was."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import psutil
import torch
from torch.nn.modules import module as torch_modules

import trl_fast
from support.training import color_pairs, make_trainer


def process_state() -> dict[str, object]:
    """Returns what slows down every later operation of a process where it is left changed."""
    hooks = [name for name in vars(torch_modules) if name.startswith("_global_") and name.endswith("_hooks")]
    return {
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "modes of torch": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "hooks of all modules": {name: len(getattr(torch_modules, name)) for name in hooks},
        "autograd": (torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "dtype": torch.get_default_dtype(),
        "collector": (gc.isenabled(), gc.get_threshold(), [*gc.callbacks]),
        "tracing": (sys.gettrace(), sys.getprofile()),
        # tqdm's only sleeps.
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "processes": [child.pid for child in psutil.Process().children(recursive=True)],
    }


def train(model_path: str, output_dir) -> weakref.ref:
    """Trains for some steps, evaluates, and returns a reference to the model."""
    arguments = {"model": model_path, "train_dataset": color_pairs(), "eval_dataset": color_pairs(6)}
    trainer = make_trainer(trl_fast, output_dir, arguments=arguments)
    trainer.train()
    trainer.evaluate()
    return weakref.ref(trainer.model)


def test_training_leaves_the_process_as_it_was(model_path, tmp_path):
    train(model_path, tmp_path / "first")  # imports what is imported at the first use
    before = process_state()
    model = train(model_path, tmp_path / "second")
    gc.collect()
    assert process_state() == before
    assert model() is None
