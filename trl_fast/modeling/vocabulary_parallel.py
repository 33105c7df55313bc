"""Reads the head of a model whose weights tensor parallelism has dealt to several processes.

transformers loads such a model (`from_pretrained(..., tp_plan="auto")`): of the head each process holds consecutive
rows of the weight, columns of the vocabulary, and the hidden states under it are whole in all processes. The head is
scored where it is (ops/head/vocabulary_shard.py); its weight is never gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trl_fast.ops.head.vocabulary_shard import VocabularyShard

TENSOR_PARALLEL = "tp"


class OwnColumns(NamedTuple):
    """Holds what a process has of a head: weight (V, H), bias (V,) or None, and which columns these are; None: all."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shard: VocabularyShard | None


def is_tensor_parallel(weight: torch.Tensor) -> bool:
    """Returns whether a weight, of any shape, is dealt to the processes of a mesh for tensor parallelism."""
    return isinstance(weight, DTensor) and TENSOR_PARALLEL in (weight.device_mesh.mesh_dim_names or ())


def own_columns(weight: torch.Tensor, bias: torch.Tensor | None) -> OwnColumns:
    """Returns this process's columns of a head: all of them, but for a head that tensor parallelism has dealt.

    weight: (V, H); bias: (V,) or None. Gradients go back to them, and are dealt as they are.

    Raises:
        ValueError: the head is dealt in another way than by its vocabulary, or a process has no column of it.
    """
    if not is_tensor_parallel(weight):
        return OwnColumns(weight, bias, None)
    assert isinstance(weight, DTensor), "only those are dealt to processes"
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(
            f"tp_plan: the head's weight is dealt to processes as {weight.placements} on {mesh}; it is scored only "
            "where each has columns of the vocabulary: give the head the style 'colwise_gather_output', or none"
        )
    vocab_size, processes = weight.shape[0], mesh.size()
    widest = -(-vocab_size // processes)
    if widest * (processes - 1) >= vocab_size:
        raise ValueError(f"tp_size={processes}: a vocabulary of {vocab_size} leaves a process without any column")
    _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    shard = VocabularyShard(first, vocab_size, widest, mesh.get_group().group_name)
    return OwnColumns(weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, shard)
