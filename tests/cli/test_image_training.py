"""The commands of training, as a person runs them on a data file that names images."""

import json

import pytest
import yaml
from transformers import AutoProcessor, LlavaForConditionalGeneration

from support.vision_processors import pictures, save_tiny_vision_model
from trl_fast.cli.main import main

REWARD = {"reward_funcs": ["get_soft_overlong_punishment"], "max_completion_length": 8, "num_generations": 2}
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
METHODS = {"sft": {}, "dpo": {}, "kto": {}, "reward": {}, "grpo": REWARD, "rloo": REWARD}


def said(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def data(tmp_path):
    """Rows for every method, each with an image in a file."""
    for number, picture in enumerate(pictures(4)):
        picture.save(tmp_path / f"{number}.png")
    completions = {name: said("assistant", name) for name in ("chosen", "rejected", "completion")}
    prompt = {"prompt": said("user", "What is it?")}
    rows = [{"images": [f"{number}.png"], "label": number % 2 == 0, **prompt, **completions} for number in range(4)]
    columns = {
        "sft": ["prompt", "completion"],
        "kto": ["prompt", "completion", "label"],
        "grpo": ["prompt"],
        "rloo": ["prompt"],
    }

    def write(method):
        kept = ["images", *columns.get(method, ["prompt", "chosen", "rejected"])]
        path = tmp_path / f"{method}.jsonl"
        path.write_text("\n".join(json.dumps({name: row[name] for name in kept}) for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    "method", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "dpo")]
)
def test_a_step_on_images(method, data, tmp_path, capsys):
    settings = {
        "model_name_or_path": save_tiny_vision_model(tmp_path / "model", "llava"),
        "dataset_name": data(method),
        "output_dir": str(tmp_path / "out"),
        **SETTINGS,
        **METHODS[method],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main([method, "--config", str(tmp_path / "run.yaml")]) == 0
    assert f"saved to {tmp_path / 'out'}" in capsys.readouterr().out
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    if method != "reward":
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_such_data_is_valid(data, tmp_path, capsys):
    model = save_tiny_vision_model(tmp_path / "model", "llava")
    assert main(["validate", "--dataset_name", data("dpo"), "--tokenizer", model, "--max_length", "64"]) == 0
    assert "Passed" in capsys.readouterr().out


def test_an_adapter_without_known_modules_says_what_to_name(data, tmp_path, capsys):
    model = save_tiny_vision_model(tmp_path / "model", "llava")
    words = ["--model_name_or_path", model, "--dataset_name", data("dpo"), "--output_dir", str(tmp_path / "out")]
    assert main(["dpo", *words, "--use_cpu", "true", "--bf16", "false", "--use_peft"]) == 2
    named = "peft_config: peft knows no target_modules of llava by itself; name some, such as 'q_proj' and 'v_proj'"
    assert named in " ".join(capsys.readouterr().err.split())
