"""Writes the README.md of a trained model: from what it was trained, how, and how to use it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from peft import PeftModel

from trl_fast.modeling.loading import base_model

from ..run_report.naming import without_secrets
from ..run_report.surroundings import versions

# Settings that say nothing of how the model was trained.
_LEFT_OUT = ("output_dir", "report_to", "run_name", "logging_", "disable_tqdm", "push_to_hub", "hub_", "run_report")
_CHAT = """\
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What color is the sky?"}], tokenize=False, add_generation_prompt=True
)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
_CONTINUE = """\
inputs = tokenizer("What color is the sky?", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_SCORE = """\
inputs = tokenizer("What color is the sky? It is blue.", return_tensors="pt").to(model.device)
print(model(**inputs).logits)"""


def model_tags(method: str) -> list[str]:
    """Returns the tags of a model that a method trained: TRL's, by which the hub finds such models, and ours."""
    return ["trl", "trl_fast", method]


def model_card(
    name: str, origin: str, method: str, trainer: str, dataset_name: str | None = None, tags: Iterable[str] = ()
) -> str:
    """Returns its beginning: what was trained, from what (a hub name, a folder or nothing), with which method.

    dataset_name: on which dataset of the hub, or file. tags: further ones.
    """
    fields: dict[str, Any] = {"library_name": "transformers", "model_name": name}
    if origin and not os.path.isdir(origin):
        fields["base_model"] = origin
    if dataset_name and not os.path.exists(dataset_name):
        fields["datasets"] = dataset_name
    fields["tags"] = [*dict.fromkeys([*model_tags(method), *tags])]
    # Dumped, for a name may hold what YAML reads otherwise, and peft reads the card when it saves.
    lines = ["---", yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "---", ""]
    lines += [f"# {name}", "", f"Trained from `{origin}` by trl_fast's {trainer}.", ""]
    return "\n".join(lines)


def usage_section(place: str, *, is_adapter: bool, is_classifier: bool, has_template: bool) -> str:
    """Returns the section on how to use a model, with code that works.

    Args:
        place: its folder or hub name.
        is_adapter: whether it needs its base model, which peft loads.
        is_classifier: whether it gives rewards, not text.
        has_template: whether its tokenizer has a chat template.
    """
    package, prefix = ("peft", "AutoPeftModelFor") if is_adapter else ("transformers", "AutoModelFor")
    kind = prefix + ("SequenceClassification" if is_classifier else "CausalLM")
    task = _SCORE if is_classifier else _CHAT if has_template else _CONTINUE
    labels = ", num_labels=1" if is_classifier and is_adapter else ""
    imports = sorted([f"from {package} import {kind}", "from transformers import AutoTokenizer"])
    if not is_adapter:
        imports = [f"from transformers import {kind}, AutoTokenizer"]
    lines = ["## Use", "", "```python", *imports, "", f"place = {place!r}"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(place)"]
    lines += [f'model = {kind}.from_pretrained(place{labels}, dtype="auto")', task, "```", ""]
    commands = [] if is_classifier else [f"trl-fast chat {shlex.quote(place)}"]
    commands += [f"trl-fast merge {shlex.quote(place)}"] if is_adapter else []
    return "\n".join([*lines, *(["```bash", *commands, "```", ""] if commands else [])])


def training_section(settings: Mapping[str, Any], data: str, packages: Mapping[str, str]) -> str:
    """Returns the section on the training: settings that differ from the defaults, the data, the versions."""
    shown = {name: value for name, value in settings.items() if not name.startswith(_LEFT_OUT)}
    lines = ["## Training", "", f"Data: {data}.", "", "Settings that differ from the defaults:", ""]
    lines += [f"- `{name}`: `{json.dumps(value)}`" for name, value in shown.items()] or ["- none"]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".", ""]
    return "\n".join(lines)


def write_model_card(
    trainer: Any, method: str, name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """Writes the card of the model of a `BaseTrainer` into its output folder; name: None for the folder's."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    folder, inner = Path(str(args.output_dir)), base_model(model)
    made = (method, type(trainer).__name__, dataset_name, [tags] if isinstance(tags, str) else tags or ())
    data = dataset_name or "given to the trainer"
    if isinstance(trainer.train_dataset, Dataset):
        data += f", {len(trainer.train_dataset):,} rows"
    sections = [
        model_card(name or folder.name, inner.config._name_or_path, *made),
        usage_section(
            args.hub_model_id or str(folder),
            is_adapter=isinstance(model, PeftModel),
            is_classifier=inner.get_output_embeddings() is None,
            has_template=bool(getattr(trainer.processing_class, "chat_template", None)),
        ),
        training_section(without_secrets(args.changed_settings()), data, versions()),
    ]
    (folder / "README.md").write_text("\n".join(sections))
