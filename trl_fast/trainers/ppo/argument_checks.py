"""Checks PPO's arguments against each other, and counts its rollouts."""

from __future__ import annotations

import math

import torch
from datasets import Dataset

from trl_fast.data import AnyDataset

from .config import PPOConfig


def check_distinct(**models: object) -> None:
    """Raises ValueError if one model was given for two purposes."""
    given = [(name, model) for name, model in models.items() if isinstance(model, torch.nn.Module)]
    for index, (name, model) in enumerate(given):
        for other, again in given[:index]:
            if model is again:
                raise ValueError(
                    f"{other} and {name} are the same object, but only one of them is to be trained; leave {name} "
                    "None to have a copy made, or load it once more"
                )


def count_rollouts(args: PPOConfig, dataset: AnyDataset) -> int:
    """Returns how many rollouts there are to be.

    Raises:
        ValueError: a stream's length is needed, or a dataset has too few rows for one rollout.
    """
    if isinstance(dataset, Dataset) and len(dataset) < args.batch_size:
        raise ValueError(
            f"the train dataset has {len(dataset)} rows, but one rollout takes {args.batch_size} prompts "
            f"(per_device_train_batch_size={args.per_device_train_batch_size} * gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} * num_mini_batches={args.num_mini_batches} * {args.world_size} "
            "processes); use a larger dataset or a smaller batch"
        )
    if args.max_steps > 0:
        return args.max_steps
    if args.total_episodes is None and not isinstance(dataset, Dataset):
        raise ValueError("total_episodes=None: the train dataset is a stream of unknown length; set it, or max_steps")
    episodes = args.total_episodes or int(args.num_train_epochs * len(dataset))
    return max(math.ceil(episodes / args.batch_size), 1)
