"""Adapts a model to Liger's kernels in its layers, and checks where they cannot be used.

transformers puts them on a model when training starts, or a user does. They replace the forward of norms and MLPs, of
each instance, and functions of the model's module in transformers, for every model of the process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers import PreTrainedModel
from transformers.utils import is_liger_kernel_available

from trl_fast.parallel.engines import original_class

from .model_changes import changes_of

logger = logging.getLogger(__name__)

LIGER_DEVICES = ("cuda", "xpu", "npu")
# Names of the function that turns queries and keys.
_ROTARY_NAMES = ("apply_rotary_pos_emb", "apply_rotary_emb")


def check_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Says so where Liger has nothing for a model's family, which then trains without.

    Raises:
        ValueError: Liger is not installed, or training runs where its kernels do not.
    """
    if not is_liger_kernel_available():
        raise ValueError("use_liger_kernel=True needs liger-kernel: `pip install liger-kernel`, or leave it out")
    if device.type not in LIGER_DEVICES:
        raise ValueError(f"use_liger_kernel=True: Liger's kernels run on a GPU, not on a {device.type}; leave it out")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning(
            f"use_liger_kernel=True has no effect: this version of Liger has no kernels for {type(model).__name__}."
        )


def turn_copies(model: PreTrainedModel, saving: type[TorchDispatchMode]) -> None:
    """Has Liger's rotary embedding turn copies of queries and keys while results are kept.

    It writes over them, and so over the results of the products that made them, by a Triton kernel that no dispatch
    mode sees: backward would turn the kept results once more.

    saving: the mode under which results are kept.
    """
    modeling = sys.modules[original_class(model).__module__]
    for name in _ROTARY_NAMES:
        rotary: Any = getattr(modeling, name, None)
        if (getattr(rotary, "__module__", None) or "").startswith("liger_kernel"):
            setattr(modeling, name, _on_copies(rotary, saving))
            change = changes_of(model).get_or_add("Liger's rotary embedding", "turns copies while results are kept")
            change.on_undo(_restore_function, modeling.__name__, name, rotary)


def _restore_function(module: str, name: str, function: Callable) -> None:
    """Gives a Python module, which all models of a family share, its function back."""
    setattr(sys.modules[module], name, function)


def _on_copies(rotary: Callable, saving: type[TorchDispatchMode]) -> Callable:
    def turn(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling() and any(
            isinstance(mode, saving) for mode in _get_current_dispatch_mode_stack()
        ):
            q, k = q.clone(), k.clone()
        return rotary(q, k, *args, **kwargs)

    return turn
