"""Makes models on fake tensors: built on the meta device, adapters and all, and then given fake memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from trl_fast.modeling import layer_kinds
from trl_fast.modeling.checkpointing import enable_checkpointing
from trl_fast.modeling.classifier_head import attach_classifier_head
from trl_fast.modeling.image_classifiers import register_image_classifier
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.layouts import REWARDS, TOKEN_SCORES, LayoutRequest, declared_layout
from trl_fast.modeling.loading import add_adapter, base_model, language_model_class, reads_images, whole_backbone
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.reference_policy import freeze
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import set_attention, use_segment_attention
from trl_fast.modeling.upcast_linear_layers import UPCAST
from trl_fast.ops.device import simulated_device
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, PADDED
from trl_fast.trainers.base.model_setup import set_up_layers

from .device_facts import PADDED_ATTENTION, planned_facts
from .example_batches import PlannedLayout
from .planned_methods import PlannedModels
from .quantized_layers import quantize
from .training_setup import ONLINE_METHODS, OURS, TrainingSetup


def meta_model(setup: TrainingSetup, layers: int | None = None, *, classifier: bool | None = None) -> PreTrainedModel:
    """Makes a model without memory, as the trainers have it before adapters.

    layers: only the first so many. classifier: whether it gives a number instead of tokens; None: as the method wants.

    Raises:
        ValueError: transformers has no model of this type for the method.
    """
    classifier = setup.method == "reward" if classifier is None else classifier
    config = shortened(setup.config, layers)
    config.use_cache = False
    if classifier:
        config.num_labels = 1
        if config.get_text_config().pad_token_id is None:
            # Trainers take the tokenizer's: a classifier reads padded rows only if it knows which token pads.
            config.get_text_config().pad_token_id = 0
        if reads_images(config):
            register_image_classifier(config)
    auto = AutoModelForSequenceClassification if classifier else language_model_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=setup.torch_dtype)
    except ValueError as error:
        raise ValueError(
            f"method={setup.method!r}: transformers has no {auto.__name__} of model type {config.model_type!r}"
        ) from error
    if classifier:
        attach_classifier_head(model)
    else:
        attach_scoring(model)
        model.trl_fast_fused_head = setup.fused_head
    if setup.system != OURS:
        changes_of(model).undo(UPCAST)
    if setup.quantization is not None:
        quantize(model, setup.quantization, setup.nested_quantization)
    return model.train()


def shortened(config: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    """Copies the config with the first `layers` layers; lists with an entry a layer are cut too."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    if layers is not None and layers < depth:
        text.num_hidden_layers = layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == depth:
                setattr(text, name, value[:layers])
    return config


@contextmanager
def planned_models(setup: TrainingSetup, max_length: int, layers: int | None = None) -> Iterator[PlannedModels]:
    """Makes the models of a step without memory, as they train, and chooses the layout of their batches.

    Layers are fused within: transformers' functions that turn queries and keys, which all models of a family share,
    are then what they were before. layers: only so many of each model's.

    Raises:
        ValueError: a model cannot be built or set up so; by the name of the setting.
    """
    with ExitStack() as stack:

        def made(*given: Any, **options: Any) -> PreTrainedModel:
            model = meta_model(*given, **options)
            # Also where it cannot be set up.
            stack.callback(lambda: changes_of(model).undo_all())
            return model

        with simulated_device(planned_facts(setup.device, capability=setup.capability)):
            policy = made(setup, layers)
            layout = choose_layout(policy, setup, max_length)
            reference = value = None
            if setup.needs_reference_model:
                second, depth = _second_model(setup, layers)
                reference = prepare(made(second, depth), second, layout, trains=False)
            if setup.method == "ppo":
                whole = setup.but(lora_r=None, quantization=None)
                value = prepare(made(setup, layers, classifier=True), whole, layout)
            images = image_layout(policy) if setup.images else None
            models = PlannedModels(prepare(policy, setup, layout), PlannedLayout(layout, images), reference, value)
        yield models


def _second_model(setup: TrainingSetup, layers: int | None) -> tuple[TrainingSetup, int | None]:
    """Returns the setup of a step's reference, or its teacher, and how many layers: one of its own has all of them."""
    if not setup.has_teacher:
        return setup, layers
    return setup.of_teacher, layers if setup.teacher is None else None


def prepare(
    model: PreTrainedModel, setup: TrainingSetup, layout: str, *, trains: bool = True
) -> PreTrainedModel | PeftModel:
    """Sets up a model's attention and its adapter, and its layers as the trainers do; `trains`: not a reference."""
    if BATCH_LAYOUTS[layout].pads:
        set_attention(model, PADDED_ATTENTION)
    else:
        use_segment_attention(model)
    if setup.images:
        model.set_attn_implementation({"vision_config": PADDED_ATTENTION})
        whole_backbone(model).register_forward_pre_hook(_give_positions, with_kwargs=True)
    with warnings.catch_warnings():
        # transformers and PEFT about names of theirs.
        warnings.simplefilter("ignore", FutureWarning)
        if setup.lora_r is not None and trains:
            model = add_adapter(model, lora_config(setup))
            if setup.gradient_checkpointing:
                model.enable_input_require_grads()
        set_up_layers(model, setup, trains=trains, reads_images=bool(setup.images))
        if setup.gradient_checkpointing and trains:
            enable_checkpointing(model)
    return model if trains else freeze(model)


def _give_positions(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives positions of three axes to a model that would count them from token ids: fake tensors have none."""
    ids = kwargs.get("input_ids")
    if ids is not None and kwargs.get("position_ids") is None and hasattr(model, "get_rope_index"):
        kwargs = {**kwargs, "position_ids": torch.zeros(3, *ids.shape, dtype=torch.int64)}
    return args, kwargs


def lora_config(setup: TrainingSetup) -> LoraConfig:
    """Returns the adapter's configuration; with its dropout off, as the trainers' disable_dropout leaves it."""
    modules, excluded = setup.lora_target_modules, setup.lora_exclude_modules
    return LoraConfig(
        task_type="SEQ_CLS" if setup.method == "reward" else "CAUSAL_LM",
        r=setup.lora_r,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
        modules_to_save=list(setup.lora_modules_to_save) if setup.lora_modules_to_save else None,
        exclude_modules=list(excluded) if isinstance(excluded, tuple) else excluded,
        use_dora=setup.use_dora,
        lora_dropout=0.0,
    )


def give_fake_memory(model: nn.Module, device: str | torch.device = "cpu") -> None:
    """Puts empty tensors, which are fake inside FakeTensorMode, in the place of those on the meta device."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    trains = tensor.requires_grad
                    made[tensor] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[tensor]


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """Returns the layers of a model, in order.

    Raises:
        ValueError: there is no list of them.
    """
    inner = base_model(model)
    layers = layer_kinds.decoder_layers(inner)
    if layers is None:
        raise ValueError(f"model: {type(inner).__name__} has no list of its layers, which the simulation needs")
    return layers


def choose_layout(model: PreTrainedModel, setup: TrainingSetup, max_length: int) -> str:
    """Returns the layout that the trainers choose by what the architecture declares.

    Raises:
        ValueError: the batch_layout that was asked for cannot be.
    """
    if setup.system != OURS:
        return PADDED
    # The online trainers cut no sequences.
    longest = None if setup.method in ONLINE_METHODS else max_length
    request = LayoutRequest(setup.batch_layout, setup.method, setup.method != "sft", longest)
    return declared_layout(model, request, REWARDS if setup.method == "reward" else TOKEN_SCORES)
