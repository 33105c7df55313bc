"""Writes the README.md of a trained model."""

from __future__ import annotations

import os


def model_card(name: str, origin: str, method: str, trainer: str) -> str:
    """Returns its text: what was trained, from what (a hub name, a folder or nothing), with which method."""
    lines = ["---", "library_name: transformers", f"model_name: {name}"]
    if origin and not os.path.isdir(origin):
        lines.append(f"base_model: {origin}")
    lines += ["tags:", "- trl_fast", f"- {method}", "---", ""]
    lines += [f"# {name}", "", f"Trained from `{origin}` by trl_fast's {trainer}.", ""]
    return "\n".join(lines)
