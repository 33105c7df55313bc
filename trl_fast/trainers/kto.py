"""KTOTrainer: TRL's constructor and behaviour, on packed batches and the fused head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.unpaired_preference import (
    BOTH,
    KL_COLUMN,
    LABEL,
    MISMATCHED,
    OWN_TOKENS,
    UNPAIRED_COLUMNS,
    UNPAIRED_REFERENCE_COLUMNS,
    DataCollatorForUnpairedPreference,
    prepare_unpaired_dataset,
    warn_of_balance,
)
from trl_fast.losses.kto import KTOTable, count_losses, kl_estimate, kto_loss_sum, kto_metrics
from trl_fast.modeling.scoring import ModelScores
from trl_fast.ops import TokenScores

from .base.metric_buffer import MetricBuffer
from .base.preference import PreferenceTrainer, padded_rows
from .kto_config import KTOConfig

# TRL logs these only for micro-batches that have such rows.
_BY_LABEL = {f"{name}/{side}" for name in ("logits", "rewards", "logps") for side in ("chosen", "rejected")}


class KTOTrainer(PreferenceTrainer):
    """Kahneman-Tversky Optimization (arXiv 2402.01306): from single completions, each good or bad.

    Args:
        model: a name, a causal language model, or a PeftModel.
        ref_model: the reference policy, an object or a name; None: the policy as it is now, which with PEFT is the
            same model with its adapter off.
        args: a KTOConfig; TRL's own is accepted too.
        data_collator: returns a TokenBatch as `DataCollatorForUnpairedPreference` does.
        train_dataset, eval_dataset: rows of prompt, completion and label, plain or conversational, or tokenized; or
            preference pairs. eval_dataset may be a dict of datasets.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.
        The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Fields of
        KTOConfig that older versions of TRL took here are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "kto"
    config_class = KTOConfig
    signature_columns = (*UNPAIRED_COLUMNS, KL_COLUMN, LABEL, *UNPAIRED_REFERENCE_COLUMNS)

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns of prepared rows that hold token ids."""
        return (*UNPAIRED_COLUMNS, KL_COLUMN) if self.loss_config.needs_kl else UNPAIRED_COLUMNS

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """As in the base: the row's own completion, and the mismatched one where there is one."""
        return UNPAIRED_REFERENCE_COLUMNS if self.loss_config.needs_kl else UNPAIRED_REFERENCE_COLUMNS[:1]

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: KTOConfig, name: str
    ) -> AnyDataset:
        dataset = prepare_unpaired_dataset(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            kl_block=args.per_device_train_batch_size if self.loss_config.needs_kl else None,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        if name == "train" and isinstance(dataset, Dataset):
            warn_of_balance(dataset, args.desirable_weight, args.undesirable_weight)
        return dataset

    def make_collator(
        self, model: PreTrainedModel | PeftModel, pad_token_id: int, layout: str, args: KTOConfig
    ) -> DataCollatorForUnpairedPreference:
        return DataCollatorForUnpairedPreference(
            pad_token_id=pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of if layout == "padded" else None,
            layout=layout,
        )

    def start(self, **kwargs: Any) -> None:
        super().start(**kwargs)
        optional = {*_BY_LABEL, "rewards/margins"}
        self._buffers = {mode: MetricBuffer(optional=optional) for mode in ("train", "eval")}

    # ---- the reference

    def sequence_logprobs(self, batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
        return token_logprobs.new_zeros(len(batch)).index_add(0, batch.branch, token_logprobs)

    def compute_ref_log_probs(self, batch: TokenBatch) -> torch.Tensor:
        """As in the base: of each row's own completion, and of the mismatched one after it where there is one."""
        precomputed = self.reference_columns[0] in batch.extras
        return super().compute_ref_log_probs(batch if precomputed else batch.get(BOTH, batch))

    # ---- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: TokenBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """The loss (0-d) of one micro-batch; its metrics wait for the next log."""
        reference = self.compute_ref_log_probs(inputs).view(len(inputs), -1)
        table = KTOTable(inputs.branch, inputs[LABEL], reference[:, 0])
        if self._scores_together(inputs):
            scored, kl = self._score_together(model, inputs, table, reference[:, 1])
        else:
            scored, kl = self._score_apart(model, inputs, table, reference)
        # What is not a number takes no part in the mean, and how much that is shows only when all is scored.
        loss = scored.loss / count_losses(scored.tokens, table, kl)
        metrics = kto_metrics(scored.tokens, table, kl, self.loss_config, self._sum_over_processes)
        recorded = {name: metrics.pop(name) for name in ("kl", "entropy")}
        recorded["num_tokens"] = self.count_tokens(inputs)
        recorded |= metrics
        if scored.aux_loss is not None and self.router_aux_loss_coef:
            loss = loss + self.router_aux_loss_coef * scored.aux_loss
            recorded["aux_loss"] = (scored.aux_loss, torch.ones_like(scored.aux_loss))
        self.record(recorded)
        return (loss, {}) if return_outputs else loss

    def _scores_together(self, inputs: TokenBatch) -> bool:
        """Whether own and mismatched completions in one pass are cheaper than the latter in one without gradient.

        Together, prompts are computed once, but mismatched completions take part in backward. A router's loss is that
        of the own completions alone, so they stay apart there.
        """
        if BOTH not in inputs or self.router_aux_loss_coef:
            return False
        passes = 1
        if torch.is_grad_enabled():
            # Backward for activations, for weights, and activations computed again.
            passes += 1 + (not isinstance(self.model, PeftModel)) + self.args.gradient_checkpointing
        added = inputs[BOTH].input_ids.numel() - inputs.input_ids.numel()
        saved = inputs[MISMATCHED].input_ids.numel() - passes * added
        if self.accelerator.num_processes > 1:
            # Processes meet in every forward pass, so they must make the same ones.
            saved = self._sum_over_processes(torch.tensor(saved, device=self.accelerator.device)).item()
        return saved > 0

    def _score_together(
        self, model: torch.nn.Module, inputs: TokenBatch, table: KTOTable, kl_reference: torch.Tensor
    ) -> tuple[ModelScores, torch.Tensor]:
        """The scores of the own completions with the sum of their losses, and the KL estimate, from one pass."""
        both, own = inputs[BOTH], inputs[BOTH].extras[OWN_TOKENS]

        def estimate(logprobs: torch.Tensor) -> torch.Tensor:
            return self._bounded_kl(self.sequence_logprobs(both, logprobs)[1::2], kl_reference)

        def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
            kl = estimate(scores.logprobs)
            return kto_loss_sum(replace(scores, logprobs=scores.logprobs[own]), table, kl, self.loss_config)

        # A single group: the estimate is of all of the batch.
        options = {"token_loss": token_loss, "group_sizes": (len(both.targets),)}
        scored = self.score(model, both, self.loss_config.outputs, **options)
        kl = estimate(scored.tokens.logprobs)
        own_scores = {name: getattr(scored.tokens, name)[own] for name in self.loss_config.outputs}
        return replace(scored, tokens=TokenScores(**own_scores)), kl

    def _score_apart(
        self, model: torch.nn.Module, inputs: TokenBatch, table: KTOTable, reference: torch.Tensor
    ) -> tuple[ModelScores, torch.Tensor]:
        """The same from a pass over the own completions, after one without gradient over the mismatched ones."""
        config = self.loss_config
        kl = reference.new_zeros(())
        if config.needs_kl:
            mismatched = inputs[MISMATCHED]
            with torch.no_grad():
                logprobs = self.score(model, mismatched).tokens.logprobs
            kl = self._bounded_kl(self.sequence_logprobs(mismatched, logprobs), reference[:, 1])

        def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
            return kto_loss_sum(scores, table, kl, config, rows)

        options = {"token_loss": token_loss, "group_sizes": inputs.group_sizes, **self.router_kwargs}
        return self.score(model, inputs, config.outputs, **options), kl

    def _bounded_kl(self, logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The KL estimate of all processes, 0-d, at least 0."""
        return self.accelerator.reduce(kl_estimate(logprobs, reference), "mean").clamp(min=0)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    # ---- evaluation

    def whole_logits(self, model: torch.nn.Module, inputs: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (S, T, V) and labels (S, T)."""
        input_ids, attention_mask = padded_rows(inputs.sequences(), self.processing_class.pad_token_id)
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, input_ids
