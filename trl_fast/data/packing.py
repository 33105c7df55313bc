"""Packs token trees into the batch that a model runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .device_transfer import copy_to_device
from .images.inputs import ImageInput
from .images.joining import ImageShape
from .images.layout import ImageLayout
from .segments import TreeLengths, num_tokens, segments_of, sequences_of
from .token_trees import Tree, neighbours_share, shared_prefixes, tree_sequences, truncate_sequences

LAYOUTS = tuple(BATCH_LAYOUTS)
# Fewer tokens are cheaper to compute once more than to attend to apart.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Holds the sequences of some trees, laid out for one forward pass, and the positions that a loss reads.

    Sequences (a prompt followed by one of its branches) are numbered tree after tree, branch after branch: the chosen
    completion of pair i is sequence 2i, the rejected one 2i + 1. S sequences hold N scored tokens, ordered by
    sequence, then by position. A completion's first token is scored too (the last token of the prompt predicts it),
    except where the prompt is empty: there nothing predicts it.

    - `input_ids` (B, T) int64. Packed: B = 1 and T = all tokens; shared_prefix: the same, but a prompt stands once
      before all its branches; padded: B = S, padding on the right.
    - `position_ids` (B, T) int64, counted from 0 in each sequence; (axes, B, T) where the images of a batch make a
      model tell tokens apart by several numbers (M-RoPE).
    - `attention_mask` (B, T) int64, 1 on tokens and 0 on padding; None but in the padded layout.
    - `sequence_lengths`: the lengths of the sequences of the packed row, in order; None in the other layouts.
    - `tree_lengths`: the lengths of the segments of each tree of the row, in order (`data.segments`); None in the
      padded layout. A sequence that shares nothing is a tree of one segment.
    - `score_positions` (N,) int64: index into the flattened (B · T) positions, of the one whose hidden state predicts
      the scored token.
    - `targets` (N,) int64: the scored token's id.
    - `branch` (N,) int64: the sequence that it belongs to.
    - `offset` (N,) int64: its 0-based index in its (truncated) completion; below 0 for a token of the prompt.
    - `branch_lengths` (S,) int64: completion tokens after truncation, also those that nothing predicts.
    - `num_tokens`: tokens of all sequences after truncation; a prompt counts once for each of its branches.
    - `group_sizes`: how many of the N scored tokens belong to each tree, in order.
    - `images`: what the model reads of the batch's images, by keyword of its forward; None where there are none. In a
      row that shares prompts an image stands once for all that continue it.
    - `image_shapes`: of each of these images, in order, what tells it apart from the others.
    - `image_runs`: first and last place + 1 of each run of image tokens in the flattened rows, where these attend to
      each other in both directions; None where they do not.
    - `extras`: tensors that ride along, such as precomputed reference log-probabilities; or batches.

    It answers to the names of fields and extras (`"label" in batch`, `batch["label"]`); a field that is None counts as
    absent. What users' hooks get is a `DictBatch`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    sequence_lengths: tuple[int, ...] | None
    score_positions: torch.Tensor
    targets: torch.Tensor
    branch: torch.Tensor
    offset: torch.Tensor
    branch_lengths: torch.Tensor
    num_tokens: int
    group_sizes: tuple[int, ...] = ()
    tree_lengths: tuple[TreeLengths, ...] | None = None
    images: dict[str, torch.Tensor] | None = None
    image_shapes: tuple[ImageShape, ...] = ()
    image_runs: tuple[tuple[int, int], ...] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sequence_lengths is not None and self.tree_lengths is None:
            object.__setattr__(self, "tree_lengths", tuple((length,) for length in self.sequence_lengths))

    def __len__(self) -> int:
        """Returns the number of sequences S."""
        return len(self.branch_lengths)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the field or extra of that name, or `default`."""
        value = self.extras.get(name, vars(self).get(name))
        return default if value is None else value

    def sequences(self) -> list[torch.Tensor]:
        """Returns the token ids (length,) of each sequence, its prompt included."""
        return self.by_sequence(self.input_ids)

    def by_sequence(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Returns, of values (B, T), those (length,) at the tokens of each sequence, its prompt included."""
        if self.tree_lengths is None:
            assert self.attention_mask is not None  # the padded layout has one
            ends = self.attention_mask.sum(1).tolist()
            return [row[:end] for row, end in zip(values, ends, strict=True)]
        segments = values[0].split([segment.length for segment in segments_of(self.tree_lengths)])
        return [torch.cat([segments[number] for number in path]) for path in sequences_of(self.tree_lengths)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Returns the same batch with every tensor on `device`; on the way to a GPU the host does not wait."""
        return self._map_tensors(lambda tensor: copy_to_device(tensor, device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """Returns the same batch with every tensor in pinned memory (called by torch's DataLoader)."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changes: dict[str, Any] = {
            name: function(value) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        extras = {
            name: value._map_tensors(function) if isinstance(value, TokenBatch) else function(value)
            for name, value in self.extras.items()
        }
        if self.images is not None:
            changes["images"] = {name: function(value) for name, value in self.images.items()}
        return replace(self, **changes, extras=extras)


def pack_trees(
    trees: list[Tree],
    layout: str,
    pad_token_id: int,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    pad_to_multiple_of: int | None = None,
    *,
    compares_tokens: bool = False,
    scores_prompts: bool = False,
    image_layout: ImageLayout | None = None,
) -> TokenBatch:
    """Lays out `trees` as one batch.

    `shared_prefix`: one row without padding, each prompt once and its branches after it. `packed`: one row without
    padding, the sequences one after the other. `padded`: one row a sequence, padded on the right with `pad_token_id`
    to the longest, rounded up to `pad_to_multiple_of`. Truncation comes first (`truncate_sequences`); all layouts
    score the same tokens in the same order.

    compares_tokens: whether sequences also share what they begin alike with where the trees do not say so, such as the
    system message of different prompts, or the first tokens of two completions.

    scores_prompts: whether the prompt of a tree is scored too, with its first branch.

    image_layout: how the model wants to have images; needed where the trees have some.

    Raises ValueError for an unknown layout or truncation mode, for `pad_to_multiple_of` in a layout that has no
    padding, and for a `max_length` that cuts an image.
    """
    _check_layout(layout, pad_to_multiple_of)
    groups = [truncate_sequences(tree_sequences(tree), max_length, truncation_mode) for tree in trees]
    sequences = [sequence for group in groups for sequence in group]
    ids = [sequence.ids for sequence in sequences]
    shared = neighbours_share(ids) if compares_tokens else [sequence.shared for sequence in sequences]
    images = None
    if image_layout is not None:
        ends = [each.start for each in sequences]
        images = SequenceImages([each.images for each in sequences], image_layout, ends)
    rows = lay_out(ids, layout, pad_token_id, pad_to_multiple_of, shared, images)
    # Nothing predicts the first token of a sequence.
    firsts = [
        1 if scores_prompts and number == 0 else max(each.start, 1)
        for group in groups
        for number, each in enumerate(group)
    ]
    scored = [range(first, len(tokens)) for first, tokens in zip(firsts, ids, strict=True)]
    targets = [tokens[first:] for first, tokens in zip(firsts, ids, strict=True)]
    sizes = iter(map(len, scored))
    return TokenBatch(
        **rows.fields,
        **rows.scored_tokens(scored, targets, [sequence.start for sequence in sequences]),
        branch_lengths=_int64([len(tokens) - start for tokens, start, *_ in sequences]),
        num_tokens=sum(map(len, ids)),
        group_sizes=tuple(sum(islice(sizes, len(group))) for group in groups),
    )


def _check_layout(layout: str, pad_to_multiple_of: int | None) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; expected one of {', '.join(LAYOUTS)}.")
    if pad_to_multiple_of is not None and not BATCH_LAYOUTS[layout].pads:
        raise ValueError(
            f"pad_to_multiple_of={pad_to_multiple_of} has no meaning in the {layout} layout, which pads nothing; "
            "leave it None or use the padded layout."
        )


class SequenceImages(NamedTuple):
    """Holds the images `of` each of S sequences, in the order of their tokens, and how a model wants to have them.

    prompts: how many tokens the prompt of each sequence has; needed where the layout has whole prompts.
    """

    of: Sequence[Sequence[ImageInput]]
    layout: ImageLayout
    prompts: Sequence[int] | None = None


@dataclass(frozen=True)
class LaidOutRows:
    """Holds the rows of a layout: fields of a `TokenBatch`, and where the tokens of each of S sequences are.

    places: S vectors (length,) int64, indices into the flattened positions of the rows.
    """

    fields: dict[str, Any]
    places: list[torch.Tensor]

    def scored_tokens(
        self, scored: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> dict[str, Any]:
        """Returns the fields of a `TokenBatch` that tell of the N scored tokens.

        Args:
            scored: the indices of the scored tokens of each sequence; none of them is 0, which nothing predicts.
            targets: their ids.
            firsts: where each sequence's completion begins.
        """
        indices = [torch.as_tensor(each, dtype=torch.int64) for each in scored]
        # Predicted by the token before it, wherever in the row that is.
        predictors = [places[each - 1] for places, each in zip(self.places, indices, strict=True)]
        offsets = [each - start for each, start in zip(indices, firsts, strict=True)]
        return {
            "score_positions": torch.cat(predictors or [_int64([])]),
            "targets": _int64([target for each in targets for target in each]),
            "branch": torch.arange(len(indices)).repeat_interleave(_int64([len(each) for each in indices])),
            "offset": torch.cat(offsets or [_int64([])]),
        }


def lay_out(
    sequences: Sequence[Sequence[int]],
    layout: str,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    shared: Sequence[int],
    images: SequenceImages | None = None,
) -> LaidOutRows:
    """Lays out S sequences of token ids.

    shared: (S,), how many of its first tokens each sequence has in common with the one before it; read where the
    layout shares them. images: those of the sequences; None: they have none.

    Raises ValueError where a sequence has not the tokens of its images.
    """
    if images is not None:
        shared = images.layout.limit_shared(sequences, images.of, shared, images.prompts)
    lengths = [len(ids) for ids in sequences]
    trees: tuple[TreeLengths, ...] | None = None
    if BATCH_LAYOUTS[layout].pads:
        width = _round_up(max(lengths, default=0), pad_to_multiple_of)
        shape = (len(lengths), width)
        places = [torch.arange(length) + row * width for row, length in enumerate(lengths)]
    else:
        shares = BATCH_LAYOUTS[layout].shares_prompts
        trees = shared_prefixes(lengths, shared if shares else [0] * len(lengths), MIN_SHARED_TOKENS)
        shape = (1, sum(map(num_tokens, trees)))
        places = _row_places(trees)
    # A token that several sequences share is written by each of them, the same.
    input_ids = torch.full((shape[0] * shape[1],), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    positions = torch.arange(shape[1]).repeat(shape[0])
    for ids, place in zip(sequences, places, strict=True):
        input_ids[place] = torch.as_tensor(ids, dtype=torch.int64)
        positions[place] = torch.arange(len(place))
        mask[place] = 1
    fields = {
        "input_ids": input_ids.view(shape),
        "position_ids": positions.view(shape),
        "attention_mask": mask.view(shape) if trees is None else None,
        "sequence_lengths": None if trees is None or BATCH_LAYOUTS[layout].shares_prompts else tuple(lengths),
        "tree_lengths": trees,
    }
    if images is not None:
        fields |= images.layout.fields(sequences, images.of, places, shape, images.prompts)
    return LaidOutRows(fields, places)


def _row_places(trees: tuple[TreeLengths, ...]) -> list[torch.Tensor]:
    """Returns where in a row of trees the tokens of each sequence are, vectors (length,) int64."""
    parts = [torch.arange(segment.start, segment.end) for segment in segments_of(trees)]
    return [torch.cat([parts[number] for number in path]) for path in sequences_of(trees)]


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _int64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
