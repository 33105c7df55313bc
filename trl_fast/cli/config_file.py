"""Reads YAML files of arguments, and the line of each key for messages."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


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
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
        config = ConfigFile(path, lines=_key_lines(node, path))
        values: Any = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}, line {error.problem_mark.line + 1}: no valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ValueError(f"--config {path}: expected a map of argument names to values, got {found}")
    config.values = values
    environment = config.values.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"{config.at('env')} must be a map of names to values, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return config


def _key_lines(node: yaml.Node | None, path: Path, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{path}, line {line}: {name} is given twice, first on line {lines[name]}")
            lines |= {name: line, **_key_lines(value, path, f"{name}.")}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines |= _key_lines(value, path, f"{prefix}{index}.")
    return lines
