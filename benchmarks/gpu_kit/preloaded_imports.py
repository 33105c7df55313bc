"""Imports what phases need, once for all: their processes are forked from one that has it."""

import contextlib

import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

import trl_fast
import trl_fast.ops  # noqa: F401

with contextlib.suppress(ImportError):
    import trl  # noqa: F401
