"""Scores tokens in TRL's way, on padded tensors, for subclasses that override or call TRL's method for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_fast.data import TokenBatch
from trl_fast.data.images.row_images import RowImages
from trl_fast.modeling.reference_policy import reference_scope
from trl_fast.modeling.scoring import ModelScores
from trl_fast.ops import TokenScores

from ..base.step import router_keywords
from .trl_batch import PaddedBatch, completion_batch
from .trl_images import COUNTS, IMAGE_KEYS, TYPES, image_entries, split_by_row


class TRLScoring:
    """Is TRL's method `_get_per_token_logps_and_entropies`, and scores batches by what a subclass made of it.

    Args:
        trainer: a `GroupTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Scores the last `logits_to_keep` tokens of B rows, `batch_size` rows at a time.

        input_ids, attention_mask: (B, T) int64. images: TRL's entries of a batch for images.

        Returns:
            Log-probabilities and entropies, both (B, logits_to_keep) float32, 0 where nothing is attended to, and the
            load-balancing loss of a mixture of experts, a scalar; None for what is not asked for.
        """
        unknown = sorted(images.keys() - {*IMAGE_KEYS})
        if unknown:
            raise TypeError(f"_get_per_token_logps_and_entropies() has no arguments {', '.join(unknown)}")
        trainer, found, size = self._trainer, [], batch_size or len(input_ids)
        outputs = ("logprobs", "entropy") if compute_entropy else ("logprobs",)
        by_row = split_by_row(images) | {name: images[name] for name in TYPES if images.get(name) is not None}
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            parts = {name: values[rows] for name, values in by_row.items()}
            own = {name: torch.cat(part) if isinstance(part, list) else part for name, part in parts.items()}
            batch, scored = completion_batch(input_ids[rows], attention_mask[rows], logits_to_keep, own)
            keywords = {"temperature": trainer.args.temperature, **router_keywords(float(compute_aux_loss))}
            with trainer.accelerator.autocast():
                scores = trainer.score(model, batch, outputs, **keywords)
            place = partial(_placed, scored=scored)
            found.append((place(scores.tokens.logprobs), place(scores.tokens.entropy), scores.aux_loss))
        logps, entropies, aux_losses = zip(*found, strict=True)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def policy_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the policy's log-probabilities (N,) float32."""
        return self.scores(self._trainer.model, batch)[0].logprobs

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the reference's log-probabilities (N,) float32."""
        trainer = self._trainer
        if trainer.ref_model is not None:
            return self.scores(trainer.ref_model, batch)[0].logprobs
        with reference_scope(trainer.accelerator.unwrap_model(trainer.model), trainer.args.ref_adapter_name):
            return self.scores(trainer.model, batch)[0].logprobs

    def scores(
        self, model: torch.nn.Module, batch: TokenBatch, *, in_loss: bool = False, compute_aux_loss: bool = False
    ) -> tuple[TokenScores, torch.Tensor | None]:
        """Scores a batch's N tokens by the subclass's `_get_per_token_logps_and_entropies`."""
        trainer = self._trainer
        completions = batch.branch_lengths.tolist()
        pairs = [ids.split([len(ids) - c, c]) for ids, c in zip(batch.sequences(), completions, strict=True)]
        prompts, answers = ([pair[side] for pair in pairs] for side in (0, 1))
        pad = trainer.tokenizer.pad_token_id
        input_ids = torch.cat((_left_padded(prompts, pad), pad_sequence(answers, True, pad)), 1)
        ones = [[torch.ones_like(ids) for ids in part] for part in (prompts, answers)]
        mask = torch.cat((_left_padded(ones[0], 0), pad_sequence(ones[1], True, 0)), 1)
        size = trainer.args.train_batch_size if trainer.model.training else trainer.args.eval_batch_size
        keywords: dict[str, Any] = {"batch_size": size, **dict.fromkeys(COUNTS)}
        if in_loss:
            keywords = {"compute_entropy": True, "compute_aux_loss": compute_aux_loss, **dict.fromkeys(IMAGE_KEYS)}
        keywords |= self._image_entries(batch, input_ids, input_ids.shape[1] - max(completions))
        given = (model, input_ids, mask, max(completions))
        logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(*given, **keywords)
        at = (batch.branch, batch.offset)
        return TokenScores(logps[at], entropy=None if entropies is None else entropies[at]), aux_loss

    def _image_entries(self, batch: TokenBatch, input_ids: torch.Tensor, width: int) -> dict[str, Any]:
        """Returns TRL's entries for the images of a batch's sequences; input_ids, width: as in `image_entries`."""
        if batch.images is None:
            return {}
        images: RowImages = self._trainer.images
        if isinstance(batch, PaddedBatch) and batch.entries is not None:
            prompts = [width if count else 0 for count in batch.entries["num_images"]]
            return {**batch.entries, **images.layout.types_of(images.layout.marked_tokens(input_ids, prompts))}
        return image_entries(images.of_sequences(batch), images.layout, input_ids, width)

    def score_for_loss(
        self,
        model: torch.nn.Module,
        batch: TokenBatch,
        *,
        token_loss: Callable[[TokenScores, torch.Tensor], torch.Tensor],
        output_router_logits: bool = False,
        **_: Any,
    ) -> ModelScores:
        """Scores a batch's N tokens by the subclass's method, and computes their loss, a scalar.

        token_loss, output_router_logits: those of `score`'s keywords that it reads.
        """
        tokens, aux_loss = self.scores(model, batch, in_loss=True, compute_aux_loss=output_router_logits)
        loss = token_loss(tokens, torch.arange(len(tokens.logprobs), device=tokens.logprobs.device))
        return ModelScores(tokens.detach(), aux_loss, loss)


def _placed(values: torch.Tensor | None, scored: torch.Tensor) -> torch.Tensor | None:
    """Returns values (N,) where `scored` (B, C) is True, 0 elsewhere."""
    return None if values is None else values.new_zeros(scored.shape).masked_scatter(scored, values)


def _left_padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=value).flip(1)
