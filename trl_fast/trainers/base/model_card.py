"""Writes the README.md of a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import Trainer

from trl_fast.modeling.loading import base_model


def model_tags(method: str) -> list[str]:
    """Returns the tags of a model that a method trained: TRL's, by which the hub finds such models, and ours."""
    return ["trl", "trl_fast", method]


def model_card(
    name: str, origin: str, method: str, trainer: str, dataset_name: str | None = None, tags: Iterable[str] = ()
) -> str:
    """Returns its text: what was trained, from what (a hub name, a folder or nothing), with which method.

    dataset_name: on which dataset of the hub. tags: further ones.
    """
    lines = ["---", "library_name: transformers", f"model_name: {name}"]
    if origin and not os.path.isdir(origin):
        lines.append(f"base_model: {origin}")
    if dataset_name:
        lines.append(f"datasets: {dataset_name}")
    lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys([*model_tags(method), *tags])), "---", ""]
    lines += [f"# {name}", "", f"Trained from `{origin}` by trl_fast's {trainer}.", ""]
    return "\n".join(lines)


def write_model_card(
    trainer: Trainer, method: str, name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """Writes the card of a trainer's model into its output folder; name: None for the folder's."""
    folder = Path(str(trainer.args.output_dir))
    origin = base_model(trainer.accelerator.unwrap_model(trainer.model)).config._name_or_path
    made = (method, type(trainer).__name__, dataset_name, [tags] if isinstance(tags, str) else tags or ())
    (folder / "README.md").write_text(model_card(name or folder.name, origin, *made))
