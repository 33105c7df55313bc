"""SFTTrainer on images: against TRL 1.16.0's on the same model and data, in all layouts, saved and resumed."""

import copy

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor

import trl_fast
from support.picture_rows import PICTURE_ROWS, picture_rows
from support.training import assert_same_logs, make_trainer
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.data.vision_collators import DataCollatorForVisionLanguageModeling

# A rate at which the model learns something to predict, so that the accuracy is not always zero, and no two logits are
# as good as equal: at 2e-2 the largest two of a token were 8e-5 apart, and its accuracy a matter of rounding.
STEPS = {"max_steps": 2, "learning_rate": 2.2e-2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SLOW = pytest.mark.slow
FAMILIES = ["qwen2_5_vl", *(pytest.param(name, marks=SLOW) for name in ("qwen3_vl", "gemma3", "llava"))]
# The others' batches are held against TRL's in tests/data/test_vision_collators.py.
KINDS = ["messages", *(pytest.param(kind, marks=SLOW) for kind in PICTURE_ROWS if kind != "messages")]


def trainer_of(module, output_dir, family, kind, arguments=None, **settings):
    given = {
        "model": tiny_vision_model(family),
        "processing_class": tiny_processor(family),
        "train_dataset": picture_rows(kind),
        "eval_dataset": picture_rows(kind, 6),
        **{name: value() for name, value in (arguments or {}).items()},
    }
    return make_trainer(module, output_dir, method="SFT", arguments=given, **{**STEPS, **settings})


def logs_of(module, output_dir, *data, **settings):
    trainer = trainer_of(module, output_dir, *data, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, *data, layouts=("packed",), **settings):
    expected = logs_of(trl, tmp_path / "trl", *data, **settings)
    for layout in layouts:
        assert_same_logs(logs_of(trl_fast, tmp_path / layout, *data, **settings, batch_layout=layout), expected)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind, family, tmp_path):
    # The default suite holds the padded layout against the others below.
    layouts = ("packed",) if (family, kind) == ("qwen2_5_vl", "messages") else ("packed", "padded")
    logs = compare(tmp_path, family, kind, layouts=layouts)
    assert logs[-1]["eval_mean_token_accuracy"] > 0


SETTINGS = {
    "prompts are learned": {"completion_only_loss": False},
    "truncated": {"max_length": 40},
    "no limit": {"max_length": None},
    "a smaller last batch": {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 1},
}


@SLOW
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, family, tmp_path):
    compare(tmp_path, family, "prompt and completion", **settings)


@SLOW
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_lora_and_streams(family, tmp_path):
    arguments = {
        "peft_config": lambda: LoraConfig(**LORA),
        "train_dataset": lambda: picture_rows("messages").to_iterable_dataset(),
    }
    compare(tmp_path, family, "messages", arguments)


MARKED = """\
{%- for message in messages %}<|im_start|>{{ message.role }} {% generation %}
{%- for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}
{%- endgeneration %}<|im_end|>{% endfor %}"""


@SLOW
def test_assistant_only_loss(tmp_path):
    def with_marks():
        processor = tiny_processor("llava")
        processor.chat_template = processor.tokenizer.chat_template = MARKED
        return processor

    compare(tmp_path, "llava", "messages", {"processing_class": with_marks}, assistant_only_loss=True)


COLLATORS = {
    "ours": DataCollatorForVisionLanguageModeling,
    "TRL's": trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling,
}


@SLOW
@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS.keys())
def test_another_collator_gets_rows_as_they_are(collator, tmp_path):
    arguments = {"data_collator": lambda: collator(tiny_processor("qwen2_5_vl"), max_length=1024)}
    compare(tmp_path, "qwen2_5_vl", "messages", arguments)


def test_entries_are_those_of_trls_collator(tmp_path):
    """A user's hook sees them, and once it has looked they are trained on."""
    trainer = trainer_of(trl_fast, tmp_path, "qwen2_5_vl", "messages")
    theirs = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(tiny_processor("qwen2_5_vl"))
    rows = [trainer.train_dataset[index] for index in range(1, 5)]
    expected = theirs([picture_rows("messages", 5)[index] for index in range(1, 5)])
    batch, unread = trainer.data_collator(rows), trainer.data_collator(rows)
    assert set(batch) == set(expected)
    loss = trainer.compute_loss(trainer.model, unread).item()
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss, rel=1e-5)
    batch["pixel_values"] = batch["pixel_values"] * 0
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(loss, rel=1e-4)


def test_a_run_is_saved_resumed_and_predicts(tmp_path):
    """The processor is saved beside the weights, and what a resumed run logs is what the whole run logged."""
    settings = {"save_steps": 1, "save_strategy": "steps", "per_device_train_batch_size": 2}
    whole = trainer_of(trl_fast, tmp_path / "whole", "llava", "one image", **settings)
    whole.train()
    resumed = trainer_of(trl_fast, tmp_path / "whole", "llava", "one image", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_logs(resumed.state.log_history[1:2], whole.state.log_history[1:2], rel=1e-6)
    saved = AutoProcessor.from_pretrained(tmp_path / "whole" / "checkpoint-1")
    image = pictures(1)[0]
    texts = [processor(images=[image], text="<image>") for processor in (saved, tiny_processor("llava"))]
    assert texts[0]["input_ids"] == texts[1]["input_ids"]

    found = whole.predict(picture_rows("one image", 3))
    logits, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(found.metrics["test_loss"], rel=1e-5)


ROWS = 5


def turn_rows():
    """Each of the assistant's turns as the completion of what stands before it."""
    rows = []
    for row in picture_rows("messages", ROWS):
        for end in range(1, len(row["messages"]), 2):
            prompt, completion = row["messages"][:end], row["messages"][end : end + 1]
            shown = sum(part["type"] == "image" for message in prompt for part in message["content"])
            rows.append({"prompt": prompt, "completion": completion, "images": row["images"][:shown]})
    return Dataset.from_list(rows)


def test_turns_that_are_learned_apart_share_their_images(tmp_path):
    """The loss and all gradients are those of a row of prompt and completion for each turn, in all layouts."""
    settings = {"per_device_train_batch_size": 20, "max_length": None}
    expected = None
    conversations = {"train_dataset": lambda: picture_rows("messages", ROWS)}
    for layout in ("padded", "packed", "shared_prefix"):
        apart = {"assistant_turns": "separately", "assistant_only_loss": True} if layout != "padded" else {}
        data = conversations if apart else {"train_dataset": turn_rows}
        trainer = trainer_of(
            trl_fast, tmp_path / layout, "qwen2_5_vl", "messages", data, batch_layout=layout, **settings | apart
        )
        inputs = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        grads = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
        found = loss.item(), grads, len(inputs.token_batch().image_shapes)
        expected = expected or found
        assert found[0] == pytest.approx(expected[0], rel=2e-5) and found[1].keys() == expected[1].keys()
        for name, gradient in grads.items():
            assert (gradient - expected[1][name]).norm() <= 2e-5 * expected[1][name].norm() + 1e-7, name
    # Every turn has its own images and those of the turns before it.
    rows = picture_rows("messages", ROWS)
    assert found[2] == sum(map(len, rows["images"])) < expected[2]


@SLOW
def test_prompts_whose_tokens_see_each_other(tmp_path):
    """TRL does not train PaliGemma: its processor reads no completion, which has no image."""
    with pytest.raises(ValueError, match="`images` are expected"):
        logs_of(trl, tmp_path, "paligemma", "prompt and completion")
    data = {"train_dataset": lambda: picture_rows("prompt and completion").filter(lambda row: len(row["images"]) > 0)}
    found = []
    for layout in ("padded", "packed"):
        trainer = trainer_of(
            trl_fast, tmp_path / layout, "paligemma", "prompt and completion", data, batch_layout=layout
        )
        trainer.train()
        found.append(trainer.state.log_history)
    assert_same_logs(*found)
    with pytest.raises(ValueError, match="the tokens of a prompt see each other in this model"):
        trainer_of(trl_fast, tmp_path, "paligemma", "messages")


WRONG = {
    "packing": ({"packing": True}, "packing=True is not supported with images"),
    "padding-free": ({"padding_free": True, "max_length": None}, "padding_free=True is not supported with images"),
    "keep_end": ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' is not supported with images"),
    "cut": ({"max_length": 7}, "train dataset, row 1: max_length=7 cuts an image, whose tokens end at 8 of"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_images_do_not_allow_is_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(trl_fast, tmp_path, "qwen2_5_vl", "messages", **settings)


def test_wrong_rows_are_named(tmp_path):
    more = [copy.deepcopy(PICTURE_ROWS["messages"](i)) for i in range(3)]
    more[2]["images"].pop()
    completions = [PICTURE_ROWS["prompt and completion"](1)]
    said = {"assistant_only_loss": True}
    cases = {
        "row 0: assistant_only_loss=True learns what the assistant says in 'messages'": completions,
        "row 2: .*1.* does not match number of image placeholders .2.": more,
        "row 0: .*image": [{"images": pictures(1), "text": "no place for it"}],
    }
    for message, rows in cases.items():
        data = {"train_dataset": lambda rows=rows: Dataset.from_list(rows), "eval_dataset": lambda: None}
        with pytest.raises(ValueError, match=f"train dataset, {message}"):
            trainer_of(trl_fast, tmp_path, "qwen2_5_vl", "messages", data, **(said if rows is completions else {}))
