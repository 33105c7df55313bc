"""Provides KTOTrainer, with TRL's constructor and behaviour, and the step function of KTO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.unpaired_preference import (
    BOTH,
    KL_COLUMN,
    LABEL,
    MISMATCHED,
    MISMATCHED_ENTRIES,
    OWN_TOKENS,
    UNPAIRED_REFERENCE_COLUMNS,
    UNPAIRED_TOKEN_COLUMNS,
    UnpairedCollator,
    prepare_unpaired_dataset,
    warn_of_balance,
)
from trl_fast.losses.kto import KTOLossConfig, count_losses, kl_estimate, kto_loss_sum, kto_metrics
from trl_fast.losses.loss_inputs import KTOLossInputs
from trl_fast.modeling.scoring import ModelScores, score
from trl_fast.ops import HeadOptions, TokenScores

from .base.balancing import MICRO_BATCH, STEP, FreeDeal
from .base.batch_reader import AnyBatch
from .base.metric_buffer import MetricBuffer
from .base.preference import PreferenceTrainer
from .base.step import StepResult, insert_after, router_keywords, with_router_loss
from .base.trl_attributes import answers_to, fixed_attribute, loss_setting
from .kto_config import KTOConfig

_WEIGHTS = "weights of prompts are BCO's; use BCOTrainer with an embedding_func"
# TRL logs these only for micro-batches that have such rows.
_BY_LABEL = {f"{name}/{side}" for name in ("logits", "rewards", "logps") for side in ("chosen", "rejected")}


@dataclass(frozen=True)
class AcrossProcesses:
    """Holds how tensors are reduced over all processes; by default there is one."""

    mean: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda value: value

    def bounded_kl(self, logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Returns the KL estimate (0-d, at least 0) from log π and log π_ref (S,) of mismatched completions."""
        return self.mean(kl_estimate(logprobs, reference)).clamp(min=0)


def sequence_logprobs(batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
    """Returns log π of each of a batch's S sequences, (S,) float32, from its N tokens' log-probs (N,)."""
    return token_logprobs.new_zeros(len(batch)).index_add(0, batch.branch, token_logprobs)


def kto_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    reference: torch.Tensor,
    config: KTOLossConfig,
    *,
    together: bool,
    head: HeadOptions,
    router_coef: float = 0.0,
    processes: AcrossProcesses = AcrossProcesses(),
) -> StepResult:
    """Computes the loss of one micro-batch of labelled completions and its metrics.

    Args:
        model: the policy, with `attach_scoring`; it may be wrapped since.
        batch: S completions with their labels, and where the loss needs them the mismatched ones, as
            `UnpairedCollator` makes them.
        reference: (S, 1 or 2) float32, log π_ref of each completion and of its mismatched one.
        config: the loss.
        together: whether own and mismatched completions are scored in one pass; see `scores_together`.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
        processes: how tensors are reduced over processes.
    """
    loss_inputs = KTOLossInputs(batch.branch, batch[LABEL], reference[:, 0])
    if together:
        scored, kl = _score_together(model, batch, loss_inputs, reference[:, 1], config, head, processes)
    else:
        router = router_keywords(router_coef)
        scored, kl = _score_apart(model, batch, loss_inputs, reference, config, head, processes, router)
    # What is not a number takes no part in the mean, and how much that is shows only when all is scored.
    loss = scored.loss / count_losses(scored.tokens, loss_inputs, kl)
    metrics = kto_metrics(scored.tokens, loss_inputs, kl, config, processes.sum)
    loss, router_metrics = with_router_loss(loss, scored, router_coef)
    return StepResult(loss, {name: metrics.pop(name) for name in ("kl", "entropy")} | metrics | router_metrics)


def scores_together(batch: TokenBatch, backward_passes: int, processes: AcrossProcesses = AcrossProcesses()) -> bool:
    """Returns whether own and mismatched completions in one pass are cheaper than the latter in one without gradient.

    Together, prompts are computed once, but mismatched completions take part in backward.

    Args:
        batch: as `kto_step` takes it.
        backward_passes: how many passes as dear as a forward pass the backward pass makes.
        processes: processes meet in every forward pass, so they must make the same ones.
    """
    if BOTH not in batch:
        return False
    added = batch[BOTH].input_ids.numel() - batch.input_ids.numel()
    saved = batch[MISMATCHED].input_ids.numel() - (1 + backward_passes) * added
    return bool(processes.sum(torch.tensor(saved)) > 0)


def _score_together(
    model: torch.nn.Module,
    batch: TokenBatch,
    loss_inputs: KTOLossInputs,
    kl_reference: torch.Tensor,
    config: KTOLossConfig,
    head: HeadOptions,
    processes: AcrossProcesses,
) -> tuple[ModelScores, torch.Tensor]:
    """Returns the scores of the own completions with the sum of their losses, and the KL estimate, from one pass."""
    both, own = batch[BOTH], batch[BOTH].extras[OWN_TOKENS]

    def estimate(logprobs: torch.Tensor) -> torch.Tensor:
        return processes.bounded_kl(sequence_logprobs(both, logprobs)[1::2], kl_reference)

    def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        kl = estimate(scores.logprobs)
        return kto_loss_sum(replace(scores, logprobs=scores.logprobs[own]), loss_inputs, kl, config)

    # A single group: the estimate is of all of the batch.
    options = {"token_loss": token_loss, "group_sizes": (len(both.targets),)}
    scored = score(model, both, outputs=config.outputs, head=head, **options)
    kl = estimate(scored.tokens.logprobs)
    own_scores = {name: getattr(scored.tokens, name)[own] for name in config.outputs}
    return replace(scored, tokens=TokenScores(**own_scores)), kl


def _score_apart(
    model: torch.nn.Module,
    batch: TokenBatch,
    loss_inputs: KTOLossInputs,
    reference: torch.Tensor,
    config: KTOLossConfig,
    head: HeadOptions,
    processes: AcrossProcesses,
    router: dict[str, bool],
) -> tuple[ModelScores, torch.Tensor]:
    """Returns the same from a pass over the own completions, after one without gradient over the mismatched ones."""
    kl = reference.new_zeros(())
    if config.needs_kl:
        mismatched = batch[MISMATCHED]
        with torch.no_grad():
            logprobs = score(model, mismatched, head=head).tokens.logprobs
        kl = processes.bounded_kl(sequence_logprobs(mismatched, logprobs), reference[:, 1])

    def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        return kto_loss_sum(scores, loss_inputs, kl, config, rows)

    options = {"token_loss": token_loss, "group_sizes": batch.group_sizes, **router}
    return score(model, batch, outputs=config.outputs, head=head, **options), kl


@answers_to(
    {
        **{name: loss_setting(name) for name in ("loss_type", "desirable_weight", "undesirable_weight")},
        "calculate_KL": fixed_attribute(lambda trainer: trainer.loss_config.needs_kl, "set loss_type"),
    }
)
class KTOTrainer(PreferenceTrainer):
    """Trains by Kahneman-Tversky Optimization (arXiv 2402.01306): from single completions, each good or bad.

    Args: those of DPOTrainer, but for
        args: a KTOConfig; TRL's own is accepted too.
        data_collator: returns a dict as `DataCollatorForUnpairedPreference` does, or a TokenBatch.
        train_dataset, eval_dataset: rows of prompt, completion and label, plain or conversational, or tokenized; or
            preference pairs. eval_dataset may be a dict of datasets.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "kto"
    config_class = KTOConfig
    collator_class = UnpairedCollator
    signature_columns = (*UNPAIRED_TOKEN_COLUMNS, KL_COLUMN, LABEL, *UNPAIRED_REFERENCE_COLUMNS)
    uncalled_hooks = {
        **dict.fromkeys(
            ("_compute_kl_logps", "kto_loss", "bco_loss"),
            "override _compute_loss(model, inputs, return_outputs), as TRL calls it today",
        ),
        **dict.fromkeys(
            ("match_underlying_distribution", "_get_chosen_prob", "_vectorize_prompt", "_get_udm_weight"), _WEIGHTS
        ),
        **dict.fromkeys(("_get_prompt_embeddings", "_get_sample_prompt_embeddings"), _WEIGHTS),
    }

    @property
    def token_columns(self) -> tuple[str, ...]:
        """Names the columns of prepared rows that hold token ids."""
        return (*UNPAIRED_TOKEN_COLUMNS, KL_COLUMN) if self.loss_config.needs_kl else UNPAIRED_TOKEN_COLUMNS

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Names the columns of the row's own completion, and of the mismatched one where there is one."""
        return UNPAIRED_REFERENCE_COLUMNS if self.loss_config.needs_kl else UNPAIRED_REFERENCE_COLUMNS[:1]

    # ---- data

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: KTOConfig, dataset_name: str
    ) -> AnyDataset:
        dataset = prepare_unpaired_dataset(
            dataset,
            processing_class,
            image_reader=self.images and self.images.reader,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            kl_batch_size=args.per_device_train_batch_size if self.loss_config.needs_kl else None,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        if dataset_name == "train" and isinstance(dataset, Dataset):
            warn_of_balance(dataset, args.desirable_weight, args.undesirable_weight)
        return dataset

    def start(self, **kwargs: Any) -> None:
        super().start(**kwargs)
        optional = {*_BY_LABEL, "rewards/margins"}
        self._buffers = {mode: MetricBuffer(optional=optional) for mode in ("train", "eval")}

    # ---- the reference

    def sequence_logprobs(self, batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
        """Sums log-probs of the scored tokens (N,) to those of the sequences (S,)."""
        return sequence_logprobs(batch, token_logprobs)

    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes what the base does, of each row's own completion, and of the mismatched one after it, if any."""
        if self.reference_columns[0] in batch.extras or MISMATCHED not in batch.extras:
            return super().reference_logprobs(batch)
        if BOTH in batch.extras:
            return super().reference_logprobs(batch.extras[BOTH])
        apart = [super(KTOTrainer, self).reference_logprobs(part) for part in (batch, batch.extras[MISMATCHED])]
        return torch.stack(apart, dim=1).flatten()

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: AnyBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes what the base does: of own completions, and of mismatched ones, None where there are none."""
        found = super().compute_ref_log_probs(model, inputs)
        return (*found, None)[:2]

    # ---- the loss

    @property
    def free_deal(self) -> FreeDeal:
        """Says that completions stay in their micro-batch, over which all processes estimate the KL together."""
        if not self.loss_config.needs_kl:
            return FreeDeal(STEP)
        return FreeDeal(MICRO_BATCH, f"loss_type={self.loss_config.loss_type!r} estimates the KL of a micro-batch")

    def _compute_loss(
        self, model: torch.nn.Module, inputs: AnyBatch, return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss of one micro-batch, as `compute_loss` says.

        Raises:
            ValueError: the batch has no mismatched completions, and the loss needs them.
        """
        batch = self.batches.token_batch(inputs)
        if self.loss_config.needs_kl and MISMATCHED not in batch.extras:
            raise ValueError(
                f"loss_type={self.loss_config.loss_type!r} reads mismatched completions, but the batch has none; "
                f"expected the entries {', '.join(MISMATCHED_ENTRIES)}"
            )
        found = kto_step(
            model,
            batch,
            self.reference_logprobs(batch).view(len(batch), -1),
            self.loss_config,
            together=self._scores_together(batch),
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
            processes=self._processes,
        )
        self.record(insert_after("entropy", found.metrics, {"num_tokens": self.count_tokens(batch)}))
        return self.with_outputs(found.loss, model, inputs) if return_outputs else found.loss

    def _scores_together(self, inputs: TokenBatch) -> bool:
        """Returns whether own and mismatched completions are scored in one pass.

        A router's loss is that of the own completions alone, so they stay apart there.
        """
        if self.router_aux_loss_coef:
            return False
        passes = 0
        if torch.is_grad_enabled():
            # Backward for activations, for weights, and activations computed again.
            passes = 1 + (not isinstance(self.model, PeftModel)) + self.args.gradient_checkpointing
        return scores_together(inputs, passes, self._processes)

    @property
    def _processes(self) -> AcrossProcesses:
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return AcrossProcesses()
        return AcrossProcesses(
            mean=lambda value: accelerator.reduce(value, "mean"),
            sum=lambda value: accelerator.reduce(value.to(accelerator.device), "sum"),
        )
