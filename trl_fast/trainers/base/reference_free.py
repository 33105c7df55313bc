"""Holds what trainers on preference data without a reference, ORPO, CPO and TPO, do alike, and their step function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import TOKEN_COLUMNS, AnyDataset, PreferenceCollator, TokenBatch, prepare_preference_dataset
from trl_fast.losses.loss_inputs import CompletionLossInputs
from trl_fast.losses.mean_metric import Metric
from trl_fast.losses.reference_free import (
    ReferenceFreeLossConfig,
    TPOLossConfig,
    reference_free_loss,
    reference_free_metrics,
    tpo_metrics,
)
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import score
from trl_fast.ops import HeadOptions
from trl_fast.ops.token_scores import required
from trl_fast.parallel.failures import failing_together

from .balancing import NEVER, STEP, FreeDeal
from .batch_reader import AnyBatch, BatchReader
from .model_setup import router_coefficient
from .padded_outputs import first_sequences, with_padded_outputs
from .prepared_datasets import check_dataset_type
from .reference_free_config import ReferenceFreeConfig
from .step import StepResult, insert_after, router_keywords, with_router_loss
from .tokenizers import older_tokenizer_name, tokenizer_of
from .trainer import BaseTrainer
from .trl_attributes import ROW_ATTRIBUTES, TRLAttribute, answers_to, fixed_attribute, loss_setting


def reference_free_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    config: ReferenceFreeLossConfig,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
) -> StepResult:
    """Computes the loss of one micro-batch of pairs and its metrics.

    Args:
        model: the policy, with `attach_scoring`; it may be wrapped since.
        batch: P trees of a prompt with its completions: chosen, rejected, and a gold one where the loss reads it.
        config: the loss.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
    """
    inputs = CompletionLossInputs(batch.branch, batch.offset, len(batch), len(batch) // len(batch.group_sizes))
    scored = score(
        model,
        batch,
        outputs=config.outputs,
        head=head,
        # Each pair's gradient is taken while its logits are there.
        token_loss=lambda scores, rows: reference_free_loss(scores, inputs, config, rows),
        group_sizes=batch.group_sizes,
        **router_keywords(router_coef),
    )
    metrics: dict[str, Metric]
    if isinstance(config, TPOLossConfig):
        metrics = tpo_metrics(scored.tokens, inputs, config)
    else:
        metrics = reference_free_metrics(scored.tokens, inputs, config)
    loss, router_metrics = with_router_loss(required(scored.loss), scored, router_coef)
    return StepResult(loss, {**metrics, **router_metrics})


_NOT_CALLED = "override _compute_loss(model, inputs, return_outputs)"
_TOKENIZE = "tokenize the dataset before, into prompt_ids and the ids of its completions"


_PREPARED = "the datasets are prepared by it; set it in the config"


@answers_to(
    {
        **ROW_ATTRIBUTES,
        "beta": loss_setting("beta"),
        **{
            name: fixed_attribute(attrgetter(f"args.{name}"), _PREPARED)
            for name in ("max_length", "max_completion_length", "generate_during_eval")
        },
        "is_encoder_decoder": fixed_attribute(lambda trainer: False, "only causal models are trained"),
        "aux_loss_coef": TRLAttribute("router_aux_loss_coef"),
        "pad_token_id": fixed_attribute(
            lambda trainer: tokenizer_of(trainer.processing_class).pad_token_id, _PREPARED
        ),
        "padding_value": fixed_attribute(
            lambda trainer: tokenizer_of(trainer.processing_class).pad_token_id, _PREPARED
        ),
    }
)
class ReferenceFreeTrainer(BaseTrainer):
    """Trains on preference data by a loss that reads the policy alone; a subclass brings its config.

    Args:
        model: a name, a causal language model, or a PeftModel.
        args: the method's config; TRL's own is accepted too.
        data_collator: returns a dict as `DataCollatorForPreference` does, or a TokenBatch.
        train_dataset, eval_dataset: rows of (prompt,) chosen, rejected, plain or conversational; or tokenized.
            eval_dataset may be a dict of datasets.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.
        model_init: only None; a model is given as `model`.

    The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Fields of the
    config that older versions of TRL took here are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    config_class = ReferenceFreeConfig
    token_columns: tuple[str, ...] = TOKEN_COLUMNS
    shares_prompts = True
    loss_config: Any  # of the config's `loss_config`
    uncalled_hooks: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tokenize_row", "build_tokenized_answer", "_tokenize"), _TOKENIZE),
        **dict.fromkeys(
            ("get_batch_loss_metrics", "concatenated_forward", "concatenated_inputs", "get_batch_logps"), _NOT_CALLED
        ),
        **dict.fromkeys(("odds_ratio_loss", "cpo_loss"), _NOT_CALLED),
        "_shift_right": "encoder-decoder models are not supported",
        "generate_from_model": "evaluation does not generate; add a LogCompletionsCallback",
        "store_metrics": "append to self._metrics['train'][name], or override log",
    }

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ReferenceFreeConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        quantization_config: object | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        if model_init is not None:
            raise ValueError("model_init: the model is prepared before training starts; give model=model_init()")
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        config = self.resolve_config(args, model).with_older_arguments(type(self), older)
        check_dataset_type(train_dataset, "train_dataset")
        assert train_dataset is not None  # after that check
        policy = self.resolve_model(model, config, quantization_config)
        reader = self.resolve_tokenizer(processing_class, policy, config)
        train, evaluated = self.prepare_datasets(train_dataset, eval_dataset, reader, config, policy)
        policy = self.adapt(policy, peft_config, config)
        layout = self.choose_layout(policy, config, first_sequences(train, self.token_columns))
        self.router_aux_loss_coef = router_coefficient(base_model(policy), config.router_aux_loss_coef)
        collator = self.make_collator(policy, reader.pad_token_id, layout, config)
        self.batches = BatchReader(collator)
        self.start(
            model=policy,
            args=config,
            data_collator=data_collator or collator,
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=reader,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    # ---- data

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Sets the loss, which tells what a batch holds and whether pairs may go anywhere in a step."""
        self.loss_config = args.loss_config()
        if self.loss_config.likelihood_weight:
            self.free_deal = FreeDeal(NEVER, "the likelihood term is a mean over the tokens of a micro-batch")
        else:
            self.free_deal = FreeDeal(STEP)

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, dataset_name: str
    ) -> AnyDataset:
        return prepare_preference_dataset(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            others=tuple(column.removesuffix("_ids") for column in self.token_columns[len(TOKEN_COLUMNS) :]),
            image_reader=self.images.reader if self.images else None,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )

    def make_collator(
        self, model: PreTrainedModel | PeftModel, pad_token_id: int, layout: str, args: Any
    ) -> PreferenceCollator:
        """Makes what collates prepared rows to a batch of that layout; `model` is as it will be trained."""
        return PreferenceCollator(
            pad_token_id=pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
            layout=layout,
            images=self.images,
            scores_prompts=self.loss_config.learns_prompts,
            columns=self.token_columns[1 : 1 + self.loss_config.num_completions],
        )

    # ---- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: AnyBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss, a scalar, of one micro-batch; its metrics wait for the next log.

        With return_outputs also the model's own output, from one more forward pass, of rows that are padded.
        """
        return self._compute_loss(model, inputs, return_outputs)

    def _compute_loss(
        self, model: torch.nn.Module, inputs: AnyBatch, return_outputs: bool
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes what `compute_loss` says; users' hook."""
        assert self.batches is not None  # since the trainer was made
        batch = self.batches.token_batch(inputs)
        found = reference_free_step(
            model, batch, self.loss_config, head=self.head_options, router_coef=self.router_aux_loss_coef
        )
        tokens, metrics = Metric(*self.count_tokens(batch)), found.metrics
        self.record(insert_after("entropy", metrics, {"num_tokens": tokens}) if "entropy" in metrics else metrics)
        return with_padded_outputs(self.batches, found.loss, model, inputs) if return_outputs else found.loss

    def labels_of(self, inputs: AnyBatch) -> torch.Tensor | None:
        """Returns what compute_metrics is given as labels: the token ids of the padded rows."""
        assert self.batches is not None  # since the trainer was made
        return self.batches.entries(inputs).get("input_ids")
