"""Training a model that reads images too on text: TRL's numbers, and a folder from which images are read as before."""

from __future__ import annotations

import pytest
import trl
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor

import trl_fast
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_pairs, make_trainer
from support.vision_models import tiny_vision_model

SETTINGS = {"max_steps": 2, "learning_rate": 1e-3, "max_length": 60}
DATA = {"SFT": lambda: sft_rows("text"), "DPO": color_pairs}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Writes a model with its tokenizer, and how it reads images."""

    def write(family):
        folder, tokenizer = tmp_path_factory.mktemp(family), build_tokenizer()
        words = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)}
        tiny_vision_model(family, **words).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 28}).save_pretrained(folder)
        return str(folder)

    return write


def train(module, method, folder, output_dir, **arguments):
    arguments = {"model": folder, "processing_class": build_tokenizer(), "train_dataset": DATA[method](), **arguments}
    trainer = make_trainer(module, output_dir, method=method, arguments=arguments, **SETTINGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "method, family",
    [
        ("SFT", "gemma3"),
        *(
            pytest.param("SFT", each, marks=pytest.mark.slow)
            for each in ("gemma4", "qwen3_vl_moe", "qwen3_5", "llava")
        ),
        *(pytest.param("DPO", each, marks=pytest.mark.slow) for each in ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_5")),
    ],
)
def test_the_numbers_of_trl(method, family, folder_of, tmp_path):
    folder = folder_of(family)
    ours = train(trl_fast, method, folder, tmp_path / "ours")
    assert ours.layout.name == {"SFT": "packed", "DPO": "shared_prefix"}[method]
    assert_same_logs(ours.state.log_history, train(trl, method, folder, tmp_path / "trl").state.log_history)


def test_a_processor_is_taken_for_its_tokenizer_and_images_can_be_read_afterwards(folder_of, tmp_path):
    folder, tokenizer = folder_of("llava"), build_tokenizer()
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=7)
    trainer = train(trl_fast, "DPO", folder, tmp_path / "run", processing_class=processor)
    assert trainer.processing_class is tokenizer
    assert not any(weight.requires_grad for name, weight in trainer.model.named_parameters() if "vision" in name)
    trainer.save_model(str(tmp_path / "saved"))
    assert CLIPImageProcessorPil.from_pretrained(tmp_path / "saved").size["shortest_edge"] == 28
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    tower = {name: weight for name, weight in saved.named_parameters() if "vision_tower" in name}
    before = dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
    assert tower and all((weight == before[name]).all() for name, weight in tower.items())
