"""Switches activations' checkpointing and offloading on, as TRL's functions do."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedModel

from trl_fast.modeling.activation_offloading import offload_activations
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing


def enable_selective_activation_checkpointing(model: PreTrainedModel) -> None:
    """Lets gradient checkpointing of a model, once it is enabled, keep the results of attention."""
    set_selective_checkpointing(model, 0, attention_always=True)


def get_act_offloading_ctx_manager(model: PreTrainedModel, **settings: Any) -> contextlib.AbstractContextManager:
    """Lets what a model's layers save for backward wait in the CPU's memory, from now on.

    settings: TRL's, about streams and sizes; they change nothing here.

    Returns:
        A context to run steps in, as scripts do; it changes nothing.
    """
    offload_activations(model)
    return contextlib.nullcontext()
