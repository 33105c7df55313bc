"""Attributes of TRL 1.16.0's online trainers: they are here, say the same, and count when they are set later."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import GenerationConfig, TrainerCallback

import trl_fast
from support.rollouts import FixedEngine, FixedRollout, brevity, color_prompts, vowels
from support.training import assert_same_logs, make_trainer

BASE = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.8, "max_steps": 3}
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}
METHODS = ("GRPO", "RLOO")
# What is not here, and why.
LEFT = {
    "_dist": "sharded weights are refused",
    "_has_async_funcs": "each call of user functions has an event loop of its own",
    **dict.fromkeys(("_name", "_paper", "_template_file"), "the model card is written otherwise"),
    "_tag_names": "those of a subclass are added to the model's",
    "_send_telemetry": "no telemetry is sent",
    "_total_train_tokens": "TRL sets it and never reads it",
    **dict.fromkeys(("_tool_call_loop", "_get_tool_suffix_ids"), "the tool loop is an engine; overriding is refused"),
}


@pytest.fixture
def make(model_path, tokenizer, tmp_path):
    def make(module, method="GRPO", *, engine=None, **settings):
        arguments = {
            "model": model_path,
            "reward_funcs": [vowels, brevity],
            "train_dataset": color_prompts(),
            **({"rollout_engine": engine} if engine else {}),
            **({"rollout_func": FixedRollout(tokenizer)} if engine is None and method == "GRPO" else {}),
        }
        folder = tmp_path / f"{module.__name__}-{method}"
        return make_trainer(module, folder, method=method, arguments=arguments, **BASE | settings)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_each_attribute_of_trls_trainer_is_here_and_says_the_same(method, make):
    theirs, ours = make(trl, method), make(trl_fast, method)
    names = {name for name in {*dir(theirs), *vars(theirs)} if not name.startswith("__")}
    assert {name for name in names if not hasattr(ours, name)} <= LEFT.keys()
    assert not [name for name in LEFT if hasattr(ours, name)]
    plain = (bool, int, float, str, list, dict, type(None), torch.Tensor)
    said = {name: value for name, value in vars(theirs).items() if isinstance(value, plain)}
    # Counts that TRL alone makes, what accelerate or transformers keep, and what depends on the batch layout.
    for name in said.keys() - LEFT.keys() - {"_memory_tracker", "hp_name", "current_flos", "model_init"}:
        value, own = said[name], getattr(ours, name)
        same = torch.equal(value, own) if isinstance(value, torch.Tensor) else value == own
        assert same or name in ("_signature_columns", "_train_batch_size"), f"{name}: {own}, TRL has {value}"
    drawn = ours.generation_config.to_diff_dict()
    assert drawn == theirs.generation_config.to_diff_dict()


def test_epsilon_high_stays_where_it_was(make):
    trainer = make(trl_fast, epsilon=0.3)
    trainer.epsilon_low = 0.1
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.1, 0.3)
    assert (trainer.loss_config.epsilon, trainer.loss_config.upper) == (0.1, 0.3)


class Schedule(TrainerCallback):
    """Sets attributes at the beginning of steps."""

    def __init__(self, trainer, *changes):
        self.trainer, self.changes = trainer, changes

    def on_step_begin(self, args, state, control, **kwargs):
        for name, value in self.changes[state.global_step].items():
            setattr(self.trainer, name, value)


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


CHANGES = {
    "loss": [
        {"beta": 0.3, "epsilon_low": 0.01},
        {"loss_type": "dr_grpo", "max_completion_length": 20, "epsilon_high": 0.02},
        {"loss_type": "bnpo", "importance_sampling_level": "sequence", "beta": 0.0},
    ],
    "rewards": [
        {"reward_funcs": [length, vowels], "reward_weights": torch.tensor([0.5, 2.0])},
        {"scale_rewards": "none", "reward_func_names": ["first", "second"]},
        {"multi_objective_aggregation": "normalize_then_sum", "mask_truncated_completions": True},
    ],
    "tokens": [
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.5},
        {"entropy_coef": 0.0, "off_policy_mask_threshold": 0.001},
        {"top_entropy_quantile": 1.0, "loss_type": "grpo"},
    ],
}


def run(trainer, *changes):
    trainer.add_callback(Schedule(trainer, *changes))
    trainer.train()
    logs = [{name: value for name, value in logs.items() if name != "step_time"} for logs in trainer.state.log_history]
    return [dict(sorted(log.items())) for log in logs]


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_sets_counts_as_in_trl(name, make):
    settings = {
        "beta": 0.1,
        "num_iterations": 1 if name == "rewards" else 2,
        "learning_rate": 5e-3,
        "entropy_coef": 0.1,
    }
    expected = run(make(trl, **settings), *CHANGES[name])
    assert_same_logs(run(make(trl_fast, **settings, **OURS), *CHANGES[name]), expected)


def test_what_a_callback_sets_in_rloo_counts_as_in_trl(make, tokenizer, monkeypatch):
    rollout = FixedRollout(tokenizer)
    monkeypatch.setattr(trl.RLOOTrainer, "_generate_single_turn", lambda trainer, ids, *_: rollout.completions(ids))
    changes = [
        {"beta": 0.5, "reward_weights": torch.tensor([2.0, 1.0])},
        {"normalize_advantages": True, "epsilon_low": 0.001},
        {"reward_clip_range": (-1.0, 0.5), "epsilon_high": 0.001},
    ]
    expected = run(make(trl, "RLOO", learning_rate=1e-3), *changes)
    ours = make(trl_fast, "RLOO", engine=FixedEngine(tokenizer), learning_rate=1e-3, **OURS)
    # Adam makes steps of whatever size a gradient has, also of what is rounding alone.
    assert_same_logs(run(ours, *changes), expected, rel=2e-3)


class NotedSettings(FixedEngine):
    settings = ()

    def generate(self, prompt_ids, settings):
        self.settings = [*self.settings, settings]
        return super().generate(prompt_ids, settings)


def test_sampling_settings_of_the_next_rollout(make, tokenizer):
    trainer = make(trl_fast, engine=NotedSettings(tokenizer), gradient_accumulation_steps=1, max_steps=5)
    config = trainer.generation_config
    assert (config.temperature, config.max_new_tokens, config.eos_token_id) == (0.8, 8, [tokenizer.eos_token_id])
    other = GenerationConfig(**{**trainer.generation_kwargs, "max_new_tokens": 5, "typical_p": 0.5})
    changes = [
        {},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1},
        {"max_completion_length": 6},
        {"generation_config": other},
        {"temperature": 0.4},
    ]
    run(trainer, *changes)
    first, *_, third, fourth, fifth = trainer.engine.settings
    assert first.temperature == 0.8 and first.generation_kwargs is None
    assert (third.temperature, third.top_p, third.top_k, third.min_p) == (0.5, 0.9, 7, 0.1)
    assert third.max_completion_length == 6 and third.repetition_penalty == 1.1
    assert {"max_new_tokens": 5, "typical_p": 0.5}.items() <= fourth.generation_kwargs.items()
    assert fifth.temperature == trainer.generation_config.temperature or fifth.generation_kwargs["temperature"] == 0.8


def test_what_is_changed_in_the_generation_config_counts(make, tokenizer):
    trainer = make(trl_fast, engine=NotedSettings(tokenizer), gradient_accumulation_steps=1, max_steps=1)
    trainer.generation_config.top_p = 0.7
    trainer.temperature = 0.6
    assert trainer.generation_config.temperature == 0.6 and trainer.generation_config.top_p == 0.7
    run(trainer, {})
    (settings,) = trainer.engine.settings
    assert settings.temperature == 0.6 and settings.generation_kwargs == {"top_p": 0.7}


def test_reward_functions_exchanged_in_place(make):
    trainer = make(trl_fast, max_steps=1)
    trainer.reward_funcs[0] = length
    trainer.reward_weights[1] = 0
    (log, *_) = run(trainer, {})
    assert log["rewards/vowels/mean"] == log["completions/mean_length"] == log["reward"]


def test_another_number_of_reward_functions(make):
    trainer = make(trl_fast, max_steps=1)
    trainer.reward_funcs = length
    (log, *_) = run(trainer, {})
    assert log["rewards/length/mean"] == log["reward"] and "rewards/vowels/mean" not in log
    assert trainer.reward_weights.tolist() == [1.0] and trainer.reward_processing_classes == [None]
    trainer = make(trl_fast, reward_weights=[1.0, 0.5])
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 reward functions; set one for each"):
        trainer.reward_funcs = length
    trainer.reward_weights = [1.0]
    trainer.reward_funcs = length
    with pytest.raises(TypeError, match="reward_funcs: expected functions"):
        trainer.reward_funcs = [3]


def test_a_table_of_completions_whose_reward_functions_change(make):
    trainer = make(trl_fast, log_completions=True, max_steps=2)
    trainer.completions_log.__init__(16)
    run(trainer, {}, {"reward_funcs": length})
    frame = trainer.completions_log.frame(2)
    assert len(frame) == 16 and frame["vowels"].isna().sum() >= 8 and frame["length"].isna().sum() == 8


REFUSED = {
    "temperature": (-1.0, ValueError, "temperature: expected a finite number > 0, got -1.0"),
    "loss_type": ("ppo", ValueError, "loss_type='ppo' is unknown"),
    "scale_rewards": ("none of them", ValueError, "scale_rewards"),
    "beta": (0.1, ValueError, "beta=0.1: GRPOTrainer was made with beta=0 and has no reference model"),
    "entropy_coef": (0.1, ValueError, "entropy_coef=0.1: GRPOTrainer was made without an entropy bonus"),
    "num_generations": (3, ValueError, "num_generations=3: expected a divisor of generation_batch_size=8"),
    "reward_weights": ([1.0, math.nan], ValueError, "reward_weights: expected finite numbers"),
    "use_vllm": (True, AttributeError, "GRPOTrainer.use_vllm cannot be changed: what it says was done when"),
    "num_iterations": (2, AttributeError, "num_iterations cannot be changed"),
    "tools": ([length], AttributeError, "tools cannot be changed"),
}


@pytest.fixture(scope="module")
def trainer(model_path, tmp_path_factory):
    arguments = {"model": model_path, "reward_funcs": [vowels, brevity], "train_dataset": color_prompts()}
    return make_trainer(trl_fast, tmp_path_factory.mktemp("run"), method="GRPO", arguments=arguments, **BASE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_an_error_and_changes_nothing(name, trainer):
    value, kind, message = REFUSED[name]
    before = getattr(trainer, name)
    with pytest.raises(kind, match=message):
        setattr(trainer, name, value)
    assert getattr(trainer, name) is before or getattr(trainer, name) == before
    setattr(trainer, name, before)


def test_groups_of_another_size_before_training(make):
    trainer = make(trl_fast, max_steps=1)
    trainer.num_generations = 2
    loader = iter(trainer.get_train_dataloader())
    assert len({row["prompt"] for row in next(loader)}) == 4
    trainer.is_in_train = True
    with pytest.raises(ValueError, match="prompts are read for groups of 2 completions until training ends"):
        trainer.num_generations = 4


@pytest.mark.parametrize("method", METHODS)
def test_signatures(method):
    trainers = [getattr(module, f"{method}Trainer") for module in (trl, trl_fast)]
    theirs, ours = (list(inspect.signature(trainer.__init__).parameters.values()) for trainer in trainers)
    for parameter, own in zip(theirs, ours[: len(theirs)], strict=True):
        assert parameter.name == own.name and parameter.default in (own.default, inspect.Parameter.empty)
    with pytest.raises(TypeError, match="has no argument 'reward_functions'; did you mean 'reward_funcs'"):
        getattr(trl_fast, f"{method}Trainer")("none", reward_functions=[length])


def test_tags_of_a_subclass(model_path, tmp_path):
    arguments = {"model": model_path, "reward_funcs": [vowels], "train_dataset": color_prompts()}
    tagged = SimpleNamespace(
        GRPOTrainer=type("Tagged", (trl_fast.GRPOTrainer,), {"_tag_names": ["trl", "mine"]}),
        GRPOConfig=trl_fast.GRPOConfig,
    )
    trainer = make_trainer(tagged, tmp_path, method="GRPO", arguments=arguments, **BASE)
    assert {"trl", "grpo", "mine"} <= set(trainer.model.model_tags)


@pytest.mark.parametrize("name", ["num_tokens", "mine"])
def test_metrics_as_lists(name, make):
    trainer = make(trl_fast, max_steps=1)
    lists = trainer._metrics["train"]
    lists[name].append(1.0)
    lists[name].extend([torch.tensor(3.0), 5])
    assert list(lists[name]) == [1.0, 3.0, 5.0] and lists[name][-1] == 5.0 and name in lists and len(lists) == 1
    lists[name][1] = 6.0
    del lists[name][2]
    assert lists[name][:] == [1.0, 6.0] and dict(lists).keys() == {name}
    lists["other"] = [2.0]
    trainer._metrics["eval"]["other"].append(7.0)
    assert trainer._buffers["train"].pop(lambda pairs: pairs) == {name: 3.5, "other": 2.0} and not lists
