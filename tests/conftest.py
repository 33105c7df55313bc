"""Settings that every test runs under."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# accelerate parses the metadata of the same packages for every trainer, a tenth of a tiny trainer's time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
importlib.metadata.version = functools.cache(importlib.metadata.version)

# torch keeps every seed for devices that may come, each time with the stack of its caller, a fiftieth of a tiny
# trainer's time.
for _device in (torch.cuda, torch.mtia, torch.xpu):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None

# A process that a shell starts in the background ignores Ctrl-C, and the tests of signals would wait for it in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _heap_at_rest():
    """Spares the collector what earlier modules left alive: collections would take longer and longer."""
    gc.collect()
    gc.freeze()
