"""Provides DPOTrainer, with TRL's constructor and behaviour, and the step function of DPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_fast.data import TOKEN_COLUMNS, AnyDataset, PreferenceCollator, TokenBatch, prepare_preference_dataset
from trl_fast.data.preference import REFERENCE_COLUMNS
from trl_fast.losses.dpo import DPOLossConfig, dpo_loss, dpo_metrics
from trl_fast.losses.loss_inputs import PreferenceLossInputs
from trl_fast.modeling.scoring import score
from trl_fast.ops import HeadOptions

from .base.balancing import NEVER, STEP, FreeDeal
from .base.batch_reader import AnyBatch
from .base.preference import PreferenceTrainer
from .base.step import StepResult, insert_after, router_keywords, with_router_loss
from .base.trl_attributes import TRLAttribute, answers_to, fixed_attribute, loss_setting
from .dpo_config import DPOConfig


def dpo_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    reference: torch.Tensor,
    config: DPOLossConfig,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
) -> StepResult:
    """Computes the loss of one micro-batch of pairs and its metrics.

    Args:
        model: the policy, with `attach_scoring`; it may be wrapped since.
        batch: P trees of a prompt with its chosen and its rejected completion.
        reference: (2P,) float32, log π_ref of each completion as `PreferenceLossInputs.sequence_logprobs` sums it.
        config: the loss.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
    """
    loss_inputs = preference_loss_inputs(batch)
    # Where the loss is a sum over pairs, each pair's gradient is taken while its logits are there.
    by_pairs = {
        "token_loss": lambda scores, rows: dpo_loss(scores, loss_inputs, reference, config, rows),
        "group_sizes": batch.group_sizes,
    }
    options = by_pairs if config.is_sum_over_pairs and batch.group_sizes else {}
    scored = score(model, batch, outputs=config.outputs, head=head, **options, **router_keywords(router_coef))
    loss = scored.loss if options else dpo_loss(scored.tokens, loss_inputs, reference, config)
    metrics = dpo_metrics(scored.tokens, loss_inputs, reference, config)
    loss, router_metrics = with_router_loss(loss, scored, router_coef)
    return StepResult(loss, {**router_metrics, "entropy": metrics.pop("entropy"), **metrics})


def _set_loss_types(trainer: DPOTrainer, names: Sequence[str] | str) -> None:
    config = trainer.loss_config
    kept = not isinstance(names, str) and len(names) == len(config.loss_type)
    trainer.loss_config = replace(config, loss_type=names, loss_weights=config.loss_weights if kept else None)


_SETTINGS = ("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting")


@answers_to(
    {
        **{name: loss_setting(name) for name in _SETTINGS},
        # New weights come after the losses that they are of; until then each has 1.
        "loss_types": TRLAttribute(read=lambda trainer: [*trainer.loss_config.loss_type], write=_set_loss_types),
        "loss_weights": TRLAttribute(
            read=lambda trainer: [*trainer.loss_config.loss_weights], write=loss_setting("loss_weights").write
        ),
        "padding_free": fixed_attribute(lambda trainer: False, "set batch_layout, which pads nothing if it can"),
    }
)
class DPOTrainer(PreferenceTrainer):
    """Trains by Direct Preference Optimization (arXiv 2305.18290) and its relatives.

    Args:
        model: a name, a causal language model, or a PeftModel.
        ref_model: the reference policy, an object or (as older versions allowed) a name; None: the policy as it is
            now, which with PEFT is the same model with its adapter off.
        args: a DPOConfig; TRL's own is accepted too.
        train_dataset, eval_dataset: rows of (prompt,) chosen, rejected, plain or conversational; or tokenized.
            eval_dataset may be a dict of datasets.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.

    The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Fields of
    DPOConfig that older versions of TRL took here are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "dpo"
    config_class = DPOConfig
    token_columns = TOKEN_COLUMNS
    collator_class = PreferenceCollator
    reference_columns = REFERENCE_COLUMNS
    signature_columns = (*TOKEN_COLUMNS, *REFERENCE_COLUMNS)
    uncalled_hooks = dict.fromkeys(
        ("dpo_loss", "concatenated_forward", "concatenated_inputs"),
        "override _compute_loss(model, inputs, return_outputs), as TRL calls it today",
    )

    # ---- data

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: DPOConfig, dataset_name: str
    ) -> AnyDataset:
        return prepare_preference_dataset(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            image_reader=self.images and self.images.reader,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )

    # ---- the reference

    def needs_reference(self, args: DPOConfig) -> bool:
        return not args.reference_free and super().needs_reference(args)

    def sequence_logprobs(self, batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
        """Sums log-probs of the scored tokens (N,) to those of the sequences (2P,), as `ld_alpha` weighs them."""
        return preference_loss_inputs(batch).sequence_logprobs(token_logprobs, self.loss_config.ld_alpha)

    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes what the base does; zeros without a reference."""
        if self.args.reference_free:
            return torch.zeros(len(batch), device=batch.targets.device)
        return super().reference_logprobs(batch)

    def _reference_key(self) -> tuple:
        return (*super()._reference_key(), self.loss_config.ld_alpha)

    # ---- the loss

    @property
    def free_deal(self) -> FreeDeal:
        """Says that pairs go anywhere in a step, unless the loss depends on those beside them."""
        if self.loss_config.is_mean_over_pairs:
            return FreeDeal(STEP)
        return FreeDeal(
            NEVER, f"loss_type={[*self.loss_config.loss_type]!r} reads the pairs of a micro-batch together"
        )

    def _compute_loss(
        self, model: torch.nn.Module, inputs: AnyBatch, return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss of one micro-batch, as `compute_loss` says."""
        batch = self.batches.token_batch(inputs)
        found = dpo_step(
            model,
            batch,
            self.reference_logprobs(batch),
            self.loss_config,
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
        )
        self.record(insert_after("entropy", found.metrics, {"num_tokens": self.count_tokens(batch)}))
        return self.with_outputs(found.loss, model, inputs) if return_outputs else found.loss


def preference_loss_inputs(batch: TokenBatch) -> PreferenceLossInputs:
    """Returns where a batch's completions are among its scored tokens."""
    return PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
