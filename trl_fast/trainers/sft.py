"""Provides SFTTrainer, with TRL's constructor and behaviour, and the step function of SFT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from trl_fast.data import (
    AnyDataset,
    LabelledCollator,
    TokenBatch,
    get_training_chat_template,
    is_chat_template_stop_token_trained,
    is_conversational,
    is_conversational_from_value,
    prepare_sft_dataset,
    turn_chat_template,
)
from trl_fast.losses.sft import OUTPUTS, TOKEN_LOSSES, token_metrics
from trl_fast.modeling.chat_template import with_trained_tokens
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import model_inputs, score
from trl_fast.ops import HeadOptions
from trl_fast.parallel.failures import failing_together
from trl_fast.settings.choices import SEPARATELY

from .base.balancing import NEVER, STEP, FreeDeal
from .base.batch_reader import AnyBatch, BatchReader
from .base.model_setup import router_coefficient
from .base.prepared_datasets import check_dataset_type
from .base.step import StepResult, insert_after, router_keywords, with_router_loss
from .base.tokenizers import older_tokenizer_name, set_end_token_and_template
from .base.trainer import BaseTrainer
from .base.trl_attributes import ROW_ATTRIBUTES, TRLAttribute, answers_to, fixed_attribute
from .sft_config import SFTConfig

logger = logging.getLogger(__name__)

# What a user's collator reads of rows with images.
_ROW_COLUMNS = ("messages", "prompt", "completion", "images", "image")


def sft_step(
    model: torch.nn.Module,
    batch: TokenBatch,
    token_loss: Callable[[torch.Tensor], torch.Tensor],
    count: torch.Tensor | int | None = None,
    *,
    head: HeadOptions,
    factor: float = 1,
    router_coef: float = 0.0,
    router_divisor: float = 1,
    loss_of_logits: Callable[..., torch.Tensor] | None = None,
) -> StepResult:
    """Computes the loss of one micro-batch of labelled sequences and its metrics.

    Args:
        model: the policy, with `attach_scoring`; it may be wrapped since.
        batch: N learned tokens.
        token_loss: from log-probs (N,) float32 to the sum of the tokens' losses (0-d), of `losses.sft.TOKEN_LOSSES`.
        count: what the sum is divided by, a 0-d tensor or a number; None: N.
        head: the user's settings of the head.
        factor: what the loss is multiplied by.
        router_coef: weight of a mixture of experts' load-balancing loss.
        router_divisor: what that loss is divided by.
        loss_of_logits: from model, batch and count to the loss (0-d), by whole logits, instead of token_loss.
    """
    router = router_keywords(router_coef)
    if loss_of_logits is not None:
        loss = loss_of_logits(model, batch, count)
        with torch.no_grad():
            scored = score(model, batch, outputs=OUTPUTS, head=head, **router)
    else:
        options = {"token_loss": lambda scores, _: token_loss(scores.logprobs), "head": head, **router}
        scored = score(model, batch, outputs=OUTPUTS, **options)
        divisor = len(batch.targets) if count is None else count
        if not isinstance(divisor, torch.Tensor):
            # Filled in there: a copy of the number would make the host wait.
            divisor = torch.full((), divisor, device=scored.loss.device)
        loss = scored.loss / divisor.to(scored.loss.device).clamp(min=1)
    loss = loss if factor == 1 else loss * factor
    loss, router_metrics = with_router_loss(loss, scored, router_coef, router_divisor)
    return StepResult(loss, token_metrics(scored.tokens) | router_metrics)


@answers_to(
    {
        **ROW_ATTRIBUTES,
        "_formatting_func": TRLAttribute("formatting_func"),
        "_skip_prepare_dataset": fixed_attribute(lambda trainer: trainer.args.skips_preparation, "set dataset_kwargs"),
    }
)
class SFTTrainer(BaseTrainer):
    """Trains by supervised fine-tuning.

    Args:
        model: a name, a causal language model, one that reads images too, or a PeftModel.
        args: an SFTConfig; TRL's own and a plain TrainingArguments are accepted too.
        data_collator: returns the tensors that a model's forward takes, with labels, as a dict; or a TokenBatch. Of a
            dataset with images it is given the rows as they are.
        train_dataset, eval_dataset: rows of text, messages, prompt and completion, or token ids, with images or not
            (`data.prepare_sft_dataset` says which). eval_dataset may be a dict of datasets.
        processing_class: the tokenizer, or the processor; None loads the model's. `tokenizer` is its older name.
        compute_loss_func: the loss from the model's own output, the labels and num_items_in_batch, which takes whole
            logits and so more memory.
        formatting_func: the text to learn from a row.

    The others are those of transformers.Trainer; `quantization_config` needs a model given by name. Arguments that
    older versions of TRL took here instead of in SFTConfig are accepted.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "sft"
    config_class = SFTConfig
    token_columns = ("input_ids",)
    signature_columns = ("input_ids", "labels", "seq_lengths")
    uncalled_hooks: ClassVar[Mapping[str, str]] = {
        "_reject_skip_prepare_without_labels": "check the dataset before it is given to the trainer",
        **dict.fromkeys(
            ("_prepare_non_packed_dataloader", "_prepare_packed_dataloader", "_tokenize"),
            "prepare the dataset before, and set dataset_kwargs={'skip_prepare_dataset': True}",
        ),
        **dict.fromkeys(
            ("_create_model_from_path", "_prepare_peft_model", "_prepare_model_for_kbit_training"),
            "prepare the model before it is given to the trainer",
        ),
        "_enable_gradient_checkpointing": "use gradient_checkpointing and gradient_checkpointing_kwargs",
    }
    formatting_func: Callable[[dict[str, Any]], str] | None = None
    _collates_rows = False  # whether the collator is given a dataset's rows as they are, where they have images
    # A loss that was divided by the tokens of all micro-batches needs no more dividing; transformers knows which is.
    loss_is_scaled_for_ga = None

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        check_dataset_type(train_dataset, "train_dataset")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        self.formatting_func = formatting_func
        self._collates_rows = data_collator is not None
        if data_collator is not None:
            args.check_for_collator()
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        model = self.adapt(model, peft_config, args)
        layout = self.choose_layout(model, args, _sample_sequences(train_dataset))
        self.router_aux_loss_coef = router_coefficient(base_model(model), args.router_aux_loss_coef)
        collator = self.make_collator(model, processing_class.pad_token_id, layout, args)
        self.padding_free = collator.padding_free
        self.batches = BatchReader(collator)
        self.start(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=self._check_loss_func(compute_loss_func, args),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    # ---- arguments

    def _check_loss_func(self, compute_loss_func: Callable | None, args: SFTConfig) -> Callable | None:
        if compute_loss_func is not None and args.loss_type != "nll":
            raise ValueError(
                f"compute_loss_func replaces the loss, so loss_type={args.loss_type!r} cannot be used too"
            )
        if compute_loss_func is not None or args.label_smoothing_factor:
            name = "label_smoothing_factor" if compute_loss_func is None else "compute_loss_func"
            logger.warning(f"{name} takes whole logits: training is slower and needs more memory than without.")
        return compute_loss_func

    def adjust_tokenizer(
        self, processing_class: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, args: SFTConfig
    ) -> None:
        """Sets the end token and the chat template that the arguments name.

        Raises:
            ValueError: eos_token is not in the vocabulary.
        """
        self._added_tokens = set_end_token_and_template(processing_class, base_model(model), args)

    def adapt(
        self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: SFTConfig
    ) -> PreTrainedModel | PeftModel:
        """Adapts the model as the base does; tokens that came with a chat template are trained beside the adapter."""
        if peft_config is not None and self._added_tokens:
            peft_config = with_trained_tokens(peft_config, base_model(model), self._added_tokens)
            peft_config.modules_to_save = list({*(peft_config.modules_to_save or []), "lm_head"})
            logger.warning(
                "chat_template_path brought new tokens: their embeddings and the whole lm_head are trained."
            )
        return super().adapt(model, peft_config, args)

    # ---- data

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
        """Sets which tokens are learned, by the first row."""
        row = next(iter(train_dataset), {})
        with_prompt = row.keys() >= {"prompt", "completion"} and self.formatting_func is None
        self.completion_only_loss = with_prompt if args.completion_only_loss is None else args.completion_only_loss
        if self.images is not None:
            whole_prompts = self.images.layout.whole_prompts
            args.check_for_images(self.completion_only_loss, whole_prompts, formatted=self.formatting_func is not None)
            if self._collates_rows:
                self.signature_columns = (*_ROW_COLUMNS, args.dataset_text_field)
        tokenized = "input_ids" in row
        if args.completion_only_loss and not (with_prompt or tokenized):
            reason = "formatting_func makes one text of each row" if self.formatting_func else f"it has {list(row)}"
            raise ValueError(
                f"completion_only_loss=True needs a train dataset with 'prompt' and 'completion', but {reason}; set "
                "completion_only_loss=False, or give the data as prompts and completions"
            )
        self.chat_template = None
        separately = args.assistant_turns == SEPARATELY
        # Turns of a conversation begin alike.
        self.shares_prompts = separately
        if args.assistant_only_loss and not tokenized:
            if not (is_conversational(row) or is_conversational_from_value(row)):
                raise ValueError(
                    f"assistant_only_loss=True needs conversations, but the train dataset has {list(row)}; set it to "
                    "False, or give the data as messages"
                )
            if separately:
                self.chat_template = turn_chat_template(tokenizer)
                return
            self.chat_template = get_training_chat_template(tokenizer)
            if not is_chat_template_stop_token_trained(tokenizer, self.chat_template):
                logger.warning(
                    "assistant_only_loss=True: the chat template leaves the token that ends the assistant's turn "
                    "outside {% generation %}, so the model may not learn to stop. Move it inside."
                )

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: SFTConfig, name: str
    ) -> AnyDataset:
        """Makes rows with input_ids and labels, packed if the arguments ask for it; see `data.prepare_sft_dataset`."""
        if self.images is not None and self._collates_rows:
            return dataset  # as in TRL: the collator reads rows as they are
        if args.skips_preparation:
            columns = dataset.column_names or []
            if "labels" not in columns and {"completion_mask", "assistant_masks"} & set(columns):
                raise ValueError(
                    f"The {name} dataset has masks but no labels, and skip_prepare_dataset=True makes none, so "
                    "every token would be learned. Add a 'labels' column, or leave skip_prepare_dataset out."
                )
            return dataset
        packing = args.packing if name == "train" or args.eval_packing is None else args.eval_packing
        return self._prepare_dataset(dataset, processing_class, args, packing, self.formatting_func, name)

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable | None,
        dataset_name: str,
    ) -> AnyDataset:
        """Does what `prepare_dataset` says, unless preparing is skipped; TRL's hook."""
        return prepare_sft_dataset(
            dataset,
            processing_class,
            args.row_format(self.completion_only_loss, self.chat_template),
            args.row_length(packing),
            formatting_func=formatting_func,
            image_reader=self.images and self.images.reader,
            shuffle_seed=args.seed if args.shuffle_dataset else None,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )

    def make_collator(
        self, model: PreTrainedModel | PeftModel, pad_token_id: int, layout: str, args: SFTConfig
    ) -> LabelledCollator:
        """Makes what collates prepared rows to a batch of that layout."""
        # In TRL these settings make one row of a batch, which shows in padding and in what compute_metrics is given.
        padding_free = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
        joins = args.assistant_turns == SEPARATELY
        return LabelledCollator(pad_token_id, layout, args.pad_to_multiple_of, padding_free, joins, self.images)

    # ---- the loss

    @property
    def free_deal(self) -> FreeDeal:
        """Says that rows go anywhere in a step where the loss is divided by the tokens of all processes."""
        if self.compute_loss_func is not None:
            return FreeDeal(NEVER, "compute_loss_func may read rows together")
        if self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs:
            return FreeDeal(STEP)
        return FreeDeal(NEVER, "each process divides by its own tokens (average_tokens_across_devices=False)")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Counts the learned tokens of all micro-batches of a step, in all processes."""
        batches = [self.batches.unread(batch) for batch in batch_samples]
        if None in batches:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batches or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        count = torch.full((), sum(len(batch.targets) for batch in batches), dtype=torch.int64, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: AnyBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss, a scalar, of one micro-batch; its metrics wait for the next log.

        With return_outputs also the model's own output, from one more forward pass.
        """
        batch = self.batches.token_batch(inputs)
        whole_logits = self.compute_loss_func is not None or self.label_smoother is not None
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        found = sft_step(
            model,
            batch,
            TOKEN_LOSSES[self.args.loss_type],
            num_items_in_batch,
            head=self.head_options,
            # The count is that of all processes, and DDP takes the mean of their gradients.
            factor=self.accelerator.num_processes if averaged else 1,
            router_coef=self.router_aux_loss_coef,
            router_divisor=1 if num_items_in_batch is None else self.current_gradient_accumulation_steps,
            loss_of_logits=self._loss_of_logits if whole_logits and self.args.loss_type == "nll" else None,
        )
        self.record(insert_after("mean_token_accuracy", found.metrics, {"num_tokens": self.count_tokens(batch)}))
        if not return_outputs:
            return found.loss
        with torch.no_grad():
            return found.loss, model(**model_inputs(self._in_trls_rows(batch)), use_cache=False)

    def _in_trls_rows(self, batch: TokenBatch) -> TokenBatch:
        """Returns the batch with a row an example; where TRL makes one row of all, it stays as it is."""
        return batch if self.padding_free else self.batches.collator.in_padded_rows(batch)

    def labels_of(self, inputs: AnyBatch) -> torch.Tensor | None:
        """Returns the labels (B, T) of a batch, in the shape of the logits that `compute_loss` returns."""
        batch = self.batches.unread(inputs)
        return inputs.get("labels") if batch is None else _labels(self._in_trls_rows(batch))

    def _loss_of_logits(
        self, model: torch.nn.Module, batch: TokenBatch, num_items_in_batch: torch.Tensor | None
    ) -> torch.Tensor:
        """Computes the user's loss, or the smoothed one of transformers, from whole logits."""
        rows = self._in_trls_rows(batch)
        output, labels = model(**model_inputs(rows), use_cache=False), _labels(rows)
        if self.compute_loss_func is not None:
            return self.compute_loss_func(output, labels, num_items_in_batch=num_items_in_batch)
        return self.label_smoother(output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)


def _labels(batch: TokenBatch) -> torch.Tensor:
    """Returns labels (B, T) that leave out what nothing of the same example predicts."""
    if batch.sequence_lengths is None:
        return batch.extras["labels"]
    return batch.extras["labels"].masked_fill(batch.position_ids == 0, -100)


def _sample_sequences(dataset: AnyDataset) -> list[list[int]]:
    """Returns token ids of the first two rows, for trying the model out; none where a collator makes them."""
    return [list(row["input_ids"]) for row in islice(dataset, 2) if "input_ids" in row]
