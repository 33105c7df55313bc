"""Defines what all trainers do alike: models and tokenizers from names, metrics, evaluation, saving, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import PredictionOutput

from trl_fast.data import AnyDataset, DictBatch, TokenBatch
from trl_fast.data.images.columns import IMAGE_COLUMNS
from trl_fast.data.images.row_images import RowImages
from trl_fast.modeling.adapters import has_virtual_tokens
from trl_fast.modeling.layouts import TOKEN_SCORES, Readout, choose_layout
from trl_fast.modeling.loading import base_model, load_causal_lm
from trl_fast.modeling.scoring import ModelScores, attach_scoring, score
from trl_fast.modeling.ulysses import sharing_rows
from trl_fast.ops import HeadOptions
from trl_fast.ops.heap import freed_memory_kept
from trl_fast.ops.validation import NotFiniteError
from trl_fast.parallel.agreement import decided_by_first, together
from trl_fast.parallel.engines import saved_whole
from trl_fast.parallel.failures import failing_together, watch_failures

from ..checkpoints.run_record import RunRecord
from ..checkpoints.writer import Checkpoints
from ..run_report.forecast import Forecast
from ..run_report.report import RunReport
from ..run_report.token_counts import TokenCounter
from .argument_checks import check_settings, checked_arguments, checked_config
from .balancing import FreeDeal, chosen_balance
from .batch_reader import BatchReader
from .callbacks import own_callbacks
from .config import BaseConfig
from .divergence import DivergenceWatch
from .fused_models import FusedModels
from .hf_trainer import evaluates, set_up_trainer, tidied
from .images import images_of_datasets
from .loaders import make_loader
from .log_window import LogWindow
from .metric_buffer import MetricBuffer, Recorded
from .metric_lists import MetricLists
from .model_card import model_tags, write_model_card
from .model_setup import adapt_model, check_trains, layout_request, loaded_model, warn_of_reentrant_router
from .overrides import check_overrides
from .parallelism import sum_over_rows
from .prepared_datasets import change_parts, check_lengths, named_parts, prepared_parts, with_dicts_as_rows
from .reference import ReferencePolicy
from .sequence_parallel import take_sequence_group
from .stop_signals import StopSignals
from .stream_loader import forbid_dispatching, in_step
from .tokenizers import checked_tokenizer, save_image_settings, set_pad_token, tokenizer_of


class BaseTrainer(Trainer):
    """Extends `transformers.Trainer` to token batches; each subclass brings its data and its loss.

    A subclass says what its prepared rows hold: `token_columns` are lists of token ids, which are held against the
    model's vocabulary; `signature_columns` are all that the collator reads (None: the token columns).
    """

    method = ""
    config_class = BaseConfig
    token_columns: tuple[str, ...] = ()
    signature_columns: ClassVar[tuple[str, ...] | None] = None
    # How a model comes from a name, and what its forward is taught: see `modeling.scoring`.
    load_model: ClassVar[Callable[..., PreTrainedModel]] = staticmethod(load_causal_lm)
    attach: ClassVar[Callable[[PreTrainedModel], None]] = staticmethod(attach_scoring)
    readout: ClassVar[Readout] = TOKEN_SCORES
    loss_is_scaled_for_ga = False  # whether the loss divides itself by the accumulation steps
    router_aux_loss_coef = 0.0
    shares_prompts = False  # whether rows hold several completions of one prompt
    free_deal = FreeDeal()
    forecast: Forecast | None = None  # what a plan expects of the run; whoever has one sets it before `train`
    images: RowImages | None = None  # how the model reads those of the datasets; None: they have none
    batches: BatchReader | None = None  # reads batches, where those are dicts in TRL; a trainer sets its own
    _ops_of_a_token: int | None = None  # forward and backward
    reference: ReferencePolicy | None = None  # what the policy is held against; a trainer sets its own
    _prepare_dataset: Callable[..., AnyDataset]  # TRL's hook: defined unless `prepare_dataset` is overridden
    uncalled_hooks: ClassVar[Mapping[str, str]] = {}  # TRL's methods, and what to do instead: see `overrides`

    def resolve_config(self, args: object | None, model: str | PreTrainedModel | PeftModel) -> BaseConfig:
        """Returns the trainer's own config: from `args`, or defaults with an output folder named after the model.

        Raises:
            ValueError: a subclass defines methods that would never be called.
        """
        watch_failures()
        check_overrides(type(self))
        return checked_config(self.config_class, args, model)

    def resolve_model(
        self, model: str | PreTrainedModel | PeftModel, args: BaseConfig, quantization_config: object | None
    ) -> PreTrainedModel | PeftModel:
        """Returns the model to train, loaded if it is given by name."""
        set_seed(args.seed)  # before everything, since adapters start from random weights
        return loaded_model(self.load_model, model, args, quantization_config)

    def resolve_tokenizer(
        self, processing_class: PreTrainedTokenizerBase | None, model: PreTrainedModel | PeftModel, args: BaseConfig
    ) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, loaded by the model's name if need be, with a pad token that the model agrees on."""
        inner = base_model(model)
        self._given_processing_class = processing_class
        processing_class = checked_tokenizer(processing_class, inner, args)
        self.adjust_tokenizer(processing_class, model, args)
        set_pad_token(processing_class, inner, args)
        return processing_class

    def adjust_tokenizer(
        self, processing_class: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, args: BaseConfig
    ) -> None:
        """Changes the tokenizer and the model's vocabulary as the arguments ask, before a pad token is chosen."""

    def adapt(
        self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: BaseConfig
    ) -> PreTrainedModel | PeftModel:
        """Returns the model with its adapter, scoring forward and dropout as the arguments ask."""
        self.attach(base_model(model))
        return adapt_model(model, peft_config, args, reads_images=self.images is not None)

    def choose_layout(self, model: PreTrainedModel | PeftModel, args: BaseConfig, sequences: list[list[int]]) -> str:
        """Returns the best batch layout for a model; see `modeling.layouts.choose_layout`."""
        self.layout = choose_layout(base_model(model), layout_request(self, model, args), sequences, self.readout)
        return self.layout.name

    def start(self, **kwargs: Any) -> None:
        """Initialises transformers.Trainer and the metrics; `kwargs` are those of its constructor."""
        args = kwargs["args"]
        forbid_dispatching(args)
        warn_of_reentrant_router(args, self.router_aux_loss_coef)
        self.sequence_group = take_sequence_group(self, args, kwargs["model"])
        if self.images is not None:
            kwargs["processing_class"] = self.images.reader.processor  # saved beside the model
        with checked_arguments(kwargs):
            super().__init__(**kwargs)
        set_up_trainer(self)
        chosen_balance(self)
        self._buffers = {"train": MetricBuffer(), "eval": MetricBuffer()}
        self._tokens = TokenCounter()
        self.fused_models = FusedModels(self)
        self.checkpoints = Checkpoints(self, lambda: RunRecord(self, self.method, self.token_columns))
        self.log_window = LogWindow(self, self._tokens, lambda: self._buffers["train"])
        self._signals = StopSignals(self.accelerator)
        self.run_report = RunReport(self, lambda: self._signals.has_stopped)
        self.callback_handler.callbacks.insert(0, self.run_report)  # before a progress bar begins
        self._adds_virtual_tokens = has_virtual_tokens(self.model)
        self._divergence = DivergenceWatch(self)
        # The window comes first, since others read what it brings back.
        for callback in (self.log_window, self._signals, self._divergence, *own_callbacks(self)):
            self.add_callback(callback)
        base_model(self.model).add_model_tags([*model_tags(self.method), *getattr(self, "_tag_names", ())])
        if self.reference is not None:
            self.reference.start(kwargs.get("callbacks") or ())

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, as the base does; one that updates the reference gets it."""
        super().add_callback(callback)
        if self.reference is not None:
            self.reference.lend(callback)

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: BaseConfig) -> None:
        """Sets what preparing the datasets reads of the trainer, from the arguments and the first row."""

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: BaseConfig, name: str
    ) -> AnyDataset:
        """Returns the rows that the collator reads; a prepared dataset comes back as it is. `name` is for messages."""
        return self._prepare_dataset(dataset, processing_class, args, name)

    def prepare_datasets(
        self,
        train_dataset: AnyDataset,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
        processing_class: PreTrainedTokenizerBase,
        args: BaseConfig,
        model: PreTrainedModel | PeftModel,
    ) -> tuple[AnyDataset, AnyDataset | dict[str, AnyDataset] | None]:
        """Returns both datasets prepared, after their token ids were held against the model's vocabulary."""
        train_dataset, eval_dataset = change_parts(with_dicts_as_rows, train_dataset, eval_dataset)
        given, inner, parts = self._given_processing_class, base_model(model), named_parts(train_dataset, eval_dataset)
        self.images = together(lambda: images_of_datasets(parts, given, processing_class, inner, args))
        together(lambda: self.set_up_data(train_dataset, processing_class, args))
        return together(lambda: prepared_parts(self, train_dataset, eval_dataset, processing_class, args, model))

    def check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: BaseConfig, name: str) -> None:
        """Checks that a model has positions for the rows of a prepared dataset; see `check_lengths`."""
        check_lengths(dataset, name, self.token_columns, model, args.max_length)

    def _set_signature_columns_if_needed(self) -> None:
        images = () if self.images is None else IMAGE_COLUMNS
        self._signature_columns = self._signature_columns or [*(self.signature_columns or self.token_columns), *images]

    # ---- the loss

    def score(
        self, model: torch.nn.Module, batch: TokenBatch, outputs: tuple[str, ...] = ("logprobs",), **kwargs: Any
    ) -> ModelScores:
        """Scores a batch by `modeling.scoring.score` with the arguments' settings of the head.

        kwargs: further keywords of `modeling.scoring.score`, and of the model's forward.
        """
        if self._adds_virtual_tokens:
            kwargs["position_ids"] = None  # peft counts them itself, with the virtual tokens first
        return score(model, batch, outputs=outputs, head=self.head_options, **kwargs)

    @property
    def called_policy(self) -> Callable[..., ModelScores]:
        """Returns the policy as it is called to score a batch outside of a step's loss."""
        return self.model

    @property
    def head_options(self) -> HeadOptions:
        """Returns the arguments' settings of the head."""
        return HeadOptions(self.args.head_backend, self.args.head_workspace_bytes, self.args.head_grad)

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the loss (0-d) of one micro-batch and adds its gradients; a check that fails names the step."""
        try:
            with sharing_rows(self.sequence_group):
                loss = super().training_step(model, inputs, *args, **kwargs)
        except NotFiniteError as error:
            raise NotFiniteError(f"step {self.state.global_step + 1}: {error}") from error
        self._divergence.see_loss(loss)
        if self.batches is not None:
            self.batches.say_if_read(inputs)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        return self._divergence.see_norm(super()._get_grad_norm(*args, **kwargs))

    # ---- batches

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Returns a batch on the trainer's device, where its loader has put it if that is ours; no look into it."""
        if not isinstance(inputs, DictBatch):
            return super()._prepare_inputs(inputs)
        return inputs.to(self.args.device) if inputs.device.type == "cpu" else inputs

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Collects the micro-batches of an optimizer step, equal numbers of them in all processes."""
        return super().get_batch_samples(in_step(epoch_iterator, self.train_dataset), *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Estimates the operations of a step on a batch: those of the layout that the model runs on."""
        batch = None if self.batches is None else self.batches.unread(inputs)
        if batch is None:
            return super().floating_point_ops(inputs)
        if self._ops_of_a_token is None:  # the base counts the model's weights each time
            self._ops_of_a_token = super().floating_point_ops({"input_ids": batch.input_ids[:1, :1]})
        return self._ops_of_a_token * batch.input_ids.numel()

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(inputs.copy() if isinstance(inputs, DictBatch) else inputs)

    # ---- evaluation

    def _get_dataloader(self, **kwargs: Any) -> Iterable[Any]:
        """Returns a loader, as the base does; a stream that is evaluated comes in the batches of a dataset."""
        return make_loader(self, super()._get_dataloader, **kwargs)

    @evaluates
    def evaluate(
        self,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Returns process 0's metrics of datasets, prepared as the constructor's; a dict's names follow the prefix."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self.prepare_for_evaluation(eval_dataset)
        return decided_by_first(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix).copy)

    @evaluates
    def predict(self, test_dataset: AnyDataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts; the dataset is prepared as those of the constructor were. The arguments are those of the base."""
        return super().predict(self.prepare_for_evaluation(test_dataset), *args, **kwargs)

    def prepare_for_evaluation(self, dataset: AnyDataset) -> AnyDataset:
        """Returns a dataset given to `evaluate`, prepared."""
        dataset = self.prepare_dataset(dataset, tokenizer_of(self.processing_class), self.args, "eval")
        self.check_positions(base_model(self.accelerator.unwrap_model(self.model)), dataset, self.args, "eval")
        return dataset

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Computes the loss of a batch, and for compute_metrics its logits and labels, padded as TRL pads them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, self.labels_of(inputs)

    def labels_of(self, inputs: Any) -> torch.Tensor | None:
        """Returns what compute_metrics is given as labels of a batch; None where it is given none."""
        return None

    # ---- metrics

    @property
    def mode(self) -> str:
        """Returns "train" or "eval", as the model is."""
        return "train" if self.model.training else "eval"

    @property
    def _metrics(self) -> dict[str, MetricLists]:
        """Returns the metrics that wait for the next log as TRL keeps them: by mode and name a list of numbers."""
        return {mode: MetricLists(buffer) for mode, buffer in self._buffers.items()}

    def record(self, metrics: Recorded) -> None:
        """Records one micro-batch's (total, count) pairs of 0-d tensors until the next log."""
        self._buffers[self.mode].add(metrics)

    def count_tokens(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns num_tokens as a metric: all tokens trained on so far, by every process."""
        return self._tokens.metric(batch, trains=self.mode == "train")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, with "eval_" before their names in evaluation."""
        metrics = self._buffers[self.mode].pop(lambda pairs: self.accelerator.reduce(pairs, "sum"))
        if "num_tokens" in metrics:
            metrics["num_tokens"] = sum_over_rows(self, self._tokens.seen)
        logs.update(metrics if self.mode == "train" else {f"eval_{name}": each for name, each in metrics.items()})
        super().log(logs, start_time)

    # ---- saving and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Trains. resume_from_checkpoint=True goes on from the newest checkpoint that is whole.

        Raises:
            ValueError: every weight is frozen; a method was put in that is never called; True was given and there is
                no such checkpoint; the given one is not whole, or another run's; or another run uses the folder.
            DivergedError: weights became NaN or infinite, or losses and gradients stayed so; names the step.
            CheckpointError: there is no room for a checkpoint.
            KeyboardInterrupt, SystemExit: as in `StopSignals.caught`.
        """
        check_overrides(type(self), vars(self))
        check_trains(self.accelerator.unwrap_model(self.model))
        check_settings(self.args)  # also what was set since the trainer was made
        with (
            tidied(self),
            self._signals.caught(saves=self.args.save_strategy != "no"),
            self.checkpoints.run(resume_from_checkpoint) as checkpoint,
            self.run_report.running(),
            failing_together(),
            freed_memory_kept(self.args.device),
        ):
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self._divergence.finish()
            return result

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes README.md into the output folder: what was trained, from what, with which method."""
        if self.is_world_process_zero():
            write_model_card(self, self.method, model_name, dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, whole whatever checkpoints hold; says so if its weights are broken."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        self._divergence.name_broken_weights(output_dir or self.args.output_dir)
        with saved_whole(self.accelerator):
            super().save_model(output_dir)
        self.run_report.say_saved(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        save_image_settings(self.model, output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        self._divergence.check_weights()
        save = super()._save_checkpoint
        folder = self.checkpoints.write(self._get_output_dir(trial), lambda: save(model, trial))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))

    def _get_output_dir(self, trial: object) -> str:
        return self.checkpoints.run_folder or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leaves the push until the checkpoint has its name."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.checkpoints.keep_dtypes()  # before the optimizer's states follow them
        super()._load_optimizer_and_scheduler(checkpoint)
        self.checkpoints.load_parts(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.checkpoints.load_weights(self.state.best_model_checkpoint)
