"""Tells a student's completions to a teacher of another tokenizer, and lays out what of both models is compared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from trl_fast.data import TokenBatch
from trl_fast.data.aligned_tokens import Completion, SpanRows, shared_tokens, span_rows, spans_of
from trl_fast.data.byte_spans import is_byte_level, spanned_tokens, spans_of_text, token_bytes
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.losses.uld import HybridDistance, SortedDistance
from trl_fast.modeling.span_distance import SpanComparison
from trl_fast.ops.linear_distance import Distance
from trl_fast.rollout.samples import Samples

from ..online.micro_batches import UpdateMaker
from .gold_config import OBSERVED, GOLDConfig


class Told(NamedTuple):
    """Holds a completion as both models have it, and the prompt as the teacher has it."""

    student: Completion
    teacher: Completion
    teacher_prompt_ids: list[int]


@dataclass(frozen=True)
class SpanUpdate:
    """Holds a micro-batch of S completions: both models' tokens, and what is compared.

    shares: (G,) float32, what of its completion each span is.
    """

    batch: TokenBatch
    teacher_batch: TokenBatch
    comparison: SpanComparison
    shares: torch.Tensor
    completions: int


class Interpreter:
    """Tells completions to a teacher by their text, which the teacher's tokenizer divides anew.

    Args:
        student, teacher: the tokenizers.
        args: the trainer's, with how spans are found and what is left out at the end.
        end_ids: tokens that end the student's completions.
        positions: the longest row of the student and of the teacher in tokens; None: there is no limit.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        args: GOLDConfig,
        end_ids: Collection[int],
        positions: tuple[int | None, int | None],
    ) -> None:
        self._student, self._teacher, self._args = student, teacher, args
        self._end_ids, self._positions = {*end_ids, student.eos_token_id}, positions

    def tell(self, prompt_ids: list[int], completion_ids: list[int]) -> Told:
        """Returns a prompt and a completion of the student's tokens as both models have them.

        The end token of both is none of the text: it stands for the same, whatever its name is.

        Raises:
            ValueError: the teacher's tokenizer makes nothing of the prompt, or a model has too few positions.
        """
        ends = completion_ids[-1] in self._end_ids
        text, own_ends = self._read(completion_ids[:-1] if ends else completion_ids)
        size = len(text.encode())
        student = Completion(
            completion_ids,
            len(completion_ids) - self._args.uld_skip_student_eos,
            [*own_ends, size] if ends else own_ends,
        )
        ids, other_ends = self._divided(text)
        end_id: Any = self._teacher.eos_token_id
        skipped = 0
        if end_id is not None:
            ids, other_ends, skipped = [*ids, end_id], [*other_ends, size], int(self._args.uld_skip_teacher_eos)
        prompt = self._prompt(prompt_ids)
        # A row of the teacher has a token to end with, whatever is compared.
        told = Told(student, Completion(ids or prompt[-1:], len(ids) - skipped, other_ends), prompt)
        self._check_length("model", len(prompt_ids), told.student, self._positions[0])
        self._check_length("teacher_model", len(prompt), told.teacher, self._positions[1])
        return told

    def _check_length(self, name: str, prompt: int, completion: Completion, positions: int | None) -> None:
        length = prompt + len(completion.ids) + _further(self._args, completion)
        if positions is not None and length > positions:
            raise ValueError(
                f"{name}: a row has {length} tokens for its tokenizer, and it has {positions} positions; "
                "set max_length or max_completion_length lower"
            )

    def _read(self, ids: list[int]) -> tuple[str, list[int]]:
        if self._args.use_extended_uld:
            return spanned_tokens(token_bytes(self._student, ids))
        return str(self._student.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), []

    def _divided(self, text: str) -> tuple[list[int], list[int]]:
        if self._args.use_extended_uld:
            return spans_of_text(self._teacher, text)
        found: Any = self._teacher(text, add_special_tokens=False)
        return list(found["input_ids"]), []

    def _prompt(self, prompt_ids: list[int]) -> list[int]:
        """Returns a prompt's text in the teacher's tokens, with what its tokenizer puts before a text."""
        text = self._student.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found: Any = self._teacher(text, add_special_tokens=True)
        ids, tokenizer = list(found["input_ids"]), self._teacher
        if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
            ids = ids[:-1]
        # The student's template may have written the very token that the teacher's tokenizer begins with.
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        if not ids:
            raise ValueError(f"teacher_model: its tokenizer makes no token of the prompt {text!r}; remove such rows")
        return ids


@dataclass(frozen=True)
class SpanUpdateMaker:
    """Makes micro-batches of completions that two models of different tokenizers read.

    interpreter: tells them to the teacher; student, teacher: lay rows out for the models; distance: compares rows.
    """

    interpreter: Interpreter
    student: UpdateMaker
    teacher: UpdateMaker
    distance: Distance
    args: GOLDConfig

    def update(self, samples: Samples, count: int, tokens: float) -> SpanUpdate:
        """Returns the micro-batch of some samples.

        count, tokens: the completions that the distance is a mean over, and the tokens of the likelihood; both a
        process's share of an optimizer step.
        """
        args = self.args
        part = samples.select(samples.by_beginning(range(len(samples))))
        told = [self.interpreter.tell(*row) for row in zip(part.prompt_ids, part.completion_ids, strict=True)]
        spans = [spans_of(one.student, one.teacher, by_text=args.use_extended_uld) for one in told]
        groups = [[[span[side] for span in own] for own in spans] for side in (0, 1)]
        student = self._side(self.student, part.prompt_ids, [one.student for one in told], groups[0])
        prompts = [one.teacher_prompt_ids for one in told]
        teacher = self._side(self.teacher, prompts, [one.teacher for one in told], groups[1])
        shares = copy_to_device(torch.tensor([1 / len(own) for own in spans for _ in own]), self.student.device)
        comparison = SpanComparison(
            *(student.rows, teacher.rows, shares * (args.uld_distillation_weight / count), self.distance),
            temperature=args.uld_student_temperature,
            teacher_temperature=args.uld_teacher_temperature,
        )
        if args.uld_crossentropy_weight:
            comparison = replace(
                comparison,
                target_rows=student.own,
                targets=student.batch.targets[student.own],
                target_weight=args.uld_crossentropy_weight / tokens,
            )
        return SpanUpdate(student.batch, teacher.batch, comparison, shares, len(part))

    def _side(
        self,
        maker: UpdateMaker,
        prompts: list[list[int]],
        completions: list[Completion],
        groups: list[list[range]],
    ) -> _Side:
        """Lays one model's rows out: those that predict a completion's tokens, and one more where that is compared."""
        after = self.args.uld_token_merge_strategy == OBSERVED
        ids = [list(one.ids) for one in completions]
        further = max((_further(self.args, one) for one in completions), default=0)
        batch = maker.token_batch(Samples.of(prompts, [own + own[-1:] * further for own in ids]))
        lengths = [len(own) + further for own in ids]
        rows = span_rows(ids, groups, lengths=lengths, after=after).to(maker.device)
        is_own = torch.cat([torch.arange(length) < length - further for length in lengths])
        return _Side(batch, rows, copy_to_device(is_own.nonzero().squeeze(1), maker.device))


def _further(args: GOLDConfig, completion: Completion) -> int:
    """Returns how many tokens more a model reads: one where the row behind the last token is compared.

    That row exists where a token follows, whichever; only its own row tells of it.
    """
    return int(args.uld_token_merge_strategy == OBSERVED and completion.compared == len(completion.ids))


class _Side(NamedTuple):
    """Holds the tokens of one model, the rows of its spans, and the places (M,) that predict a completion's tokens."""

    batch: TokenBatch
    rows: SpanRows
    own: torch.Tensor


def distance_of(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    sizes: tuple[int, int],
    args: GOLDConfig,
    device: torch.device,
) -> Distance:
    """Returns how rows of two heads of these sizes are compared.

    Raises:
        ValueError: a hybrid is asked for, and the vocabularies have no token in common.
    """
    if not args.uld_use_hybrid_loss:
        return SortedDistance()
    ids = shared_tokens(student.get_vocab(), teacher.get_vocab(), sizes)
    if not len(ids[0]):
        raise ValueError(
            "uld_use_hybrid_loss=True: the teacher's vocabulary has no token of the student's; set it to False"
        )
    matched, unmatched = args.uld_hybrid_matched_weight, args.uld_hybrid_unmatched_weight
    weights = None if matched is None or unmatched is None else (matched, unmatched)
    return HybridDistance.of(ids[0].to(device), ids[1].to(device), sizes, args.beta, weights)


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, args: GOLDConfig) -> None:
    """Checks that tokens can be aligned by their text, where that is asked for.

    Raises:
        ValueError: a tokenizer is not a byte-level one.
    """
    if not args.use_extended_uld:
        return
    for name, tokenizer in (("processing_class", student), ("teacher_model", teacher)):
        if not is_byte_level(tokenizer):
            raise ValueError(
                f"use_extended_uld=True needs tokenizers of bytes, and that of {name} ({type(tokenizer).__name__}) is "
                "none; set use_extended_uld=False, which compares tokens by position"
            )
