"""The demo's pairs and its real model."""

import pytest
import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.preference_tasks import TASKS, Task, preference_pairs
from examples.smollm2 import gguf_file, smollm2_folder


def test_pairs_are_right_and_wrong_by_the_tasks_own_score():
    data = preference_pairs(24, 9, seed=3)
    assert (len(data["train"]), len(data["test"])) == (24, 9)
    sources = {task.name: reasoning_gym.create_dataset(task.name, size=700, seed=3, **task.settings) for task in TASKS}
    entries = {(name, entry["question"].strip()): entry for name, source in sources.items() for entry in source}
    for row in [*data["train"], *data["test"]]:
        question = row["prompt"][-1]["content"]
        entry = entries[row["task"], question]
        assert sources[row["task"]].score_answer(row["chosen"][0]["content"], entry) == 1.0
        assert sources[row["task"]].score_answer(row["rejected"][0]["content"], entry) < 1.0


def test_no_question_is_in_both_splits_and_the_seed_decides():
    data = preference_pairs(24, 9, seed=3)
    questions = [{row["prompt"][-1]["content"] for row in data[split]} for split in ("train", "test")]
    assert len(questions[0]) == 24 and not questions[0] & questions[1]
    assert preference_pairs(24, 9, seed=3)["train"][:] == data["train"][:]
    assert preference_pairs(24, 9, seed=4)["train"][:] != data["train"][:]


def test_too_many_pairs_are_refused_by_name():
    few = Task("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 3})
    with pytest.raises(ValueError, match="task 'gcd' has only . different questions, 60 were asked for"):
        preference_pairs(60, 0, tasks=(few,))


def test_the_real_model_says_something_sensible():
    """SmolLM2-135M-Instruct, converted on the first call; the demo has done so before the tests in `.ci/run`."""
    assert gguf_file().is_file()
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


def test_the_demo_builds_its_trainer_from_flags(tmp_path):
    """Does what `make demo` does before it trains, on a tiny model."""
    from examples.demo import flags, parse_arguments
    from support.models import save_tiny_model
    from support.tokenizer import build_tokenizer
    from trl_fast.cli.training import make_parser, make_trainer
    from trl_fast.trainers.methods import METHODS

    for name, split in preference_pairs(8, 4).items():
        split.to_json(tmp_path / "data" / f"{name}.jsonl")
    words = ["--model_name_or_path", save_tiny_model(tmp_path / "model", build_tokenizer())]
    arguments = parse_arguments([*words, "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path)])
    given = [*flags(arguments, "lora", tmp_path / "out"), "--use_cpu", "--bf16", "false"]
    *parsed, _ = make_parser(METHODS["dpo"]).parse_args_and_config(given)
    trainer = make_trainer(METHODS["dpo"], *parsed)
    assert len(trainer.train_dataset) == 8 and len(trainer.eval_dataset) == 4
