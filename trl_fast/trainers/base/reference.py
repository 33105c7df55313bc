"""Makes the reference policy of a trainer, prepares it as the policy is, and scores with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trl_fast.data import TokenBatch
from trl_fast.modeling.layouts import ChosenLayout, choose_layout_or_pad
from trl_fast.modeling.loading import base_model, load_causal_lm
from trl_fast.modeling.reference_policy import copy_adapter_as_reference, copy_as_reference, freeze, reference_scope
from trl_fast.modeling.scoring import ModelScores, attach_scoring, score
from trl_fast.modeling.segment_attention import follow_attention
from trl_fast.ops import TokenScores
from trl_fast.parallel.agreement import together
from trl_fast.parallel.engines import prepare_frozen
from trl_fast.settings.batch_layouts import AUTO, PADDED

from ..checkpoints.parts import WeightsPart
from .callbacks import SyncRefModelCallback
from .images import share_images
from .model_setup import layout_request, router_coefficient, set_up_layers
from .reference_config import ReferenceConfig
from .trainer import BaseTrainer


@torch.no_grad()
def reference_scores(
    model: Callable[..., ModelScores],
    batch: TokenBatch,
    *,
    policy: torch.nn.Module | None = None,
    adapter: str | None = None,
    **keywords: Any,
) -> TokenScores:
    """Scores a batch's N tokens under the reference policy, without gradient.

    Args:
        model: the reference, a model of its own or the policy, as it is called (wrapped or not).
        batch: the tokens.
        policy: the policy without what was wrapped around it, where the reference is the same model without its
            adapter, or with another one; None: the reference is a model of its own.
        adapter: the adapter that is the reference, as in `modeling.reference_policy.adapter_reference`.
        keywords: those of `modeling.scoring.score`.
    """
    with reference_scope(policy, adapter):
        return score(model, batch, **keywords).tokens


class ReferenceTrainer(BaseTrainer):
    """Trains with a loss that reads log-probabilities of a reference policy.

    `ref_model` is that policy; None where it is the model itself without its adapter, or where there is none. A
    subclass calls `set_up_models` and then `start`.
    """

    config_class = ReferenceConfig
    ref_model: torch.nn.Module | None = None

    def set_up_models(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None,
        args: ReferenceConfig,
        peft_config: PeftConfig | None,
        sequences: list[list[int]],
        *,
        wanted: bool = True,
        adapter_wanted: bool = True,
    ) -> tuple[PreTrainedModel | PeftModel, str]:
        """Returns the policy, adapted, and both models' batch layout; `ref_model` becomes the reference policy.

        sequences: a few, to try the model out on. wanted: whether a copy of the policy is made where no ref_model is
        given and no adapter tells policy and reference apart. adapter_wanted: the same of an adapter that the model
        came with.

        Raises:
            NotImplementedError: sync_ref_model with an adapter and no ref_model.
            ValueError: as in `adapt` and `choose_layout`.
        """
        self.ref_model = self._make_reference(model, ref_model, args, peft_config, wanted)
        came_with_adapter = isinstance(model, PeftModel)
        model = self.adapt(model, peft_config, args)
        if came_with_adapter:
            self._prepare_adapters(model, args, adapter_wanted)
        layout = self.choose_layout(model, args, sequences)
        if self.ref_model is not None:
            self._prepare_reference(base_model(model), args)
            layout = self._layout_of_both(base_model(model), args, sequences)
        self.router_aux_loss_coef = router_coefficient(base_model(model), args.router_aux_loss_coef)
        return model, layout

    def _make_reference(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None,
        args: ReferenceConfig,
        peft_config: PeftConfig | None,
        wanted: bool,
    ) -> PreTrainedModel | None:
        with_adapter = peft_config is not None or isinstance(model, PeftModel)
        if args.sync_ref_model and with_adapter and ref_model is None:
            raise NotImplementedError(
                "sync_ref_model=True needs a reference model of its own, but with PEFT the reference is the same "
                "model without its adapter; give a ref_model or set sync_ref_model=False"
            )
        if isinstance(ref_model, str):
            options = args.ref_model_init_kwargs or {"dtype": model.dtype}
            return freeze(load_causal_lm(ref_model, **{"trust_remote_code": args.trust_remote_code, **options}))
        if ref_model is not None:
            return freeze(ref_model)
        return None if with_adapter or not wanted else copy_as_reference(model)

    def _prepare_adapters(self, model: PeftModel, args: ReferenceConfig, wanted: bool) -> None:
        if args.model_adapter_name is not None:
            model.set_adapter(args.model_adapter_name)
        # Training goes on from the adapter that the model came with, so a frozen copy of it is the reference.
        if wanted and self.ref_model is None and args.ref_adapter_name is None:
            copy_adapter_as_reference(model)

    def _prepare_reference(self, policy: PreTrainedModel, args: ReferenceConfig) -> None:
        inner = base_model(self.ref_model)
        attach_scoring(inner)
        inner.trl_fast_fused_head = policy.trl_fast_fused_head
        # Of another family, it gets the attention of the layout that it is tried out in.
        if type(inner) is type(policy):
            follow_attention(inner, policy)
        together(lambda: set_up_layers(inner, args, trains=False))

    def _layout_of_both(self, policy: PreTrainedModel, args: ReferenceConfig, sequences: list[list[int]]) -> str:
        """Returns the policy's layout, or the padded one where the reference is of another family that needs it.

        Raises:
            ValueError: the layout was asked for by name, and the reference cannot run it.
        """
        inner = base_model(self.ref_model)
        layout = self.layout.name
        if type(inner) is type(policy) or layout == PADDED:
            return layout
        request = replace(layout_request(self, inner, args), asked=layout)
        if choose_layout_or_pad(inner, request, sequences, self.readout) == layout:
            return layout
        reason = f"the reference, {type(inner).__name__}, runs padded rows only"
        if args.batch_layout != AUTO:
            raise ValueError(f"batch_layout={layout!r} cannot be used: {reason}; use 'auto' or {PADDED!r}")
        self.layout = ChosenLayout(PADDED, reason)
        return PADDED

    def start(self, **kwargs: Any) -> None:
        """Starts as the base does; then the reference goes where the policy is."""
        super().start(**kwargs)
        if self.ref_model is not None:
            share_images(self, self.ref_model)
            self.ref_model = prepare_frozen(self.accelerator, self.ref_model)
        for callback in kwargs.get("callbacks") or ():
            self._lend_reference(callback)
        if self.ref_model is None:
            return
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
            self._save_reference()

    def _save_reference(self) -> None:
        """Puts the reference, which changes, into checkpoints."""
        part = WeightsPart("reference", self.ref_model, self.accelerator, writes=self.args.should_save)
        self.checkpoints.collective_parts.append(part)

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, as the base does; one that updates the reference gets it."""
        super().add_callback(callback)
        self._lend_reference(callback)

    def _lend_reference(self, callback: Any) -> None:
        if not getattr(callback, "update_ref_model", False):
            return
        if self.ref_model is None or isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise ValueError(
                f"{type(callback).__name__}(update_ref_model=True) needs a reference model of its own, and a policy "
                "without an adapter, whose weights it can take; leave update_ref_model out"
            )
        callback.ref_model = self.ref_model
        self._save_reference()

    @property
    def called_policy(self) -> Callable[..., ModelScores]:
        """Returns the policy as it is called to score a batch outside of a step's loss."""
        return self.model

    def score_reference(self, batch: TokenBatch, **kwargs: Any) -> TokenScores:
        """Scores a batch's N tokens under the reference; `kwargs` are those of `modeling.scoring.score`."""
        model = self.called_policy if self.ref_model is None else self.ref_model
        policy = self.accelerator.unwrap_model(self.model) if self.ref_model is None else None
        options = {"policy": policy, "adapter": self.args.ref_adapter_name, "head": self.head_options}
        with self.compute_loss_context_manager():
            return reference_scores(model, batch, **options, **kwargs)
