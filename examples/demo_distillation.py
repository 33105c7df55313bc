"""Distils a real model into a student with a third of its layers, end to end.

    python -m examples.demo_distillation [--steps 80] [--layers 10] [--model_name_or_path ...] [--output_dir runs/gkd]

The teacher, SmolLM2-135M-Instruct, answers short questions. The student is the teacher with every third of its layers
left, which by itself writes nothing that can be read. It learns the teacher's distributions on the teacher's answers
and on answers of its own. How far it lies from the teacher on answers to held-out questions, and how often both find
the same token likeliest, is printed before and after. The exit status is 1 if the divergence did not fall by half.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_fast import GKDConfig, GKDTrainer
from trl_fast.data.prompt_only import tokenize_prompt
from trl_fast.modeling.distillation import ReadDivergence, teacher_states
from trl_fast.modeling.scoring import evaluating, read_model
from trl_fast.rollout import SamplingSettings, TransformersEngine, end_token_ids

from .online_demo import common_settings, make_console, plot, quiet
from .smollm2 import smollm2_folder

QUESTIONS = (
    "Write one sentence about {}.",
    "What is {}?",
    "Why do people like {}?",
    "Name something that goes with {}.",
)
TOPICS = (
    *("tea", "rain", "music", "the sea", "bread", "a bicycle", "winter", "a garden", "the moon", "chess", "football"),
    *("a library", "coffee", "a river", "the desert", "painting", "a horse", "cheese", "the wind", "a train", "honey"),
    *("mathematics", "a castle", "snow", "dancing", "a violin", "history", "the forest", "salt", "a lighthouse"),
    *("swimming", "an apple", "poetry", "a volcano", "sleep", "a market", "gold", "a whale", "summer", "clouds"),
)
# The last topics are held out.
HELD_OUT_TOPICS = 6
# Of the divergence before: what may be left.
LEFT = 0.5


def make_student(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Returns a copy of the teacher with so many of its layers, evenly spread."""
    config = type(teacher.config)(**{**teacher.config.to_dict(), "num_hidden_layers": layers})
    student = AutoModelForCausalLM.from_config(config)
    weights, count = teacher.state_dict(), teacher.config.num_hidden_layers
    kept = [round(index * (count - 1) / max(layers - 1, 1)) for index in range(layers)]
    own = {}
    for name in student.state_dict():
        parts = name.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(kept[int(parts[place])])
        own[name] = weights[".".join(parts)]
    student.load_state_dict(own)
    student.generation_config = teacher.generation_config
    return student


def questions() -> dict[str, list[list[dict[str, str]]]]:
    """Returns prompts by split; no topic is in both."""

    def asked(topics: tuple[str, ...]) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": text.format(topic)}] for topic in topics for text in QUESTIONS]

    return {"train": asked(TOPICS[:-HELD_OUT_TOPICS]), "test": asked(TOPICS[-HELD_OUT_TOPICS:])}


def answered(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, str]]], length: int
) -> Dataset:
    """Returns the prompts with answers that the teacher samples."""
    engine = TransformersEngine(teacher, end_token_ids(teacher, tokenizer), tokenizer.pad_token_id, tokenizer)
    found = engine.generate([tokenize_prompt(prompt, tokenizer) for prompt in prompts], SamplingSettings(length))
    texts = tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
    rows = zip(prompts, texts, strict=True)
    return Dataset.from_list(
        [{"prompt": prompt, "completion": [{"role": "assistant", "content": text or "."}]} for prompt, text in rows]
    )


def make_trainer(
    student: PreTrainedModel, teacher: PreTrainedModel, data: dict[str, Dataset], arguments: argparse.Namespace
) -> GKDTrainer:
    """Returns a trainer on a mixture of the teacher's answers and the student's own."""
    config = GKDConfig(
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        lmbda=0.25,
        beta=0.0,
        temperature=1.0,
        max_new_tokens=arguments.tokens,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 4),
        **common_settings(arguments, "gkd"),
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    return GKDTrainer(
        student,
        teacher,
        config,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )


def held_out(trainer: GKDTrainer) -> dict[str, float]:
    """Returns the divergence, the entropy and the share of same likeliest tokens on the held-out answers, now."""
    settings = trainer.divergence_settings
    reading = {"outputs": ("divergence", "entropy", "is_same_top1")}
    same, tokens = 0.0, 0
    with evaluating(trainer.model):
        for rows in trainer.get_eval_dataloader():
            update = trainer._prepare_inputs(rows)
            states = teacher_states(trainer.teacher_model, update.batch)
            asked = type(settings)(**{**vars(settings), **reading})
            found = read_model(trainer.model, update.batch, ReadDivergence(states, update.weights, asked)).value
            same += found.scores.is_same_top1.sum().item()
            tokens += len(update.batch.targets)
    return {"same_top1": same / tokens, "loss": trainer.evaluate()["eval_loss"]}


def sample(trainer: GKDTrainer, prompt: list[dict[str, str]]) -> str:
    """Returns an answer of the student."""
    torch.manual_seed(0)
    found = trainer.engine.generate([tokenize_prompt(prompt, trainer.tokenizer)], trainer.args.sampling_settings())
    return trainer.tokenizer.decode(found.completion_ids[0], skip_special_tokens=True)


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="teacher; default: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / "gkd")
    parser.add_argument("--steps", type=int, default=80, help="steps of 8 answers")
    parser.add_argument("--layers", type=int, default=10, help="layers of the student")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path = str(smollm2_folder())
    console = make_console()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    student = make_student(teacher, arguments.layers)
    data = {split: answered(teacher, tokenizer, asked, arguments.tokens) for split, asked in questions().items()}
    trainer = make_trainer(student, teacher, data, arguments)
    quiet(trainer, console)
    before, prompt = held_out(trainer), data["test"][0]["prompt"]
    said = sample(trainer, prompt)
    trainer.train()
    after = held_out(trainer)
    plot(trainer.state.log_history, ("eval_loss", "eval_entropy"), arguments.output_dir / "training.png")
    table = Table(title="held-out questions, before → after distillation", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("divergence from the teacher, nats a token", f"{before['loss']:.3f} → {after['loss']:.3f}")
    table.add_row("same likeliest token", f"{before['same_top1']:.3f} → {after['same_top1']:.3f}")
    console.print(table)
    console.print(f"{prompt[0]['content']}\n  before: {said!r}\n  after:  {sample(trainer, prompt)!r}", markup=False)
    console.print(f"training curves: {arguments.output_dir / 'training.png'}")
    return 0 if after["loss"] < LEFT * before["loss"] else 1


if __name__ == "__main__":
    sys.exit(main())
