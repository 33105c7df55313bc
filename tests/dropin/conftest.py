import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from support.models import save_tiny_model
from support.tokenizer import build_tokenizer
from support.training import color_labels, color_pairs


@pytest.fixture
def without_trl():
    """As in a fresh process: trl is not imported, nothing answers for it, and argv and path come back afterwards."""
    imported = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    finders, argv, path = list(sys.meta_path), list(sys.argv), list(sys.path)
    for name in imported:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        del sys.modules[name]
    sys.modules.update(imported)
    sys.meta_path[:], sys.argv[:], sys.path[:] = finders, argv, path


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder in which hub names are folders: a tiny model, and datasets of every kind."""
    root = tmp_path_factory.mktemp("hub")
    save_tiny_model(root / "Qwen" / "Qwen2.5-0.5B-Instruct", build_tokenizer())
    pairs = color_pairs(8)
    single = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    chats = single.map(
        lambda row: {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        },
        remove_columns=single.column_names,
    )
    datasets = {"ultrafeedback_binarized": pairs, "tldr": single, "Capybara": chats, "kto-mix-14k": color_labels(8)}
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs]
    datasets["ultrafeedback-prompt"] = Dataset.from_list(prompts)
    for name, dataset in datasets.items():
        (root / "trl-lib" / name).mkdir(parents=True)
        dataset.to_json(str(root / "trl-lib" / name / "train.jsonl"))
    return root


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch):
    """An empty folder to run in, where the hub's names are found."""
    for owner in hub.iterdir():
        os.symlink(owner, tmp_path / owner.name)
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)
