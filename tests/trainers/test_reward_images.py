"""Reward models on pairs whose prompts have images: against the model's own forward, in all layouts, and learning."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from datasets import Dataset
from PIL import Image

from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast import RewardConfig, RewardTrainer
from trl_fast.data.images import ImageReader
from trl_fast.data.reward_modeling import prepare_reward_dataset
from trl_fast.modeling.loading import load_reward_model

SHOWN = pictures(7)
SLOW = pytest.mark.slow
OTHERS = ["qwen3_vl", "gemma3", "llava", "smolvlm"]
FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=SLOW) for name in OTHERS)]


def message(role, content):
    return [{"role": role, "content": content}]


def pair(images, text, chosen, rejected):
    return {
        "images": images,
        "prompt": message("user", text),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }


def rows():
    """A prompt with an image, one with two, and one of text alone."""
    texts, shown = ["What color is this?", "Which of these two?", "What is the sky?"], [SHOWN[:1], SHOWN[1:3], []]
    return [pair(images, text, "It is blue and red.", "green") for images, text in zip(shown, texts, strict=True)]


def folder_of(family, tmp_path):
    """A folder with a language model of the family that reads images, and its processor."""
    folder = tmp_path / family
    tiny_vision_model(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    return str(folder)


def trainer_for(model, family, tmp_path, data, **changes):
    values = {"output_dir": str(tmp_path / "out"), "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    values |= {"per_device_train_batch_size": 3, "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    values |= {"model_init_kwargs": {"dtype": "float32"}} if isinstance(model, str) else {}
    return RewardTrainer(
        model=model,
        args=RewardConfig(**values | {"disable_tqdm": True} | changes),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_processor(family),
    )


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_forward(family, tmp_path):
    """Most families have no such class in transformers: it is made of a language model."""
    model, found = load_reward_model(folder_of(family, tmp_path), dtype=torch.float32), {}
    for layout in ("shared_prefix", "packed", "padded"):
        trainer = trainer_for(copy.deepcopy(model), family, tmp_path, rows(), batch_layout=layout, max_steps=1)
        assert trainer.layout.name == layout
        assert type(trainer.model).__name__.endswith("ForSequenceClassification")
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[layout] = loss.item(), gradients(trainer.model)
    trainer.model.zero_grad()
    entries = batch.copy()
    scores = trainer.model(**entries, use_cache=False).logits.squeeze(-1)
    loss = -torch.nn.functional.logsigmoid(scores[:3] - scores[3:]).mean()
    loss.backward()
    expected = gradients(trainer.model)
    assert any("visual" in name or "vision" in name for name in expected)
    for value, weights in found.values():
        assert value == pytest.approx(loss.item(), rel=2e-5) and weights.keys() == expected.keys()
        for name, weight in weights.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5 * scale + 1e-7, msg=name)
    # Entries that a user's hook has read and changed are trained on.
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss.item(), rel=2e-5)
    batch["pixel_values"] = batch["pixel_values"] * 0.5
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(loss.item(), rel=1e-4)


def told_apart(count, seed):
    """Pairs with a picture that is mostly red or mostly blue, of which one answer is right."""
    draw = random.Random(seed)
    data = []
    for number in range(count):
        red = number % 2 == 0
        shade = (draw.randint(180, 255), draw.randint(0, 60), draw.randint(0, 60))
        answers = ("It is red.", "It is blue.") if red else ("It is blue.", "It is red.")
        picture = Image.new("RGB", (28, 28), shade if red else shade[::-1])
        data.append(pair([picture], "What color is this?", *answers))
    return data


def test_it_learns_to_look_and_is_loaded_again(tmp_path):
    """Held-out accuracy rises from chance: answers and questions are the same, only pictures tell which is right."""
    torch.manual_seed(1)
    folder = folder_of("qwen2_5_vl", tmp_path)
    settings = {"max_steps": 16, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 16}
    trainer = trainer_for(folder, "qwen2_5_vl", tmp_path, told_apart(16, 0), **settings)
    held_out = Dataset.from_list(told_apart(8, 1))
    before = trainer.evaluate(held_out)["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate(held_out)
    assert before <= 0.75 and after["eval_accuracy"] == 1
    trainer.save_model(str(tmp_path / "saved"))
    again = trainer_for(str(tmp_path / "saved"), "qwen2_5_vl", tmp_path, rows())
    assert again.evaluate(held_out)["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)
    assert [*(tmp_path / "saved").glob("*processor_config.json")]


def test_images_behind_the_prompt_are_named():
    processor = tiny_processor("qwen2_5_vl")
    texts = {side: f"{side} {processor.image_token}" for side in ("chosen", "rejected")}
    data = Dataset.from_list([{"images": SHOWN[:1], "prompt": "Look: ", **texts}])
    with pytest.raises(ValueError, match="row 0, column 'chosen': an image stands behind"):
        prepare_reward_dataset(data, processor.tokenizer, image_reader=ImageReader(processor))


def test_a_family_without_a_model_to_read_from_is_named(tmp_path, monkeypatch):
    folder = folder_of("llava", tmp_path)
    monkeypatch.setattr("trl_fast.modeling.image_classifiers.MODEL_MAPPING", {})
    monkeypatch.setattr("trl_fast.modeling.image_classifiers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    with pytest.raises(ValueError, match="llava: transformers has neither a classifier nor"):
        load_reward_model(folder)
