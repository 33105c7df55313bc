"""Finds what is broken in a model's folder, for when it could not be loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trl_fast.input_errors import error_line

_LFS = b"version https://git-lfs"


def why_not_loaded(name_or_path: str, error: BaseException) -> str:
    """Returns why a model or tokenizer could not be loaded by hub name or folder, in one line with the remedy."""
    path = Path(name_or_path)
    if path.is_dir():
        return _find_fault(path) or _reason(error)
    if path.is_file():
        return "it is a file; give the folder that it lies in"
    if path.is_absolute() or name_or_path.startswith(("./", "../", "~")) or name_or_path.count("/") > 1:
        return "there is no such folder"
    return f"it is no folder here and cannot be had from the hub: {error_line(error)}"


def shape_mismatch(error: str) -> str | None:
    """Returns what is wrong with a shape, from the error with which torch loads a model's files under ZeRO-3.

    None: the error tells of no shape.
    """
    sizes = r"torch\.Size\((\[.*?\])\)"
    line = re.search(rf"size mismatch for (\S+): .*? shape {sizes} from checkpoint, .*? is {sizes}", error)
    if line is None:
        return None
    name, found, expected = line.groups()
    if found != expected and sorted(json.loads(found)) == sorted(json.loads(expected)):
        return (
            f"{name} has the shape {found} where the model has {expected}: under DeepSpeed ZeRO-3 transformers "
            "does not see the model's shapes, and transposes also weights that it has saved itself; train with FSDP2"
        )
    return f"{name} has the shape {found} in its files and {expected} by its config.json"


def _reason(error: BaseException) -> str:
    text = error_line(error)
    if "Weights only load failed" in text:
        return "its .bin file holds Python objects besides tensors, which could run code; save it as safetensors"
    if "unexpected keyword argument" in text:
        return f"{text}; see model_init_kwargs"
    return text


def _find_fault(folder: Path) -> str | None:
    files = sorted(folder.iterdir())
    for file in files:
        fault = _file_fault(file) if file.is_file() else None
        if fault is not None:
            return f"{file.name} {fault}"
    names = {file.name for file in files}
    if "config.json" in names:
        if "model_type" not in json.loads((folder / "config.json").read_text()):
            return "config.json has no model_type; copy the one that belongs to the weights"
        return None
    if "adapter_config.json" in names:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        return (
            f"it is an adapter of {base!r} and no whole model; give the result of "
            "peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True), or merge the adapter and save that"
        )
    return "it has no config.json; give the folder that save_pretrained wrote"


def _file_fault(file: Path) -> str | None:
    if not file.stat().st_size and file.suffix in (".json", ".safetensors", ".bin"):
        return "is empty; copy it again"
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            return "is a pointer of Git LFS and not the file itself; run `git lfs pull` there"
    if file.suffix == ".json":
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError as error:
            return f"is no valid JSON, line {error.lineno}: {error.msg}"
        except UnicodeDecodeError as error:
            return f"is no text: {error}"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"is no whole safetensors file ({error_line(error)}); copy it again"
    return None
