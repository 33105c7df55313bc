"""Writes down which operators run."""

from torch.utils._python_dispatch import TorchDispatchMode


class SeenOperators(TorchDispatchMode):
    """Holds the names of the operators that ran within, in order, and their arguments.

    Ops of the project's own are one each, but for those whose backward passes are in C++: the kernels that they call.
    """

    def __init__(self):
        super().__init__()
        self.names = []
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        self.arguments.append(args)
        return func(*args, **(kwargs or {}))
