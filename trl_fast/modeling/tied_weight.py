"""Gives a head that shares its weight with the embeddings that weight from the embeddings' node of the graph.

Autograd would make a gradient as large as the weight for the tokens' rows, and add it to the head's. Where both come
from one node, the rows are added to the head's gradient in place (`ops.layers.tied_embedding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trl_fast.parallel.partitions import is_partitioned

# Of embeddings while their model is scored: the weight for the head, None until tokens are looked up.
HEAD_WEIGHT = "trl_fast_head_weight"


@contextmanager
def one_gradient_of_tied_weight(model: PreTrainedModel) -> Iterator[None]:
    """Has embeddings hand their weight on to the head within the context, where both train one and can do so.

    Those can whose class has `hands_weight_on`. Engines that hold weights in parts look for the parameter itself.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    weight: Any = getattr(embeddings, "weight", None)
    is_tied = isinstance(weight, nn.Parameter) and getattr(head, "weight", None) is weight
    can = getattr(embeddings, "hands_weight_on", False) and not torch.compiler.is_compiling()
    if not (is_tied and can and weight.requires_grad and torch.is_grad_enabled()) or _in_parts(model, weight):
        yield
        return
    vars(embeddings)[HEAD_WEIGHT] = None
    try:
        yield
    finally:
        del vars(embeddings)[HEAD_WEIGHT]


def weight_of_head(model: PreTrainedModel, head: nn.Module) -> Any:
    """Returns a head's weight (V, H): the one that the embeddings have handed on, if so."""
    handed_on = getattr(model.get_input_embeddings(), HEAD_WEIGHT, None)
    return head.weight if handed_on is None else handed_on


def _in_parts(model: PreTrainedModel, weight: torch.Tensor) -> bool:
    return isinstance(model, FSDPModule) or is_partitioned(weight)
