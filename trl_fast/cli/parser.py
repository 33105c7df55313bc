"""Parses flags and a YAML file into dataclasses, as TRL's parser does."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, _SubParsersAction
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.field_docs import FieldDoc, read_fields

from .arguments import ModelConfig
from .config_file import ConfigFile, read_config

# Names of other tools, and what they are here.
_MEANT = {
    "model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}


class TrlParser(HfArgumentParser):
    """Parses dataclasses from flags and from a YAML file.

    `--config file.yaml`: its keys become defaults, flags win; its map `env` goes to the environment. Sub-commands made
    by `add_subparsers` are parsers of this class, too; their arguments come back in the namespace. `--max-length` is
    `--max_length`. `none` and `null` mean None. `--trust_remote_code` reaches ModelConfig and the trainer's config.

    Raises:
        ValueError: a dataclass has a field `config`.
    """

    def __init__(self, dataclass_types: type | Iterable[type] | None = None, **kwargs: Any) -> None:
        types: list[Any] = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or [])
        for owner in types:
            if "config" in owner.__dataclass_fields__:
                raise ValueError(f"{owner.__name__} has a field named config, which is the flag of the YAML file")
        super().__init__(types, allow_abbrev=False, **kwargs)
        self.config_file = ConfigFile(Path())
        self.add_argument("--config", help="YAML file whose keys become defaults; flags win.")
        fields = {name for owner in types for name, item in owner.__dataclass_fields__.items() if item.init}
        self._adds_trust_remote_code = "trust_remote_code" not in fields and any(
            issubclass(owner, ModelConfig) for owner in types
        )
        if self._adds_trust_remote_code:
            self._add_trust_remote_code()
        for action in self._actions:
            if action.choices is not None and True in action.choices:
                # One of several texts or a truth value: true without a value, and written in either case.
                action.nargs, action.const, action.type = "?", True, _choice_of(action.choices)
            if action.type is string_to_bool and action.nargs is None:
                # One that may be None, too, is true without a value: --bf16.
                action.nargs, action.const = "?", True
            # For report_to, "none" is a value of its own.
            if callable(action.type) and not action.choices and action.dest != "report_to":
                action.type = _none_or(action.type)

    def format_help(self) -> str:
        """Returns the help, with the texts that stand below the dataclasses' fields; older names are left out."""
        docs: dict[str, FieldDoc] = {}
        for owner in self.dataclass_types:
            with suppress(OSError, KeyError):  # a class that was made without source
                docs |= read_fields(f"{owner.__module__}:{owner.__qualname__}")
        for action in self._actions:
            doc = docs.get(action.dest)
            if doc is not None and doc.is_older_name:
                action.help = SUPPRESS
            elif doc is not None and action.help is None:
                action.help = " ".join(doc.text.split()).replace("%", "%%")
        return super().format_help()

    def _add_trust_remote_code(self) -> None:
        """Adds the flag, for parsers without a trainer's config, which has it."""
        self.add_argument(
            *("--trust_remote_code", "--trust-remote-code"),
            type=string_to_bool,
            nargs="?",
            const=True,
            default=False,
            help="Allow models and tokenizers that bring Python code of their own.",
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one line about a flag, with the choice that was probably meant."""
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = did_you_mean(found[1], re.findall(r"[^\s',]+", found[2])) if found else ""
        message = re.sub(r"argument (--\w+)/--\S+:", r"argument \1:", message)
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Does what it does in transformers, and gives `trust_remote_code` to ModelConfig too."""
        parsed = super().parse_args_into_dataclasses(*args, **kwargs)
        trusted = any(getattr(one, "trust_remote_code", False) for one in parsed)
        for one in parsed:
            if isinstance(one, ModelConfig):
                one.trust_remote_code = trusted
        return parsed

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Returns one object for each dataclass.

        Args:
            args: the command line; None: that of the program.
            return_remaining_strings: return unknown flags and keys last, as a list of `--key value` strings.
            fail_with_unknown_args: False forgives unknown keys in the YAML file, but never unknown flags.
            separate_remaining_strings: return unknown keys and unknown flags as two lists.

        Raises:
            ValueError: the YAML file cannot be read, or a key or flag is unknown or has a bad value.
        """
        args, from_file = self._read_config(args)
        try:
            *parsed, namespace, from_flags = self.parse_args_into_dataclasses(
                args=args, return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise self.located(error, args) from error
        for taken in ("config", *(["trust_remote_code"] if self._adds_trust_remote_code else [])):
            vars(namespace).pop(taken, None)
        if vars(namespace):
            parsed.append(namespace)
        if return_remaining_strings:
            rest = (from_file, from_flags) if separate_remaining_strings else ([*from_file, *from_flags],)
            return (*parsed, *rest)
        unknown = [*(from_file if fail_with_unknown_args else []), *from_flags]
        if unknown:
            raise self.unknown(unknown)
        return tuple(parsed)

    def remaining_strings(self, args: Sequence[str]) -> list[str]:
        """Returns the flags and YAML keys that this parser does not know, without making the dataclasses."""
        args, from_file = self._read_config(args)
        return [*from_file, *self.parse_known_args(args)[1]]

    def unknown(self, remaining: list[str], others: Iterable[str] = ()) -> ValueError:
        """Returns the error about flags and keys that nobody knows, with the nearest known names.

        others: further names, without dashes, to suggest.
        """
        known = [*(action.dest for action in self._actions), *others]
        messages = []
        for word in remaining:
            name = word.lstrip("-").split("=")[0]
            plain = name.replace("-", "_")
            hint = did_you_mean(_MEANT[plain] if _MEANT.get(plain) in known else plain, known)
            if name in self.config_file.lines:
                messages.append(f"{self.config_file.at(name)} is an unknown key{hint}")
            elif word.startswith("-"):
                messages.append(f"unknown argument {word}{hint}")
        return ValueError("; ".join(messages or [f"unexpected arguments {' '.join(remaining)}"]))

    def _read_config(self, args: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Takes the values of `--config` as defaults; returns the other flags, and the keys it does not know."""
        finder = _Finder(add_help=False, allow_abbrev=False, prog=self.prog)
        finder.add_argument("--config", type=Path)
        found, args = finder.parse_known_args(sys.argv[1:] if args is None else list(args))
        if found.config is None:
            return args, []
        self.config_file = read_config(found.config)
        return args, self.set_defaults_with_config(**self.config_file.values)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Makes values the defaults of arguments by name, also of sub-commands'; they are not required any more.

        Returns:
            What no argument has the name of, as `--key value` strings.

        Raises:
            ValueError: a value does not fit its argument.
        """
        remaining = []
        for key, value in kwargs.items():
            actions = [action for action in _all_actions(self) if action.dest == key]
            if not actions:
                remaining += [f"--{key}", str(value)]
            for action in actions:
                action.required = False
                action.default = self._checked(action, value)
        return remaining

    def _checked(self, action: Action, value: Any) -> Any:
        try:
            return _from_yaml(action, value)
        except (ArgumentTypeError, TypeError, ValueError) as error:
            key, hint = action.dest, _hint(action, value)
            place = self.config_file.at(key) if key in self.config_file.lines else key
            raise ValueError(f"{place}: {value!r}: {error}{hint}") from error

    def located(self, error: Exception, args: Sequence[str]) -> Exception:
        """Returns an error with the line of the YAML key that it names, as it is if it names none."""
        line = self._line_of(str(error), args)
        return error if line is None else ValueError(f"{self.config_file.path}, line {line}: {error}")

    def _line_of(self, message: str, args: Sequence[str]) -> int | None:
        """Returns the line of the first key that a message names and that no flag has replaced."""
        flags = {word.lstrip("-").split("=")[0].replace("-", "_") for word in args if word.startswith("-")}
        lines = {key: line for key, line in self.config_file.lines.items() if key not in flags}
        places = {key: re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message) for key in lines}
        named = [(match.start(), -len(key), lines[key]) for key, match in places.items() if match]
        return min(named)[-1] if named else None


def _all_actions(parser: ArgumentParser) -> Iterator[Action]:
    """Yields the arguments of a parser and of its sub-commands."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for inner in {id(inner): inner for inner in action.choices.values()}.values():
                yield from _all_actions(inner)
        else:
            yield action


class _Finder(ArgumentParser):
    """Finds `--config` among flags of which it knows no other; ends the program with one line where it is wrong."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and the line."""
        self.exit(2, f"{self.prog}: {message}\n")


def _choice_of(choices: Iterable[Any]) -> Callable[[str], Any]:
    """Returns what reads one of several values, whose texts may be written in either case."""
    by_text = {str(choice).lower(): choice for choice in choices}
    return lambda text: by_text.get(text.lower(), text)


def _none_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    parse.__name__ = getattr(convert, "__name__", "value")
    return parse


def _hint(action: Action, value: Any) -> str:
    return did_you_mean(str(value), map(str, action.choices)) if action.choices else ""


def _from_yaml(action: Action, value: Any) -> Any:
    """Converts a YAML value as the flag converts its text, and checks it against the flag's choices."""
    if value is False and action.choices and "no" in action.choices:
        # What YAML makes of an unquoted no.
        value = "no"
    if action.nargs in ("+", "*"):
        values = value if isinstance(value, list) else [value]
        return None if value is None else [_convert(action, item) for item in values]
    value = _convert(action, value)
    if action.choices and value is not None and value not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}")
    return value


def _convert(action: Action, value: Any) -> Any:
    if value is None or not callable(action.type):
        return value
    # Flags that take text may stand for fields that also take maps, lists or numbers; the dataclass decides.
    if not isinstance(value, str) and getattr(action.type, "__name__", "") not in ("int", "float", "string_to_bool"):
        return value
    return action.type(str(value))
