"""Lists what is changed on a model and undoes it: `print(changes_of(model))`, `changes_of(model).undo_all()`.

Whatever changes a model of transformers for training (its forward, attention, checkpointing, layers) does so through
its list of changes. A change is made once, and can be undone alone as long as nothing has been put on top of it since.
The list goes with the model: a deep copy has its own, whose entries point at the copy's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle

_ATTRIBUTE = "trl_fast_changes"


class _Absent:
    """Stands for an attribute that a module did not have of its own; a class, so that copies are the same object."""


class Change:
    """Holds one change of a model: what was there before, and how that comes back."""

    def __init__(self, name: str, purpose: str) -> None:
        self.name, self.purpose = name, purpose
        # Steps that undo the change, made of modules and values, so that they are copied with the model.
        self._steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._checks: list[tuple[torch.nn.Module, str, Any]] = []

    def set(self, module: torch.nn.Module, name: str, value: object, *, fixed: bool = True) -> None:
        """Sets an attribute of a module; it gets back the one it had, or its class's.

        fixed: False for an attribute of ours whose value may change before the change is undone.
        """
        before = vars(module).get(name, _Absent)
        setattr(module, name, value)
        if fixed:
            self._checks.append((module, name, value))
        self._steps.append((_restore, (module, name, before)))

    def set_class(self, module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
        """Exchanges the class of a module."""
        before, module.__class__ = type(module), cls
        self._checks.append((module, "__class__", cls))
        self._steps.append((setattr, (module, "__class__", before)))

    def add_hook(self, handle: RemovableHandle) -> None:
        """Counts a hook, which was registered on a module, among what the change made."""
        self._steps.append((RemovableHandle.remove, (handle,)))

    def on_undo(self, function: Callable[..., None], *args: object) -> None:
        """Has a function called when the change is undone; a function of a module, so that it can be copied."""
        self._steps.append((function, args))

    def undo(self) -> None:
        """Puts back what was there before.

        Raises:
            RuntimeError: something else has been put on top of the change since.
        """
        for module, name, value in self._checks:
            found = type(module) if name == "__class__" else vars(module).get(name, _Absent)
            if found is not value and found != value:
                raise RuntimeError(
                    f"{self.name!r} cannot be undone: {name} of {type(module).__name__} has been changed since by "
                    "something else; undo that first"
                )
        for function, args in reversed(self._steps):
            function(*args)
        self._steps, self._checks = [], []


class ModelChanges:
    """Holds the changes of a model, in the order in which they were made."""

    def __init__(self) -> None:
        self._changes: dict[str, Change] = {}

    def get_or_add(self, name: str, purpose: str) -> Change:
        """Returns the change of that name, which is put on the list; if it is there already, the one that is there."""
        return self._changes.setdefault(name, Change(name, purpose))

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the changes, first made first."""
        return tuple(self._changes)

    def __contains__(self, name: str) -> bool:
        return name in self._changes

    def __len__(self) -> int:
        return len(self._changes)

    def __str__(self) -> str:
        return "\n".join(f"{change.name}: {change.purpose}" for change in self._changes.values())

    def undo(self, name: str) -> None:
        """Undoes one change.

        Raises:
            KeyError: there is no change of that name.
            RuntimeError: something else has been put on top of the change since.
        """
        if name not in self._changes:
            raise KeyError(f"{name!r} is no change of this model; it has {', '.join(self.names) or 'none'}")
        self._changes[name].undo()
        del self._changes[name]

    def undo_all(self) -> None:
        """Undoes all changes, the last one first.

        Raises:
            RuntimeError: something else has been put on top of a change since.
        """
        for name in reversed(self.names):
            self.undo(name)


def changes_of(model: torch.nn.Module) -> ModelChanges:
    """Returns the list of what is changed on a model; on the transformers model inside, where adapters were put on."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    changes = vars(inner).get(_ATTRIBUTE)
    if changes is None:
        changes = ModelChanges()
        setattr(inner, _ATTRIBUTE, changes)
    return changes


def has_change(model: torch.nn.Module, name: str) -> bool:
    """Tells whether a model of transformers has a change of that name; unlike `changes_of` it makes no list."""
    return name in vars(model).get(_ATTRIBUTE, ())


def unbound_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """Returns a module's forward as a function that takes the module too: what wraps it also serves a copy of it.

    A forward that something else has bound already, such as the hooks of accelerate, stays bound.
    """
    bound = module.forward
    return getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))


def _restore(module: torch.nn.Module, name: str, before: object) -> None:
    """Gives a module its attribute back, or its class's if it had none of its own."""
    if before is _Absent:
        delattr(module, name)
    else:
        setattr(module, name, before)


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives a module another forward within the context; FSDP1's wrapper keeps its own, which calls the module's."""
    inner: Any = module.module if isinstance(module, FullyShardedDataParallel) else module
    before = vars(inner).get("forward")
    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        if before is not None:
            inner.forward = before
