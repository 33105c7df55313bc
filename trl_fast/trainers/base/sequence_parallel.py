"""Has the processes of a group train on the same rows, each on its part of their tokens (Ulysses).

`ParallelismConfig(sp_size=N)` in the arguments asks for it. accelerate is not told: for it, and for the engine that
it prepares the model with, the processes are those of data parallelism, which take the mean of all gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch.distributed
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from trl_fast.data import DictBatch
from trl_fast.data.images.row_images import RowImages
from trl_fast.modeling.layouts import ChosenLayout
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.ulysses import SequenceGroup, sharing_refusal
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .parallelism import requested_parallelism

# The methods that score their rows in one pass, and nothing beside it.
_METHODS = ("sft", "dpo", "orpo", "cpo", "tpo")


class RowTrainer(Protocol):
    """Names what a trainer tells about its batches, and whether it shares their rows with other processes."""

    method: str
    layout: ChosenLayout
    images: RowImages | None
    sequence_group: SequenceGroup | None


def take_sequence_group(
    trainer: RowTrainer, args: TrainingArguments, model: PreTrainedModel | PeftModel
) -> SequenceGroup | None:
    """Returns the processes that share rows with this one, and takes what asks for them out of the arguments.

    Consecutive processes are a group. None: the arguments do not ask for sequence parallelism. Collective.

    Raises:
        ValueError: they do, and model, method or layout cannot be served so; names the field and the remedy.
    """
    sizes = requested_parallelism(args)
    size = 1 if sizes is None else sizes.sp_size
    if size == 1:
        return None
    why = _refusal(trainer, args, model, size)
    if why is not None:
        raise ValueError(f"parallelism_config: sp_size={size} cannot be used: {why}")
    args.parallelism_config = None
    first = args.process_index // size * size
    groups = {
        start: torch.distributed.new_group(list(range(start, start + size)))
        for start in range(0, args.world_size, size)
    }
    return SequenceGroup(groups[first], args.process_index - first, size)


def _refusal(
    trainer: RowTrainer, args: TrainingArguments, model: PreTrainedModel | PeftModel, size: int
) -> str | None:
    sizes, method = args.parallelism_config, trainer.method
    if sizes is None:
        return "the launcher's environment asks for it; set parallelism_config=ParallelismConfig(sp_size=...) instead"
    if sizes.tp_size > 1 or sizes.dp_shard_size > 1:
        return "it is not combined with tp_size or dp_shard_size; leave those out"
    if args.world_size % size:
        return f"{args.world_size} processes are no multiple of it; start {size}, or a multiple of them"
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        return f"{method} does more with a row than to score it; use it with one of {known}, or leave it out"
    if BATCH_LAYOUTS[trainer.layout.name].pads:
        layout = trainer.layout.name
        return f"batch_layout={layout!r} has several rows, and the tokens of one packed row are shared; leave it out"
    if trainer.images is not None:
        return "the dataset has images, whose tokens are those of whole rows; leave it out"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "the virtual tokens of an adapter stand before a row, not in a part of it; use LoRA"
    if getattr(base_model(model), "trl_fast_fused_head", True) is False:
        return "the model's own logits are scored, which are those of whole rows; leave it out"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "a router's load-balancing loss is one of whole rows; set router_aux_loss_coef=0"
    return sharing_refusal(base_model(model), size)


class SharedRows:
    """Iterates over the batches of all processes of a group, one after the other: each process gets all of them.

    loader: this process's own batches, as many as each of the others has.
    """

    def __init__(self, loader: Iterable[Any], group: SequenceGroup) -> None:
        self._loader, self._group = loader, group

    def __len__(self) -> int:
        return len(self._loader) * self._group.size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            for source in range(self._group.size):
                yield self._told_by(source, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    @property
    def sampler(self) -> Any:
        """Raises ValueError: a resumed run asks for it, and would skip one process's batches by it."""
        raise ValueError(
            "resume_from_checkpoint with sp_size: rows that the run has seen cannot be skipped yet; set "
            "ignore_data_skip=True to begin the data anew"
        )

    def _told_by(self, source: int, batch: Any) -> Any:
        """Returns the batch of process `source` of the group; batch: this process's own."""
        own = batch.to("cpu") if hasattr(batch, "to") else batch
        packed = own.token_batch() if isinstance(own, DictBatch) else own
        told = [packed]
        torch.distributed.broadcast_object_list(told, group=self._group.group, group_src=source)
        return own.holding(told[0]) if isinstance(own, DictBatch) else told[0]
