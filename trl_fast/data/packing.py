"""Packs token trees into the batch that a model runs on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .device_transfer import copy_to_device
from .token_trees import Tree, truncate_tree

LAYOUTS = tuple(BATCH_LAYOUTS)
# A shorter prompt is cheaper to compute once more than to attend to apart.
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
    - `position_ids` (B, T) int64, counted from 0 in each sequence.
    - `attention_mask` (B, T) int64, 1 on tokens and 0 on padding; None but in the padded layout.
    - `sequence_lengths`: the lengths of the sequences of the packed row, in order; None in the other layouts.
    - `tree_lengths`: the lengths of the segments (prompt, then branches) of each tree of the row, in order; None in
      the padded layout. A sequence that shares nothing is a tree of one segment.
    - `score_positions` (N,) int64: index into the flattened (B · T) positions, of the one whose hidden state predicts
      the scored token.
    - `targets` (N,) int64: the scored token's id.
    - `branch` (N,) int64: the sequence that it belongs to.
    - `offset` (N,) int64: its 0-based index in its (truncated) completion.
    - `branch_lengths` (S,) int64: completion tokens after truncation, also those that nothing predicts.
    - `num_tokens`: tokens of all sequences after truncation; a prompt counts once for each of its branches.
    - `group_sizes`: how many of the N scored tokens belong to each tree, in order.
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
    tree_lengths: tuple[tuple[int, ...], ...] | None = None
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
        found = []
        trees = values[0].split([*map(sum, self.tree_lengths)])
        for tree, lengths in zip(trees, self.tree_lengths, strict=True):
            prompt, *branches = tree.split(list(lengths))
            found += [torch.cat((prompt, branch)) for branch in branches] or [prompt]
        return found

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenBatch":
        """Returns the same batch with every tensor on `device`; on the way to a GPU the host does not wait."""
        return self._map_tensors(lambda tensor: copy_to_device(tensor, device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenBatch":
        """Returns the same batch with every tensor in pinned memory (called by torch's DataLoader)."""
        return self._map_tensors(torch.Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenBatch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changes: dict[str, Any] = {
            name: function(value) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        extras = {
            name: value._map_tensors(function) if isinstance(value, TokenBatch) else function(value)
            for name, value in self.extras.items()
        }
        return replace(self, **changes, extras=extras)


def pack_trees(
    trees: list[Tree],
    layout: str,
    pad_token_id: int,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    pad_to_multiple_of: int | None = None,
) -> TokenBatch:
    """Lays out `trees` as one batch.

    `shared_prefix`: one row without padding, each prompt once and its branches after it. `packed`: one row without
    padding, the sequences one after the other. `padded`: one row a sequence, padded on the right with `pad_token_id`
    to the longest, rounded up to `pad_to_multiple_of`. Truncation comes first (`truncate_tree`); all layouts score the
    same tokens in the same order.

    Raises ValueError for an unknown layout or truncation mode, and for `pad_to_multiple_of` in a layout that has no
    padding.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; expected one of {', '.join(LAYOUTS)}.")
    if pad_to_multiple_of is not None and not BATCH_LAYOUTS[layout].pads:
        raise ValueError(
            f"pad_to_multiple_of={pad_to_multiple_of} has no meaning in the {layout} layout, which pads nothing; "
            "leave it None or use the padded layout."
        )
    cut = [truncate_tree(tree, max_length, truncation_mode) for tree in trees]
    groups = [[(tree.prompt_ids, branch) for tree in parts for branch in tree.branches] for parts in cut]
    sequences = [sequence for group in groups for sequence in group]
    lengths = [len(prompt_ids) + len(branch) for prompt_ids, branch in sequences]
    if BATCH_LAYOUTS[layout].shares_prompts:
        inputs, places = _shared_inputs([tree for parts in cut for tree in parts])
    elif BATCH_LAYOUTS[layout].pads:
        width = _round_up(max(lengths, default=0), pad_to_multiple_of)
        places = _whole_places([index * width for index in range(len(lengths))], sequences)
        inputs = _padded_inputs(sequences, lengths, width, pad_token_id)
    else:
        places = _whole_places([0, *accumulate(lengths)], sequences)
        inputs = _packed_inputs(sequences, lengths)
    sizes = tuple(sum(len(completion[_first_scored(prompt) :]) for prompt, completion in group) for group in groups)
    return TokenBatch(**inputs, **_scored_tokens(sequences, places), num_tokens=sum(lengths), group_sizes=sizes)


class _Place(NamedTuple):
    """Holds where the prompt and the completion of a sequence start among the flattened positions."""

    prompt: int
    completion: int


def _whole_places(firsts: Iterable[int], sequences: list[tuple[list[int], list[int]]]) -> list[_Place]:
    """Returns the places of sequences whose completions stand right after their prompts."""
    return [_Place(first, first + len(prompt)) for first, (prompt, _) in zip(firsts, sequences, strict=False)]


def _shared_inputs(trees: list[Tree]) -> tuple[dict[str, Any], list[_Place]]:
    input_ids: list[int] = []
    positions: list[int] = []
    tree_lengths: list[tuple[int, ...]] = []
    places: list[_Place] = []
    for tree in trees:
        prompt = tree.prompt_ids
        if len(prompt) < MIN_SHARED_TOKENS or len(tree.branches) < 2:
            for branch in tree.branches:
                places.append(_Place(len(input_ids), len(input_ids) + len(prompt)))
                input_ids += prompt + branch
                positions += range(len(prompt) + len(branch))
                tree_lengths.append((len(prompt) + len(branch),))
            continue
        start = len(input_ids)
        input_ids += prompt
        positions += range(len(prompt))
        for branch in tree.branches:
            places.append(_Place(start, len(input_ids)))
            input_ids += branch
            positions += range(len(prompt), len(prompt) + len(branch))
        tree_lengths.append((len(prompt), *map(len, tree.branches)))
    inputs = {
        "input_ids": _int64(input_ids)[None],
        "position_ids": _int64(positions)[None],
        "attention_mask": None,
        "sequence_lengths": None,
        "tree_lengths": tuple(tree_lengths),
    }
    return inputs, places


def _packed_inputs(sequences: list[tuple[list[int], list[int]]], lengths: list[int]) -> dict[str, Any]:
    positions = [torch.arange(length) for length in lengths]
    return {
        "input_ids": _int64([token for sequence in sequences for part in sequence for token in part])[None],
        "position_ids": torch.cat(positions or [_int64([])])[None],
        "attention_mask": None,
        "sequence_lengths": tuple(lengths),
    }


def _padded_inputs(
    sequences: list[tuple[list[int], list[int]]], lengths: list[int], width: int, pad_token_id: int
) -> dict[str, Any]:
    rows = [prompt + branch + [pad_token_id] * (width - len(prompt) - len(branch)) for prompt, branch in sequences]
    positions = torch.arange(width).expand(len(rows), width)
    return {
        "input_ids": _int64(rows).reshape(len(rows), width),
        "position_ids": positions.contiguous(),
        "attention_mask": (positions < _int64(lengths)[:, None]).long(),
        "sequence_lengths": None,
    }


def _scored_tokens(sequences: list[tuple[list[int], list[int]]], places: list[_Place]) -> dict[str, Any]:
    score_positions: list[int] = []
    targets: list[int] = []
    branch: list[int] = []
    offset: list[int] = []
    for index, ((prompt_ids, completion), place) in enumerate(zip(sequences, places, strict=True)):
        first = _first_scored(prompt_ids)
        scored = completion[first:]
        targets += scored
        branch += [index] * len(scored)
        offset += range(first, first + len(scored))
        if scored and prompt_ids:
            score_positions.append(place.prompt + len(prompt_ids) - 1)
        inside = len(scored) - (1 if prompt_ids else 0)
        score_positions += range(place.completion, place.completion + inside)
    return {
        "score_positions": _int64(score_positions),
        "targets": _int64(targets),
        "branch": _int64(branch),
        "offset": _int64(offset),
        "branch_lengths": _int64([len(completion) for _, completion in sequences]),
    }


def _first_scored(prompt_ids: list[int]) -> int:
    """Returns the index of the first completion token that a token before it predicts."""
    return 0 if prompt_ids else 1


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _int64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
