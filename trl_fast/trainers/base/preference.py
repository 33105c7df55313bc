"""Holds what trainers on preference data with a reference, DPO and KTO, do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset, DictCollator, PreferenceCollator, TokenBatch, UnpairedCollator
from trl_fast.modeling.reference_cache import reference_hash, with_reference_columns
from trl_fast.parallel.engines import prepared_for_evaluation
from trl_fast.parallel.failures import failing_together
from trl_fast.parallel.partitions import whole_in_forward

from .batch_reader import AnyBatch, BatchReader
from .padded_outputs import first_sequences, with_padded_outputs
from .preference_config import PreferenceConfig
from .prepared_datasets import (
    change_parts,
    check_dataset_type,
    check_reference_vocabulary,
    named_parts,
    without_columns,
)
from .reference import REFERENCE_ATTRIBUTES, ReferencePolicy
from .tokenizers import older_tokenizer_name
from .trainer import BaseTrainer
from .trl_attributes import ROW_ATTRIBUTES, answers_to, fixed_attribute, loss_setting

_PRECOMPUTED = "the datasets have the reference's log-probs, or not, since the trainer was made"


@answers_to(
    {
        **ROW_ATTRIBUTES,
        **REFERENCE_ATTRIBUTES,
        "beta": loss_setting("beta"),
        "precompute_ref_logps": fixed_attribute(lambda trainer: trainer.args.precompute_ref_log_probs, _PRECOMPUTED),
    }
)
class PreferenceTrainer(BaseTrainer):
    """Trains on preference data; a subclass brings its data, its collator and its loss.

    `reference_columns` hold precomputed log-probabilities of a row's sequences under the reference, in their order in
    a batch.
    """

    config_class = PreferenceConfig
    reference: ReferencePolicy
    shares_prompts = True
    collator_class: ClassVar[type[PreferenceCollator] | type[UnpairedCollator]]
    reference_columns: ClassVar[tuple[str, ...]] = ()
    uncalled_hooks: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("_tokenize", "tokenize_row", "process_row", "build_tokenized_answer", "_truncate_inputs"),
            "tokenize the dataset before, into prompt_ids and the ids of its completions",
        ),
        **dict.fromkeys(
            ("_compute_loss_liger", "get_batch_loss_metrics", "forward", "get_batch_logps"),
            "override _compute_loss(model, inputs, return_outputs), as TRL calls it today",
        ),
        **dict.fromkeys(
            ("null_ref_context", "compute_reference_log_probs"), "give a ref_model, or override compute_ref_log_probs"
        ),
        **dict.fromkeys(
            ("_create_model_from_path", "_prepare_peft_model", "_prepare_deepspeed"),
            "prepare the model before it is given to the trainer",
        ),
        "_prepare_gradient_checkpointing": "use gradient_checkpointing and gradient_checkpointing_kwargs",
        "generate_from_model_and_ref": "evaluation does not generate; add a LogCompletionsCallback",
        "store_metrics": "append to self._metrics['train'][name], or override log",
    }

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        check_dataset_type(train_dataset, "train_dataset")
        if args.precompute_ref_log_probs:
            _check_no_stream("train_dataset", train_dataset)
            _check_no_stream("eval_dataset", eval_dataset)
        if isinstance(model, torch.nn.Module) and ref_model is model:
            raise ValueError("ref_model is the very object of model; leave it out to use a copy of the policy")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        train_dataset, eval_dataset = change_parts(self._without_reference_columns, train_dataset, eval_dataset)
        sequences, wanted = self.sample_sequences(train_dataset), self.needs_reference(args)
        self.reference = ReferencePolicy(self)
        model, layout = self.reference.set_up(model, ref_model, args, peft_config, sequences, wanted=wanted)
        parts = named_parts(train_dataset, eval_dataset)
        check_reference_vocabulary(parts, self.token_columns, model, self.reference.model)
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
        )
        if args.precompute_ref_log_probs:
            self._precompute_all()

    # ---- what a subclass brings

    def set_up_data(
        self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig
    ) -> None:
        """Sets the loss, which tells what its rows hold."""
        self.loss_config = args.loss_config()

    def needs_reference(self, args: PreferenceConfig) -> bool:
        """Tells whether the reference is asked during training."""
        return not args.precompute_ref_log_probs

    def make_collator(
        self, model: PreTrainedModel | PeftModel, pad_token_id: int, layout: str, args: PreferenceConfig
    ) -> DictCollator:
        """Makes what collates prepared rows to a batch of that layout; `model` is as it will be trained."""
        return self.collator_class(
            pad_token_id=pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
            layout=layout,
            images=self.images,
        )

    def sample_sequences(self, dataset: AnyDataset) -> list[list[int]]:
        """Returns two token sequences of a prepared dataset's first row, for trying the model out."""
        return first_sequences(dataset, self.token_columns)

    def sequence_logprobs(self, batch: TokenBatch, token_logprobs: torch.Tensor) -> torch.Tensor:
        """Sums log-probs of the scored tokens (N,) to those of the sequences (S,), as the loss does."""
        raise NotImplementedError

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
        """Computes what `compute_loss` says; TRL's hook."""
        raise NotImplementedError

    def with_outputs(self, loss: torch.Tensor, model: torch.nn.Module, inputs: AnyBatch) -> tuple[torch.Tensor, Any]:
        """Returns a loss, a scalar, and the model's own output of the batch's padded rows, without gradient."""
        return with_padded_outputs(self.batches, loss, model, inputs)

    def labels_of(self, inputs: AnyBatch) -> torch.Tensor | None:
        """Returns what compute_metrics is given as labels: the token ids of the padded rows."""
        return self.batches.entries(inputs).get("input_ids")

    # ---- the reference

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes log π_ref of each sequence, (S,) float32, summed as the loss sums the policy's."""
        columns = self.reference_columns
        if columns[0] in batch.extras:
            return torch.stack([batch.extras[column] for column in columns], dim=1).flatten()
        return self.sequence_logprobs(batch, self.reference.score(batch).logprobs)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: AnyBatch) -> tuple[torch.Tensor, ...]:
        """Computes log π_ref of a batch for each of the `reference_columns`, a number a row, (P,) float32.

        TRL's hook, called where reference log-probs are precomputed. model: the reference, `self.ref_model` or, where
        that is the policy without its adapter, `self.model`.

        Raises:
            ValueError: it is another model.
        """
        unwrap = self.accelerator.unwrap_model
        if unwrap(model) is not unwrap(self.ref_model or self.model):
            raise ValueError(
                "compute_ref_log_probs: model is not the trainer's reference; expected self.ref_model, or self.model "
                "where that is None. To score with another model, call it on the batch's entries"
            )
        batch = self.batches.token_batch(inputs)
        return tuple(self.reference_logprobs(batch).view(-1, len(self.reference_columns)).unbind(1))

    def _without_reference_columns(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Returns a given dataset without numbers of a reference, which may have been another one, as in TRL."""
        reason = "the reference is asked itself; give its model as ref_model"
        return without_columns(dataset, name, self.reference_columns, reason)

    def _reference_key(self) -> tuple:
        """Returns all that precomputed numbers depend on besides the dataset."""
        args = self.args
        return (args.max_length, args.truncation_mode, args.bf16, args.fp16)

    def _precompute_all(self) -> None:
        reference = self.accelerator.unwrap_model(self.ref_model or self.model)
        self._cache_key = (reference_hash(reference, self.args.ref_adapter_name), *self._reference_key())
        asked, args = self.args.precompute_ref_batch_size, self.args
        train_size, eval_size = asked or args.train_batch_size, asked or args.eval_batch_size
        with prepared_for_evaluation(self):
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", train_size)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {
                    name: self._precompute_ref_logps(dataset, name, eval_size)
                    for name, dataset in self.eval_dataset.items()
                }
            elif self.eval_dataset is not None:
                self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", eval_size)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Returns a prepared dataset with the `reference_columns`, from a cache or computed; TRL's hook."""
        accelerator, columns = self.accelerator, self.reference_columns

        def compute() -> dict[str, list[float]]:
            # remove_unused_columns works on loaders that Trainer makes; this one is ours.
            self._set_signature_columns_if_needed()
            read = [column for column in self._signature_columns if column in dataset.column_names]
            rows = dataset.select_columns(read) if self.args.remove_unused_columns else dataset
            loader = DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator)
            shown = {"desc": f"Reference log-probs of {name}", "disable": not accelerator.is_main_process}
            scored = []
            is_prepared = self.ref_model is not None or self.model_wrapped is not self.model
            with nullcontext() if is_prepared else whole_in_forward(self.model):
                for batch in tqdm(accelerator.prepare(loader), **shown):
                    numbers = self.compute_ref_log_probs(self.ref_model or self.model, batch)
                    found = torch.stack([column for column in numbers if column is not None], dim=1)
                    scored.append(accelerator.gather_for_metrics(found).cpu())
            return dict(zip(columns, torch.cat(scored).t().tolist(), strict=True))

        return with_reference_columns(dataset, self._cache_key, compute, writes=accelerator.is_local_main_process)

    def prepare_for_evaluation(self, dataset: AnyDataset) -> AnyDataset:
        """Prepares a dataset given to `evaluate`, with reference log-probs where those are precomputed.

        Raises:
            ValueError: they were precomputed from a policy that has been trained since, or the dataset is a stream.
        """
        if self.args.precompute_ref_log_probs:
            _check_no_stream("eval_dataset", dataset)
        dataset = super().prepare_for_evaluation(dataset)
        if not self.args.precompute_ref_log_probs or self.reference_columns[0] in dataset.column_names:
            return dataset
        if self.ref_model is None and not isinstance(self.model, PeftModel) and self.state.global_step > 0:
            raise ValueError(
                "evaluate(eval_dataset=...): with precompute_ref_log_probs=True the reference was the policy "
                "before training, which is gone; give the dataset to the constructor, or give a ref_model"
            )
        size = self.args.precompute_ref_batch_size or self.args.eval_batch_size
        return self._precompute_ref_logps(dataset, "eval", size)


def _check_no_stream(name: str, dataset: AnyDataset | dict[str, AnyDataset] | None) -> None:
    """Raises ValueError if a dataset, or one of a dict of them, is a stream; `name` is the argument."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_no_stream(f"{name}[{key!r}]", part)
    elif isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is a stream (IterableDataset), but precompute_ref_log_probs=True keeps the reference's log-probs "
            "beside the rows; give a datasets.Dataset, or set precompute_ref_log_probs=False"
        )
