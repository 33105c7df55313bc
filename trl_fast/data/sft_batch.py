"""Makes batches of labelled token sequences: those of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, PADDED

from .dict_batch import DictCollator, check_entries
from .images.row_images import RowImages
from .packing import SequenceImages, TokenBatch, lay_out
from .padded_rows import pad
from .tensor_collator import TensorCollator
from .token_trees import neighbours_share

IGNORED = -100

_LABELLED = ("input_ids", "labels", "attention_mask", "position_ids")
_PADDED_ENTRIES = _LABELLED[:3]
# What collators for flattened rows say beside the position ids, which tell the same.
_DERIVED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_FLATTENED_ENTRIES = ("input_ids", "labels", "position_ids", *_DERIVED)


def labelled_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> TokenBatch:
    """Returns the batch of sequences whose labelled tokens are scored.

    A token is scored if its label is not -100 and a token of its own sequence stands before it; the label is what is
    predicted. With an `attention_mask` (or neither) it is the padded layout: a row a sequence. With `position_ids`
    alone it is the packed one: a single row, where each 0 starts another sequence. The labels stay in `extras`.

    Args:
        input_ids, labels: (B, T) int64.
        attention_mask: (B, T), 1 on tokens, 0 on padding.
        position_ids: (B, T) int64; counted from 0 in every row where they are not given.

    Raises ValueError for several rows with position ids but no mask.
    """
    packed = attention_mask is None and position_ids is not None
    if packed and len(input_ids) != 1:
        raise ValueError(
            f"position_ids without an attention_mask mean one row of sequences, but there are {len(input_ids)} rows; "
            "expected an attention_mask, or a single row."
        )
    width, device = input_ids.shape[1], input_ids.device
    places = torch.arange(width, device=device).expand_as(input_ids)
    if position_ids is None:
        position_ids = places.contiguous()
    if packed:
        lengths = _cu_seqlens(position_ids[0]).diff()
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    else:
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = attention_mask.sum(dim=1)
        sequence = torch.arange(len(input_ids), device=device).repeat_interleave(width)
    first = (position_ids if packed else places) == 0
    scored = ((labels != IGNORED) & ~first).flatten().nonzero().flatten()
    return TokenBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        sequence_lengths=tuple(lengths.tolist()) if packed else None,
        score_positions=scored - 1,
        targets=labels.flatten()[scored],
        branch=sequence[scored],
        offset=position_ids.flatten()[scored],
        branch_lengths=lengths,
        num_tokens=int(lengths.sum()),
        extras={"labels": labels},
    )


def pack_labelled(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    layout: str,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    images: SequenceImages | None = None,
) -> TokenBatch:
    """Lays out sequences of (token ids, labels) as one batch; labels of -100 mark tokens that are not learned.

    `padded`: a row a sequence, padded on the right to the longest one, or to the next multiple of
    `pad_to_multiple_of`. `packed`: one row, the sequences one after the other; padding up to a multiple then consists
    of sequences of one token. `shared_prefix`: one row, what neighbours begin alike with once; `extras` has no labels.

    images: those of the sequences; None: they have none.

    Raises ValueError for an unknown layout, where a sequence has more or fewer labels than tokens, and where it does
    not have the tokens of its images.
    """
    if layout not in BATCH_LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; expected one of {', '.join(BATCH_LAYOUTS)}.")
    for index, (ids, labels) in enumerate(sequences):
        if len(ids) != len(labels):
            raise ValueError(f"Sequence {index} of the batch has {len(ids)} tokens and {len(labels)} labels.")
    if BATCH_LAYOUTS[layout].shares_prompts or (images is not None and any(images.of)):
        return _laid_out_batch(sequences, layout, pad_token_id, pad_to_multiple_of, images)
    input_ids = [_int64(ids) for ids, _ in sequences]
    targets = [_int64(labels) for _, labels in sequences]
    if BATCH_LAYOUTS[layout].pads:
        mask = [torch.ones_like(ids) for ids in input_ids]
        return labelled_batch(
            pad(input_ids, pad_token_id, pad_to_multiple_of),
            pad(targets, IGNORED, pad_to_multiple_of),
            attention_mask=pad(mask, 0, pad_to_multiple_of),
        )
    positions = torch.cat([torch.arange(len(ids)) for ids in input_ids])
    return labelled_batch(
        pad([torch.cat(input_ids)], pad_token_id, pad_to_multiple_of),
        pad([torch.cat(targets)], IGNORED, pad_to_multiple_of),
        position_ids=pad([positions], 0, pad_to_multiple_of),
    )


def _laid_out_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    layout: str,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    images: SequenceImages | None,
) -> TokenBatch:
    """Lays out sequences of (token ids, labels) that may have images or share what neighbours begin alike with."""
    ids, labels = [ids for ids, _ in sequences], [_int64(labels) for _, labels in sequences]
    shares = BATCH_LAYOUTS[layout].shares_prompts
    shared = neighbours_share(ids) if shares else [0] * len(ids)
    rows = lay_out(ids, layout, pad_token_id, pad_to_multiple_of, shared, images)
    # Nothing predicts the first token of a sequence.
    scored = [((each[1:] != IGNORED).nonzero().flatten() + 1).tolist() for each in labels]
    targets = [each[places].tolist() for each, places in zip(labels, scored, strict=True)]
    lengths = [len(each) for each in ids]
    whole = labels if BATCH_LAYOUTS[layout].pads else [torch.cat(labels)]
    return TokenBatch(
        **rows.fields,
        **rows.scored_tokens(scored, targets, [0] * len(ids)),
        branch_lengths=_int64(lengths),
        num_tokens=sum(lengths),
        extras={} if shares else {"labels": pad(whole, IGNORED, pad_to_multiple_of)},
    )


def join_beginnings(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], images: SequenceImages | None = None
) -> tuple[list[tuple[Sequence[int], Sequence[int]]], SequenceImages | None]:
    """Returns sequences of (token ids, labels) without those that the next one begins with: it has their labels too.

    So the model computes their tokens once in every layout, with the same context. A sequence stays where it and the
    next one learn the same token, which counts twice. images: those of the sequences; the answer has those of the
    sequences that stay.
    """
    ids = [ids for ids, _ in sequences]
    shared = neighbours_share(ids)
    if images is not None:
        shared = images.layout.limit_shared(ids, images.of, shared, images.prompts)
    found: list[tuple[Sequence[int], Sequence[int]]] = []
    kept: list[int] = []
    for number, ((ids_here, labels), common) in enumerate(zip(sequences, shared, strict=True)):
        if found and common == len(found[-1][0]):
            before = np.full(len(ids_here), IGNORED)
            before[:common] = found[-1][1]
            if not ((before != IGNORED) & (np.asarray(labels) != IGNORED)).any():
                found[-1] = (ids_here, np.where(before != IGNORED, before, labels).tolist())
                kept[-1] = number
                continue
        found.append((ids_here, labels))
        kept.append(number)
    if images is None:
        return found, None
    prompts = [_first_learned(labels) for _, labels in found]
    return found, images._replace(of=[images.of[number] for number in kept], prompts=prompts)


def sequence_labels(batch: TokenBatch) -> list[torch.Tensor]:
    """Returns the labels (length,) int64 of each sequence of a batch, -100 where a token is not learned."""
    if "labels" in batch.extras:
        return batch.by_sequence(batch.extras["labels"])
    lengths = batch.branch_lengths
    labels = batch.targets.new_full((int(lengths.sum()),), IGNORED)
    labels[(lengths.cumsum(0) - lengths)[batch.branch] + batch.offset] = batch.targets
    return list(labels.split(lengths.tolist()))


def unpacked(
    batch: TokenBatch, pad_token_id: int, multiple: int | None = None, images: RowImages | None = None
) -> TokenBatch:
    """Returns the same sequences in the padded layout, rows rounded up to a `multiple`; images: reads theirs."""
    if batch.tree_lengths is None:
        return batch
    if images is not None and batch.images is not None:
        here = batch.to("cpu")
        parts = zip(here.sequences(), sequence_labels(here), strict=True)
        sequences = [(ids.tolist(), labels.tolist()) for ids, labels in parts]
        prompts = [_first_learned(labels) for _, labels in sequences]
        placed = SequenceImages(images.of_sequences(here), images.layout, prompts)
        return pack_labelled(sequences, PADDED, pad_token_id, multiple, placed).to(batch.input_ids.device)
    ids, labels = batch.sequences(), sequence_labels(batch)
    mask = [torch.ones_like(row) for row in ids]
    rows = (pad(ids, pad_token_id, multiple), pad(labels, IGNORED, multiple))
    return labelled_batch(*rows, attention_mask=pad(mask, 0, multiple))


def _int64(tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64)


def _first_learned(labels: Sequence[int]) -> int:
    """Returns how many tokens stand before the first learned one: the prompt, where completions are learned."""
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _cu_seqlens(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns cumulative lengths (S + 1,) int64 of a row's S sequences; each 0 in `position_ids` (T,) starts one."""
    first = (position_ids == 0).nonzero().flatten()
    return torch.cat((first, first.new_tensor([len(position_ids)])))


def _sequence_lengths(row: dict[str, Any]) -> list[int]:
    """Returns the lengths of the sequences in a row of a packed dataset; other rows are one."""
    lengths = row.get("seq_lengths")
    return [len(row["input_ids"])] if lengths is None else [int(length) for length in lengths]


@dataclass
class LabelledCollator(DictCollator):
    """Collates rows with `input_ids`, and `labels` unless every token is learned, into a batch.

    A row of a packed dataset holds several sequences; its `seq_lengths` tell them apart. The entries are those of
    `DataCollatorForLanguageModeling` with the same `padding_free`; the other arguments are those of `pack_labelled`.

    joins: whether sequences that the next one begins with are learned in it (`join_beginnings`). images: reads those
    of rows; None: they have none.
    """

    pad_token_id: int
    layout: str = PADDED
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    joins: bool = False
    images: RowImages | None = None

    def collate(self, examples: list[dict[str, Any]]) -> TokenBatch:
        sequences, images = [], []
        for row in examples:
            labels, waiting = row.get("labels", row["input_ids"]), self.images.inputs(row) if self.images else ()
            for start, end in pairwise([0, *accumulate(_sequence_lengths(row))]):
                sequences.append((row["input_ids"][start:end], labels[start:end]))
                own = self.images.first_of(waiting, sequences[-1][0]) if self.images else ()
                images.append(own)
                # The turns of a conversation have its first images each, examples that are packed have images of
                # their own.
                waiting = waiting if self.joins else waiting[len(own) :]
        multiple = self.pad_to_multiple_of
        if not self.padding_free:
            multiple = BATCH_LAYOUTS[self.layout].padding_multiple(multiple)
        prompts = [_first_learned(labels) for _, labels in sequences]
        placed = SequenceImages(images, self.images.layout, prompts) if self.images else None
        if not self.joins:
            return pack_labelled(sequences, self.layout, self.pad_token_id, multiple, placed)
        joined, placed = join_beginnings(sequences, placed)
        batch = pack_labelled(joined, self.layout, self.pad_token_id, multiple, placed)
        return replace(batch, num_tokens=sum(len(ids) for ids, _ in sequences))

    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        of_images = self.images.names(batch) if self.images else ()
        return (*(_FLATTENED_ENTRIES if self.padding_free else _PADDED_ENTRIES), *of_images)

    def entries(self, batch: TokenBatch) -> dict[str, Any]:
        parts = zip(batch.sequences(), sequence_labels(batch), strict=True)
        collator = DataCollatorForLanguageModeling(
            self.pad_token_id, padding_free=self.padding_free, pad_to_multiple_of=self.pad_to_multiple_of
        )
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in parts]
        found = collator(rows)
        if self.images is None:
            return found
        prompts = [_first_learned(row["labels"].tolist()) for row in rows]
        return found | self.images.entries(batch, range(len(batch)), found["input_ids"], prompts)

    def token_batch(self, entries: Mapping[str, Any]) -> TokenBatch:
        images = self.images.given(entries) if self.images else {}
        check_entries(entries, {"input_ids", "labels"}, {"attention_mask", "position_ids", *_DERIVED, *images})
        batch = labelled_batch(**{name: entries[name] for name in entries if name in _LABELLED})
        if images:
            return replace(batch, images=images)
        # Where the model keeps no sequences of a row apart, each has a row of its own.
        return unpacked(batch, self.pad_token_id) if BATCH_LAYOUTS[self.layout].pads else batch

    def in_padded_rows(self, batch: TokenBatch) -> TokenBatch:
        """Returns the batch with a row a sequence, as TRL pads it."""
        return unpacked(batch, self.pad_token_id, self.pad_to_multiple_of, self.images)


@dataclass
class DataCollatorForLanguageModeling(TensorCollator):
    """Collates rows as TRL's collator of the same name does, into tensors for a model's own forward.

    Rows have `input_ids`, and `labels` unless every token is learned. `padding_free`: one row without padding, the
    labels of first tokens -100; `seq_lengths` of a row tell the sequences of a packed dataset apart. Otherwise a row
    each, padded on the right with `pad_token_id` to the longest, rounded up to `pad_to_multiple_of`.

    Returns a dict of `input_ids`, `labels` and `attention_mask` (B, T), with `return_position_ids` also
    `position_ids`; or, padding-free, `input_ids`, `labels`, `position_ids` and `seq_idx` (1, T), and the boundaries
    `cu_seq_lens_q`, `cu_seq_lens_k` (S + 1,), `max_length_q`, `max_length_k` as variable-length attention takes them.
    """

    pad_token_id: int
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        ids = [_int64(row["input_ids"]) for row in examples]
        labels = [_int64(row.get("labels", row["input_ids"])) for row in examples]
        device = ids[0].device
        positions = [
            torch.cat([torch.arange(length, device=device) for length in _sequence_lengths(row)]) for row in examples
        ]
        if self.padding_free:
            return self._flattened(*(torch.cat(parts) for parts in (ids, labels, positions)))
        masks = [torch.ones_like(row) for row in ids]
        values = {"input_ids": (ids, self.pad_token_id), "labels": (labels, IGNORED)}
        if self.return_position_ids:
            values["position_ids"] = (positions, 0)
        values["attention_mask"] = (masks, 0)
        return {name: pad(rows, value, self.pad_to_multiple_of) for name, (rows, value) in values.items()}

    def _flattened(self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        ids, labels, positions = (
            pad([row], value, self.pad_to_multiple_of)
            for row, value in ((ids, self.pad_token_id), (labels, IGNORED), (positions, 0))
        )
        cu_seqlens = _cu_seqlens(positions[0]).to(torch.int32)
        longest = int(cu_seqlens.diff().max())
        numbers = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=ids.device)
        return {
            "input_ids": ids,
            "labels": labels.masked_fill(positions == 0, IGNORED),
            "position_ids": positions,
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seqlens),
            **dict.fromkeys(("max_length_q", "max_length_k"), longest),
            "seq_idx": numbers.repeat_interleave(cu_seqlens.diff())[None],
        }
