"""Refuses, before training, the kinds of model parallelism that the trainers do not serve.

Data parallelism, sharded or not, is not looked at here: it changes no tensor that a layer or a head sees.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from accelerate import ParallelismConfig
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments


class _Refusal(NamedTuple):
    """Says why a kind of parallelism is refused, and what to do instead."""

    why: str
    remedy: str


# By the field of accelerate's ParallelismConfig or transformers' DistributedConfig that asks for it.
_REFUSED = {
    "cp_size": _Refusal(
        "ring context parallelism attends over a whole row of tokens, so that sequences which are packed into one row "
        "would see each other",
        "leave it out, and use FSDP with gradient checkpointing and tiled_mlp for long rows",
    ),
    "sp_size": _Refusal(
        "sequence parallelism hands each process a piece of every row, which trl_fast's packed rows do not have yet",
        "leave it out, and use FSDP with gradient checkpointing and tiled_mlp for long rows",
    ),
    "tp_size": _Refusal(
        "tensor parallelism shards the head over its vocabulary, which trl_fast's head cannot score yet",
        "leave it out, and use FSDP2 or DeepSpeed ZeRO-3, which shard weights too",
    ),
    "pp_size": _Refusal(
        "pipeline parallelism cuts the model into stages, and trl_fast runs the layers and the head of one process",
        "leave it out, and use FSDP2 or DeepSpeed ZeRO-3, which shard weights too",
    ),
    "ep_size": _Refusal(
        "expert parallelism was not tried out with trl_fast", "leave it out, and use FSDP2 or DeepSpeed ZeRO-3"
    ),
    "fsdp_size": _Refusal(
        "a model that transformers has sharded while it was loaded is not one that accelerate prepares",
        "load the model whole, and start with `accelerate launch --use_fsdp --fsdp_version 2`",
    ),
}


def requested_parallelism(args: TrainingArguments) -> ParallelismConfig | None:
    """Returns the parallelism that accelerate will set up: that of the arguments, or of the launcher's environment."""
    if args.parallelism_config is not None:
        return args.parallelism_config
    from_launcher = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return ParallelismConfig() if from_launcher else None


def check_parallelism(args: TrainingArguments) -> None:
    """Checks that the arguments ask for no parallelism that is not served.

    Raises:
        ValueError: they do; the message names the field, its value, why and the remedy.
    """
    _refuse("parallelism_config", requested_parallelism(args))


def check_model_parallelism(model: PreTrainedModel | PeftModel) -> None:
    """Checks that a model was not sharded, as it was loaded, in a way that is not served.

    Raises:
        ValueError: as in `check_parallelism`.
    """
    _refuse("distributed_config", getattr(model.config, "distributed_config", None))


def _refuse(source: str, sizes: object | None) -> None:
    for field, (why, remedy) in _REFUSED.items():
        size = getattr(sizes, field, None) or 1
        if size > 1:
            raise ValueError(f"{source}: {field}={size} cannot be used: {why}; {remedy}")
