"""Trains a policy and its value model as one model, whichever engine shards them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trl_fast.modeling.loading import base_model, is_quantized
from trl_fast.modeling.policy_and_value import PolicyAndValue, policy_weights
from trl_fast.modeling.scoring import ModelScores
from trl_fast.parallel.engines import Engine, engine_of

from ..online.trainer import OnlineTrainer
from .critic import Critic


class ActorCriticTrainer(OnlineTrainer):
    """Trains a policy, `model`, and a value model that one optimizer trains and one engine prepares.

    A subclass makes the `critic`, and calls `join_models` when it has started.
    """

    critic: Critic

    def start(self, **kwargs: Any) -> None:
        """Starts as the base does.

        Raises:
            NotImplementedError: FSDP1 shards the weights.
        """
        super().start(**kwargs)
        if engine_of(self.accelerator) is Engine.FSDP1:
            raise NotImplementedError(
                f"{type(self).__name__} does not work under FSDP1, which cannot clip the gradients of each of two "
                "models that it shards together; use FSDP2 (fsdp_version: 2)"
            )

    def join_models(self) -> None:
        """Makes one model of the policy and the critic's, for the engine to prepare."""
        policy: Any = self.model
        self.models = PolicyAndValue(policy, self.critic.plain)
        self.model_wrapped = self.models
        if self.place_model_on_device and not is_quantized(base_model(self.value_model)):
            self._move_model_to_device(self.value_model, self.args.device)
        self.critic.join(lambda **inputs: self.model_wrapped(value=inputs)[1], self.accelerator)

    @property
    def value_model(self) -> PreTrainedModel | PeftModel:
        """Returns the value model, without what was wrapped around it."""
        return self.critic.plain

    @property
    def called_policy(self) -> Callable[..., ModelScores]:
        """Returns the policy as it is called to score a batch: as a part of both models."""
        return lambda **inputs: self.model_wrapped(policy=inputs)[0]

    @property
    def prepared_model(self) -> torch.nn.Module:
        """Returns what the engine has made of both models."""
        return self.model_wrapped

    @contextmanager
    def _as_both(self) -> Iterator[None]:
        """Lets transformers.Trainer find both models where it looks for the one that it trains."""
        policy, self.model = self.model, self.models
        try:
            yield
        finally:
            # FSDP leaves its wrapper there.
            self.model = policy

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_both():
            prepared = super()._prepare_for_training(*args, **kwargs)
        self.callback_handler.model = self.model
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # FSDP writes both models here, and DeepSpeed too.
        with self._as_both():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_best_model(self) -> None:
        with self._as_both() if self.is_fsdp_enabled else nullcontext():
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the policy alone, also of a state dict of both models."""
        super()._save(output_dir, policy_weights(state_dict or {}) or state_dict)

    @contextmanager
    def unsynced(self, model: torch.nn.Module) -> Iterator[None]:
        """Lets gradients wait within the context for those of a later micro-batch: DeepSpeed makes no step in it."""
        gradients = self.accelerator.gradient_state
        gradients._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            gradients._set_sync_gradients(True)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clips each model's gradients by their own norm, and returns the policy's."""
        norm = super()._clip_grad_norm(self.model)
        if not self.is_deepspeed_enabled:  # which clips both models' gradients together
            self.accelerator.clip_grad_norm_(self.value_model.parameters(), self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        norm = super()._get_grad_norm(self.model, *args, **kwargs)
        gradients = [weight.grad for weight in self.critic.trained_weights().values() if weight.grad is not None]
        value_norm = self._divergence.see_norm(torch.nn.utils.get_total_norm(gradients))
        assert norm is not None and value_norm is not None, "both are known"
        self._divergence.see_norm(norm + value_norm)
        return norm
