"""Which dataset's images a trainer reads, and processors that are not the model's."""

from __future__ import annotations

import pytest
from datasets import Dataset

import trl_fast
from support.models import tiny_model
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor


def rows(**columns):
    said = {"prompt": "What is it?", "chosen": "It is blue.", "rejected": "A dog."}
    messages = {name: [{"role": "assistant", "content": text}] for name, text in said.items()}
    return Dataset.from_list([{**messages, "prompt": [{"role": "user", "content": said["prompt"]}], **columns}] * 2)


def trainer(folder, train, evaluated=None, *, model=None, processor=None):
    values = {"output_dir": str(folder), "per_device_eval_batch_size": 2, "report_to": [], "use_cpu": True}
    return trl_fast.DPOTrainer(
        model or tiny_vision_model("llava"),
        args=trl_fast.DPOConfig(**values, bf16=False, disable_tqdm=True, activation_checkpointing=False),
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=processor or tiny_processor("llava"),
    )


def scores(made, name):
    made.evaluate(made.eval_dataset[name])
    return [made.state.log_history[-1][f"eval_logps/{column}"] for column in ("chosen", "rejected")]


def test_images_of_the_eval_dataset_alone_are_read(tmp_path):
    """TRL evaluates without them."""
    shown = rows(images=pictures(1))
    made = trainer(tmp_path / "eval", rows(), {"text": rows(), "shown": shown})
    expected, found = scores(trainer(tmp_path / "both", shown, {"shown": shown}), "shown"), scores(made, "shown")
    assert found == expected != scores(made, "text")


def test_models_and_processors_that_do_not_read_images_are_named(tmp_path):
    shown = rows(images=pictures(1))
    with pytest.raises(ValueError, match="The eval shown dataset has images, which LlamaForCausalLM does not read"):
        trainer(
            tmp_path,
            rows(),
            {"text": rows(), "shown": shown},
            model=tiny_model(),
            processor=tiny_processor("llava").tokenizer,
        )
    with pytest.raises(
        ValueError, match=r"Qwen2_5_VLProcessor\) writes the token .* LlavaForConditionalGeneration reads"
    ):
        trainer(tmp_path, shown, processor=tiny_processor("qwen2_5_vl"))
