"""Deals a generation's completions to processes and micro-batches by their cost, once their advantages are known."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import gcd
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trl_fast.data.balanced_batches import CostModel, TreeSizes, deal
from trl_fast.data.tree_lengths import tokens_and_pairs
from trl_fast.modeling.loading import base_model
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from ..base.balancing import NEVER, STEP, FreeDeal, chosen_balance

logger = logging.getLogger(__name__)

# The trainers that have said why they do not deal.
_TOLD: WeakSet[Any] = WeakSet()


def deal_of_groups(trainer: Any) -> FreeDeal:
    """Returns how widely GRPO and RLOO let completions be dealt; by default they are not, since they would be sent."""
    if not trainer.args.is_on_policy:
        return FreeDeal(NEVER, "an optimizer step is made of some of a generation's completions")
    if not trainer.order_is_free:
        return FreeDeal(NEVER, "a term of the loss reads the completions of a micro-batch together")
    return FreeDeal(STEP, default=NEVER)


def deal_completions(trainer: Any, samples: Samples) -> Samples:
    """Returns the completions that this process trains on: as many, some of them other processes'.

    They stay as they are unless the arguments ask for a deal, and where that cannot be: where a process has a part of
    a group, or the layout pads. That is said once.

    Args:
        trainer: GRPO's or RLOO's.
        samples: this process's completions with their advantages.
    """
    chosen, group = chosen_balance(trainer), trainer.args.num_generations
    layout, several = BATCH_LAYOUTS[trainer.updates.layout], trainer.accelerator.num_processes > 1
    if chosen == NEVER or not several or not trainer.model.training:
        return samples
    obstacle = _obstacle(len(samples), group, pads=layout.pads)
    if obstacle:
        if trainer not in _TOLD:
            _TOLD.add(trainer)
            logger.warning(f"balance_batches={chosen!r} has no effect: {obstacle}.")
        return samples
    slices = trainer.slices(samples)
    unit = gcd(len(slices[0]), group)
    order = [number for numbers in slices for number in samples.grouped(numbers)]
    units = [order[start : start + unit] for start in range(0, len(order), unit)]
    config = base_model(trainer.accelerator.unwrap_model(trainer.model)).config.get_text_config()
    model, trained = CostModel.of_config(config, has_head=True), set(trainer.trained(samples))
    costs = [
        completions_cost(
            model, samples.select(filter(trained.__contains__, unit)), shares_prompts=layout.shares_prompts
        )
        for unit in units
    ]
    across = chosen == STEP
    samples, slices = exchange(trainer.accelerator, samples, units, costs, len(slices), across_micro_batches=across)
    trainer.slicer.keep(samples, slices)
    return samples


def _obstacle(completions: int, group: int, *, pads: bool) -> str:
    """Returns why the completions of a process cannot be dealt; an empty text if they can."""
    if pads:
        return "rows are padded to the longest of their micro-batch, so that each costs what that one does"
    if completions % group:
        return (
            f"a process has {completions} completions of a generation, a group has {group} and is dealt whole; set "
            "per_device_train_batch_size times steps_per_generation to a multiple of num_generations"
        )
    return ""


def completions_cost(model: CostModel, samples: Samples, *, shares_prompts: bool) -> int:
    """Returns what completions cost, as `CostModel.costs` counts, laid out together as an update lays them out.

    shares_prompts: whether a beginning that several have alike is computed once: of prompts, and of completions.
    """
    part = samples.select(samples.by_beginning(range(len(samples))))
    sequences = [prompt + completion for prompt, completion in zip(part.prompt_ids, part.completion_ids, strict=True)]
    found = tokens_and_pairs(sequences, shares_prompts=shares_prompts)
    sizes = TreeSizes(*(np.array([value], dtype=np.float64) for value in (*found, sum(map(len, part.completion_ids)))))
    return int(model.costs(sizes).item())


def exchange(
    accelerator: Accelerator,
    samples: Samples,
    units: list[list[int]],
    costs: list[int],
    micro_batches: int,
    *,
    across_micro_batches: bool,
) -> tuple[Samples, list[list[int]]]:
    """Returns this process's completions after units of them were dealt to all by their costs, and its micro-batches.

    Every process has as many units. Their costs are gathered; completions are sent only if some change the process.
    """
    rows, ranks, me = len(units) // micro_batches, accelerator.num_processes, accelerator.process_index
    gathered = accelerator.gather(torch.tensor(costs, device=accelerator.device)).cpu().numpy()
    # From (W, A, B) to (A, W, B); a place there tells whose unit it is, and which.
    table = gathered.reshape(ranks, micro_batches, rows).transpose(1, 0, 2).ravel()
    places = deal(table, ranks, rows, across_micro_batches=across_micro_batches).reshape(micro_batches, ranks, rows)
    owners, numbers = places // rows % ranks, places // (rows * ranks) * rows + places % rows
    takers = np.broadcast_to(np.arange(ranks)[None, :, None], places.shape)
    moves = owners != takers
    sent = {int(place): samples.select(units[numbers[places == place][0]]) for place in places[moves & (owners == me)]}
    received: dict[int, Samples] = {}
    if moves.any():
        for part in gather_object([{place: _alone(found) for place, found in sent.items()}]):
            received |= part
    mine = zip(places[:, me].ravel(), owners[:, me].ravel(), numbers[:, me].ravel(), strict=True)
    parts = [samples.select(units[number]) if owner == me else received[int(place)] for place, owner, number in mine]
    joined = type(samples).joined(parts)
    size = len(joined) // micro_batches
    return joined, [[*range(start, start + size)] for start in range(0, len(joined), size)]


def _alone(samples: Samples) -> Samples:
    """Returns the samples with vectors that do not lie in those of all completions, which would be sent too."""
    copies: dict[str, Any] = {
        name: [vector.clone() for vector in value]
        for name, value in vars(samples).items()
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
    }
    return replace(samples.without_other_images(), **copies)
