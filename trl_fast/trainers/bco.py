"""Provides BCOTrainer, as TRL's last version had it, and the step function of BCO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset, TokenBatch, UnpairedCollator, prepare_unpaired_dataset
from trl_fast.data.unpaired_preference import (
    LABEL,
    PROMPT_WEIGHT,
    UNPAIRED_REFERENCE_COLUMNS,
    UNPAIRED_TOKEN_COLUMNS,
    warn_of_one_label,
)
from trl_fast.losses.bco import BCOLossConfig, bco_loss, bco_metrics, bco_rewards
from trl_fast.losses.loss_inputs import KTOLossInputs, sums_by_sequence
from trl_fast.modeling.scoring import score
from trl_fast.ops import HeadOptions, TokenScores
from trl_fast.ops.token_scores import required

from .base.balancing import MICRO_BATCH, FreeDeal
from .base.batch_reader import AnyBatch
from .base.metric_buffer import MetricBuffer
from .base.preference import PreferenceTrainer
from .base.prompt_weights import PromptWeights
from .base.running_mean import Mean, RunningMean
from .base.step import StepResult, router_keywords, with_router_loss
from .base.trl_attributes import TRLAttribute, answers_to, fixed_attribute
from .bco_config import BCOConfig

_SIDES = [f"{name}/{side}" for side in ("chosen", "rejected") for name in ("rewards", "logps", "logits")]


def bco_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    reference: torch.Tensor,
    seen: Mean,
    config: BCOLossConfig,
    *,
    learns: bool,
    head: HeadOptions,
    router_coef: float = 0.0,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> tuple[StepResult, Mean]:
    """Computes the loss of one micro-batch of labelled completions and its metrics.

    Args:
        model: the policy, with `attach_scoring`; it may be wrapped since.
        batch: S completions with their labels, and maybe weights of their prompts.
        reference: (S,) float32, log π_ref of each completion.
        seen: the mean of the rewards before this micro-batch.
        config: the loss.
        learns: whether the micro-batch's own rewards count in the mean, as they do in training.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
        reduce: sums a tensor over processes.

    Returns:
        The loss with its metrics, and the mean of the rewards after it.
    """
    inputs = KTOLossInputs(batch.branch, batch[LABEL], reference)

    def mean_of(rewards: torch.Tensor) -> Mean:
        return seen.with_values(rewards, reduce) if learns else Mean(*(each.to(rewards.device) for each in seen))

    def token_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        rewards = bco_rewards(scores.logprobs, inputs, config)
        return bco_loss(rewards, inputs.labels, mean_of(rewards).mean, batch.get(PROMPT_WEIGHT))

    # A single group: the mean is that of all of the batch.
    options: dict[str, Any] = {"token_loss": token_loss, "group_sizes": (len(batch.targets),)}
    scored = score(model, batch, outputs=config.outputs, head=head, **options, **router_keywords(router_coef))
    after = mean_of(bco_rewards(scored.tokens.logprobs, inputs, config))
    metrics = bco_metrics(scored.tokens, inputs, after.mean, config)
    loss, router_metrics = with_router_loss(required(scored.loss), scored, router_coef)
    return StepResult(loss, {**metrics, **router_metrics}), after


class BCOMetricBuffer(MetricBuffer):
    """Collects the metrics of BCO, whose logged values of good and bad completions are means over all of them."""

    def __init__(self) -> None:
        super().__init__(pooled=_SIDES)

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | None]:
        """Returns what the base does in TRL's order, with the margin of the rewards' means where both are there.

        reduce: sums a tensor (M, 2) over processes.
        """
        found = super().pop(reduce)
        sides = {name: found.pop(name) for name in _SIDES if name in found}
        chosen, rejected = sides.get("rewards/chosen"), sides.get("rewards/rejected")
        margins = {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}
        return {**sides, **margins, **found}


_NOT_CALLED = "override _compute_loss(model, inputs, return_outputs)"
_FITTED = "rows are weighed when the trainer is made; give embedding_func"


@answers_to(
    {
        "embedding_func": fixed_attribute(
            lambda trainer: trainer.prompt_weights and trainer.prompt_weights.embed, _FITTED
        ),
        "embedding_tokenizer": fixed_attribute(
            lambda trainer: trainer.prompt_weights and trainer.prompt_weights.tokenizer, _FITTED
        ),
        "match_underlying_distribution": fixed_attribute(lambda trainer: trainer.prompt_weights is not None, _FITTED),
        "precompute_ref_log_probs": TRLAttribute("args.precompute_ref_log_probs", fixed="set it in the config"),
    }
)
class BCOTrainer(PreferenceTrainer):
    """Trains by Binary Classifier Optimization (arXiv 2404.04656): from single completions, each good or bad.

    Args: those of KTOTrainer in the order of TRL's BCOTrainer, but for
        args: a BCOConfig.
        embedding_func: from input_ids and attention_mask (B, T) of prompts to their embeddings (B, d); losses of bad
            completions are then weighed by how likely their prompts are among those of good ones. None: they are not.
        embedding_tokenizer: the tokenizer of embedding_func.
        model_init: only None; a model is given as `model`.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "bco"
    config_class = BCOConfig
    collator_class = UnpairedCollator
    token_columns = UNPAIRED_TOKEN_COLUMNS
    reference_columns: ClassVar[tuple[str, ...]] = UNPAIRED_REFERENCE_COLUMNS[:1]
    signature_columns = (*UNPAIRED_TOKEN_COLUMNS, LABEL, PROMPT_WEIGHT, *UNPAIRED_REFERENCE_COLUMNS[:1])
    free_deal = FreeDeal(MICRO_BATCH, "the mean of the rewards so far is one after each micro-batch")
    loss_config: BCOLossConfig
    prompt_weights: PromptWeights | None = None
    uncalled_hooks = {
        **dict.fromkeys(("bco_loss", "get_batch_loss_metrics", "forward", "get_batch_logps"), _NOT_CALLED),
        **dict.fromkeys(
            ("_get_udm_weight", "_get_chosen_prob", "_vectorize_prompt", "_get_prompt_embeddings"),
            "give an embedding_func that does it",
        ),
        "_get_sample_prompt_embeddings": "set prompt_sample_size",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None = None,
        args: BCOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        embedding_func: Callable[..., torch.Tensor] | None = None,
        embedding_tokenizer: PreTrainedTokenizerBase | None = None,
        **others: Any,
    ) -> None:
        if model_init is not None:
            raise ValueError("model_init: the model is prepared before training starts; give model=model_init()")
        adapters: dict[str, Any] = {"model_adapter_name": model_adapter_name, "ref_adapter_name": ref_adapter_name}
        self.prompt_weights = _prompt_weights(embedding_func, embedding_tokenizer)
        self._preprocess_logits = preprocess_logits_for_metrics
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            peft_config=peft_config,
            **{name: value for name, value in adapters.items() if value is not None},
            **others,
        )

    # ---- data

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, dataset_name: str
    ) -> AnyDataset:
        dataset = prepare_unpaired_dataset(
            dataset,
            processing_class,
            image_reader=self.images.reader if self.images else None,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        if dataset_name == "train" and isinstance(dataset, Dataset):
            warn_of_one_label(dataset, "BCO")
        if self.prompt_weights is None:
            return dataset
        return self.prompt_weights.weighed(dataset, processing_class, args, dataset_name)

    def start(self, **kwargs: Any) -> None:
        """Starts as the base does, with the mean of the rewards as a part of checkpoints."""
        super().start(**kwargs, preprocess_logits_for_metrics=self._preprocess_logits)
        self.running = RunningMean()
        self.checkpoints.parts.append(self.running)
        self._buffers = {mode: BCOMetricBuffer() for mode in ("train", "eval")}

    # ---- the loss

    def sequence_logprobs(self, batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
        """Sums log-probs of the scored tokens (N,) to those of the sequences (S,)."""
        return sums_by_sequence(token_logprobs, batch.branch, len(batch))

    def _compute_loss(
        self, model: torch.nn.Module, inputs: AnyBatch, return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss of one micro-batch, as `compute_loss` says; in training its rewards enter their mean."""
        assert self.batches is not None  # since the trainer was made
        batch, learns = self.batches.token_batch(inputs), self.mode == "train"
        found, mean = bco_step(
            model,
            batch,
            self.reference_logprobs(batch),
            self.running.state,
            self.loss_config,
            learns=learns,
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
            reduce=self._sum_over_processes,
        )
        if learns:
            self.running.state = mean
        self.count_tokens(batch)
        self.record(found.metrics)
        return self.with_outputs(found.loss, model, inputs) if return_outputs else found.loss

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.accelerator.num_processes == 1 else self.accelerator.reduce(value, "sum")


def _prompt_weights(
    embed: Callable[..., torch.Tensor] | None, tokenizer: PreTrainedTokenizerBase | None
) -> PromptWeights | None:
    """Returns what weighs prompts; None where nothing was given.

    Raises:
        ValueError: one of the two is missing, or the tokenizer has no pad token.
    """
    if embed is None and tokenizer is None:
        return None
    if embed is None or tokenizer is None:
        missing = "embedding_func" if embed is None else "embedding_tokenizer"
        raise ValueError(f"{missing} is missing: embedding_func and embedding_tokenizer go together")
    if tokenizer.pad_token_id is None:
        raise ValueError("embedding_tokenizer has no pad token; set embedding_tokenizer.pad_token")
    return PromptWeights(embed, tokenizer)
