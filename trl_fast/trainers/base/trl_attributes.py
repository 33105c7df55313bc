"""Gives a trainer class the attributes of TRL's trainer, each with the place where its value is kept here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from .tokenizers import tokenizer_of


@dataclass(frozen=True)
class TRLAttribute:
    """Describes an attribute of TRL's trainers. It is a descriptor: `answers_to` puts it into a class.

    Args:
        path: from the trainer to the value, such as "args.beta".
        read: from the trainer to the value, where it is not what is found at the path.
        write: takes the trainer and a value; None: it is put at the path.
        fixed: why the value cannot be changed; None: it can be.
    """

    path: str = ""
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any, Any], None] | None = None
    fixed: str | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __get__(self, trainer: Any, owner: type) -> Any:
        if trainer is None:
            return self
        return attrgetter(self.path)(trainer) if self.read is None else self.read(trainer)

    def __set__(self, trainer: Any, value: Any) -> None:
        """Changes the value.

        Raises:
            AttributeError: it is fixed, and another one.
        """
        if self.fixed is not None:
            name = vars(self)["_name"]
            if not _is_same(value, self.__get__(trainer, type(trainer))):
                raise AttributeError(f"{type(trainer).__name__}.{name} cannot be changed: {self.fixed}")
        elif self.write is not None:
            self.write(trainer, value)
        else:
            parent, _, name = self.path.rpartition(".")
            setattr(attrgetter(parent)(trainer) if parent else trainer, name, value)


def answers_to(attributes: Mapping[str, TRLAttribute]) -> Callable[[type], type]:
    """Returns a class decorator that adds the attributes which the class does not define."""

    def add(owner: Any) -> Any:
        for name, attribute in attributes.items():
            if name not in vars(owner):
                setattr(owner, name, attribute)
                attribute.__set_name__(owner, name)
        return owner

    return add


def argument(name: str) -> TRLAttribute:
    """Returns the attribute that is an argument of the config, read at each use; a new value is checked as there."""

    def write(trainer: Any, value: Any) -> None:
        change_argument(trainer, name, value)

    return TRLAttribute(f"args.{name}", write=write)


def loss_setting(name: str) -> TRLAttribute:
    """Returns the attribute that is a field of the trainer's `loss_config`; a new value is checked as there."""

    def write(trainer: Any, value: Any) -> None:
        trainer.loss_config = replace(trainer.loss_config, **{name: value})

    return TRLAttribute(f"loss_config.{name}", write=write)


def fixed_attribute(read: Callable[[Any], Any], reason: str) -> TRLAttribute:
    """Returns an attribute that is read from the trainer, and why it cannot be changed."""
    return TRLAttribute(read=read, fixed=reason)


_SET_BY_DATA = "the datasets tell whether there are images"
# Of all trainers whose batches come from a dataset of rows.
ROW_ATTRIBUTES = {
    "aux_loss_enabled": fixed_attribute(
        lambda trainer: bool(trainer.router_aux_loss_coef), "set router_aux_loss_coef"
    ),
    "_tokenizer": fixed_attribute(
        lambda trainer: tokenizer_of(trainer.processing_class), "the datasets were prepared with it"
    ),
    "_is_vlm": fixed_attribute(lambda trainer: trainer.images is not None, _SET_BY_DATA),
    "_is_vision_dataset": fixed_attribute(lambda trainer: trainer.images is not None, _SET_BY_DATA),
    "_total_train_tokens": TRLAttribute("_tokens.seen"),
}


def change_argument(trainer: Any, name: str, value: Any) -> None:
    """Changes an argument of a trainer's config.

    Raises:
        ValueError: the config does not take the value; it keeps the old one.
    """
    args, old = trainer.args, getattr(trainer.args, name)
    setattr(args, name, value)
    try:
        args.check_values()
    except ValueError:
        setattr(args, name, old)
        raise


def _is_same(value: Any, present: Any) -> bool:
    if value is present:
        return True
    try:
        return bool(value == present)
    except (RuntimeError, ValueError):
        return False
