"""Defines SDFTTrainer, with TRL's interface and behaviour, on shared prompts and a head that is read once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset
from trl_fast.data.repeat_sampler import RepeatSampler
from trl_fast.data.teacher_prompts import (
    PRIVILEGED_CONTEXT,
    TEACHER_PROMPT_IDS,
    prepare_teacher_prompts,
    teacher_prompt,
)
from trl_fast.modeling.loading import base_model
from trl_fast.parallel.engines import engine_of
from trl_fast.parallel.failures import failing_together
from trl_fast.rollout import NoRewards, RolloutEngine, end_token_ids

from ..base.prepared_datasets import check_dataset_type
from ..base.step import insert_after
from ..base.tokenizers import older_tokenizer_name
from ..base.trl_attributes import answers_to
from ..distillation.teacher import check_sharded_head
from ..online.engines import make_engine
from ..online.generation_buffer import GenerationBuffer
from ..online.prompt_order import PromptOrder
from ..online.rollout_checks import check_sources
from ..online.sampling import Sampling
from ..online.trainer import OnlineTrainer
from .events import call_event, tell_of_batch
from .model_checks import check_topk
from .samples import TaughtSamples, taught_update
from .sdft_config import SDFTConfig
from .step import DISTILLATION_LOSS, SelfDistillationSettings, SelfDistillationUpdate, self_distillation_step
from .teacher_models import SelfTeacher
from .trl_attributes import SDFT_ATTRIBUTES, UNCALLED_HOOKS


@answers_to(SDFT_ATTRIBUTES)
class SDFTTrainer(OnlineTrainer):
    """Trains a model to answer as it does itself when it is told more, on its own completions (arXiv 2601.19897).

    Args:
        model: a name, a causal language model, or a PeftModel.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages, and `privileged_context`, what the teacher
            is told: text or messages.
        processing_class: the tokenizer; None: the model's. Its older name is `tokenizer`.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments or data, by name, before training starts.
    """

    method = "sdft"
    config_class: Any = SDFTConfig
    token_columns: tuple[str, ...] = (PROMPT_IDS, TEACHER_PROMPT_IDS)
    signature_columns = ("prompt", PRIVILEGED_CONTEXT, PROMPT_IDS, TEACHER_PROMPT_IDS)
    loss_is_scaled_for_ga = True
    uncalled_hooks = UNCALLED_HOOKS
    args: Any
    model: Any  # there always is one
    reference: SelfTeacher

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SDFTConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: object | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_sources(None, None, None, rollout_engine)
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        config: Any = self.resolve_config(args, model)
        check_dataset_type(train_dataset, "train_dataset")
        student: Any = self.resolve_model(model, config, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, student, config)
        check_topk(student, config)
        train, evaluated = self.prepare_datasets(train_dataset, eval_dataset, processing_class, config, student)
        sequences = [list(row[PROMPT_IDS]) for row in train.take(2)]
        self.reference = SelfTeacher(self)
        student, layout = self.reference.set_up_teacher(student, config, peft_config, sequences)
        self.sampling, self.generation = Sampling(self), GenerationBuffer(config, TaughtSamples)
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

    def _set_up_rollouts(self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None) -> None:
        check_sharded_head(model, shards_weights=engine_of(self.accelerator).needs.shards_weights)
        self.add_callback(self.generation)
        self.seed_sampling(layout)
        self.end_ids = end_ids = end_token_ids(model, self.tokenizer)
        self.set_up_loop(
            make_engine(self, engine, end_ids),
            NoRewards(),
            end_ids=end_ids,
            completions_kept=self.args.generation_batch_size,
            samples_class=TaughtSamples,
        )
        self.loop.settings = self.sampling.settings

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the student's prompts and the teacher's.

        Raises:
            NotImplementedError: there are images.
            ValueError: as in `prepare_prompt_dataset` and `prepare_teacher_prompts`.
        """
        if self.images is not None:
            raise NotImplementedError(f"the {name} dataset has images, which the teacher's prompts have no place for")
        options: dict[str, Any] = {
            "chat_template_kwargs": args.chat_template_kwargs,
            "max_prompt_length": args.max_prompt_length,
            "num_proc": args.dataset_num_proc,
            "name": name,
        }
        dataset = prepare_prompt_dataset(dataset, processing_class, **options)
        template = args.teacher_prompt_template
        return prepare_teacher_prompts(dataset, processing_class, template=template, **options)

    def check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: Any, name: str) -> None:
        """Checks that a model has positions for prompts of either kind with sampled completions.

        Raises:
            ValueError: it has not.
        """
        columns = self.token_columns
        try:
            for column in columns:
                self.token_columns = (column,)
                super().check_positions(model, dataset, args, name)
        finally:
            self.token_columns = columns

    def prompt_order(self) -> PromptOrder:
        """Returns the order of training prompts: each as often as it gets completions, for all updates on them."""
        return PromptOrder.of_generations(self.args, self.args.generation_batch_size)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.generations("eval"), seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """Returns the loader of the evaluation's rows; a stream is read as a whole, to have a dataset's order.

        Raises:
            ValueError: a batch would not hold all completions of its prompts.
        """
        self.args.check_eval_batch()
        datasets: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = datasets[eval_dataset]
        dataset: Any = datasets if eval_dataset is None else eval_dataset
        if isinstance(dataset, IterableDataset):
            dataset = list(dataset)
        return super().get_eval_dataloader(dataset)

    # ---- the rollout

    def make_samples(self, rows: list[dict[str, Any]]) -> TaughtSamples:
        """Samples a completion of each row, and records their lengths.

        Raises:
            ValueError, RuntimeError: as in `RolloutLoop.generate`.
        """
        args, asked = self.args, rows
        if args.generate_from_teacher:
            asked = [
                {"prompt": teacher_prompt(row, args.teacher_prompt_template), PROMPT_IDS: row[TEACHER_PROMPT_IDS]}
                for row in rows
            ]
        prompts = [row["prompt"] for row in asked]
        told = {"generation_prompts": prompts, "generation_prompt_text": None}
        call_event(self, "on_generation_prompts_selected", lambda: told)
        with self.rescue.guard():
            rollout, _ = self.loop.generate(asked, self)
            rollout.completions = self.loop.reader.read(prompts, rollout)
        found: Any = self.loop.samples_of(rollout, self)
        self.loop.metrics.keep_completions(prompts, rollout.completions)
        samples = replace(
            found,
            prompt_ids=[list(row[PROMPT_IDS]) for row in rows],
            teacher_prompt_ids=[list(row[TEACHER_PROMPT_IDS]) for row in rows],
        )
        moves = self.model.training and not (args.is_on_policy or args.generate_from_teacher)
        if args.distillation_is_clip is not None and moves:
            samples.old_logprobs = self.updates.score(samples, self.policy_logprobs, self._batches(samples))
        tell_of_batch(self, samples)
        return samples

    def _slices(self, samples: TaughtSamples) -> list[list[int]]:
        """Returns the numbers of the completions of each micro-batch, in their order: those of a prompt together."""
        size = self.args.train_batch_size if self.model.training else self.args.eval_batch_size
        return [list(range(start, min(start + size, len(samples)))) for start in range(0, len(samples), size)]

    def _batches(self, samples: TaughtSamples) -> list[list[int]]:
        """Returns the same in the order of the update's own batches."""
        return [samples.by_beginning(chosen) for chosen in self._slices(samples)]

    def _prepare_inputs(self, rows: Any) -> Any:
        """Returns a micro-batch; where it is time, of new completions of `rows`."""
        if not self.model.training:
            return self._update(self.make_samples(rows))
        if self.generation.is_used_up:
            samples = self.make_samples(rows)
            self.generation.slices = [samples.select(chosen) for chosen in self._slices(samples)]
            names = ("generate_every", "steps_per_generation")
            call_event(self, "on_generation_batch_built", lambda: {name: getattr(self.args, name) for name in names})
        current = self.generation.current
        assert isinstance(current, TaughtSamples), "slices are samples"
        return self._update(current)

    def _update(self, samples: TaughtSamples) -> SelfDistillationUpdate:
        """Returns the micro-batch of samples."""
        return taught_update(
            *(self.updates, samples, range(len(samples))),
            loss_divisor=self._loss_divisor,
            skipped_tokens=self.args.num_loss_tokens_to_skip,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes one micro-batch's step; step_time is that of all micro-batches of an optimizer step."""
        with self.generation.timed_step(self.current_gradient_accumulation_steps, self.recorder):
            return super().training_step(*args, **kwargs)

    # ---- the update

    @property
    def _loss_divisor(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _compute_loss(self, model: torch.nn.Module, inputs: SelfDistillationUpdate) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        result = self_distillation_step(
            *(model, self.reference, inputs, SelfDistillationSettings.of(self.args)),
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
            loss_divisor=self._loss_divisor,
        )
        own = {"sdft/distillation_loss": result.metrics[DISTILLATION_LOSS]}
        self.record(insert_after(DISTILLATION_LOSS, result.metrics, own))
        return result.loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Computes the loss of completions that are made for the evaluation."""
        update = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, update).detach(), None, None
