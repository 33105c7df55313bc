"""Tells whether a run's engine reads the optimizer's states of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from trl_fast.parallel.engines import Engine

# What writes optimizer's states, with the files and folders by which it is known.
_DEEPSPEED, _FSDP, _TRANSFORMERS = "DeepSpeed", "FSDP", "one process or DDP"
_FILES = {
    _DEEPSPEED: ("global_step*",),
    _FSDP: (OPTIMIZER_NAME_BIN, "optimizer_*", "pytorch_model_fsdp*"),
    _TRANSFORMERS: (OPTIMIZER_NAME,),
}


# Each process of ZeRO-3 has written one; other stages write one file for all. Universal checkpoints are of any number.
_ZERO3_PARTS, _UNIVERSAL = "global_step*/*zero_pp_rank_*_model_states.pt", "latest_universal"


def find_engine_conflict(folder: Path, engine: Engine, processes: int) -> str | None:
    """Returns why `processes` of an engine cannot go on from a checkpoint, in a few words; None if they can.

    The optimizer would begin anew without a word where another engine has written its states. A checkpoint that has
    none conflicts with no engine. ZeRO-3 stops at an assertion where the files are not those of as many processes.
    """
    writers = [writer for writer, names in _FILES.items() if any(any(folder.glob(name)) for name in names)]
    reader = _DEEPSPEED if engine.is_deepspeed else _FSDP if engine.is_fsdp else _TRANSFORMERS
    if writers and reader not in writers:
        return f"its optimizer's states were written by {writers[0]}, and {engine.value} does not read them"
    if not writers or engine is not Engine.ZERO3 or (folder / _UNIVERSAL).exists():
        return None
    parts = len(list(folder.glob(_ZERO3_PARTS)))
    if not parts:
        return f"it has the files of another stage of DeepSpeed, and {engine.value} does not read them"
    if parts != processes:
        return f"it has the files of {parts} processes of {engine.value}, and this run has {processes}"
    return None
