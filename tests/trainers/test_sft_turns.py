"""SFT with each turn of the assistant after its own context: against TRL 1.16.0 on the same turns, one row each."""

from importlib.resources import files

import pytest
import torch
import trl
from datasets import Dataset

import trl_fast
from support.models import save_tiny_model
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, make_trainer
from trl_fast.data import LAYOUTS

THOUGHT = "<think>\nIt is {} of course.\n</think>\n\nIt is {}."


def conversation(number, thoughts=True):
    """Three turns of the assistant, with thoughts that Qwen3's template drops once another question follows."""
    said = []
    for turn in range(3):
        said.append({"role": "user", "content": f"What color is the sky {number * turn}?" * (1 + number % 2)})
        text = THOUGHT.format("blue" * (1 + turn), f"green {number}") if thoughts else f"The sea is green {turn}."
        said.append({"role": "assistant", "content": text})
    return said


def conversations(count=3, **how):
    return Dataset.from_list([{"messages": conversation(number, **how)} for number in range(count)])


def turns_one_by_one(dataset):
    """The rows that TRL needs for the same: a prompt and a completion for each turn."""
    return Dataset.from_list(
        [
            {"prompt": row["messages"][:end], "completion": row["messages"][end : end + 1]}
            for row in dataset
            for end in range(1, len(row["messages"]), 2)
        ]
    )


@pytest.fixture(scope="module")
def thinking_path(tmp_path_factory):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    return save_tiny_model(tmp_path_factory.mktemp("tiny-thinking"), tokenizer)


def trained(module, folder, model_path, dataset, **settings):
    rows = len(dataset)
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, "gradient_accumulation_steps": 1}
    arguments = {"model": model_path, "train_dataset": dataset, "eval_dataset": dataset}
    settings = {"max_steps": 2, "learning_rate": 2e-2, "max_length": None, **sizes, **settings}
    trainer = make_trainer(module, folder, method="SFT", arguments=arguments, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer


def ours(folder, model_path, dataset, **settings):
    turns = {"assistant_only_loss": True, "assistant_turns": "separately"}
    return trained(trl_fast, folder, model_path, dataset, **turns, **settings)


@pytest.fixture(scope="module")
def expected(thinking_path, tmp_path_factory):
    """TRL's logs of the turns one by one."""
    folder = tmp_path_factory.mktemp("trl")
    return trained(trl, folder, thinking_path, turns_one_by_one(conversations())).state.log_history


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_trls_numbers_of_turns_one_by_one(layout, expected, thinking_path, tmp_path):
    trainer = ours(tmp_path, thinking_path, conversations(), batch_layout=layout)
    assert_same_logs(trainer.state.log_history, expected)
    counts = trainer._tokens
    assert counts.seen == expected[1]["num_tokens"]
    assert (counts.computed < counts.seen) == (layout == "shared_prefix")


@pytest.mark.parametrize("mode", ["keep_start", pytest.param("keep_end", marks=pytest.mark.slow)])
def test_turns_are_cut_as_trls(mode, thinking_path, tmp_path):
    """The longest turn, with its context, has 118 tokens."""
    settings, dataset = {"max_length": 97, "truncation_mode": mode}, conversations()
    theirs = trained(trl, tmp_path / "trl", thinking_path, turns_one_by_one(dataset), **settings)
    trainer = ours(tmp_path / "turns", thinking_path, dataset, **settings)
    assert_same_logs(trainer.state.log_history, theirs.state.log_history)


def test_turns_that_go_on_from_each_other_are_one_sequence(model_path, tmp_path):
    """A template that keeps what was said: the numbers are those of turns one by one, and of turns together."""
    dataset = conversations(thoughts=False)
    expected = trained(trl, tmp_path / "trl", model_path, turns_one_by_one(dataset))
    trainer = ours(tmp_path / "turns", model_path, dataset)
    assert_same_logs(trainer.state.log_history, expected.state.log_history)
    batch = trainer.data_collator.collate(list(trainer.train_dataset))
    assert (
        len(batch) == 3 and batch.input_ids.numel() < batch.num_tokens == expected.state.log_history[0]["num_tokens"]
    )


TURNS = {
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "learning_rate": 2e-2, "max_steps": 2},
    **{"max_length": None, "assistant_only_loss": True, "assistant_turns": "separately"},
}


def test_streams_and_loaders_in_other_processes(expected, thinking_path, tmp_path):
    arguments = {"model": thinking_path, "train_dataset": conversations().to_iterable_dataset()}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, dataloader_num_workers=1, **TURNS)
    trainer.train()
    for one, other in zip(trainer.state.log_history[:2], expected[:2], strict=True):
        assert_same_logs([{**one, "epoch": 0}], [{**other, "epoch": 0}])


def test_users_see_a_row_a_turn(expected, thinking_path, tmp_path):
    """A loss of the user's own, which reads logits and labels."""
    seen = []

    def loss_of(outputs, labels, num_items_in_batch):
        seen.append((labels != -100).sum(1).tolist())
        logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch

    arguments = {"model": thinking_path, "train_dataset": conversations(), "compute_loss_func": loss_of}
    trainer = make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, **TURNS)
    trainer.train()
    assert trainer.layout.name == "shared_prefix" and [len(rows) for rows in seen] == [9, 9] and min(seen[0]) > 10
    for one, other in zip(trainer.state.log_history[:2], expected[:2], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


BAD = {
    "no turn": ({"messages": [{"role": "user", "content": "Hi"}]}, {}, "row 0: no message has the role 'assistant'"),
    "begins with one": (
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {},
        "row 0: the conversation begins with the assistant's message",
    ),
    "text": (
        {"text": "Hi"},
        {},
        r"assistant_only_loss=True needs conversations, but the train dataset has \['text'\]",
    ),
    "tokens": (
        {"input_ids": [5, 6]},
        {},
        "train dataset: assistant_turns='separately' needs conversations, but it is tok",
    ),
    "formatted": (
        {"messages": conversation(0)},
        {"formatting_func": lambda row: "Hi"},
        "needs conversations, but formatting_func makes one text of each row",
    ),
    "collator": ({"messages": conversation(0)}, {"data_collator": list}, "data_collator: with assistant_turns="),
}


@pytest.mark.parametrize(("row", "given", "message"), BAD.values(), ids=BAD)
def test_data_without_turns(row, given, message, thinking_path, tmp_path):
    arguments = {"model": thinking_path, "train_dataset": Dataset.from_list([row]), **given}
    how = {"assistant_only_loss": True, "assistant_turns": "separately"}
    with pytest.raises(ValueError, match=message):
        make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, **how)


SETTINGS = {
    "assistant_turns='separatly' is unknown; .* did you mean 'separately'": {"assistant_turns": "separatly"},
    "set assistant_only_loss=True": {"assistant_only_loss": False},
    "set packing=False": {"packing": True},
    "set eval_packing=False": {"eval_packing": True},
    "skip_prepare_dataset.* makes no turns": {"dataset_kwargs": {"skip_prepare_dataset": True}},
}


@pytest.mark.parametrize(("message", "settings"), SETTINGS.items(), ids=[*map(str, SETTINGS.values())])
def test_settings_that_do_not_go_with_it(message, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl_fast.SFTConfig(tmp_path, **{"assistant_only_loss": True, "assistant_turns": "separately", **settings})


@pytest.mark.slow
def test_two_processes_with_turns_train_as_one(thinking_path, tmp_path):
    """Rows are dealt by the tokens that are computed once."""

    def train(folder, batch_size):
        settings = {**TURNS, "per_device_train_batch_size": batch_size, "balance_batches": "step"}
        arguments = {"model": thinking_path, "train_dataset": conversations(8)}
        trainer = make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    first, second = run_on_ranks(lambda: train(tmp_path / "two", 2), engine="ddp")
    one = train(tmp_path / "one", 4)
    assert_same_logs(first, one, rel=2e-6, abs=1e-6)
    assert_same_logs(second, one, rel=2e-6, abs=1e-6)


def test_a_run_goes_on_from_its_checkpoint(thinking_path, tmp_path):
    def train(folder, resume=None, **settings):
        arguments = {"model": thinking_path, "train_dataset": conversations(4)}
        settings = {**TURNS, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1, **settings}
        trainer = make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return [log for log in trainer.state.log_history if "loss" in log]

    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_logs(again[1:], whole[1:], rel=1e-6)
