"""Tells transformers.Trainer who scales the loss, and refuses how it must not run."""

from __future__ import annotations

from transformers import Trainer

from trl_fast.parallel.engines import keep_float32_outputs


def forbid_data_parallel(trainer: Trainer) -> None:
    """Raises ValueError if the trainer would cut batches into parts for several GPUs."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{type(trainer).__name__} does not run under nn.DataParallel, which is used when several GPUs are "
            "visible to one process; start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def set_up_devices(trainer: Trainer) -> None:
    """Has FSDP2 keep outputs in float32; raises ValueError as `forbid_data_parallel` does."""
    forbid_data_parallel(trainer)
    keep_float32_outputs(trainer.accelerator)


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
