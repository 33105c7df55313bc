"""Makes Triton launch a kernel on the GPU of its tensors: alone, it takes the current GPU."""

import functools
from collections.abc import Callable

import torch


def on_tensors_device(launcher: Callable) -> Callable:
    """Returns a launcher that makes the GPU of its first argument, a tensor, the current one while it runs.

    Tensors elsewhere, as the interpreter takes them, leave everything as it is.
    """

    @functools.wraps(launcher)
    def launch(first: torch.Tensor, *args: object, **kwargs: object) -> None:
        if not first.is_cuda:
            return launcher(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launcher(first, *args, **kwargs)

    return launch
