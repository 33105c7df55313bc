"""Tells transformers.Trainer who scales the loss, and refuses how it must not run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from trl_fast.parallel.engines import (
    Engine,
    engine_of,
    keep_buffers_apart,
    keep_float32_outputs,
    prepared_for_evaluation,
)
from trl_fast.parallel.failures import failing_together

from .callbacks import remove_noise
from .images import share_images
from .progress import close_progress


def forbid_data_parallel(trainer: Trainer) -> None:
    """Raises ValueError if the trainer would cut batches into parts for several GPUs."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{type(trainer).__name__} does not run under nn.DataParallel, which is used when several GPUs are "
            "visible to one process; start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def check_low_bits(model: Any) -> None:
    """Checks that FSDP can shard what a model holds in 4 or 8 bits.

    Raises:
        ValueError: weights of 8 bits; or those of 4 bits are stored in another dtype than that of the other weights.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(
            "load_in_8bit=True: FSDP shards no weights of 8 bits; load in 4 bits, or train by DDP or DeepSpeed"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if not getattr(model, "is_loaded_in_4bit", False) or quantizer is None:
        return
    storage = quantizer.quantization_config.bnb_4bit_quant_storage
    if storage != model.dtype:
        found, wanted = (str(dtype).removeprefix("torch.") for dtype in (storage, model.dtype))
        raise ValueError(
            f"bnb_4bit_quant_storage={found}: FSDP shards 4-bit weights only if they are stored in the dtype of the "
            f"other weights; set bnb_4bit_quant_storage={wanted!r}"
        )


def declare_loss_scaling(trainer: Trainer) -> None:
    """Makes `loss_is_scaled_for_ga` decide who divides the loss by the accumulation steps, as transformers 5.19 does.

    True: `compute_loss` has done so; False: the trainer will; None: transformers goes by whether the loss was divided
    by the tokens of all micro-batches. Earlier versions look at two other attributes alone.
    """
    if hasattr(Trainer, "loss_is_scaled_for_ga") or trainer.loss_is_scaled_for_ga is None:
        return
    trainer.model_accepts_loss_kwargs = False
    # Any function will do: it says that the loss is scaled, and our own compute_loss never calls it.
    trainer.compute_loss_func = trainer.compute_loss if trainer.loss_is_scaled_for_ga else None


def set_up_trainer(trainer: Trainer) -> None:
    """Sets who scales the loss, and what engines that share a model need, of a trainer that was just made.

    Raises:
        ValueError: tiled_mlp with FSDP1; or as in `forbid_data_parallel` and `check_low_bits`.
    """
    forbid_data_parallel(trainer)
    engine, tokens = engine_of(trainer.accelerator), getattr(trainer.args, "tiled_mlp", None)
    if engine.is_fsdp:
        check_low_bits(trainer.model)
    if tokens is not None and engine is Engine.FSDP1:
        raise ValueError(f"tiled_mlp={tokens}: {engine.value} loses gradients of tiles; use FSDP2, or leave it unset")
    keep_float32_outputs(trainer.accelerator)
    keep_buffers_apart(trainer.accelerator)
    share_images(trainer, trainer.model)
    declare_loss_scaling(trainer)


@contextmanager
def tidied(trainer: Any) -> Iterator[None]:
    """Takes away what training shows and puts on models, whatever ends it: progress, noise, fused layers."""
    try:
        with trainer.fused_models.running():
            yield
    finally:
        close_progress(trainer.callback_handler.callbacks)
        remove_noise(trainer)


def evaluates(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a trainer's method that evaluates: models are prepared for it, and processes fail together."""

    @functools.wraps(method)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with failing_together(), self.fused_models.running(), prepared_for_evaluation(self):
            return method(self, *args, **kwargs)

    return evaluate
