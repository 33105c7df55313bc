"""One micro-batch of sequences that are all as long as they may be."""

from __future__ import annotations

from trl_fast.data import TokenBatch, Tree, pack_labelled, pack_trees
from trl_fast.data.reward_modeling import reward_batch

from .training_setup import TrainingSetup

# Any ids do; the two texts of a pair must differ after their prompt.
_PROMPT, _CHOSEN, _REJECTED = 1, 2, 3
_PAD = 0


def make_batch(setup: TrainingSetup, max_length: int, layout: str) -> TokenBatch:
    """Pairs (dpo, reward) or sequences (sft) of `max_length` tokens, as many as a device's batch."""
    count = setup.per_device_train_batch_size
    if setup.method == "sft":
        ids = [_PROMPT] * max_length
        return pack_labelled([(ids, ids)] * count, layout, _PAD)
    prompt = [_PROMPT] * round(max_length * setup.prompt_share)
    answers = [[token] * (max_length - len(prompt)) for token in (_CHOSEN, _REJECTED)]
    if setup.method == "reward":
        return reward_batch([(prompt + answers[0], prompt + answers[1])] * count, layout, _PAD)
    return pack_trees([Tree(prompt, answers)] * count, layout, _PAD)
