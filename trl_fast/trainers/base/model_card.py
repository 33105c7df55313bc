"""Writes the README.md of a trained model."""

from __future__ import annotations

import os


def model_tags(method: str) -> list[str]:
    """Returns the tags of a model that a method trained: TRL's, by which the hub finds such models, and ours."""
    return ["trl", "trl_fast", method]


def model_card(name: str, origin: str, method: str, trainer: str) -> str:
    """Returns its text: what was trained, from what (a hub name, a folder or nothing), with which method."""
    lines = ["---", "library_name: transformers", f"model_name: {name}"]
    if origin and not os.path.isdir(origin):
        lines.append(f"base_model: {origin}")
    lines += ["tags:", *(f"- {tag}" for tag in model_tags(method)), "---", ""]
    lines += [f"# {name}", "", f"Trained from `{origin}` by trl_fast's {trainer}.", ""]
    return "\n".join(lines)
