"""Turns samples into the batch of TRL's online trainers, a dict of padded tensors, and such a dict into an update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_fast.data import TokenBatch
from trl_fast.data.images.layout import ImageLayout
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.rollout.samples import Samples

from .micro_batches import Update
from .trl_images import COUNTS, PIXELS, TYPES, image_entries, split_by_row

NEEDED_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
# TRL's keys of values a token, the fields of `Samples` that hold them, and what pads them.
_TOKEN_KEYS = {
    "old_per_token_logps": ("old_logprobs", 0.0),
    "ref_per_token_logps": ("ref_logprobs", 0.0),
    "sampling_per_token_logps": ("sampling_logprobs", 0.0),
    "importance_sampling_ratio": ("importance_ratios", 1.0),
}


@dataclass(frozen=True)
class BatchFormat:
    """Describes TRL's batch of a method.

    Args:
        pad_token_id: pads token ids; prompts on the left, completions on the right.
        pad_to_multiple_of: to which widths are rounded up.
        device: where the tensors are.
        processes: whose completions `num_items_in_batch` counts.
        by_sequence: the keys that hold one value (B, 1) a completion instead of one a token.
        sums_old: whether the batch holds `old_logps` (B,), sums over tokens, and no other log-probabilities (RLOO).
        images: how the model wants to have images; None: there are none.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None
    device: torch.device
    processes: int
    by_sequence: frozenset[str] = frozenset()
    sums_old: bool = False
    images: ImageLayout | None = None

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Returns TRL's batch of B samples, padded to the widths of the generation that they are of."""
        prompts, completions = (self._rounded(width) for width in samples.widths)
        kept = (~samples.excluded)[:, None].long()
        ids = [torch.tensor(row) for row in samples.prompt_ids]
        prompt_ids = _pad_left(ids, prompts, self.pad_token_id)
        prompt_mask = _pad_left([torch.ones_like(row) for row in ids], prompts, 0)
        ids = [torch.tensor(row) for row in samples.completion_ids]
        completion_mask = _pad_right([torch.ones_like(row) for row in ids], completions, 0) * kept
        batch: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": _pad_right(ids, completions, self.pad_token_id),
            "completion_mask": completion_mask,
        }
        if self.sums_old:
            old = samples.old_logprobs or [torch.zeros(len(row)) for row in ids]
            batch["old_logps"] = (_pad_right(old, completions, 0.0) * completion_mask).sum(1)
        batch["advantages"] = samples.advantages
        if not self.sums_old:
            batch["num_items_in_batch"] = torch.tensor(round(samples.generation_tokens * self.processes))
            batch |= self._token_values(samples, completions)
            if samples.mask is not None:
                batch["tool_mask"] = _pad_right([row.long() for row in samples.mask], completions, 1) * kept
        if self.images is not None:
            whole = torch.cat((prompt_ids, batch["completion_ids"]), 1)
            batch |= image_entries(samples.all_images(), self.images, whole, prompts)
        return {name: values.to(self.device) if name not in COUNTS else values for name, values in batch.items()}

    def _token_values(self, samples: Samples, width: int) -> dict[str, torch.Tensor]:
        found = {}
        for name, (field, padding) in _TOKEN_KEYS.items():
            vectors = getattr(samples, field)
            if vectors is not None:
                values = _pad_right(vectors, width, padding)
                found[name] = values[:, :1] if name in self.by_sequence else values
        return found

    def _rounded(self, width: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple


class MicroBatch(MutableMapping[str, Any]):
    """Answers to TRL's keys, whose tensors are made when they are first asked for; holds the update that is trained.

    Args:
        make: returns TRL's batch.

    Attributes:
        fused: what the fused step takes; it fits as long as nothing is changed.
    """

    fused: Update

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make
        self._values: dict[str, Any] | None = None
        self._original: dict[str, tuple[int, int]] = {}

    @property
    def values_by_key(self) -> dict[str, Any]:
        """Returns TRL's batch, the same one each time."""
        if self._values is None:
            self._values = self._make()
            self._original = _fingerprint(self._values)
        return self._values

    @property
    def is_changed(self) -> bool:
        """Says whether a value was exchanged, added, taken out or written to, so that the update is another one."""
        return self._values is not None and _fingerprint(self._values) != self._original

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values_by_key[key] = value

    def __delitem__(self, key: str) -> None:
        del self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def _fingerprint(values: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns which objects the values are, and how often each tensor was written to."""
    return {name: (id(value), getattr(value, "_version", 0)) for name, value in values.items()}


def check_batch(batch: object, source: str) -> dict[str, Any]:
    """Returns what `source` gave if it is a batch of TRL's.

    Raises:
        ValueError: it is none, or lacks a key.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"{source} gave a {type(batch).__name__}; expected a dict with the keys {NEEDED_KEYS}")
    missing = [name for name in NEEDED_KEYS if name not in batch]
    if missing:
        raise ValueError(f"{source} gave a dict with the keys {sorted(batch)}; {', '.join(missing)} are missing")
    return dict(batch)


def shuffled_parts(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """Shuffles a batch's rows and cuts them into equal parts, as TRL does; numbers (0-d tensors) go to all parts."""
    rows, of_images = len(batch["prompt_ids"]), split_by_row(batch)
    batch = {**batch, **of_images}
    order = torch.randperm(rows)
    size = rows // parts

    def part(value: Any, chosen: torch.Tensor) -> Any:
        if isinstance(value, torch.Tensor):
            return value[chosen.to(value.device)] if value.ndim else value
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rows:
            return [value[index] for index in chosen.tolist()]
        return value

    chosen = order[: parts * size].split(size)
    found = [{name: part(value, indices) for name, value in batch.items()} for indices in chosen]
    return [{**each, **{name: torch.cat(each[name]) for name in of_images}} for each in found]


@dataclass(frozen=True, eq=False)
class PaddedBatch(TokenBatch):
    """Holds rows of TRL's batch with its entries for images, which tell how many a row has."""

    entries: Mapping[str, Any] | None = None


def completion_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    images: Mapping[str, Any] | None = None,
) -> tuple[TokenBatch, torch.Tensor]:
    """Returns the batch that scores the last `logits_to_keep` tokens of each row, and which of them it scores.

    Rows move to the left, so that padding stands on the right, as in the padded layout.

    Args:
        input_ids, attention_mask: (B, T) int64, padded anywhere.
        images: a mapping with TRL's entries for the images of these rows; None: there are none.

    Returns:
        The batch of N tokens, and (B, logits_to_keep) bool: the N tokens that are attended to and come after another
        one; if there is none, the first of the first row.
    """
    attended = attention_mask.bool()
    rows, width = input_ids.shape
    first = attended.int().argmax(1, keepdim=True)
    prompt = width - logits_to_keep
    columns = torch.arange(logits_to_keep, device=input_ids.device)
    places = columns + prompt - first - 1
    scored = attended[:, prompt:] & (places >= 0)
    if not scored.any():
        scored[0, 0] = True
    longest = int((width - first).max())
    source = (torch.arange(longest, device=input_ids.device) + first) % width
    inside = torch.arange(longest, device=input_ids.device) + first < width
    row_of = torch.arange(rows, device=input_ids.device)[:, None].expand_as(scored)
    counts = scored.sum(1)
    batch = PaddedBatch(
        input_ids=input_ids.gather(1, source),
        position_ids=torch.arange(longest, device=input_ids.device).repeat(rows, 1),
        attention_mask=(attended.gather(1, source) & inside).long(),
        sequence_lengths=None,
        score_positions=(row_of * longest + places.clamp(min=0))[scored],
        targets=input_ids[:, prompt:][scored],
        branch=row_of[scored],
        offset=columns.expand_as(scored)[scored],
        branch_lengths=attended[:, prompt:].sum(1),
        num_tokens=int(attended.sum()),
        group_sizes=tuple(counts.tolist()),
        images=_images_of(images or {}, source),
        entries={name: (images or {}).get(name) for name in (*PIXELS, *COUNTS)},
    )
    return batch, scored


def _images_of(entries: Mapping[str, Any], source: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Returns what the model's forward takes of images; source: (B, T), which columns of TRL's rows stand where."""
    pixels = {name: entries[name] for name in PIXELS if entries.get(name) is not None and len(entries[name])}
    if not pixels:
        return None
    return pixels | {name: entries[name].gather(1, source) for name in TYPES if entries.get(name) is not None}


def read_update(
    batch: Mapping[str, Any],
    keys: Collection[str],
    weights_of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> Update:
    """Returns the update of TRL's batch of B completions, in the padded layout.

    Args:
        batch: with NEEDED_KEYS.
        keys: of values a token, which the loss reads too where they are there.
        weights_of: from the lengths (B,) float32 of the completions and num_items_in_batch, if there is one, to the
            weight (B,) in the loss of a token of each completion.

    Raises:
        ValueError: a key is missing.
    """
    batch = check_batch(batch, "compute_loss")
    completion_mask = batch["completion_mask"]
    counted = completion_mask * batch.get("tool_mask", 1)
    input_ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    attention_mask = torch.cat((batch["prompt_mask"], completion_mask), 1)
    tokens, scored = completion_batch(input_ids, attention_mask, completion_mask.shape[1], batch)
    lengths = counted.sum(1).float()
    advantages = batch["advantages"]
    vectors = {
        field: batch[name].expand_as(scored)[scored].float()
        for name, (field, _) in _TOKEN_KEYS.items()
        if name in keys and batch.get(name) is not None
    }
    if batch.get("old_logps") is not None:
        # The loss reads their sum only.
        vectors["old_logprobs"] = (batch["old_logps"] / scored.sum(1).clamp(min=1))[tokens.branch]
    loss_inputs = PolicyLossInputs(
        branch=tokens.branch,
        advantages=advantages if advantages.ndim == 1 else advantages.mean(1),
        weights=weights_of(lengths, batch.get("num_items_in_batch")).to(lengths.device),
        mask=counted[scored].float(),
        token_advantages=None if advantages.ndim == 1 else advantages.expand_as(scored)[scored],
        **vectors,
    )
    sizes = tuple(size for size in tokens.group_sizes if size)
    return Update(tokens, loss_inputs, lengths.new_zeros(0), sizes)


def _pad_left(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    return _pad_right([row.flip(0) for row in rows], width, value).flip(1)


def _pad_right(rows: list[torch.Tensor], width: int, value: float) -> torch.Tensor:
    """Returns rows (length,) as one tensor (B, width)."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)
