"""A command's help, which is read from sources, lists the flags that its parser has, and fits the terminal."""

import time
from enum import Enum

import pytest

from trl_fast.cli.commands import COMMANDS
from trl_fast.cli.flag_groups import OTHERS, group_of, grouped
from trl_fast.cli.help_page import LAUNCHER, WIDTH, flags_of, help_page, help_topic, is_switch
from trl_fast.cli.launch import launcher_options
from trl_fast.cli.main import main
from trl_fast.cli.parser import TrlParser
from trl_fast.lazy_imports import import_place
from trl_fast.settings.field_docs import UNKNOWN
from trl_fast.settings.older_names import OlderName
from trl_fast.trainers.methods import METHODS

# Commands with flags, and the methods that some of them take.
CALLS = [
    (name, method)
    for name, command in COMMANDS.items()
    if command.arguments
    for method in (("dpo", "ppo") if command.takes_method else [None])
]
# Flags whose choices are a table that is computed; their texts name them.
COMPUTED = {"log_level", "log_level_replica"}
TOPICS = ["", "all", "lora"]


def parser_of(name, method):
    types = [import_place(place) for place in COMMANDS[name].places(method)]
    return TrlParser(types)


def flags(page):
    return {line.split()[0].removeprefix("--") for line in page.splitlines() if line.startswith("  --")}


def plain(value):
    return value.value if isinstance(value, Enum) else value


@pytest.mark.parametrize("name, method", CALLS)
def test_the_help_has_the_flags_of_the_parser(name, method):
    actions = [action for action in parser_of(name, method)._actions if action.dest != "help"]
    ours = {doc.name: doc for doc in flags_of(COMMANDS[name], method)}
    launched = {doc.name for doc in LAUNCHER} if name in METHODS else set()
    shown = {action.dest for action in actions if not isinstance(action.help, OlderName)} - {"torch_dtype"}
    assert ours.keys() == shown | launched and launched <= launcher_options().keys()
    assert flags(help_page(COMMANDS[name], "all", method)) == ours.keys()
    for action in actions:
        if action.dest not in shown or action.option_strings[0] == f"--no_{action.dest}":
            continue
        doc = ours[action.dest]
        # transformers' parser knows no default of a list that is a text.
        default = "" if action.dest == "debug" else plain(action.default)
        assert doc.default == default or (doc.default is UNKNOWN and action.required), doc
        expected = [plain(choice) for choice in action.choices or ()] if action.dest not in COMPUTED else []
        assert list(doc.choices) == expected, doc
        assert (action.nargs == "?" and action.default is False) == is_switch(doc), doc


@pytest.mark.parametrize("name, method", [*CALLS, ("preview", None)])
@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_fits_the_terminal(name, method, topic):
    page = help_page(COMMANDS[name], topic if method or name in METHODS else "", method)
    assert max(map(len, page.splitlines())) <= WIDTH
    # A*-PO, IW-OPD and self-distillation have max_prompt_length as an argument of their own.
    own = {"a2po", "iw_opd", "sdft", "sdpo"} & {name, method}
    older = {"torch_dtype", "evaluation_strategy"} | (set() if own else {"max_prompt_length"})
    assert not older & flags(page)


@pytest.mark.parametrize("name", METHODS)
def test_the_common_flags_are_few_and_every_flag_has_a_group(name):
    docs = flags_of(COMMANDS[name])
    assert {"model_name_or_path", "dataset_name", "output_dir", "learning_rate"} <= flags(help_page(COMMANDS[name]))
    assert 25 <= len(flags(help_page(COMMANDS[name]))) <= 45
    assert {doc.name for doc in docs if group_of(doc) == OTHERS} == {"config", "do_train", "do_predict"}
    assert sum(map(len, grouped(docs).values())) == len(docs)


def test_a_topic():
    assert flags(help_page(COMMANDS["grpo"], "vllm")) >= {"use_vllm", "vllm_mode", "vllm_server_port"}
    assert "use_dora" in flags(help_page(COMMANDS["sft"], "quantisation"))
    assert flags(help_page(COMMANDS["dpo"], "--label-smoothing")) == {"label_smoothing", "label_smoothing_factor"}
    with pytest.raises(ValueError, match="--help lore: no flag or group has this in its name; did you mean 'lora_r'"):
        help_page(COMMANDS["dpo"], "lore")


@pytest.mark.parametrize(
    "words, topic",
    [
        ([], None),
        (["--beta", "1"], None),
        (["--beta", "1", "-h"], ""),
        (["--help", "--beta", "1"], ""),
        (["--help", "all"], "all"),
    ],
)
def test_what_help_is_asked_for(words, topic):
    assert help_topic(words) == topic


def test_help_is_quick(capsys):
    begin = time.process_time()
    assert main(["dpo", "-h"]) == 0
    assert time.process_time() - begin < 1
    assert "--beta X" in capsys.readouterr().out
    assert main(["dpo", "--help", "betta"]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().err
