"""Makes one micro-batch of sequences that are all as long as they may be, for each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trl_fast.data import TokenBatch, Tree, pack_labelled, pack_trees
from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.packing import SequenceImages
from trl_fast.data.reward_modeling import reward_batch
from trl_fast.data.unpaired_preference import KL_COLUMN, LABEL, UnpairedCollator
from trl_fast.losses.loss_normalization import LossNormalizer
from trl_fast.losses.policy_gradient import sequence_weights
from trl_fast.losses.ppo import ppo_loss_inputs
from trl_fast.modeling.classifier_head import state_batch
from trl_fast.rollout.images import image_keywords
from trl_fast.rollout.samples import Samples
from trl_fast.trainers.a2po import ValueUpdate
from trl_fast.trainers.kto import scores_together
from trl_fast.trainers.online.micro_batches import Update, UpdateMaker
from trl_fast.trainers.online.pairs import PairUpdate, make_pair_update
from trl_fast.trainers.ppo.experience import PPOUpdate

from .generation import Generation
from .training_setup import OURS, TrainingSetup

# Any ids do; the two texts of a pair must differ after their prompt.
_PROMPT, _CHOSEN, _REJECTED, _GOLD = 1, 2, 3, 4
_PAD = 0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlannedLayout:
    """Holds how batches are laid out, one of BATCH_LAYOUTS; images: what laying out images needs to know."""

    name: str
    images: ImageLayout | None = None


@dataclass(frozen=True)
class _PlannedRowImages:
    """Stands where a collator asks for the images of a row (`RowImages`): each row has these."""

    images: tuple[ImageInput, ...]
    layout: ImageLayout

    def inputs(self, row: Mapping[str, object]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of a row's images."""
        return self.images


@dataclass(frozen=True)
class KTOInputs:
    """Holds a micro-batch of KTO; together: whether own and mismatched completions are scored in one pass."""

    batch: TokenBatch
    together: bool


@dataclass
class SampledInputs:
    """Holds what a step on sampled completions works on: what is sampled at a time, and a micro-batch of the update.

    The step puts the images of its micro-batch on the device after generation.
    """

    generation: Generation
    update: Update | PairUpdate | ValueUpdate


@dataclass(frozen=True)
class PPOInputs:
    """Holds what a step of PPO works on; rollout, rollout_states: what policies and value model score at a time."""

    generation: Generation
    rollout: TokenBatch
    rollout_states: TokenBatch
    update: PPOUpdate


def labelled_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> TokenBatch:
    """Makes sequences of which every token is learned (SFT)."""
    ids, count = _with_images([_PROMPT] * max_length, setup, layout), setup.per_device_train_batch_size
    images = None if layout.images is None else SequenceImages([setup.images] * count, layout.images)
    return pack_labelled([(ids, ids)] * count, layout.name, _PAD, images=images)


def preference_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> TokenBatch:
    """Makes pairs of completions with a prompt that both share; ORPO learns the prompt, TPO a gold completion."""
    prompt, answers = _pair(setup, max_length, layout)
    gold = [[_GOLD] * (max_length - len(prompt))] if setup.method == "tpo" else []
    trees = [Tree(prompt, [*answers, *gold], setup.images)] * setup.per_device_train_batch_size
    learns_prompts = setup.method == "orpo"
    return pack_trees(trees, layout.name, _PAD, scores_prompts=learns_prompts, image_layout=layout.images)


def reward_pairs(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> TokenBatch:
    """Makes pairs of texts that begin alike (reward)."""
    prompt, (chosen, rejected) = _pair(setup, max_length, layout)
    count = setup.per_device_train_batch_size
    pairs, images = [(prompt + chosen, prompt + rejected)] * count, [setup.images] * count
    return reward_batch(pairs, layout.name, _PAD, images=images, image_layout=layout.images)


def unpaired_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> KTOInputs:
    """Makes completions with labels and as long mismatched completions (KTO)."""
    _, (_, other) = _pair(setup, max_length, layout)
    batch = _labelled_completions(setup, max_length, layout, {KL_COLUMN: other})
    backward_passes = 1 + (setup.lora_r is None) + setup.gradient_checkpointing
    return KTOInputs(batch, scores_together(batch, backward_passes))


def good_and_bad_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> TokenBatch:
    """Makes completions with labels (BCO)."""
    return _labelled_completions(setup, max_length, layout, {})


def _labelled_completions(
    setup: TrainingSetup, max_length: int, layout: PlannedLayout, more: dict[str, list[int]]
) -> TokenBatch:
    """Makes completions with labels, and with more columns of token ids."""
    prompt, (own, _) = _pair(setup, max_length, layout)
    row = {"prompt_ids": prompt, "completion_ids": own, LABEL: True, **more}
    images: Any = None if layout.images is None else _PlannedRowImages(setup.images, layout.images)
    collator = UnpairedCollator(_PAD, layout=layout.name, images=images)
    return collator.collate([row] * setup.per_device_train_batch_size)


def policy_micro_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> SampledInputs:
    """Makes completions of as few prompts as the group size allows, each with an advantage (GRPO, RLOO)."""
    count, group = setup.per_device_train_batch_size, setup.group_size
    samples = _samples(setup, max_length, layout, count, group)
    samples.advantages = torch.ones(count)
    zeros = [torch.zeros(len(ids)) for ids in samples.completion_ids]
    samples.old_logprobs = zeros if setup.scores_old_policy else None
    samples.ref_logprobs = zeros if setup.method != "rloo" and setup.needs_reference else None
    window = LossNormalizer(
        float(samples.lengths.sum()), setup.gradient_accumulation_steps, len(samples.completion_ids[0])
    )
    weights = sequence_weights("dapo" if setup.method == "grpo" else "grpo", samples.lengths, window)
    maker = UpdateMaker(layout.name, _PAD, None, _CPU, layout.images)
    total = setup.completions_per_generation
    generation = _generation(setup, max_length, layout, -(-total // group), total)
    return SampledInputs(generation, maker.update(samples, list(range(count)), weights))


def pair_micro_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> SampledInputs:
    """Makes two completions of each prompt (Online DPO)."""
    prompts, completions = setup.per_device_train_batch_size, setup.completions_per_generation
    samples = _samples(setup, max_length, layout, completions, 2)
    batch = samples.batch(layout.name, _PAD, image_layout=layout.images)
    update = make_pair_update(samples, batch, torch.zeros(len(batch.branch)))
    return SampledInputs(_generation(setup, max_length, layout, prompts, completions), update)


def value_micro_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> SampledInputs:
    """Makes one completion of each prompt (A*-PO)."""
    count = setup.per_device_train_batch_size
    samples = _samples(setup, max_length, layout, count, 1)
    batch, zeros = samples.batch(layout.name, _PAD), torch.zeros(count)
    update = ValueUpdate(batch, tuple(map(len, samples.completion_ids)), zeros, zeros, zeros)
    return SampledInputs(_generation(setup, max_length, layout, count, count), update)


def ppo_micro_batch(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> PPOInputs:
    """Makes completions of different prompts, for the rollout and for the update (PPO)."""
    scored = min(setup.local_rollout_forward_batch_size, setup.completions_per_generation)
    rollout, batch = (
        _samples(setup, max_length, layout, count, 1).batch(layout.name, _PAD)
        for count in (scored, setup.per_device_train_batch_size)
    )
    states = state_batch(batch, torch.zeros(len(batch), dtype=torch.bool))
    zeros = torch.zeros(len(batch.targets))
    return PPOInputs(
        _generation(setup, max_length, layout, scored, scored),
        rollout,
        state_batch(rollout, torch.zeros(len(rollout), dtype=torch.bool)),
        PPOUpdate(batch, ppo_loss_inputs(zeros, torch.ones_like(zeros)), states, zeros, zeros),
    )


def _pair(setup: TrainingSetup, max_length: int, layout: PlannedLayout) -> tuple[list[int], list[list[int]]]:
    """Makes a prompt and two completions of it."""
    prompt = _with_images([_PROMPT] * setup.prompt_tokens(max_length), setup, layout)
    return prompt, [[token] * (max_length - len(prompt)) for token in (_CHOSEN, _REJECTED)]


def _with_images(ids: list[int], setup: TrainingSetup, layout: PlannedLayout) -> list[int]:
    """Puts the images' tokens in the place of as many of a prompt's; the first one or two stay text."""
    if layout.images is None:
        return ids
    count = setup.image_tokens
    first = min(2, max(1, len(ids) - count - 1))
    return [*ids[:first], *[layout.images.image_token_id] * count, *ids[first + count :]]


def _prompt_tokens(setup: TrainingSetup, max_length: int) -> int:
    """Returns how long the prompt of a sampled completion is: a token at least, and one is left for the completion."""
    return min(max(1, setup.prompt_tokens(max_length)), max_length - 1)


def _samples(setup: TrainingSetup, max_length: int, layout: PlannedLayout, count: int, group: int) -> Samples:
    """Makes so many completions, `group` of each prompt; none begins as another one of its prompt does."""
    prompts = [_prompt(setup, max_length, layout, index // group) for index in range(count)]
    length = max_length - len(prompts[0])
    samples = Samples.of(prompts, [_text(setup, layout, index, _CHOSEN, length) for index in range(count)])
    if layout.images is not None:
        inputs = {str(number): image for number, image in enumerate(setup.images)}
        samples.images, samples.completion_images = [tuple(inputs)] * count, [()] * count
        samples.image_inputs = inputs
    return samples


def _prompt(setup: TrainingSetup, max_length: int, layout: PlannedLayout, number: int) -> list[int]:
    """Makes the prompt of a number, as long as those of sampled completions are, with its images."""
    length = _prompt_tokens(setup, max_length)
    return _with_images(_text(setup, layout, number, _PROMPT, length), setup, layout)


def _text(setup: TrainingSetup, layout: PlannedLayout, number: int, token: int, length: int) -> list[int]:
    """Makes a text of so many tokens, which differs from those of other numbers in its first token, or in two."""
    vocabulary = setup.config.get_text_config().vocab_size
    if layout.images is None:
        first = [number % vocabulary, number // vocabulary]
    else:
        # None of them stands for an image.
        skipped, words = layout.images.image_token_id, vocabulary - 1
        first = [digit + (digit >= skipped) for digit in (number % words, number // words)]
    return [*first, *[token] * length][:length]


def _generation(
    setup: TrainingSetup, max_length: int, layout: PlannedLayout, prompts: int, completions: int
) -> Generation:
    """Makes so many different prompts, or one for each completion where generation reads them so.

    TRL's always does. Ours does where image tokens attend to the last token of a prompt, which is read apart.
    """
    images = layout.images
    one = _prompt(setup, max_length, layout, 0)
    ends_with_image = images is not None and (images.whole_prompts or one[-1] == images.image_token_id)
    if ends_with_image or setup.system != OURS:
        prompts = completions
    ids = torch.tensor([_prompt(setup, max_length, layout, number) for number in range(prompts)])
    keywords = {} if images is None else image_keywords([setup.images] * prompts, images, ids)
    return Generation(ids, completions, max_length, keywords)
