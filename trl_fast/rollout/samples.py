"""Holds completions with what a policy loss reads about them, and makes the batches that a model scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, TypeVar

import torch

from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.packing import TokenBatch, pack_trees
from trl_fast.data.token_trees import Tree

from .images import PromptImages

AnySamples = TypeVar("AnySamples", bound="Samples")

# Fields that hold one vector a completion, as long as it is.
TOKEN_FIELDS = ("mask", "old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_ratios")


@dataclass
class Samples:
    """Holds S completions, those of one prompt next to each other where sharing is to pay.

    - `prompt_ids`, `completion_ids`: token ids by completion, none of them empty.
    - `advantages` (S,) float32, on the CPU.
    - `excluded` (S,) bool: completions of which no token counts, because they were cut off.
    - `generation_tokens`: tokens that count in the whole generation, a process's share; 0 until it is known.
    - `widths`: tokens of the longest prompt and of the longest completion of this process's generation.
    - `images`, `completion_images`: digests of the images of each prompt and completion, in the order of their tokens;
      None: the run has none. `image_inputs`: what the model reads of them, by digest.
    - the others: one float32 vector (length,) a completion, on the CPU, or None. `losses.loss_inputs` says what
      they are.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    advantages: torch.Tensor
    excluded: torch.Tensor
    generation_tokens: float = 0.0
    widths: tuple[int, int] = (0, 0)
    mask: list[torch.Tensor] | None = None
    old_logprobs: list[torch.Tensor] | None = None
    ref_logprobs: list[torch.Tensor] | None = None
    sampling_logprobs: list[torch.Tensor] | None = None
    importance_ratios: list[torch.Tensor] | None = None
    images: list[tuple[str, ...]] | None = None
    completion_images: list[tuple[str, ...]] | None = None
    image_inputs: dict[str, ImageInput] | None = None

    @classmethod
    def of(cls: type[AnySamples], prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> AnySamples:
        """Returns completions of which nothing else is known."""
        count = len(prompt_ids)
        widths = max(map(len, prompt_ids), default=0), max(map(len, completion_ids), default=0)
        return cls(prompt_ids, completion_ids, torch.zeros(count), torch.zeros(count, dtype=torch.bool), widths=widths)

    @classmethod
    def joined(cls: type[AnySamples], parts: Sequence[AnySamples]) -> AnySamples:
        """Returns the completions of all parts, one after the other; the parts are of one generation."""
        values: dict[str, Any] = {"generation_tokens": parts[0].generation_tokens}
        for item in fields(cls):
            found = [getattr(part, item.name) for part in parts]
            if isinstance(found[0], torch.Tensor):
                values[item.name] = torch.cat(found)
            elif isinstance(found[0], list):
                values[item.name] = [value for part in found for value in part]
            elif isinstance(found[0], dict):
                values[item.name] = {name: value for part in found for name, value in part.items()}
        lists = values["prompt_ids"], values["completion_ids"]
        return cls(**values, widths=(max(map(len, lists[0])), max(map(len, lists[1]))))

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> torch.Tensor:
        """Returns how many tokens of each completion count, (S,) float32."""
        if self.mask is None:
            lengths = torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.float32)
        else:
            lengths = torch.stack([mask.sum() for mask in self.mask])
        return lengths.masked_fill(self.excluded, 0.0)

    def select(self: AnySamples, indices: Iterable[int]) -> AnySamples:
        """Returns the completions of these numbers, in this order."""
        indices = list(indices)
        values = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                value = value[indices]
            elif isinstance(value, list):
                value = [value[index] for index in indices]
            values[item.name] = value
        return type(self)(**values)

    def grouped(self, order: Sequence[int]) -> list[int]:
        """Returns `order` with the completions of one prompt brought together, each prompt where it first stands."""
        first: dict[tuple, int] = {}
        for place, index in enumerate(order):
            first.setdefault(self.prompt(index), place)
        return sorted(order, key=lambda index: first[self.prompt(index)])

    def by_beginning(self, indices: Iterable[int]) -> list[int]:
        """Returns `indices` with prompts and completions that begin alike next to each other, as a batch shares them.

        The answer does not depend on the order of `indices`, but for completions that are the same.
        """
        return sorted(indices, key=lambda index: (*self.prompt(index), self.completion_ids[index]))

    def prompt(self, index: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Returns the tokens and the images of a completion's prompt, which are the same in its whole group."""
        return tuple(self.prompt_ids[index]), () if self.images is None else self.images[index]

    def add_images(self, images: PromptImages | None, completion_images: PromptImages | None) -> None:
        """Adds the images of prompts and completions; None: there are none.

        All processes call this in a run with images, so that completions can change the process.
        """
        nothing: PromptImages = [()] * len(self)
        parts = [nothing if part is None else part for part in (images, completion_images)]
        self.images, self.completion_images = ([tuple(each.digest for each in own) for own in part] for part in parts)
        self.image_inputs = {each.digest: each.inputs for part in parts for own in part for each in own}

    def inputs_of(self, digests: Iterable[str]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of images."""
        inputs = self.image_inputs or {}
        return tuple(inputs[digest] for digest in digests)

    def all_images(self) -> list[tuple[ImageInput, ...]]:
        """Returns what the model reads of the images of each prompt with its completion, in order."""
        if self.images is None or self.completion_images is None:
            return [()] * len(self)
        pairs = zip(self.images, self.completion_images, strict=True)
        return [self.inputs_of(own + given) for own, given in pairs]

    def without_other_images(self: AnySamples) -> AnySamples:
        """Returns the same completions with what the model reads of their own images only."""
        if self.image_inputs is None:
            return self
        own = {digest for part in (self.images, self.completion_images) for each in part or () for digest in each}
        return replace(self, image_inputs={digest: self.image_inputs[digest] for digest in sorted(own)})

    def flat(self, name: str) -> torch.Tensor | None:
        """Returns a field of TOKEN_FIELDS as one vector (N,) in the order of the completions."""
        vectors = getattr(self, name)
        return None if vectors is None else torch.cat(vectors)

    def flat_fields(self) -> dict[str, torch.Tensor | None]:
        """Returns the fields of TOKEN_FIELDS by name, each as one vector (N,) float32, None where it is unknown."""
        vectors = {name: getattr(self, name) for name in TOKEN_FIELDS}
        return {name: None if parts is None else torch.cat(parts) for name, parts in vectors.items()}

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Splits values (N,) by completion: the reverse of `flat`."""
        return list(values.split([len(ids) for ids in self.completion_ids]))

    def places_of(self, indices: Iterable[int]) -> torch.Tensor:
        """Returns the places (M,) int64 of the tokens of these completions among those of all."""
        lengths = [len(ids) for ids in self.completion_ids]
        places = torch.arange(sum(lengths)).split(lengths)
        return torch.cat([places[index] for index in indices])

    def batch(
        self,
        layout: str,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        image_layout: ImageLayout | None = None,
    ) -> TokenBatch:
        """Returns the batch that scores every completion token: a tree for each run of completions of one prompt.

        In a layout that shares prompts, what else neighbours begin alike with is shared too: the system message of
        different prompts, the first turns of completions that call tools.
        """
        trees = [
            Tree(list(ids), [self._branch(index) for index in run], self.inputs_of(images))
            for (ids, images), run in groupby(range(len(self)), key=self.prompt)
        ]
        return pack_trees(
            *(trees, layout, pad_token_id),
            pad_to_multiple_of=pad_to_multiple_of,
            compares_tokens=True,
            image_layout=image_layout,
        )

    def _branch(self, index: int) -> list[int] | Tree:
        ids = self.completion_ids[index]
        images = () if self.completion_images is None else self.completion_images[index]
        return Tree(ids, [[]], self.inputs_of(images)) if images else ids
