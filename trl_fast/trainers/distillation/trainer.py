"""Defines DistillationTrainer, with TRL's interface and behaviour, on shared rows and two fused heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.prompt_completion import COMPLETION_IDS, prepare_given_completions, split_conversations
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset
from trl_fast.data.repeat_sampler import RepeatSampler
from trl_fast.data.tokenization import tokenize_unpaired
from trl_fast.modeling.distillation import DivergenceSettings
from trl_fast.modeling.layouts import choose_layout
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import give_up_fused_head
from trl_fast.parallel.engines import engine_of
from trl_fast.parallel.failures import failing_together
from trl_fast.rollout import NoRewards, RolloutEngine, end_token_ids
from trl_fast.rollout.samples import Samples

from ..base.model_setup import layout_request
from ..base.prepared_datasets import check_dataset_type, check_lengths
from ..base.reference import ReferencePolicy
from ..base.tokenizers import older_tokenizer_name
from ..base.trl_attributes import answers_to
from ..online.engines import make_engine
from ..online.generation_buffer import GenerationBuffer
from ..online.micro_batches import Slicer
from ..online.prompt_order import PromptOrder
from ..online.rollout_checks import check_sources
from ..online.sampling import Sampling
from ..online.tool_use import open_toolbox
from ..online.trainer import OnlineTrainer
from .config import DistillationConfig
from .mixture import Mixture
from .step import DistillationUpdate, distillation_step
from .teacher import (
    check_is_another,
    check_sharded_head,
    chosen_teacher,
    columns_of_one,
    load_teacher,
    same_family,
    shared_vocabulary,
)
from .trl_attributes import DISTILLATION_ATTRIBUTES, UNCALLED_HOOKS


@answers_to(DISTILLATION_ATTRIBUTES)
class DistillationTrainer(OnlineTrainer):
    """Trains a student to predict what a teacher predicts, on completions of its own (arXiv 2306.13649).

    Args:
        model: the student: a name, a causal language model, or a PeftModel.
        teacher_model: a name or a model with the student's vocabulary; None: the one that the config names.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages; with lmbda below 1 also `completion`, or
            `messages` in the place of both.
        processing_class: the tokenizer, or the processor for images; None: the model's. Its older name is `tokenizer`.
        tools: functions that the student may call, sync or async, with type hints and a docstring. Prompts must be
            conversations.
        rollout_func: as in GRPOTrainer: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments or data, by name, before training starts.
    """

    method = "distillation"
    config_class: Any = DistillationConfig
    loss_is_scaled_for_ga = True
    uncalled_hooks = UNCALLED_HOOKS
    # How a row without images becomes tokens where its completion is given.
    tokenize_row: ClassVar[Callable[..., dict[str, list[int]]]] = staticmethod(tokenize_unpaired)
    # What holds completions, and what makes them.
    samples_class: type[Samples] = Samples
    mixture_class: type[Mixture] = Mixture
    args: DistillationConfig
    model: Any  # there always is one
    # Tokens that both models know, where one head is padded further.
    vocab_size: int | None = None

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | PeftModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        *,
        rollout_func: Callable[[list, DistillationTrainer], dict[str, Any]] | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_sources(tools, rollout_func, None, rollout_engine)
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        config: Any = self.resolve_config(args, model)
        check_dataset_type(train_dataset, "train_dataset")
        teacher = self.choose_teacher(teacher_model, config)
        check_is_another(model, teacher, config, quantization_config)
        student: Any = self.resolve_model(model, config, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, student, config)
        teacher = self.set_up_teacher(teacher, student, processing_class, config)
        self.toolbox = open_toolbox(tools, processing_class, config)
        train, evaluated = self.prepare_datasets(train_dataset, eval_dataset, processing_class, config, student)
        sequences = self.probe_sequences([list(row[PROMPT_IDS]) for row in train.take(2)], student, teacher)
        self.reference = ReferencePolicy(self)
        given: Any = (student, teacher, config, peft_config, sequences)
        student, layout = self.reference.set_up(*given, wanted=False, adapter_wanted=False)
        if teacher is not None:
            self._read_heads_alike(base_model(student), config, sequences)
        self.rollout_func, self.sampling = rollout_func, Sampling(self)
        self.generation, self.slicer = GenerationBuffer(config, self.samples_class), Slicer()
        self.start(
            model=student,
            args=config,
            data_collator=list,
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_up_rollouts(base_model(student), layout, rollout_engine)

    def choose_teacher(self, given: Any, args: Any) -> Any:
        """Returns the teacher, a model or a name, that the trainer is given or that the arguments name.

        Raises:
            TypeError, ValueError: as in `teacher.chosen_teacher`.
        """
        return chosen_teacher(given, args)

    def set_up_teacher(
        self, teacher: Any, student: Any, tokenizer: PreTrainedTokenizerBase, args: Any
    ) -> PreTrainedModel | PeftModel | None:
        """Returns the teacher, loaded, whose vocabulary is the student's; None: it is not computed here.

        Raises:
            OSError, ValueError: as in `teacher.load_teacher` and `compare_vocabularies`.
        """
        teacher = load_teacher(teacher, args)
        self.compare_vocabularies(student, teacher, tokenizer, args)
        return teacher

    def compare_vocabularies(
        self, student: Any, teacher: Any, processing_class: PreTrainedTokenizerBase, args: Any
    ) -> None:
        """Finds out which tokens both models know.

        Raises:
            ValueError: as in `shared_vocabulary`.
        """
        self.vocab_size = shared_vocabulary(student, teacher, processing_class, args)
        # The other model has no embedding of these.
        self.unsampled_tokens = columns_of_one(student, teacher)

    def probe_sequences(self, sequences: list[list[int]], student: Any, teacher: Any) -> list[list[int]]:
        """Returns prompts on which both models are tried out."""
        return sequences

    def _read_heads_alike(self, model: PreTrainedModel, args: DistillationConfig, sequences: list[list[int]]) -> None:
        """Lets both models give their own logits where the head of one of them is not understood."""
        given: Any = self.teacher_model
        teacher: Any = base_model(given)
        if not same_family(model, teacher):
            # The head of a family is understood, or is not; one of another family is tried out.
            request = replace(layout_request(self, teacher, args), asked=self.layout.name)
            choose_layout(teacher, request, sequences, self.readout)
        for one, other in ((model, teacher), (teacher, model)):
            if one.trl_fast_fused_head and not other.trl_fast_fused_head:
                give_up_fused_head(one, f"the head of {type(other).__name__}, which it is compared with, is not read")

    def _set_up_rollouts(self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None) -> None:
        check_sharded_head(model, shards_weights=engine_of(self.accelerator).needs.shards_weights)
        self.add_callback(self.generation)
        self.seed_sampling(layout)
        self.end_ids = end_ids = end_token_ids(model, self.tokenizer)
        self.set_up_loop(
            make_engine(self, engine, end_ids),
            NoRewards(),
            end_ids=end_ids,
            completions_kept=self.args.completions_per_step,
            parses_messages=True,
            # What a template writes behind an end token is part of a given completion.
            warns_of_cut_off=self.args.lmbda == 1,
            samples_class=self.samples_class,
        )
        self.loop.settings = self.sampling.settings
        self.mixture = self.mixture_class(self)

    # ---- data

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Sets whether completions of the datasets are read."""
        if args.reads_given or args.evaluates_given:
            self.token_columns = (PROMPT_IDS, COMPLETION_IDS)

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts, and the completions where they are read."""
        options: dict[str, Any] = {
            "image_reader": self.images and self.images.reader,
            "chat_template_kwargs": self.prompt_template_kwargs(args),
            "num_proc": args.dataset_num_proc,
            "name": name,
        }
        dataset = split_conversations(dataset, num_proc=args.dataset_num_proc, name=name)
        if COMPLETION_IDS in self.token_columns:
            limits = {"max_length": args.max_length, "max_prompt_length": args.given_prompt_limit}
            return prepare_given_completions(
                dataset, processing_class, tokenize=self.tokenize_row, **limits, **options
            )
        return prepare_prompt_dataset(dataset, processing_class, **options)

    def prompt_template_kwargs(self, args: Any) -> dict[str, Any]:
        """Returns what the chat template is given beside a prompt's messages."""
        tools = {} if self.toolbox is None else {"tools": self.toolbox.schemas}
        return {**(args.chat_template_kwargs or {}), **tools}

    def check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: Any, name: str) -> None:
        """Checks that a model has positions for prompts with sampled completions, and with given ones.

        Raises:
            ValueError: it has not.
        """
        check_lengths(dataset, name, self.token_columns, model, None)
        maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Those that are cut have max_length tokens with their completions, at most.
        is_cut = args.prompt_limit is not None and (maximum is None or args.max_length <= maximum)
        if (args.lmbda > 0 or args.seq_kd) and not is_cut:
            columns, self.token_columns = self.token_columns, (PROMPT_IDS,)
            try:
                super().check_positions(model, dataset, args, name)
            finally:
                self.token_columns = columns

    def prompt_order(self) -> PromptOrder:
        """Returns the order of training prompts: each as often as it gets completions, for all micro-batches."""
        return PromptOrder.of_generations(self.args, self.args.completions_per_step)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        if self.args.evaluates_given:
            # In order, as in TRL's GKD: a batch's loss is a mean over its tokens, so its rows matter.
            return RepeatSampler(eval_dataset, mini_repeat_count=1, shuffle=False)
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.num_generations, seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """Returns the loader of the evaluation's rows; a stream is read as a whole, to have a dataset's order."""
        datasets: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = datasets[eval_dataset]
        dataset: Any = datasets if eval_dataset is None else eval_dataset
        if isinstance(dataset, IterableDataset):
            dataset = list(dataset)
        return super().get_eval_dataloader(dataset)

    # ---- the rollout

    def _prepare_inputs(self, rows: Any) -> Any:
        """Returns a micro-batch; where it is time, of new completions of `rows`."""
        if not self.model.training:
            samples = self.mixture.samples(rows, [not self.args.evaluates_given] * len(rows))
            return self._update(samples, max(samples.lengths.sum().item(), 1))
        if self.generation.is_used_up:
            self.generation.slices = self.mixture.slices(rows, self.state.global_step)
        current = self.generation.current
        assert isinstance(current, Samples), "slices are samples"
        return self._update(current, current.generation_tokens)

    def _update(self, samples: Samples, tokens: float) -> Any:
        """Returns the micro-batch of samples. tokens: those that the loss is a mean over, a process's share."""
        part = samples.select(samples.by_beginning(range(len(samples))))
        batch, mask = self.updates.token_batch(part), part.flat("mask")
        counted = torch.ones(len(batch.targets)) if mask is None else mask
        return DistillationUpdate(batch, copy_to_device(counted / tokens, self.accelerator.device))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes one micro-batch's step; step_time is that of all micro-batches of an optimizer step."""
        with self.generation.timed_step(self.current_gradient_accumulation_steps, self.recorder):
            return super().training_step(*args, **kwargs)

    # ---- the update

    @property
    def teacher_model(self) -> torch.nn.Module:
        """Returns the teacher, as the engine has prepared it."""
        assert self.ref_model is not None, "it is checked that there is one"
        return self.ref_model

    @property
    def divergence_settings(self) -> DivergenceSettings:
        """Returns what the loss compares, as the arguments are now."""
        args = self.args
        return DivergenceSettings(
            *(args.beta, args.divergence, args.loss_temperature), top_k=args.teacher_top_k, vocab_size=self.vocab_size
        )

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        given = (model, self.teacher_model, inputs, self.divergence_settings)
        result = distillation_step(*given, **self.step_options)
        self.record(result.metrics)
        return result.loss

    @property
    def step_options(self) -> dict[str, Any]:
        """Returns the keywords of `distillation_step`."""
        options: dict[str, Any] = {
            "head": self.head_options,
            "router_coef": self.router_aux_loss_coef,
            "loss_divisor": self.current_gradient_accumulation_steps if self.model.training else 1,
        }
        return {**options, "position_ids": None} if self._adds_virtual_tokens else options

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Computes the loss of completions that are made for the evaluation, or given for it."""
        update = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, update).detach(), None, None
