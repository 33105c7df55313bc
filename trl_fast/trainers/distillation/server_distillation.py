"""Defines ServerDistillationTrainer, with TRL's interface and behaviour: the teacher runs in a vLLM server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.device_transfer import copy_to_device
from trl_fast.modeling.distillation import DivergenceSettings
from trl_fast.rollout import RolloutEngine
from trl_fast.rollout.teacher_server import TeacherServer

from ..base.trl_attributes import answers_to
from .served_teacher import URL_SETTING, open_teacher_server
from .server_distillation_config import ServerDistillationConfig
from .server_samples import ServerMixture, ServerSamples
from .server_step import ServerUpdate, server_distillation_step
from .trainer import DistillationTrainer
from .trl_attributes import SERVER_ATTRIBUTES, SERVER_UNCALLED_HOOKS


@answers_to(SERVER_ATTRIBUTES)
class ServerDistillationTrainer(DistillationTrainer):
    """Trains a student to predict what a teacher in a vLLM server predicts, on completions of its own.

    Args:
        model, args, processing_class, callbacks, optimizers: as in DistillationTrainer.
        quantization_config, peft_config, rollout_func, rollout_engine, tokenizer: as there, too.
        train_dataset, eval_dataset: as there, without images.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments or data, by name, before training starts.
        ConnectionError, RuntimeError: the server is not up, or is none of vLLM's.
    """

    method = "server_distillation"
    config_class: Any = ServerDistillationConfig
    samples_class = ServerSamples
    mixture_class = ServerMixture
    uncalled_hooks = SERVER_UNCALLED_HOOKS
    args: ServerDistillationConfig
    server: TeacherServer

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ServerDistillationConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        *,
        rollout_func: Callable[[list, ServerDistillationTrainer], dict[str, Any]] | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        ours: Any = {"rollout_func": rollout_func, "rollout_engine": rollout_engine, "tokenizer": tokenizer}
        super().__init__(
            *(model, None, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers),
            quantization_config=quantization_config,
            peft_config=peft_config,
            **ours,
        )

    # ---- the teacher

    def choose_teacher(self, given: Any, args: Any) -> None:
        """Checks that a server is named.

        Raises:
            ValueError: none is.
        """
        if args.teacher_model_server_url is None:
            raise ValueError(f"{URL_SETTING} is missing; set it to the vLLM server that runs the teacher")

    def set_up_teacher(self, teacher: Any, student: Any, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Waits for the teacher's server.

        Raises:
            ConnectionError, RuntimeError: as in `TeacherServer`.
        """
        self.server = open_teacher_server(args, student)

    @property
    def teacher_model(self) -> Any:
        """Returns None: no teacher is here."""
        return None

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts, and the completions where they are read.

        Raises:
            NotImplementedError: there are images.
        """
        if self.images is not None:
            raise NotImplementedError(
                f"the {name} dataset has images, which the teacher's server is not sent; use DistillationTrainer, or "
                "leave them out"
            )
        return super().prepare_dataset(dataset, processing_class, args, name)

    # ---- the update

    def _update(self, samples: Any, tokens: float) -> ServerUpdate:
        """Returns the micro-batch of samples; the loss is the mean over its own tokens, as in TRL."""
        part = samples.select(samples.by_beginning(range(len(samples))))
        with self.rescue.guard():
            ids, logprobs = part.compared(self.args.beta)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        update = super()._update(part, max(part.lengths.sum().item(), 1) * steps)
        device = self.accelerator.device
        return ServerUpdate(
            update.batch, update.weights, copy_to_device(ids, device), copy_to_device(logprobs, device)
        )

    @property
    def divergence_settings(self) -> DivergenceSettings:
        """Returns what the loss compares, as the arguments are now."""
        args = self.args
        return DivergenceSettings(args.beta, temperature=args.loss_temperature, tail=args.loss_add_tail)

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        result = server_distillation_step(model, inputs, self.divergence_settings, **self.step_options)
        self.record(result.metrics)
        return result.loss
