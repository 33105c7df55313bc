"""Ranges of settings: every numeric field has one, bad values are refused by name, good ones are taken."""

import dataclasses
import importlib
import math
import typing
import warnings

import numpy as np
import pytest
import trl

import trl_fast
from trl_fast.cli.arguments import DatasetConfig, DatasetMixtureConfig, ModelConfig
from trl_fast.cli.plan import PlanArguments
from trl_fast.losses.dpo import DPOLossConfig
from trl_fast.losses.kto import KTOLossConfig
from trl_fast.losses.policy_gradient import PolicyLossConfig
from trl_fast.planning.training_setup import TrainingSetup
from trl_fast.rollout import SamplingSettings
from trl_fast.settings.ranges import FINITE, RANGES, Range, check_ranges, range_of
from trl_fast.trainers.methods import METHODS

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
# Other dataclasses with numbers of the same names.
OTHERS = [ModelConfig, TrainingSetup, SamplingSettings, DPOLossConfig, KTOLossConfig, PolicyLossConfig]
OTHERS += [DatasetConfig, DatasetMixtureConfig, PlanArguments]
CONFIGS = {config.__name__.removesuffix("Config"): config for config in (m.config_class() for m in METHODS.values())}


def config(method, folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return CONFIGS[method](str(folder), **CPU, **settings)


def parts(hint):
    """A type hint and all that it is made of."""
    yield hint
    for argument in typing.get_args(hint):
        yield from parts(argument)


def numeric_fields(owner):
    hints = typing.get_type_hints(owner)
    return [item.name for item in dataclasses.fields(owner) if {int, float} & set(parts(hints[item.name]))]


@pytest.mark.parametrize("owner", [*CONFIGS.values(), *OTHERS], ids=lambda owner: owner.__name__)
def test_every_numeric_field_has_a_range(owner):
    """One without is a new field: enter it into RANGES, as FINITE if every number makes sense."""
    names = numeric_fields(owner)
    assert names
    assert [name for name in names if range_of(owner, name) is None] == []


@pytest.mark.parametrize("method", CONFIGS)
def test_integers_and_lists_are_those_of_the_annotations(method):
    owner = CONFIGS[method]
    hints = typing.get_type_hints(owner)
    for name in numeric_fields(owner):
        inside, allowed = set(parts(hints[name])), range_of(owner, name)
        assert allowed.whole == (float not in inside), name
        assert allowed.many == any(typing.get_origin(part) in (list, tuple) for part in inside), name


def test_no_entry_is_left_over():
    known = {name for owner in [*CONFIGS.values(), *OTHERS] for name in numeric_fields(owner)}
    assert {key.split(".")[-1] for key in RANGES} == known


def refused(method, name, value, folder):
    with pytest.raises(ValueError) as error:
        config(method, folder, **{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}: expected ") and "\n" not in message, message
    expected, _, remedy = message.partition(f", got {value!r}; ")
    assert "number" in expected or "integer" in expected, message
    assert remedy, message


def out_of_range(allowed):
    """Returns numbers that a range does not have: none at all, and one beyond each end."""
    bad = [math.nan, *([] if allowed.infinite else [math.inf, -math.inf])]
    if allowed.low > -math.inf:
        bad += [allowed.low] if allowed.above else [allowed.low - 1]
    if allowed.high < math.inf:
        bad += [allowed.high] if allowed.below else [allowed.high + 1 if allowed.whole else allowed.high + 0.5]
    if allowed.whole:
        bad.append(max(allowed.low, 0) + 1.5)
    return bad


def first_owners():
    """Returns which config is the first to have each field, with its range: others have it from a common base."""
    first = {}
    for method, owner in CONFIGS.items():
        for name in numeric_fields(owner):
            first.setdefault((name, range_of(owner, name)), method)
    return first


FIRST_OWNERS = first_owners()


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_out_of_range_is_refused_in_every_field(method, tmp_path):
    """In every field one number, and in the first config that has it all that its range does not have."""
    owner = CONFIGS[method]
    for place, name in enumerate(numeric_fields(owner)):
        allowed = range_of(owner, name)
        bad = out_of_range(allowed)
        is_first = FIRST_OWNERS[name, allowed] == method
        for value in bad if is_first else [bad[place % len(bad)]]:
            refused(method, name, [1.0, value] if allowed.many else value, tmp_path)
        if is_first and name not in ("tiled_mlp", "pad_to_multiple_of"):
            refused(method, name, "many", tmp_path)


# Values that TRL's documentation or code gives a meaning of their own, or that lie at a range's end.
TAKEN = {
    "SFT": [
        {"max_steps": -1},
        {"max_steps": 0, "num_train_epochs": 0},
        {"num_train_epochs": 0.5, "warmup_steps": 0.1},
        {"learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "adam_beta1": 0.0, "adam_epsilon": 0.0},
        {"save_steps": 0.25, "logging_steps": 0.5, "eval_steps": 0.5, "eval_strategy": "steps"},
        {"save_steps": 0, "eval_steps": 0, "save_total_limit": 0},
        {"logging_steps": 0, "logging_strategy": "no", "save_total_limit": -1, "eval_delay": 0.5},
        {"seed": 0, "data_seed": -1, "local_rank": -1, "dataset_num_proc": 0},
        {"max_length": None, "pad_to_multiple_of": "auto", "tiled_mlp": True, "neftune_noise_alpha": 5},
        {"pad_to_multiple_of": "8", "activation_budget_bytes": 0, "head_workspace_bytes": None},
        {"warmup_ratio": 0.1},
        {"learning_rate": np.float32(1e-3), "seed": np.int64(3), "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        {"dataset_batch_size": -1, "num_of_sequences": 0},
    ],
    "DPO": [
        {"beta": 0},
        {"label_pad_token_id": -100, "padding_value": 0, "ld_alpha": 1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, -0.5], "f_alpha_divergence_coef": -2.0},
        {"label_smoothing": 0.5, "ref_model_mixup_alpha": 1.0},
    ],
    "KTO": [{"desirable_weight": 0.0, "undesirable_weight": 1.33}],
    "Reward": [{"center_rewards_coefficient": 0.01}, {"center_rewards_coefficient": None}],
    "GRPO": [
        {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 5.0, "delta": 1.5, "loss_type": "cispo"},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 0.9},
        {"top_k": -1, "top_p": 0.1, "min_p": 1.0, "temperature": 2},
        {"reward_weights": [1.0, -0.5, 0], "steps_per_generation": 4, "num_generations_eval": 1},
        {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.0},
        {"top_entropy_quantile": 0.0, "entropy_coef": -0.01, "num_completions_to_print": 0},
        {"max_tool_calling_iterations": 0, "off_policy_mask_threshold": 0.5},
        {"generation_kwargs": {"do_sample": False, "top_k": -1}},
    ],
    "RLOO": [{"reward_clip_range": (-math.inf, 10)}, {"reward_clip_range": [-5.0, 5.0]}],
    "PPO": [{"total_episodes": 5, "kl_coef": 0, "missing_eos_penalty": 0, "gamma": 0, "lam": 1}],
}


@pytest.mark.parametrize(
    "method, settings", [(method, settings) for method, cases in TAKEN.items() for settings in cases], ids=str
)
def test_values_with_a_meaning_are_taken(method, settings, tmp_path):
    made = config(method, tmp_path, **settings)
    for name, value in settings.items():
        if name not in ("warmup_ratio", "pad_to_multiple_of", "tiled_mlp", "eval_steps", "dataset_num_proc"):
            assert getattr(made, name) == value, name


def config_of_trl(method):
    """TRL's config of a method, also of its experimental package."""
    name = f"{method}Config"
    packages = next(known.trl_packages for known in METHODS.values() if name in known.exports)
    return getattr(trl, name, None) or getattr(importlib.import_module(packages[-1]), name)


@pytest.mark.parametrize("method", [method for method in CONFIGS if method not in ("BCO", "PPO")])
def test_trls_defaults_are_taken(method, tmp_path):
    needed = {"teacher_model_server_url": "http://host:1"} if method == "ServerDistillation" else {}
    theirs = config_of_trl(method)(str(tmp_path), **CPU, **needed)
    config(method, tmp_path)
    owner = CONFIGS[method]
    for name in numeric_fields(owner):
        value = getattr(theirs, name, None)
        if value is not None and not isinstance(value, str):
            assert value in range_of(owner, name), name


MESSAGES = [
    ("DPO", "beta", math.nan, "a finite number >= 0, got nan; left out, it is 0.1"),
    ("KTO", "beta", 0, "a finite number > 0, got 0; left out, it is 0.1"),
    (
        "SFT",
        "max_grad_norm",
        math.inf,
        "a finite number >= 0, got inf; 0 switches clipping off",
    ),
    ("SFT", "gradient_accumulation_steps", -1, "an integer >= 1, got -1; "),
    ("GRPO", "steps_per_generation", 0, "an integer >= 1 or None, got 0; "),
    ("GRPO", "top_p", 0.0, "a finite number in (0, 1], got 0.0; 1 keeps all tokens"),
    (
        "GRPO",
        "num_generations",
        None,
        "an integer >= 2, got None; a completion is compared ",
    ),
    ("GRPO", "max_completion_length", None, "an integer >= 1, got None; "),
    (
        "GRPO",
        "reward_weights",
        [1.0, math.nan],
        "a list of finite numbers or None, got [1.0, ",
    ),
    ("GRPO", "reward_weights", 2.0, "a list of finite numbers or None, got 2.0; "),
    (
        "GRPO",
        "generation_kwargs",
        {"min_p": math.nan},
        "finite numbers, got {'min_p': nan}",
    ),
    (
        "SFT",
        "lr_scheduler_kwargs",
        '{"power": NaN}',
        "finite numbers, got {'power': nan}",
    ),
    (
        "SFT",
        "learning_rate",
        "1e-5",
        "a finite number >= 0, got '1e-5'; give a number, not text",
    ),
    ("SFT", "learning_rate", None, "a finite number >= 0, got None; "),
    ("SFT", "max_length", 9.5, "an integer >= 1 or None, got 9.5; None is no limit"),
    ("SFT", "adam_beta2", 1.0, "a finite number in [0, 1), got 1.0; "),
    ("SFT", "max_seq_length", 0, "an integer >= 1 or None, got 0; "),
    ("SFT", "tiled_mlp", "many", "an integer >= 1 or None, got 'many'; True: 4096 tokens"),
]


@pytest.mark.parametrize("method, name, value, message", MESSAGES)
def test_messages(method, name, value, message, tmp_path):
    with pytest.raises(ValueError) as error:
        config(method, tmp_path, **{name: value})
    assert str(error.value).startswith(f"{name}: expected {message}")


def test_an_integer_written_as_a_float_becomes_one(tmp_path):
    made = config("SFT", tmp_path, max_steps=1e3, gradient_accumulation_steps=2.0, max_length=np.float64(9))
    taken = (made.max_steps, made.gradient_accumulation_steps, made.max_length)
    assert taken == (1000, 2, 9) and all(type(value) is int for value in taken)


def test_fields_of_a_subclass_only_have_to_be_finite(tmp_path):
    @dataclasses.dataclass
    class WithMore(trl_fast.SFTConfig):
        threshold: float = -1.0
        bounds: list = dataclasses.field(default_factory=list)
        note: "str | NotHere" = ""  # noqa: F821

    made = WithMore(str(tmp_path), **CPU, threshold=-7, bounds=[1, "a", {"b": 2.0}], note="x")
    assert (made.threshold, made.bounds) == (-7, [1, "a", {"b": 2.0}])
    with pytest.raises(ValueError, match="threshold: expected a finite number, got inf; left out, it is -1.0"):
        WithMore(str(tmp_path), **CPU, threshold=math.inf)
    with pytest.raises(ValueError, match="bounds: expected finite numbers, got .*nan"):
        WithMore(str(tmp_path), **CPU, bounds=[1, {"b": [math.nan]}])
    with pytest.raises(ValueError, match="threshold: expected a finite number, got nan; give such a value"):
        check_ranges(dataclasses.make_dataclass("Given", [("threshold", float)])(math.nan))


def test_ranges_contain_and_describe():
    half_open = Range(0, 1, above=True)
    assert 1 in half_open and 0.5 in half_open and 0 not in half_open and math.nan not in half_open
    assert 1e300 in FINITE and 10**400 in Range(1, whole=True) and "1" not in FINITE and None not in FINITE
    assert math.inf in Range(infinite=True) and math.nan not in Range(infinite=True)
    assert str(FINITE) == "a finite number" and str(half_open) == "a finite number in (0, 1]"
    assert str(Range(1, 9, whole=True, below=True)) == "an integer in [1, 9)"


def test_minus_one_keeps_all_tokens(tmp_path):
    assert config("GRPO", tmp_path, top_k=-1).sampling_settings().top_k == 0
    with pytest.raises(ValueError, match="temperature: .*greedy decoding"):
        SamplingSettings(max_completion_length=4, temperature=math.nan)
