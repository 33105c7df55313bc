"""Loads models as tensor parallelism asks, and refuses, before training, the kinds of parallelism that are not served.

Data parallelism, sharded or not, is not looked at here: it changes no tensor that a layer or a head sees.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from accelerate import ParallelismConfig
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.training_args import ParallelMode

from trl_fast.modeling.loading import base_model


class _Refusal(NamedTuple):
    """Says why a kind of parallelism is refused, and what to do instead."""

    why: str
    remedy: str


# By the field of accelerate's ParallelismConfig or transformers' DistributedConfig that asks for it.
_REFUSED = {
    "cp_size": _Refusal(
        "ring context parallelism attends over a whole row of tokens, so that sequences which are packed into one row "
        "would see each other",
        "use sp_size instead (Ulysses), which attends within each sequence of the whole row",
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
    sizes = requested_parallelism(args)
    _refuse("parallelism_config", sizes)
    if sizes is not None and sizes.tp_size not in (1, args.world_size):
        raise ValueError(
            f"parallelism_config: tp_size={sizes.tp_size} with {args.world_size} processes: tensor parallelism is not "
            f"combined with data parallelism yet; use tp_size={args.world_size}, or start {sizes.tp_size} processes"
        )


def parallel_options(args: TrainingArguments, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of from_pretrained with which a run of several processes loads a model; given: the user's.

    A model of which each process has a part for tensor parallelism is loaded in parts.
    """
    if args.parallel_mode is not ParallelMode.DISTRIBUTED:
        return {}
    sizes = requested_parallelism(args)
    is_said = {"distributed_config", "tp_plan", "tp_size"} & given.keys()
    if sizes is None or sizes.tp_size == 1 or is_said:
        return {"device_map": None}
    return {"device_map": None, "distributed_config": DistributedConfig(tp_size=sizes.tp_size)}


def check_model_parallelism(model: PreTrainedModel | PeftModel, args: object) -> None:
    """Checks that a model is not in parts, as it was loaded, in a way that is not served with these arguments.

    Raises:
        ValueError: as in `check_parallelism`.
    """
    loaded = getattr(model.config, "distributed_config", None)
    _refuse("distributed_config", loaded)
    if loaded is None or loaded.tp_size == 1:
        return
    tensor_parallel = f"distributed_config: tp_size={loaded.tp_size}"
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", None) or loaded.tp_size
    if heads % loaded.tp_size and any(name.endswith("k_proj") for name in base_model(model).tp_plan or ()):
        raise ValueError(
            f"{tensor_parallel}: {type(base_model(model)).__name__} has {heads} key-value heads, which are not dealt "
            "evenly to so many processes; use a tp_size that divides them, or FSDP2"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            f"peft_config with {tensor_parallel}: PEFT's factors do not fit weights that are in parts; leave one of "
            "the two out: LoRA trains under FSDP2 and DeepSpeed ZeRO-3, which shard weights too"
        )
    if getattr(args, "precompute_ref_log_probs", False):
        raise ValueError(
            f"precompute_ref_log_probs=True with {tensor_parallel}: what it has computed is found again by a hash of "
            "whole weights, and no process has those; set precompute_ref_log_probs=False"
        )


def check_loaded_for(args: TrainingArguments, model: PreTrainedModel | PeftModel) -> None:
    """Checks that a model to train is in the parts that the arguments ask for.

    Raises:
        ValueError: they ask for tensor parallelism, and it is whole, or in other parts.
    """
    sizes = (getattr(model.config, "distributed_config", None), requested_parallelism(args))
    in_parts, wanted = (getattr(each, "tp_size", None) or 1 for each in sizes)
    if wanted not in (1, in_parts):
        raise ValueError(
            f"parallelism_config: tp_size={wanted}, but {type(base_model(model)).__name__} was loaded with "
            f"tp_size={in_parts}; give the model by name, or load it with from_pretrained(..., "
            f"distributed_config=DistributedConfig(tp_size={wanted}))"
        )


def _refuse(source: str, sizes: object | None) -> None:
    for field, (why, remedy) in _REFUSED.items():
        size = getattr(sizes, field, None) or 1
        if size > 1:
            raise ValueError(f"{source}: {field}={size} cannot be used: {why}; {remedy}")


def check_online(trainer: Trainer) -> None:
    """Checks that a trainer that samples completions does not run under tensor parallelism.

    Raises:
        ValueError: it does; with the remedy.
    """
    if trainer.get_tp_size() > 1:
        raise ValueError(
            f"tp_size={trainer.get_tp_size()}: {type(trainer).__name__} deals prompts and rewards to processes, "
            "but under tensor parallelism all have the same rows; use FSDP2 or DeepSpeed ZeRO-3, which shard weights"
        )


def processes_of_a_row(trainer: Trainer) -> int:
    """Returns how many processes compute each row together: those of tensor or of sequence parallelism."""
    group = getattr(trainer, "sequence_group", None)
    return trainer.get_tp_size() if group is None else group.size


def sum_over_rows(trainer: Trainer, number: int) -> int:
    """Returns the sum of a number of all processes, of which those that compute rows together have the same."""
    own = torch.tensor(number, dtype=torch.int64, device=trainer.accelerator.device)
    return int(trainer.accelerator.reduce(own, "sum").item()) // processes_of_a_row(trainer)


def shares_rows(args: object) -> bool:
    """Tells whether processes share the tokens of a row, and so compute each layer again together or not at all."""
    sizes = getattr(args, "parallelism_config", None)
    return sizes is not None and sizes.sp_size > 1
