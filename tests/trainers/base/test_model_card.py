"""The README.md of a trained model: TRL's fields, and code that works."""

import re

import pytest
import yaml
from peft import LoraConfig

import trl_fast
from support.training import color_pairs, make_trainer
from trl_fast.trainers.base.model_card import model_card, training_section

LORA = {"target_modules": ["q_proj"], "r": 2}


def card(path, folder, peft, method="DPO", **settings):
    """Trains for a step, and returns the card's text."""
    task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
    peft_config = LoraConfig(**LORA, task_type=task) if peft else None
    arguments = {"model": str(path), "train_dataset": color_pairs(8), "peft_config": peft_config}
    trainer = make_trainer(trl_fast, folder, arguments=arguments, method=method, max_steps=1, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="some/pairs", tags="mine")
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("method", ["DPO", "Reward"])
def test_its_code_works(method, peft, model_path, reward_model_path, tmp_path, capsys):
    text = card(reward_model_path if method == "Reward" else model_path, tmp_path, peft, method)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    exec(code, {})
    said = capsys.readouterr().out
    assert ("tensor(" in said) == (method == "Reward") and said.strip()
    assert (f"trl-fast chat {tmp_path}" in text) == (method == "DPO")
    assert (f"trl-fast merge {tmp_path}" in text) == peft
    assert "Data: some/pairs, 8 rows." in text and "- `learning_rate`: `0.001`" in text and "`beta`" not in text
    assert "Versions: python" in text and "output_dir" not in text
    head = text.split("---")[1]
    assert "datasets: some/pairs" in head and all(f"- {tag}\n" in head for tag in ("trl", "trl_fast", "mine"))


def test_a_file_is_no_dataset_of_the_hub(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.touch()
    assert "datasets:" not in model_card("out", "", "dpo", "DPOTrainer", str(file))


@pytest.mark.parametrize("name", ["[bold]<b>", "a: b", "@x", "12", "out"])
def test_any_name_can_be_read_again(name):
    assert yaml.safe_load(model_card(name, "", "dpo", "DPOTrainer").split("---")[1])["model_name"] == name


def test_without_other_settings():
    assert "- none\n" in training_section({"output_dir": "out"}, "given", {"torch": "2"})
