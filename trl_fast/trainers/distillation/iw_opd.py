"""Defines IWOPDTrainer, with TRL's interface and behaviour: a policy gradient by what a teacher says of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.prompt_completion import COMPLETION_IDS, prompts_of_conversations
from trl_fast.data.prompt_only import prepare_prompt_dataset
from trl_fast.losses.iw_opd import IWOPDLossConfig
from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.distillation import DivergenceSettings
from trl_fast.rollout import RolloutEngine
from trl_fast.rollout.teacher_server import TeacherServer

from ..base.trl_attributes import answers_to
from .gkd import check_unused_arguments
from .iw_opd_config import IW_OPD, IWOPDConfig
from .iw_opd_step import IWOPDUpdate, iw_opd_step
from .served_teacher import SAMPLED, open_teacher_server
from .server_samples import ServerMixture, ServerSamples
from .server_step import ServerUpdate, server_distillation_step
from .step import DistillationUpdate, distillation_step
from .trainer import DistillationTrainer
from .trl_attributes import IW_OPD_ATTRIBUTES, IW_OPD_UNCALLED_HOOKS

logger = logging.getLogger(__name__)


@answers_to(IW_OPD_ATTRIBUTES)
class IWOPDTrainer(DistillationTrainer):
    """Trains by importance-weighted on-policy distillation (arXiv 2606.22600), or by a divergence.

    Args:
        model, teacher_model, args, processing_class, callbacks, optimizers: as in DistillationTrainer; with
            `use_teacher_server` there is no teacher_model.
        peft_config, quantization_config, rollout_engine, tokenizer: as there, too.
        train_dataset, eval_dataset: rows with `messages` or `prompt`; with lmbda below 1 also the answer.
        data_collator: not used.
        compute_metrics, preprocess_logits_for_metrics: refused.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments or data, by name, before training starts.
        ConnectionError, RuntimeError: the teacher's server is not up, or is none of vLLM's.
    """

    method = "iw_opd"
    config_class: Any = IWOPDConfig
    samples_class = ServerSamples
    mixture_class = ServerMixture
    uncalled_hooks = IW_OPD_UNCALLED_HOOKS
    args: Any
    server: TeacherServer | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        teacher_model: str | PreTrainedModel | PeftModel | None = None,
        args: IWOPDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: object | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_unused_arguments(
            model,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        ours: Any = {"rollout_engine": rollout_engine, "tokenizer": tokenizer}
        assert model is not None, "it is looked at before"
        super().__init__(
            *(model, teacher_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers),
            quantization_config=quantization_config,
            peft_config=peft_config,
            **ours,
        )

    # ---- the teacher

    def choose_teacher(self, given: Any, args: Any) -> Any:
        """Returns the teacher that the trainer is given or that the arguments name; None: a server runs it.

        Raises:
            TypeError, ValueError: as in the base.
        """
        if not args.use_teacher_server:
            return super().choose_teacher(given, args)
        if given is not None:
            logger.warning("teacher_model is not used: with use_teacher_server=True the server runs the teacher.")
        return None

    def set_up_teacher(self, teacher: Any, student: Any, tokenizer: PreTrainedTokenizerBase, args: Any) -> Any:
        """Returns the teacher, loaded, or waits for its server.

        Raises:
            OSError, ValueError, ConnectionError, RuntimeError: as in the base, and in `open_teacher_server`.
        """
        if not args.use_teacher_server:
            return super().set_up_teacher(teacher, student, tokenizer, args)
        self.server = open_teacher_server(args, student)
        return None

    @property
    def teacher_model(self) -> Any:
        """Returns the teacher, as the engine has prepared it; None: a server runs it."""
        return self.ref_model

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts, and the completions where they are read.

        Raises:
            NotImplementedError: there are images.
        """
        if self.images is not None:
            raise NotImplementedError(f"the {name} dataset has images, which are not served; use DistillationTrainer")
        if COMPLETION_IDS in self.token_columns:
            return super().prepare_dataset(dataset, processing_class, args, name)
        return prepare_prompt_dataset(
            prompts_of_conversations(dataset, num_proc=args.dataset_num_proc, name=name),
            processing_class,
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=args.max_prompt_length,
            num_proc=args.dataset_num_proc,
            name=name,
        )

    # ---- the update

    def _update(self, samples: Any, tokens: float) -> DistillationUpdate:
        """Returns the micro-batch of samples. tokens: those that the loss is a mean over, a process's share."""
        part: ServerSamples = samples.select(samples.by_beginning(range(len(samples))))
        is_gradient = self.args.distillation_objective == IW_OPD
        told = None
        if self.server is not None:
            with self.rescue.guard():
                told = part.answers()
        if told is not None and not is_gradient:
            # As in ServerDistillationTrainer, the mean over its own tokens.
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            tokens = max(part.lengths.sum().item(), 1) * steps
        update, device = super()._update(part, tokens), self.accelerator.device
        if not is_gradient:
            return update if told is None else self._told(update, *part.compared(self.args.beta))
        sampled = part.flat("sampling_logprobs")
        given = (None if told is None else told.own_logprobs, sampled)
        on_device = [None if each is None else copy_to_device(each, device) for each in given]
        return IWOPDUpdate(update.batch, update.weights, tuple(map(len, part.completion_ids)), *on_device)

    def _told(self, update: DistillationUpdate, ids: torch.Tensor, logprobs: torch.Tensor) -> ServerUpdate:
        given = (copy_to_device(each, self.accelerator.device) for each in (ids, logprobs))
        return ServerUpdate(update.batch, update.weights, *given)

    @property
    def divergence_settings(self) -> DivergenceSettings:
        """Returns what the loss compares, as the arguments are now."""
        args = self.args
        given = {"temperature": args.loss_temperature, "tail": args.loss_add_tail, "vocab_size": self.vocab_size}
        if self.server is None and args.loss_top_k:
            side = "teacher" if args.beta == 0 else "student"
            return DivergenceSettings(args.beta, top_k=args.loss_top_k, top_k_of=side, **given)
        return DivergenceSettings(args.beta, **given)

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        args, keywords = self.args, self.step_options
        if isinstance(inputs, IWOPDUpdate):
            told = self._teacher_logprobs(inputs) if inputs.teacher_logprobs is None else inputs.teacher_logprobs
            config = IWOPDLossConfig(args.iw_opd_gamma, args.iw_opd_epsilon)
            result = iw_opd_step(model, inputs, told, config, temperature=args.temperature, **keywords)
        elif self._compares_sampled_token(inputs):
            told = self._teacher_logprobs(inputs)
            sampled = ServerUpdate(inputs.batch, inputs.weights, inputs.batch.targets[:, None], told[:, None])
            result = server_distillation_step(model, sampled, self.divergence_settings, **keywords)
        elif isinstance(inputs, ServerUpdate):
            result = server_distillation_step(model, inputs, self.divergence_settings, **keywords)
        else:
            result = distillation_step(model, self.teacher_model, inputs, self.divergence_settings, **keywords)
        self.record(result.metrics)
        return result.loss

    def _compares_sampled_token(self, inputs: Any) -> bool:
        args = self.args
        is_sampled = args.beta > 0 and args.loss_top_k == 1 and args.reverse_kl_top_1_mode == SAMPLED
        return is_sampled and not isinstance(inputs, ServerUpdate)

    def _teacher_logprobs(self, inputs: DistillationUpdate) -> torch.Tensor:
        """Returns the teacher's log-probabilities (N,) of the batch's tokens, without gradient."""
        return self.reference_logprobs(inputs.batch)

    # ---- metrics

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes one micro-batch's step, and records the loss and the lengths of its kind of completions."""
        step, place = self.state.global_step, self.generation.step % self.args.steps_per_generation
        loss = super().training_step(*args, **kwargs)
        slices: Any = self.generation.slices
        self._record_kind(slices[place].lengths, loss, is_own=self.mixture.drawn(step)[place])
        return loss

    def _record_kind(self, lengths: torch.Tensor, loss: torch.Tensor, *, is_own: bool) -> None:
        kind, steps = "on_policy" if is_own else "off_policy", self.args.gradient_accumulation_steps
        self.recorder.record_statistics(f"completions/{kind}_{{}}_length", lengths, ("mean", "max", "min"))
        if is_own:
            is_cut = (lengths >= self.args.max_completion_length).float()
            self.recorder.record_statistics("completions/truncated_fraction", is_cut, ("mean",))
        self.record({f"{kind}_loss": Metric.over(loss.detach().float() * steps, 1)})

    @property
    def shows_completions(self) -> bool:
        """Says whether completions are shown with the next log."""
        return self.state.global_step % self.args.log_completions_steps == 0
