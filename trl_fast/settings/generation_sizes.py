"""Checks arguments of generation that methods of distillation share: how many prompts, how long, how fresh."""

from __future__ import annotations

from typing import Any


def check_prompt_room(args: Any) -> None:
    """Checks that `max_length` leaves a token for a prompt before a sampled completion.

    Raises:
        ValueError: it does not.
    """
    if args.max_length is not None and args.max_length <= (args.max_completion_length or 0):
        raise ValueError(
            f"max_completion_length={args.max_completion_length} with max_length={args.max_length} leaves no token "
            "for a prompt; raise max_length, or set max_completion_length lower"
        )


def set_generation_batch_size(args: Any) -> None:
    """Sets `generation_batch_size` where it is None, to the different prompts of a process's optimizer step.

    Raises:
        ValueError: it is another number than num_generations leaves.
    """
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.generation_batch_size is None and rows % args.num_generations == 0:
        args.generation_batch_size = rows // args.num_generations
    if (args.generation_batch_size or 0) * args.num_generations != rows:
        raise ValueError(
            f"generation_batch_size={args.generation_batch_size} prompts with num_generations="
            f"{args.num_generations} are not the {rows} completions that a process learns in a step "
            "(per_device_train_batch_size * gradient_accumulation_steps); leave generation_batch_size out"
        )


def check_sync_frequency(args: Any) -> None:
    """Checks that each step's completions are to be sampled with its weights.

    Raises:
        ValueError: `vllm_sync_frequency` is not 1.
    """
    if args.vllm_sync_frequency != 1:
        raise ValueError(
            f"vllm_sync_frequency={args.vllm_sync_frequency}: completions are sampled with the weights of their "
            "step, whatever samples them; leave it at 1"
        )
