"""Sets up a model's layers and router as the arguments ask: policies, value models and references alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trl_fast.data.images.row_images import RowImages
from trl_fast.modeling.activation_offloading import offload_activations
from trl_fast.modeling.adapters import adapter_refusal, check_virtual_tokens
from trl_fast.modeling.finite_weights import check_weights
from trl_fast.modeling.fused_layers import fuse_layers
from trl_fast.modeling.image_models import image_probes
from trl_fast.modeling.layouts import LayoutRequest
from trl_fast.modeling.liger_kernels import check_liger
from trl_fast.modeling.loading import add_adapter, base_model, disable_dropout, is_quantized, keep_used_conversions
from trl_fast.modeling.low_bit_layers import compute_alike, train_in_bfloat16
from trl_fast.modeling.recurrent_layers import warn_of_missing_kernels, warn_of_unread_adapters
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.modeling.unread_parts import freeze_unread_parts, name_present_layers, run_frozen_readers_without_graph
from trl_fast.parallel.agreement import together
from trl_fast.parallel.weights import has_read_weights

from .config import BaseConfig
from .parallelism import check_model_parallelism, parallel_options, shares_rows

logger = logging.getLogger(__name__)


def loading_options(args: BaseConfig, quantization_config: object | None) -> dict[str, Any]:
    """Returns the keywords of from_pretrained for a model given by name.

    Raises:
        ValueError: quantization_config is in model_init_kwargs too.
    """
    given = cast("dict[str, Any]", args.model_init_kwargs or {})
    options = {"trust_remote_code": args.trust_remote_code, **given}
    if quantization_config is None:
        return options
    if "quantization_config" in options:
        raise ValueError("quantization_config is given twice: to the trainer, and in model_init_kwargs; leave one out")
    return {**options, "quantization_config": quantization_config}


def loaded_model(
    load: Callable[..., PreTrainedModel],
    model: str | PreTrainedModel | PeftModel,
    args: BaseConfig,
    quantization_config: object | None,
) -> PreTrainedModel | PeftModel:
    """Returns a model as it is, or, where a name is given, what `load` makes of it and of keywords of from_pretrained.

    Raises:
        ValueError: a quantization_config for a model that is loaded already, or one whose weights have no values; or
            as in `loading_options`.
    """
    if isinstance(model, str):
        options = loading_options(args, quantization_config)
        return load(model, **options | parallel_options(args, options))
    # Of several processes, some may get their weights' values from another one later.
    if args.world_size == 1 and all(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"model: {type(base_model(model)).__name__} is on the meta device, where weights have no values; give its "
            "name, or load it with from_pretrained outside of torch.device('meta')"
        )
    if args.model_init_kwargs:
        logger.warning("model_init_kwargs is ignored: the model is an object that is loaded already.")
    if quantization_config is not None:
        raise ValueError("quantization_config needs a model given by name; this one is loaded already")
    return model


class LayerSettings(Protocol):
    """Names the arguments that `set_up_layers` reads: a config has them, and the setup of a planned run."""

    disable_dropout: bool
    tiled_mlp: int | None
    use_liger_kernel: bool
    activation_offloading: bool

    @property
    def fused_layers(self) -> Literal["auto", True, False]:
        """Returns whether layers run in one pass each where that can be."""

    @property
    def activation_budget(self) -> int | None:
        """Returns the bytes that checkpointing may keep; None: by device."""

    @property
    def keeps_attention(self) -> bool:
        """Tells whether checkpointing keeps what attention gives whatever the budget."""


def adapt_model(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: BaseConfig, *, reads_images: bool
) -> PreTrainedModel | PeftModel:
    """Returns a model that trains with its adapter, its layers set up; reads_images as in `set_up_layers`."""
    if peft_config is not None:
        model = add_adapter(cast(PreTrainedModel, model), peft_config)
    check_virtual_tokens(model, gradient_checkpointing=args.gradient_checkpointing)
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    together(lambda: set_up_layers(model, cast(LayerSettings, args), reads_images=reads_images))
    return model


def set_up_layers(
    model: PreTrainedModel | PeftModel, args: LayerSettings, *, trains: bool = True, reads_images: bool = False
) -> None:
    """Sets up dropout and tiles; of a model that trains also what is frozen, and what is kept for backward, and where.

    reads_images: whether it is trained on images, so that what reads them is trained too.

    Raises:
        NotFiniteError: weights are NaN or infinite.
        ValueError: the model is sharded in a way that is not served; fused_layers is set, and nothing of the model can
            be fused; tiled_mlp is set, and there is no MLP that can be tiled; a model of 4 or 8 bits has no adapter,
            or was packed for inference; or Liger's kernels cannot be used.
    """
    check_model_parallelism(model, args)
    inner = base_model(model)
    if has_read_weights():
        check_weights(model, f"{type(inner).__name__} {inner.config._name_or_path!r}")
    if args.disable_dropout:
        disable_dropout(model)
    # Before layers are fused, so that what is fused can be undone.
    if args.tiled_mlp is not None:
        tile_mlps(inner, args.tiled_mlp)
    if args.fused_layers and args.use_liger_kernel:
        logger.info("fused_layers: off, since use_liger_kernel=True fuses the same layers.")
    elif args.fused_layers:
        # A plan's tensors are on the CPU, which then counts as the planned device.
        device = args.device if isinstance(args, BaseConfig) else torch.device("cpu")
        fuse_layers(inner, device, required=args.fused_layers is True)
    compute_alike(inner)
    name_present_layers(inner)
    keep_used_conversions(inner)
    if not trains:
        return
    if is_quantized(inner):
        _check_adapter(model)
        train_in_bfloat16(model)
    if reads_images:
        run_frozen_readers_without_graph(inner)
    else:
        freeze_unread_parts(inner)
    if torch.cuda.is_available():
        warn_of_missing_kernels(inner)
        warn_of_unread_adapters(inner)
    if args.use_liger_kernel:
        check_liger(inner, cast(BaseConfig, args).device)
    if args.activation_offloading:
        offload_activations(inner)
    set_selective_checkpointing(
        inner,
        args.activation_budget,
        attention_always=args.keeps_attention,
        whole_layers=not args.activation_offloading and not shares_rows(args),
    )


def _check_adapter(model: PreTrainedModel | PeftModel) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__}: weights in 4 or 8 bits cannot train; give a peft_config for an adapter (in "
            "commands --use_peft)"
        )


class LayoutNeeds(Protocol):
    """Names what a trainer tells about its batches."""

    method: str
    shares_prompts: bool
    images: RowImages | None


def layout_request(trainer: LayoutNeeds, model: PreTrainedModel | PeftModel, args: BaseConfig) -> LayoutRequest:
    """Returns what a trainer asks of the layout of its batches for a model."""
    probes = None if trainer.images is None else image_probes(trainer.images.reader, trainer.images.layout)
    limits = args.max_length, args.disable_dropout, adapter_refusal(model)
    return LayoutRequest(args.batch_layout, trainer.method, trainer.shares_prompts, *limits, probes)


def check_trains(model: PreTrainedModel | PeftModel) -> None:
    """Checks that a model has weights to train.

    Raises:
        ValueError: every weight is frozen, so that training would change nothing.
    """
    if any(weight.requires_grad for weight in model.parameters()):
        return
    name = type(base_model(model)).__name__
    if isinstance(model, PeftModel):
        remedy = (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True), or give the model without it "
            "and a peft_config for a new one"
        )
    else:
        remedy = "call model.requires_grad_(True), or give a peft_config for an adapter"
    raise ValueError(f"{name}: every weight is frozen (requires_grad=False), so nothing would train; {remedy}")


def router_coefficient(model: PreTrainedModel, wanted: float | None) -> float:
    """Returns the weight of a router's load-balancing loss: the one wanted, else its config's; 0 for other models.

    Raises:
        ValueError: a weight is wanted and the model does not return its router's logits.
    """
    config = model.config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    if wanted and not has_router:
        raise ValueError(
            f"router_aux_loss_coef={wanted}: {type(model).__name__} is no mixture of experts that returns its "
            "router's logits; leave it unset"
        )
    if not has_router:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted)


def warn_of_reentrant_router(args: BaseConfig, coefficient: float) -> None:
    """Warns if checkpointing is of the kind with which a router's loss, of that weight, has no gradient."""
    options = args.gradient_checkpointing_kwargs
    reentrant = args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant")
    if reentrant and coefficient:
        logger.warning(
            "gradient_checkpointing_kwargs: with use_reentrant=True the router's load-balancing loss has no "
            "gradient, since transformers collects its logits where none is recorded; set use_reentrant=False."
        )
