"""Simulates one optimizer step on fake tensors, through the very code that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from trl_fast.modeling.loading import base_model, whole_backbone
from trl_fast.ops.device import DeviceFacts, simulated_device

from .baseline_steps import baseline_loss
from .device_batches import on_device
from .device_facts import (
    GPU_KERNELS,
    KINDS_BY_CODE,
    DeviceMeter,
    flash_workspace,
    mixed_dtype_workspace,
    planned_facts,
)
from .fake_models import decoder_layers, give_fake_memory, planned_models
from .memory_timeline import (
    EMBEDDING_STAGE,
    FIRST_LAYER,
    FORWARD_STAGE,
    GRADIENTS,
    HEAD_STAGE,
    LAST_LAYER,
    MIDDLE_LAYERS,
    OPTIMIZER_STAGE,
    REFERENCE,
    VALUE_BACKWARD_STAGE,
    VALUE_FORWARD_STAGE,
    WEIGHTS,
    Timeline,
)
from .memory_tracker import CUDA_GRANULARITY, MemoryTracker, Observer
from .planned_images import VisionTower
from .planned_layers import pytorch_layers
from .planned_methods import PLANNED, PlannedModels
from .planned_optimizers import PlannedOptimizer, planned_optimizer
from .roofline.work import Work, WorkCounter
from .training_setup import OURS, TrainingSetup


def simulate(
    setup: TrainingSetup, max_length: int, layers: int | None = None, *, counts_work: bool = False
) -> Timeline:
    """Simulates the memory of one optimizer step on a micro-batch of sequences of `max_length` tokens.

    The step is not the first one: the optimizer has its averages already. Where the policy samples what it learns
    from, generation is part of the step. layers: only that many of the models'; counts_work: run all tiles that are
    alike, not some of them, and count the work. Otherwise a GPU's work has the operations of attention alone.

    Raises:
        ValueError: the batch_layout cannot be, or the architecture cannot be simulated.
    """
    meter = DeviceMeter()
    if setup.device != "gpu" and not counts_work:
        timeline = _simulated(setup, max_length, layers, _tracker(setup), planned_facts(setup.device, meter))
        return replace(timeline, host_bytes=meter.host_peak)
    tracker = _tracker(setup, lambda *given: counter.observe(*given))
    vision = VisionTower()
    counter = WorkCounter(
        lambda: tracker.stage,
        tracker.was_there,
        lambda: vision.is_reading or (bool(setup.images) and tracker.stage == EMBEDDING_STAGE),
        attention_only=not counts_work,
    )
    meter.launched = lambda size: counter.add(Work(moved=size, launches=1))
    meter.saw_launch = counter.launch
    meter.attended = lambda flops, read, written: counter.add(
        Work(attention_flops=flops, moved=read + written, launches=1)
    )
    meter.copied = lambda size: counter.add(Work(host_bytes=size))
    facts = planned_facts(setup.device, meter, every_tile=counts_work, capability=setup.capability)
    timeline = _simulated(setup, max_length, layers, tracker, facts, vision)
    return replace(timeline, host_bytes=meter.host_peak, work=counter.by_stage, image_work=counter.of_images)


def _simulated(
    setup: TrainingSetup,
    max_length: int,
    layers: int | None,
    tracker: MemoryTracker,
    facts: DeviceFacts,
    vision: VisionTower | None = None,
) -> Timeline:
    with planned_models(setup, max_length, layers) as models:
        return _simulated_with(models, setup, max_length, tracker, facts, vision)


def _simulated_with(
    models: PlannedModels,
    setup: TrainingSetup,
    max_length: int,
    tracker: MemoryTracker,
    facts: DeviceFacts,
    vision: VisionTower | None,
) -> Timeline:
    inputs = PLANNED[setup.method].inputs(setup, max_length, models.layout)
    with pytorch_layers(base_model(models.policy)), _faking(tracker, facts):
        with tracker.labelling(REFERENCE):
            if models.reference is not None:
                give_fake_memory(models.reference)
        with tracker.labelling(WEIGHTS):
            for model in models.trained:
                give_fake_memory(model)
        optimizer = planned_optimizer(setup, models.trained, tracker)
        _mark_stages(models.policy, tracker, _POLICY_STAGES)
        if models.value is not None:
            _mark_stages(models.value, tracker, _VALUE_STAGES)
        for model in filter(None, (models.policy, models.reference, models.value)):
            if vision is not None and setup.images:
                vision.watch(base_model(model))
        if setup.images and setup.activation_budget != 0:
            # The layers of a tower keep results where the pass before left room for them.
            _run(setup, models, inputs, optimizer, tracker)
            tracker.start_again()
        _run(setup, models, inputs, optimizer, tracker)
    selective = base_model(models.policy).trl_fast_selective_checkpointing
    return replace(tracker.timeline(), results=selective.budget.asked, default_budget=selective.default_limit)


@contextmanager
def _faking(tracker: MemoryTracker, facts: DeviceFacts) -> Iterator[None]:
    """Makes tensors fake within, on a device with these facts, and lets the tracker see them."""
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, simulated_device(facts):
        yield


def _tracker(setup: TrainingSetup, observe: Observer | None = None) -> MemoryTracker:
    if setup.device == "cpu":
        return MemoryTracker(workspace=mixed_dtype_workspace, kinds_by_code=KINDS_BY_CODE, observe=observe)
    return MemoryTracker(CUDA_GRANULARITY, flash_workspace, GPU_KERNELS, KINDS_BY_CODE, observe)


def _run(
    setup: TrainingSetup,
    models: PlannedModels,
    inputs: object,
    optimizer: PlannedOptimizer,
    tracker: MemoryTracker,
) -> None:
    # Trainers have the micro-batches of a step on the device at once; what is sampled gets there one by one.
    held = [on_device(inputs) for _ in range(setup.gradient_accumulation_steps)]
    if setup.system == OURS:
        loss = PLANNED[setup.method].loss(setup, models, held[0], tracker.enter)
    else:
        loss = baseline_loss(setup, models, held[0], tracker)
    loss.backward()
    trained = [weight for model in models.trained for weight in model.parameters() if weight.grad is not None]
    for weight in trained:
        tracker.label(weight.grad, GRADIENTS)
    tracker.enter(OPTIMIZER_STAGE)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class _Stages:
    """Names the stages of a model that trains; None: nothing new begins there."""

    forward: str
    after_forward: str | None
    last_layer: str
    middle_layers: str | None
    first_layer: str | None
    embedding: str | None


_POLICY_STAGES = _Stages(FORWARD_STAGE, HEAD_STAGE, LAST_LAYER, MIDDLE_LAYERS, FIRST_LAYER, EMBEDDING_STAGE)
_VALUE_STAGES = _Stages(VALUE_FORWARD_STAGE, None, VALUE_BACKWARD_STAGE, None, None, None)


def _mark_stages(model: PreTrainedModel | PeftModel, tracker: MemoryTracker, stages: _Stages) -> None:
    """Puts hooks into a model that tell the tracker where in the step it is."""
    layers, backbone = decoder_layers(model), whole_backbone(base_model(model))

    def enter_on_gradient(tensor: torch.Tensor, stage: str | None) -> None:
        if stage is not None and tracker.stage == stages.forward and tensor.requires_grad:
            tensor.register_hook(lambda _: tracker.enter(stage))

    def before_first(_module, args, kwargs) -> None:
        enter_on_gradient(args[0] if args else kwargs["hidden_states"], stages.embedding)

    def after(stage: str | None) -> Callable:
        return lambda _module, _args, out: enter_on_gradient(out[0] if isinstance(out, tuple) else out, stage)

    layers[0].register_forward_pre_hook(before_first, with_kwargs=True)
    for number, layer in enumerate(layers):
        last, first = number == len(layers) - 1, number == 0
        stage = stages.last_layer if last else stages.first_layer if first else stages.middle_layers
        layer.register_forward_hook(after(stage))

    def before_backbone(*_: object) -> None:
        if torch.is_grad_enabled():
            tracker.enter(stages.forward)

    def after_backbone(*_: object) -> None:
        if tracker.stage == stages.forward and stages.after_forward is not None:
            tracker.enter(stages.after_forward)

    backbone.register_forward_pre_hook(before_backbone)
    backbone.register_forward_hook(after_backbone)
