"""Provides RewardTrainer, with TRL's constructor and behaviour, and the step function of reward models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.reward_modeling import (
    MARGIN,
    SEQUENCE_COLUMNS,
    RewardCollator,
    prepare_reward_dataset,
)
from trl_fast.losses.reward import reward_loss, reward_metrics
from trl_fast.modeling.adapters import check_reads_last_token
from trl_fast.modeling.chat_template import with_trained_tokens
from trl_fast.modeling.classifier_head import HEAD, attach_classifier_head, rewards
from trl_fast.modeling.layouts import REWARDS
from trl_fast.modeling.loading import base_model, load_reward_model
from trl_fast.parallel.failures import failing_together

from .base.balancing import STEP, FreeDeal
from .base.batch_reader import AnyBatch, BatchReader
from .base.prepared_datasets import check_dataset_type
from .base.step import StepResult
from .base.tokenizers import older_tokenizer_name, set_end_token_and_template
from .base.trainer import BaseTrainer
from .base.trl_attributes import ROW_ATTRIBUTES, answers_to
from .reward_config import RewardConfig

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 12


def reward_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    *,
    center_rewards_coefficient: float | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda rewards: rewards,
) -> tuple[StepResult, torch.Tensor]:
    """Computes the loss of one micro-batch of pairs and its metrics.

    Args:
        model: the reward model, with `attach_classifier_head`; it may be wrapped since.
        batch: P pairs with their margins, if they have any, from `data.reward_modeling.reward_batch`.
        center_rewards_coefficient: as in `reward_loss`.
        gather: from the rewards (2P,) of this process to those of all.

    Returns:
        The loss with its metrics, and the rewards (2P,) float32 without gradient.
    """
    scores = rewards(model, batch)
    loss = reward_loss(scores, batch.get(MARGIN), center_rewards_coefficient)
    return StepResult(loss, reward_metrics(gather(scores.detach()))), scores.detach()


@answers_to(ROW_ATTRIBUTES)
class RewardTrainer(BaseTrainer):
    """Trains reward models on preference pairs, by the Bradley-Terry model (arXiv 2203.02155, section 3.5).

    Args:
        model: a name, a sequence classifier with num_labels=1, or a PeftModel of one. By name it may be a language
            model, which gets a new head.
        args: a RewardConfig; TRL's own is accepted too.
        data_collator: returns a dict as `trl_fast.data.DataCollatorForReward` does, or a TokenBatch.
        train_dataset, eval_dataset: rows of (prompt,) chosen, rejected (, margin), plain or conversational; or
            tokenized. eval_dataset may be a dict of datasets.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.
        compute_metrics: is given the rewards (2P, 1) of each batch, those of all chosen sequences first.

    The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Fields of
    RewardConfig that older versions of TRL took here are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "reward"
    config_class = RewardConfig
    token_columns = SEQUENCE_COLUMNS
    shares_prompts = True
    uncalled_hooks = {
        "visualize_samples": "evaluation prints no samples; write them in a callback's on_evaluate",
    }
    signature_columns = (*SEQUENCE_COLUMNS, MARGIN)
    free_deal = FreeDeal(STEP)
    load_model = staticmethod(load_reward_model)
    attach = staticmethod(attach_classifier_head)
    readout = REWARDS

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        check_dataset_type(train_dataset, "train_dataset")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        model = self.adapt(model, peft_config, args)
        layout = self.choose_layout(model, args, _sample_sequences(train_dataset))
        collator = self.make_collator(model, processing_class.pad_token_id, layout, args)
        self.batches = BatchReader(collator)
        self.start(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    # ---- the model and its tokenizer

    def resolve_model(
        self, model: str | PreTrainedModel | PeftModel, args: RewardConfig, quantization_config: object | None
    ) -> PreTrainedModel | PeftModel:
        """Returns the model as the base does.

        Raises:
            ValueError: the model does not give one number a sequence.
        """
        model = super().resolve_model(model, args, quantization_config)
        inner = base_model(model)
        if inner.config.num_labels != 1:
            raise ValueError(
                f"model: this {type(inner).__name__} has num_labels={inner.config.num_labels}, but a reward is one "
                "number; load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or give "
                "the model's name"
            )
        return model

    def adjust_tokenizer(
        self, processing_class: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, args: RewardConfig
    ) -> None:
        """Sets the end token and the chat template that the arguments name.

        Raises:
            ValueError: eos_token is not in the vocabulary.
            OSError: there is nothing at chat_template_path.
        """
        self._added_tokens = set_end_token_and_template(processing_class, base_model(model), args)

    def adapt(
        self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: RewardConfig
    ) -> PreTrainedModel | PeftModel:
        """Adapts the model as the base does; tokens that came with a chat template are trained beside the adapter."""
        if isinstance(peft_config, PeftConfig):
            peft_config = _for_a_classifier(peft_config)
            if self._added_tokens:
                peft_config = with_trained_tokens(peft_config, base_model(model), self._added_tokens)
                logger.warning("chat_template_path brought new tokens: their embeddings are trained.")
        model = super().adapt(model, peft_config, args)
        check_reads_last_token(model)
        head = getattr(base_model(model), HEAD, None)
        trains = head is None or any(weight.requires_grad for weight in head.parameters())
        if isinstance(model, PeftModel) and not trains:
            logger.warning(
                f"The model's head ({HEAD!r}) is frozen. If it is new, its random weights stay as they are; set "
                f"modules_to_save=[{HEAD!r}] or task_type='SEQ_CLS' in peft_config to train it."
            )
        return model

    # ---- data

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: RewardConfig, dataset_name: str
    ) -> AnyDataset:
        return prepare_reward_dataset(
            dataset,
            processing_class,
            image_reader=self.images and self.images.reader,
            max_length=args.max_length,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )

    def make_collator(
        self, model: PreTrainedModel | PeftModel, pad_token_id: int, layout: str, args: RewardConfig
    ) -> RewardCollator:
        """Makes what collates prepared rows to a batch of that layout."""
        return RewardCollator(pad_token_id, layout, args.pad_to_multiple_of, self.images)

    # ---- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: AnyBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, SequenceClassifierOutput]:
        """Computes the loss (0-d) of one micro-batch; its metrics wait for the next log.

        With return_outputs also the rewards as `logits` (2P, 1), those of all chosen sequences first.
        """
        batch = self.batches.token_batch(inputs)
        found, scores = reward_step(
            model,
            batch,
            center_rewards_coefficient=self.args.center_rewards_coefficient,
            # The smallest and largest reward are those of all processes.
            gather=self.accelerator.gather,
        )
        self.record({"num_tokens": self.count_tokens(batch), **found.metrics})
        if not return_outputs:
            return found.loss
        return found.loss, SequenceClassifierOutput(logits=scores.view(-1, 2).T.reshape(-1, 1))

    # ---- evaluation

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple | None]:
        """Computes the loss of a batch, and for compute_metrics its rewards; there are no labels."""
        loss, logits, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits, None if logits is None else ()


def _for_a_classifier(peft_config: PeftConfig) -> PeftConfig:
    """Returns the adapter's configuration, its task a reward model's where it said that of a language model."""
    if peft_config.task_type != TaskType.CAUSAL_LM:
        return peft_config
    logger.warning(
        "peft_config: task_type='CAUSAL_LM' is for language models; 'SEQ_CLS' is used, with which the reward model's "
        "head is trained and saved beside the adapter."
    )
    peft_config = copy.copy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    return peft_config


def _sample_sequences(dataset: AnyDataset) -> list[list[int]]:
    """Returns two short token sequences for trying the model out: ends of the first row's, where they differ.

    Raises:
        ValueError: a stream has no row that is short enough.
    """
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            "The train dataset has no row of at most max_length tokens; raise max_length, or set it to None"
        )
    return [row[column][-_PROBE_TOKENS:] for column in SEQUENCE_COLUMNS]
