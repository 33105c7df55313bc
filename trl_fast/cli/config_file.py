"""Reads YAML files of arguments, and the line of each key for messages."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_fast.input_errors import error_line

_MOST_VALUES = 10_000
_TOO_MANY = f"aliases make more than {_MOST_VALUES} values; write fewer of them"


@dataclass
class ConfigFile:
    """Holds the values of a YAML file, and the line of every key; inner keys are named like datasets.0.path."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def at(self, key: str) -> str:
        """Returns the place of a key for messages: `file.yaml, line 3: key`."""
        return f"{self.path}, line {self.lines[key]}: {key}"


def read_config(path: Path) -> ConfigFile:
    """Reads a YAML file; its map `env` goes into the environment, not into the values.

    Raises:
        ValueError: the file is not there, is no YAML or no map, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        config = ConfigFile(path, lines=_KeyLines(path).of(node))
        values: Any = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{where}: no valid YAML: {error.problem}") from error
    except FileNotFoundError as error:
        raise ValueError(f"--config {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: is no UTF-8 text ({error}); save it as UTF-8") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"--config {path}: cannot be read as YAML: {error_line(error)}") from error
    if values is None:
        raise ValueError(f"--config {path}: holds no argument; write lines such as learning_rate: 1.0e-5")
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ValueError(f"--config {path}: expected a map of argument names to values, got {found}")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{config.at(str(key))} is no name of an argument; write one as --help lists them")
    config.values = values
    environment = config.values.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"{config.at('env')} must be a map of names to values, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return config


class _KeyLines:
    """Finds the lines of all keys; inner ones are named like datasets.0.path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parents: list[yaml.Node] = []
        self._seen = 0

    def of(self, node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
        """Returns the line of each key below a node, by its name.

        Raises:
            ValueError: a key is given twice, a value holds itself, or aliases make too many values of few.
        """
        self._seen += 1
        if node is not None and (node in self._parents or self._seen > _MOST_VALUES):
            fault = "an alias stands inside of what it names" if node in self._parents else _TOO_MANY
            raise ValueError(f"{self._path}, line {node.start_mark.line + 1}: {fault}")
        lines: dict[str, int] = {}
        self._parents.append(node)
        if isinstance(node, yaml.MappingNode):
            merged: dict[str, int] = {}
            for key, value in node.value:
                name, line = f"{prefix}{key.value}", key.start_mark.line + 1
                if key.tag == "tag:yaml.org,2002:merge":
                    parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for part in parts:
                        merged = {**self.of(part, prefix), **merged}
                elif name in lines:
                    raise ValueError(f"{self._path}, line {line}: {name} is given twice, first on line {lines[name]}")
                else:
                    lines |= {name: line, **self.of(value, f"{name}.")}
            lines = {**merged, **lines}
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines |= self.of(value, f"{prefix}{index}.")
        self._parents.pop()
        return lines
