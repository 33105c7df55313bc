"""Holds the pages to the code: scripts and commands run; flags, fields, rows, metrics and formulas are the code's."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import runpy
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import trl_fast
from support.models import save_tiny_classifier, save_tiny_model
from support.pages import Block, blocks, blocks_of, in_backticks, message_sources, table_rows
from support.source_tree import ROOT
from support.teacher_server import teacher_server
from support.tokenizer import build_tokenizer
from trl_fast.cli.commands import COMMANDS
from trl_fast.cli.launch import launcher_flags
from trl_fast.cli.main import main
from trl_fast.cli.preview import make_parser as make_preview_parser
from trl_fast.cli.training import make_parser
from trl_fast.data import (
    SFTFormat,
    SFTLength,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_sft_dataset,
    prepare_unpaired_dataset,
)
from trl_fast.data.joined_text import tokenize_joined
from trl_fast.data.prompt_completion import (
    prepare_given_completions,
    prompts_of_conversations,
    split_conversations,
)
from trl_fast.data.prompt_only import prepare_prompt_dataset
from trl_fast.data.teacher_prompts import prepare_teacher_prompts
from trl_fast.losses.a2po import a2po_loss, optimal_values
from trl_fast.losses.bco import bco_losses
from trl_fast.losses.dpo import PAIR_LOSSES, DPOLossConfig, PreferencePairs, dpo_loss
from trl_fast.losses.f_divergences import F_DIVERGENCES
from trl_fast.losses.kto import LOSSES as KTO_LOSSES
from trl_fast.losses.kto import KTOLossConfig, kto_losses
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.online_dpo import LOSSES as ONLINE_DPO_LOSSES
from trl_fast.losses.online_dpo import online_dpo_loss_config, online_loss_inputs
from trl_fast.losses.policy_gradient import LOSSES as POLICY_LOSSES
from trl_fast.losses.policy_gradient import PolicyLossConfig, policy_terms
from trl_fast.losses.ppo import ppo_loss_inputs, value_loss
from trl_fast.losses.reference_free import (
    CPO_LOSSES,
    TPO_LOSSES,
    WITHOUT_SMOOTHING,
    CPOLossConfig,
    ORPOLossConfig,
    TPOLossConfig,
)
from trl_fast.losses.reward import reward_loss
from trl_fast.losses.sft import TOKEN_LOSSES
from trl_fast.ops import TokenScores
from trl_fast.trainers.methods import METHODS

# The method pages, and what makes the rows of each ready.
PREPARES = {
    "sft": lambda rows, tokenizer: prepare_sft_dataset(rows, tokenizer, SFTFormat(), SFTLength()),
    "dpo": prepare_preference_dataset,
    "reward": prepare_reward_dataset,
    "kto": prepare_unpaired_dataset,
    "bco": prepare_unpaired_dataset,
    "orpo": prepare_preference_dataset,
    "cpo": prepare_preference_dataset,
    "tpo": lambda rows, tokenizer: prepare_preference_dataset(rows, tokenizer, others=("reference",)),
    "grpo": prepare_prompt_dataset,
    "rloo": prepare_prompt_dataset,
    "online_dpo": prepare_prompt_dataset,
    "a2po": prepare_prompt_dataset,
    "distillation": prepare_prompt_dataset,
    "gold": lambda rows, tokenizer: prepare_given_completions(
        split_conversations(rows), tokenizer, tokenize=tokenize_joined
    ),
    "server_distillation": prepare_prompt_dataset,
    "iw_opd": lambda rows, tokenizer: prepare_prompt_dataset(prompts_of_conversations(rows), tokenizer),
    "sdft": lambda rows, tokenizer: prepare_teacher_prompts(
        prepare_prompt_dataset(rows, tokenizer), tokenizer, template="{prompt} {privileged_context}"
    ),
    "sdpo": prepare_prompt_dataset,
    "ppo": lambda rows, tokenizer: (
        rows if "input_ids" in rows.column_names else prepare_prompt_dataset(rows, tokenizer)
    ),
}
MODEL, REWARD_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "reward-model"
TEACHER, TEACHER_URL = "HuggingFaceTB/SmolLM2-360M-Instruct", "http://localhost:8000"
# What transformers logs once, when training ends.
_AT_THE_END = re.compile(r"train_|total_flos")
# How formulas are written, and what Python reads.
_SIGNS = str.maketrans({"·": "*", "−": "-", "²": "**2"})


def slow_but(*fast: str) -> list:
    """Returns the pages' names as parameters; all but some run in `make test-slow` only."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in PREPARES]


def page(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with tiny models, by the names that the pages use; one is served. PPO's has a reward model."""
    tokenizer = build_tokenizer()
    teacher = save_tiny_model(tmp_path_factory.mktemp("teacher"), tokenizer)
    with teacher_server(teacher) as server:
        yield {
            MODEL: save_tiny_model(tmp_path_factory.mktemp("model"), tokenizer),
            REWARD_MODEL: save_tiny_classifier(tmp_path_factory.mktemp("reward"), tokenizer),
            TEACHER: teacher,
            TEACHER_URL: server.url,
        }


def with_models(text: str, models: dict[str, str], name: str) -> str:
    """Puts folders into a text of a page; elsewhere than on PPO's the reward model is what training writes."""
    for known in (MODEL, TEACHER, TEACHER_URL):
        text = text.replace(known, models[known])
    return text.replace(REWARD_MODEL, models[REWARD_MODEL]) if name == "ppo" else text


@pytest.fixture
def unpacked(tmp_path, monkeypatch, models):
    """Writes the titled blocks of a page into the working directory, tiny models in place of real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> dict[str, list[Block]]:
        found: dict[str, list[Block]] = {}
        for block in blocks_of(page(name)):
            found.setdefault(block.language, []).append(block)
            if block.title:
                Path(block.title).write_text(with_models(block.text, models, name), encoding="utf-8")
        return found

    return write


# ---- every page: what can be read


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_snippets_parse_and_their_arguments_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in trl_fast.__all__:
            known = inspect.signature(getattr(trl_fast, node.func.id)).parameters
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= known.keys(), node.func.id


def own_commands() -> list[tuple[str, list[str]]]:
    """Returns the page and the words of every command line of ours in a block, those with an ellipsis left out."""
    found = [(block.page, words) for block in blocks("bash", "sh") for words in block.commands]
    # Settings of the environment stand before a command.
    found = [(name, list(dropwhile(lambda word: "=" in word, words))) for name, words in found]
    return [(name, words) for name, words in found if words[:1] == ["trl-fast"] and "…" not in words]


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


@pytest.mark.parametrize("name, words", own_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_flags_of_commands_exist(name, words, unpacked, capsys):
    _, command, *arguments = words
    parser = make_parser
    if command == "preview":
        command, *arguments = arguments
        parser = make_preview_parser
    if command in METHODS:
        if name.startswith("docs/"):
            unpacked(Path(name).stem)
        arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
        _, unknown = launcher_flags(parser(METHODS[command]).remaining_strings(arguments))
        assert not unknown
    elif command.startswith("--"):
        assert main([command]) == 0
    else:
        assert importlib.util.find_spec(f"trl_fast.cli.{command.replace('-', '_')}"), command
        method = arguments[:1] if COMMANDS[command].takes_method else []
        with suppress(SystemExit):
            main([command, *method, "--help", *(["all"] if COMMANDS[command].arguments else [])])
        listed = capsys.readouterr().out.replace(",", " ").replace("=", " ").split()
        assert command == "run" or flags(arguments) <= flags(listed)


@pytest.mark.parametrize("module, words", sorted(
    {(words[2], tuple(words[3:])) for block in blocks("bash", "sh") for words in block.commands
     if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks.")}
), ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_flags_of_benchmarks_exist(module, words):
    path = Path(importlib.util.find_spec(module).origin)
    files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for flag in flags(list(words)):
        assert re.search(rf"{flag}\b", text.replace("-", "_")), flag


def test_quoted_messages_are_those_of_the_code():
    known = message_sources()
    quoted = [block.text.strip() for block in blocks_of(page("troubleshooting")) if block.language == "text"]
    assert len(quoted) > 10
    for quote in quoted:
        parts = [part for part in quote.split("…") if len(part) > 3]
        assert any(all(part in text for part in parts) for text in known), quote


# ---- the pages of the methods: what runs


@pytest.mark.parametrize("name", PREPARES)
def test_rows_are_taken(name):
    from datasets import Dataset

    found = [block for block in blocks_of(page(name)) if block.language == "jsonl"]
    assert found
    for block in found:
        rows = [json.loads(line) for line in block.text.splitlines()]
        assert len(PREPARES[name](Dataset.from_list(rows), build_tokenizer())) == len(rows)


def test_the_first_data_is_taken(unpacked):
    from datasets import load_dataset

    unpacked("start")
    runpy.run_path("make_pairs.py")
    rows = load_dataset("json", data_files="pairs.jsonl", split="train")
    assert len(prepare_preference_dataset(rows, build_tokenizer())) == len(rows) == 18


@pytest.mark.parametrize("name", slow_but("sft", "dpo", "reward", "kto", "grpo"))
def test_scripts_run_and_metrics_are_named(name, unpacked):
    scripts = [block for block in unpacked(name)["python"] if block.title.startswith("train_")]
    trainer = runpy.run_path(scripts[0].title)["trainer"]
    logged = {key for entry in trainer.state.log_history for key in entry if not _AT_THE_END.match(key)} - {"step"}
    named = {metric for row in table_rows(page(name), "Metrics") for metric in in_backticks(row[0])}
    patterns = [re.compile(re.escape(metric).replace("NAME", r"[^/]+") + "$") for metric in named]
    assert not {metric for metric in logged if not any(pattern.match(metric) for pattern in patterns)}
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "trl_fast").rglob("*.py"))
    for metric in named - logged:
        # Some names are made of parts.
        assert all(word in sources for word in metric.rpartition("/")[2].split("_")), metric


@pytest.mark.parametrize("name", slow_but("dpo"))
def test_commands_run(name, unpacked, models):
    commands = [words for block in unpacked(name)["bash"] for words in block.commands if words[1] == name]
    assert commands
    for words in commands:
        assert main([with_models(word, models, name) for word in words[1:]]) == 0


# ---- formulas


def formulas(name: str, heading: str) -> dict[str, str]:
    """Returns the first formula of each row of a table by the name in its first cell."""
    return {in_backticks(row[0])[0]: in_backticks(row[1])[0] for row in table_rows(page(name), heading)}


def value(formula: str, **names: object) -> torch.Tensor:
    """Computes a formula as it is printed."""
    known = {
        "σ": torch.sigmoid,
        "logσ": F.logsigmoid,
        "exp": lambda x: torch.as_tensor(x, dtype=torch.float64).exp(),
        "log": lambda x: torch.as_tensor(x, dtype=torch.float64).log(),
        "max": lambda x, y: torch.maximum(*_both(x, y)),
        "min": lambda x, y: torch.minimum(*_both(x, y)),
    }
    return eval(formula.translate(_SIGNS), {"__builtins__": {}}, {**known, **names})


def _both(x: object, y: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.broadcast_tensors(*(torch.as_tensor(one, dtype=torch.float64) for one in (x, y)))


def random_vectors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator, dtype=torch.float64) * 3 for _ in range(count)]


def test_formulas_of_dpo_are_those_of_the_code():
    chosen, rejected, ref_chosen, ref_rejected, s_c, s_r = random_vectors(6)
    n_c, n_r = torch.tensor([3, 1, 7, 2, 5]), torch.tensor([2, 4, 1, 6, 5])
    mean = torch.tensor(-1.5, dtype=torch.float64)
    pairs = PreferencePairs(chosen, rejected, ref_chosen, ref_rejected, s_c, s_r, n_c, n_r, mean)
    config = DPOLossConfig(tuple(PAIR_LOSSES), beta=0.3, label_smoothing=0.1, discopop_tau=0.7)
    r_c, r_r = chosen - ref_chosen, rejected - ref_rejected
    sorted_differences = {
        "aot": (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values,
        "aot_unpaired": r_c.sort().values - r_r.sort().values,
    }
    names = {"r_c": r_c, "r_r": r_r, "s_c": s_c, "s_r": s_r, "n_c": n_c, "n_r": n_r, "l": mean.expand(5)}
    names |= {"β": 0.3, "ε": 0.1, "τ": 0.7, "x": 0.3 * (s_c - s_r)}
    found = formulas("dpo", "The formulas")
    assert found.keys() == PAIR_LOSSES.keys()
    for name, loss in PAIR_LOSSES.items():
        computed = value(found[name], **names, d=sorted_differences.get(name))
        torch.testing.assert_close(computed, loss(pairs, config), msg=name)


def test_formulas_of_f_divergences_are_those_of_the_code():
    (r,) = random_vectors(1)
    found = formulas("dpo", "f-divergences")
    assert found.keys() == F_DIVERGENCES.keys()
    for name, score in F_DIVERGENCES.items():
        torch.testing.assert_close(value(found[name], r=r, α=0.4), score(r, 0.4), msg=name)


def test_formulas_of_sft_and_reward_are_those_of_the_code():
    logprobs = -random_vectors(1)[0].abs()
    for name, formula in formulas("sft", "The formulas").items():
        torch.testing.assert_close(value(formula, p=logprobs.exp()).sum(), TOKEN_LOSSES[name](logprobs))
    r_c, r_r, m = random_vectors(3)
    found = value(formulas("reward", "The formulas")["preference"], r_c=r_c, r_r=r_r, m=m, c=0.3)
    torch.testing.assert_close(found.mean(), reward_loss(torch.stack((r_c, r_r), 1).flatten(), m, 0.3))


def test_formulas_of_kto_are_those_of_the_code():
    (r,) = random_vectors(1)
    rows = {in_backticks(row[0])[0]: row for row in table_rows(page("kto"), "The formulas")}
    assert rows.keys() == set(KTO_LOSSES)
    for name, row in rows.items():
        config = KTOLossConfig(name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
        z = torch.tensor(0.4 if config.needs_kl else 0.0, dtype=torch.float64)
        for cell, label in zip(row[1:3], (True, False), strict=True):
            computed = value(in_backticks(cell)[0], r=r, z=z, β=0.3, w_d=1.5, w_u=0.7)
            labels = torch.full_like(r, label, dtype=torch.bool)
            torch.testing.assert_close(computed, kto_losses(r, labels, z, config), msg=name)


def test_formulas_of_bco_are_those_of_the_code():
    r, w = random_vectors(2)
    ((_, *cells),) = [row[:3] for row in table_rows(page("bco"), "The formulas")]
    shift, weights = torch.tensor(0.4, dtype=torch.float64), w.abs()
    for cell, label in zip(cells, (True, False), strict=True):
        labels = torch.full_like(r, label, dtype=torch.bool)
        computed = value(in_backticks(cell)[0], r=r, δ=shift, w=weights)
        expected = bco_losses(r, labels, shift) * (1 if label else weights)
        torch.testing.assert_close(computed, expected)


def test_formulas_of_the_losses_without_a_reference_are_those_of_the_code():
    chosen, rejected = (-vector.abs() for vector in random_vectors(2))
    names = {"l_c": chosen, "l_r": rejected, "L_c": chosen, "L_r": rejected, "β": 0.3, "ε": 0.1, "γ": 0.2}
    computed = value(formulas("orpo", "The formulas")["orpo"], **names)
    torch.testing.assert_close(computed, ORPOLossConfig(beta=0.3).pair_losses(chosen, rejected))
    found = {"cpo": formulas("cpo", "The formulas"), "tpo": formulas("tpo", "The formulas")}
    assert found["cpo"].keys() == set(CPO_LOSSES) and found["tpo"].keys() == set(TPO_LOSSES)
    for method, known in found.items():
        for name, formula in known.items():
            smoothing = {} if name in WITHOUT_SMOOTHING else {"label_smoothing": 0.1}
            if method == "cpo":
                config = CPOLossConfig(beta=0.3, loss_type=name, simpo_gamma=0.2, alpha=0.4, **smoothing)
            else:
                config = TPOLossConfig(beta=0.3, loss_type=name, tpo_l_gamma=0.2, **smoothing)
            rewards = {"R_c": config.shaped(chosen), "R_r": config.shaped(rejected)}
            computed = value(formula, **names, **rewards)
            torch.testing.assert_close(computed, config.pair_losses(chosen, rejected), msg=name)


def test_formulas_of_the_policy_losses_are_those_of_the_code():
    logprobs, advantages, old = (vector.float() / 4 for vector in random_vectors(3))
    ones = torch.ones_like(logprobs)
    inputs = PolicyLossInputs(torch.arange(5), advantages, ones, old_logprobs=old)
    bounds = {"epsilon": 0.2, "epsilon_high": 0.3}
    names = {"ρ": (logprobs - old).exp(), "A": advantages, "l": logprobs, "ε": 0.2, "ε_high": 0.3, "clip": torch.clamp}
    names |= {"w": (logprobs - old).exp(), "k": torch.where(advantages >= 0, 2.0, 3.0)}
    names |= {"λ": torch.where(advantages >= 0, 3.0, 2.0), "τ": torch.where(advantages > 0, 1.0, 1.05)}
    found = formulas("grpo", "The formulas")
    assert found.keys() == POLICY_LOSSES.keys()
    for name, formula in found.items():
        config = PolicyLossConfig(name, delta=1.4, **bounds)
        computed = value(formula, **names, δ=1.4).float()
        torch.testing.assert_close(computed, policy_terms(logprobs, inputs, config).terms, msg=name)
    config = PolicyLossConfig("grpo", importance_sampling_level="product", **bounds)
    computed = value(formulas("rloo", "The formulas")["rloo"], **names).float()
    torch.testing.assert_close(computed, policy_terms(logprobs, inputs, config).terms)


def test_formulas_of_online_dpo_are_those_of_the_code():
    logprobs, reference = random_vectors(2)
    inputs = online_loss_inputs(torch.arange(4), 4)
    logratios = (logprobs - reference)[:4]
    found = formulas("online_dpo", "The formulas")
    assert tuple(found) == ONLINE_DPO_LOSSES
    for name, formula in found.items():
        computed = value(formula, δ=logratios[0::2] - logratios[1::2], β=0.3).mean()
        loss = dpo_loss(
            TokenScores(logprobs=logprobs[:4]), inputs, reference[:4], online_dpo_loss_config(name, beta=0.3)
        )
        torch.testing.assert_close(computed, loss, msg=name)


def test_the_formula_of_a2po_is_that_of_the_code():
    logprobs, reference, rewards, values = random_vectors(4)
    computed = value(formulas("a2po", "The formulas")["a2po"], d=logprobs - reference, r=rewards, V=values, β=0.3)
    loss = a2po_loss(logprobs, torch.arange(5), reference, rewards - values, 0.3)
    torch.testing.assert_close(computed.mean(), loss)
    grouped = torch.stack((rewards, values), 1)
    torch.testing.assert_close(optimal_values(grouped, 0.5), 0.5 * (grouped / 0.5).exp().mean(1).log())


def test_formulas_of_ppo_are_those_of_the_code():
    logprobs, old, advantages, values, old_values, returns = (vector / 4 for vector in random_vectors(6))
    found = formulas("ppo", "The formulas")
    names = {"ρ": (logprobs - old).exp(), "A": advantages, "V": values, "V_old": old_values, "R": returns}
    names |= {"c": 0.2, "v": 0.3, "clip": torch.clamp}
    terms = policy_terms(logprobs, ppo_loss_inputs(old, advantages), PolicyLossConfig("dapo", epsilon=0.2)).terms
    torch.testing.assert_close(value(found["policy"], **names), terms)
    computed = value(found["value"], **names).mean()
    torch.testing.assert_close(computed, value_loss(values, old_values, returns, 0.3).loss)
