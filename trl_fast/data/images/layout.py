"""Tells where images stand in the rows of a batch, and what a model is told of them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from .inputs import ImageInput
from .joining import ImageShape, join_images, split_images

# From the token ids of a sequence and its images to the positions (axes, length) of its tokens.
Positions = Callable[[list[int], Sequence[ImageInput]], torch.Tensor]


@dataclass(frozen=True)
class ImageLayout:
    """Describes what a model wants to know of images in a batch.

    - `image_token_id`: the token that stands for a part of an image.
    - `type_names`: the keywords under which its forward takes the types of tokens (B, T), see `types_of`.
    - `positions`: gives the positions of a sequence where they have several axes (M-RoPE); None: 0, 1, 2 …
    - `sees_both_ways`: whether the tokens of an image attend to each other in both directions.
    - `whole_prompts`: whether all tokens of a prompt with images do so too, not only those of images (PaliGemma).
    """

    image_token_id: int
    type_names: tuple[str, ...] = ()
    positions: Positions | None = None
    sees_both_ways: bool = False
    whole_prompts: bool = False

    def limit_shared(
        self,
        sequences: Sequence[Sequence[int]],
        images: Sequence[Sequence[ImageInput]],
        shared: Sequence[int],
        prompts: Sequence[int] | None,
    ) -> list[int]:
        """Returns how many first tokens each of S sequences has in common with the one before it, images included.

        The tokens of different images are the same. Images side by side that see each other are shared together.

        shared: (S,), how many token ids they have in common. prompts: as in `fields`.
        """
        found = [*shared]
        for index in range(1, len(found)):
            same = map(ImageInput.is_same, images[index - 1], images[index])
            equal = next((number for number, each in enumerate(same) if not each), len(images[index]))
            if equal < len(images[index]):
                tokens = (torch.as_tensor(sequences[index]) == self.image_token_id).nonzero().flatten()
                first = sum(image.num_tokens for image in images[index][:equal])
                found[index] = min(found[index], int(tokens[first]))
            if self.whole_prompts:
                ends = [self._end_of_run(prompts, images, each) for each in (index - 1, index)]
                found[index] = found[index] if max(ends) <= found[index] and ends[0] == ends[1] else 0
            elif self.sees_both_ways:
                found[index] = self._before_run(sequences[index - 1 : index + 1], found[index])
        return found

    def _before_run(self, neighbours: Sequence[Sequence[int]], shared: int) -> int:
        """Returns where image tokens begin that go on behind the first `shared` tokens of one of two sequences.

        They attend to what stands there, which the two sequences do not have in common.
        """
        goes_on = any(ids[shared] == self.image_token_id for ids in neighbours if shared < len(ids))
        while goes_on and shared and neighbours[0][shared - 1] == self.image_token_id:
            shared -= 1
        return shared

    def fields(
        self,
        sequences: Sequence[Sequence[int]],
        images: Sequence[Sequence[ImageInput]],
        places: Sequence[torch.Tensor],
        shape: tuple[int, int],
        prompts: Sequence[int] | None,
    ) -> dict[str, Any]:
        """Returns the fields of a `TokenBatch` that tell of images; none where there are no images, or types alone.

        An image whose first token has the same place in several sequences stands once in the batch.

        Args:
            sequences: the token ids of each of S sequences.
            images: the images of each, in the order of their tokens.
            places: the indices of each one's tokens into the flattened rows, (length,) int64.
            shape: of the rows, (B, T).
            prompts: how many tokens the prompt of each has; None serves where those of whole prompts do not count.

        Raises:
            ValueError: a sequence has more or fewer image tokens than its images have.
        """
        standing = [torch.as_tensor(ids, dtype=torch.int64) == self.image_token_id for ids in sequences]
        for marks, own in zip(standing, images, strict=True):
            _check_tokens(int(marks.sum()), own)
        if not any(images):
            # Without types of tokens, PaliGemma would let text see what follows it.
            types = self.types_of(torch.zeros(shape, dtype=torch.bool))
            return {"images": types} if self.whole_prompts else {}
        at: dict[int, ImageInput] = {}
        marked = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        runs: set[tuple[int, int]] = set()
        for number, (marks, own, place) in enumerate(zip(standing, images, places, strict=True)):
            tokens = place[marks]
            firsts = accumulate((image.num_tokens for image in own[:-1]), initial=0)
            at.update(zip(tokens[[*firsts]].tolist() if own else [], own, strict=True))
            seen = place[: self._end_of_run(prompts, images, number)] if self.whole_prompts else tokens
            marked[seen] = True
            runs.update(_runs(seen))
        ordered = [at[place] for place in sorted(at)]
        return {
            "images": join_images(ordered) | self.types_of(marked.view(shape)),
            "image_shapes": tuple(ImageShape.of(image) for image in ordered),
            "image_runs": tuple(sorted(runs)) if self.sees_both_ways else None,
            **self._positions(sequences, images, places, shape),
        }

    def by_sequence(
        self,
        sequences: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        joined: Mapping[str, torch.Tensor],
        shapes: Sequence[ImageShape],
    ) -> list[tuple[ImageInput, ...]]:
        """Returns the images of each of S sequences of a batch, in the order of their tokens.

        Args:
            sequences: the token ids of each, (length,).
            places: the indices of its tokens into the flattened rows, (length,).
            joined, shapes: the images of the batch, `TokenBatch.images` and `image_shapes`.
        """
        if not shapes:
            return [()] * len(sequences)
        images = split_images({name: each for name, each in joined.items() if name not in self.type_names}, shapes)
        tokens = [place[ids == self.image_token_id] for ids, place in zip(sequences, places, strict=True)]
        ordered = torch.cat(tokens).unique()
        firsts = accumulate((shape.num_tokens for shape in shapes[:-1]), initial=0)
        at = dict(zip(ordered[[*firsts]].tolist(), images, strict=True))
        return [tuple(at[place] for place in each.tolist() if place in at) for each in tokens]

    @staticmethod
    def _end_of_run(prompts: Sequence[int] | None, images: Sequence[Sequence[ImageInput]], number: int) -> int:
        """Returns how many first tokens of a sequence see each other where those of whole prompts with images do."""
        if prompts is None:
            raise ValueError("The tokens of a prompt with images see each other in this model: prompts must be given")
        return prompts[number] if images[number] else 0

    def marked_tokens(self, input_ids: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """Returns which tokens (B, T) of rows are those of images, or of whole prompts: bool.

        prompts: how many first tokens of each row, pads too, are a prompt with images; 0 if it has no images.
        """
        if not self.whole_prompts:
            return input_ids == self.image_token_id
        ends = torch.tensor(prompts, device=input_ids.device)
        return torch.arange(input_ids.shape[1], device=input_ids.device) < ends[:, None]

    def types_of(self, marked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the types of tokens for the model's forward, int64 by keyword, 1 on marked ones (B, T) and else 0.

        Whole prompts: 0 on marked ones and else 1.
        """
        return dict.fromkeys(self.type_names, (marked ^ self.whole_prompts).long())

    def _positions(
        self,
        sequences: Sequence[Sequence[int]],
        images: Sequence[Sequence[ImageInput]],
        places: Sequence[torch.Tensor],
        shape: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        if self.positions is None:
            return {}
        found = [self.positions([*ids], own) for ids, own in zip(sequences, images, strict=True)]
        # Padding keeps position 0: nothing reads it.
        flat = torch.zeros(len(found[0]), shape[0] * shape[1], dtype=torch.int64)
        for positions, place in zip(found, places, strict=True):
            flat[:, place] = positions
        return {"position_ids": flat.view(-1, *shape)}


def _check_tokens(found: int, images: Sequence[ImageInput]) -> None:
    expected = sum(image.num_tokens for image in images)
    if found != expected:
        raise ValueError(
            f"A sequence has {found} image tokens, but its {len(images)} images have {expected}; if max_length cuts "
            "them, raise it, and if rows lost their column of images on the way, keep it"
        )


def _runs(places: torch.Tensor) -> list[tuple[int, int]]:
    """Returns start and end of each run of neighbouring places (n,)."""
    if not len(places):
        return []
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in places.tensor_split(breaks)]
