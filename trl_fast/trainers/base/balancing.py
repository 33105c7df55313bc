"""Deals the rows of training batches to processes by their cost, where the loss of a step does not depend on it."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from accelerate.data_loader import BatchSamplerShard
from datasets import IterableDataset
from torch.utils.data import DataLoader

from trl_fast.data import AnyDataset
from trl_fast.data.balanced_batches import BalancedBatches, CostModel
from trl_fast.data.tree_lengths import measured_trees
from trl_fast.modeling.layouts import TOKEN_SCORES
from trl_fast.modeling.loading import base_model
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS
from trl_fast.settings.choices import BALANCES

from .prepared_datasets import shows_tokens

logger = logging.getLogger(__name__)

NEVER, MICRO_BATCH, STEP = BALANCES


class FreeDeal(NamedTuple):
    """Holds how widely rows may be dealt without a change of a step's loss, and why not more widely.

    widest: of `BALANCES`. reason: a sentence without its end, of no meaning where nothing is wider. default: what is
    chosen where nothing is asked for, if it is not too wide.
    """

    widest: str = NEVER
    reason: str = "completions belong to the process that sampled them"
    default: str = MICRO_BATCH


def chosen_balance(trainer: Any) -> str:
    """Returns how rows are dealt, of `BALANCES`: as the arguments ask, else so that no number depends on it.

    Raises:
        ValueError: the arguments ask for a deal on which the trainer's loss depends.
    """
    asked, free = trainer.args.balance_batches, trainer.free_deal
    if trainer.router_aux_loss_coef:
        free = FreeDeal(NEVER, "the router's load-balancing loss is that of the tokens which a process has together")
    if asked is None:
        return min(free.default, free.widest, key=BALANCES.index)
    if BALANCES.index(asked) > BALANCES.index(free.widest):
        raise ValueError(
            f"balance_batches={asked!r} would change the loss: {free.reason}; set balance_batches={free.widest!r}, or "
            "leave it out"
        )
    return asked


def balanced(loader: DataLoader, trainer: Any, dataset: AnyDataset) -> DataLoader:
    """Returns the loader of a trainer's training data, made by accelerate, with its rows dealt by their cost.

    It stays as it is with one process, for prompts, whose completions are dealt, and where costs are not known or do
    not add up; that is said if a deal was asked for.
    """
    chosen, shard = chosen_balance(trainer), getattr(loader, "batch_sampler", None)
    if chosen == NEVER or trainer.accelerator.num_processes == 1 or trainer.batches is None:
        return loader
    obstacle = _obstacle(trainer, dataset)
    if obstacle and trainer.args.balance_batches is not None:
        logger.warning(f"balance_batches={chosen!r} has no effect: {obstacle}.")
    if obstacle or not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1:
        return loader
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    costs = CostModel.of_config(model.config.get_text_config(), has_head=trainer.readout is TOKEN_SCORES)
    shares = BATCH_LAYOUTS[trainer.layout.name].shares_prompts
    sizes = measured_trees(dataset, trainer.token_columns, trainer.args.max_length, shares_prompts=shares)
    shard.batch_sampler = BalancedBatches(
        shard.batch_sampler,
        costs.costs(sizes),
        shard.num_processes,
        trainer.args.gradient_accumulation_steps,
        across_micro_batches=chosen == STEP,
        fills=shard.even_batches,
        split=shard.split_batches,
    )
    return loader


def _obstacle(trainer: Any, dataset: AnyDataset) -> str:
    """Returns why rows cannot be dealt by their cost; an empty text if they can."""
    if getattr(trainer, "sequence_group", None) is not None:
        return "with sp_size the processes of a group compute each row together"
    if isinstance(dataset, IterableDataset):
        return "the training data are a stream, whose rows are not known before they come"
    if BATCH_LAYOUTS[trainer.layout.name].pads or trainer.data_collator is not trainer.batches.collator:
        return "rows are padded to the longest of their micro-batch, so that each costs what that one does"
    if not shows_tokens(dataset, trainer.token_columns):
        return "the dataset's rows are made as they are read, so that their lengths are not known before"
    return ""
