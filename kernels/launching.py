"""Makes Triton launch a kernel on the GPU of its tensors: alone, it takes the current GPU.

Tensors of a simulated GPU have no memory that a kernel could be launched on. Something stands in for launchers then,
which `trl_fast.ops.device.simulated_device` puts here.
"""

import functools
import threading
from collections.abc import Callable

import torch


class _StandIns(threading.local):
    """Holds what is called in the place of a launcher, in this thread, by the type of the device of its tensors.

    It is given the launcher and what the launcher was given.
    """

    def __init__(self) -> None:
        self.by_device: dict[str, Callable[..., None]] = {}


stand_ins = _StandIns()


def on_tensors_device(launcher: Callable) -> Callable:
    """Returns a launcher that makes the GPU of its first argument, a tensor, the current one while it runs.

    Tensors elsewhere, as the interpreter takes them, leave everything as it is.
    """

    @functools.wraps(launcher)
    def launch(first: torch.Tensor, *args: object, **kwargs: object) -> None:
        stand_in = stand_ins.by_device.get(first.device.type)
        if stand_in is not None:
            stand_in(launcher, first, *args, **kwargs)
            return
        if not first.is_cuda:
            return launcher(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launcher(first, *args, **kwargs)

    return launch
