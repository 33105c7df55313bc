"""Says how much memory a trainer's step takes by default where it could take more or less, with the same results.

A step is not to need more memory than TRL's step on the same rows. So nothing here is larger than something that TRL's
step has, where ours has not, or later. It depends on the problem alone: what is free has no say in how sums are split,
so that a run gives the same bits beside other processes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trl_fast.data.layer_sizes import mlp_width
from trl_fast.ops.device import device_facts
from trl_fast.ops.head.vocabulary_shard import VocabularyShard
from trl_fast.ops.matmul import SIXTEEN_BITS

from .model_changes import changes_of

TILED_LAYERS = "tiled layers"
# Rows and columns of a tile of TRL 1.16's logits, and bytes of a row that may be taken here. On a GPU a row of its
# tile has 32768 logits of 16 bits, 64 KiB. On a CPU each row of 32768 float32 logits has seven such rows beside it in
# backward, 960 KiB in all: the head's workspace and what checkpointing keeps share that.
_TILE_ROWS_OF_TRL, _TILE_COLUMNS_OF_TRL = 4096, 32768
_ROW_BYTES_OF_TRL_ON_CPU = 960 << 10
_ROW_BYTES_ON_CPU, _ROW_BYTES_ON_GPU = 384 << 10, 56 << 10
_KEPT_ROW_BYTES_ON_CPU = _ROW_BYTES_OF_TRL_ON_CPU - _ROW_BYTES_ON_CPU
# With more, a frozen head is no faster, and neither is a trained one.
_MOST_BYTES, _MOST_TRAINED_BYTES = 1 << 30, 8 << 30
# Rows of float32 logits that a workspace has room for, however few rows are scored.
_LEAST_ROWS = 16


def head_workspace(
    model: PreTrainedModel,
    weight: torch.Tensor,
    dtype: torch.dtype,
    num_rows: int,
    num_tokens: int,
    shard: VocabularyShard | None = None,
) -> int:
    """Returns the bytes of the workspace of a model's head for `num_rows` scored rows of `num_tokens` tokens.

    On a CPU as much as TRL's tiles of logits take; on a GPU also its tile of the weight where that is cast, or as much
    as what comes later in a step: the MLP's backward pass, and of a 16-bit weight that trains its gradient, which TRL
    makes beside float32 sums and a tile.

    weight: (V, H), the head's; dtype: of the hidden states, as its products take them; shard: which columns these are.
    Processes that share the vocabulary get the same bytes.
    """
    on_cpu = device_facts(weight.device).kind == "cpu"
    row_bytes = _ROW_BYTES_ON_CPU if on_cpu else _ROW_BYTES_ON_GPU
    size = min(min(num_rows, _TILE_ROWS_OF_TRL) * row_bytes, _MOST_BYTES)
    columns = weight.shape[0] if shard is None else shard.widest
    size = max(size, _LEAST_ROWS * 4 * columns)
    if on_cpu:
        return size
    if weight.dtype != dtype:
        size += min(columns, _TILE_COLUMNS_OF_TRL) * weight.shape[1] * dtype.itemsize
    later = mlp_bytes(model, num_tokens)
    if not _trains(model, weight):
        return max(size, min(later, _MOST_BYTES))
    gradient = size + columns * weight.shape[1] * weight.itemsize if weight.dtype in SIXTEEN_BITS else 0
    return max(size, min(max(later, gradient), _MOST_TRAINED_BYTES))


def _trains(model: PreTrainedModel, weight: torch.Tensor) -> bool:
    """Tells whether a head's weight trains, or is that of a trained head's reference.

    A reference gets the workspace of its policy, so that a row is in the same products under both. The reference of an
    adapter is the adapted model itself; of a model that trains whole it is a second one, where nothing trains.
    """
    return weight.requires_grad or not any(each.requires_grad for each in model.parameters())


def mlp_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Returns the bytes that the MLP of a decoder layer takes at least in backward, of so many tokens.

    They are those of 4.5 intermediate results of 16 bits. An MLP in tiles takes less; no bytes are counted then.
    """
    if TILED_LAYERS in changes_of(model):
        return 0
    return num_tokens * 9 * (mlp_width(model.config.get_text_config()) or 0)


def default_activation_budget(model: PreTrainedModel, hidden: torch.Tensor, missing_gradients: int) -> int:
    """Returns the bytes of results that checkpointing keeps in a forward pass where all layers are checkpointed.

    On GPUs none: there only what is free is spent. On a CPU no more than what TRL's tiles of logits take above a layer
    in backward, beside which the results are still kept: six intermediate results of its MLP, and of the hidden size
    six more than stand beside the tiles; and no more than the head's workspace leaves of them.

    Where TRL has no tiles, because no head reads the vocabulary, as much as that workspace would have been; but no
    more than the gradients that backward is still to make take above such a layer and the inputs of all: kept results
    go while gradients come.

    hidden: the first layer's hidden states (B, T, H); Gemma 3n has several of them (A, B, T, H). missing_gradients:
    bytes of the gradients that are not there when the pass starts.
    """
    if device_facts(hidden.device).kind != "cpu":
        return 0
    tokens, hidden_size, kind = hidden.shape[-3:-1].numel(), hidden.shape[-1], hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    config = model.config.get_text_config()
    mlp = 0 if TILED_LAYERS in changes_of(model) else mlp_width(config) or 4 * hidden_size
    layer = tokens * 6 * (mlp + hidden_size) * dtype.itemsize
    if model.get_output_embeddings() is None:
        inputs = config.num_hidden_layers * hidden.nbytes
        return max(0, min(tokens * _ROW_BYTES_ON_CPU, _MOST_BYTES, missing_gradients - layer - inputs))
    rows = min(tokens, _TILE_ROWS_OF_TRL)
    return max(0, min(rows * _KEPT_ROW_BYTES_ON_CPU, rows * _ROW_BYTES_OF_TRL_ON_CPU - layer))
