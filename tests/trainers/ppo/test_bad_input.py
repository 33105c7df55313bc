"""PPO refuses bad arguments and data before training: messages name the argument, its value and what was expected."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
from support.models import tiny_classifier, tiny_model
from support.rollouts import FixedEngine, color_prompts
from support.tokenizer import build_tokenizer
from support.training import SETTINGS, make_trainer

CONFIGS = [
    ({"kl_estimator": "k2"}, "kl_estimator='k2' is unknown; expected one of k1, k3"),
    ({"stop_token": "period"}, "stop_token='period' is unknown; expected 'eos' or None"),
    ({"stop_token": "eos", "stop_token_id": 3}, "stop_token='eos' and stop_token_id=3 mean the same"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
]


@pytest.mark.parametrize(("settings", "message"), CONFIGS, ids=[next(iter(case[0])) for case in CONFIGS])
def test_config(settings, message, tmp_path):
    with pytest.raises(ValueError) as error:
        trl_fast.PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert message in str(error.value)


def test_defaults_and_sizes(tmp_path):
    config = trl_fast.PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    expected = {
        "learning_rate": 3e-6,
        "num_mini_batches": 1,
        "total_episodes": None,
        "local_rollout_forward_batch_size": 64,
        "num_sample_generations": 10,
        "response_length": 53,
        "stop_token": None,
        "stop_token_id": None,
        "temperature": 0.7,
        "missing_eos_penalty": None,
        "sft_model_path": "EleutherAI/pythia-160m",
        "reward_model_path": "EleutherAI/pythia-160m",
        "num_ppo_epochs": 4,
        "whiten_rewards": False,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "cliprange": 0.2,
        "vf_coef": 0.1,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "ds3_gather_for_generation": True,
        "model_adapter_name": None,
        "ref_adapter_name": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_mini_batches": 4}
    config = trl_fast.PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **sizes)
    names = ("micro_batch_size", "local_mini_batch_size", "mini_batch_size", "local_batch_size", "batch_size")
    assert [getattr(config, name) for name in names] == [2, 6, 6, 24, 24]


@pytest.fixture
def make(model_path, reward_model_path, tokenizer, tmp_path):
    def make(*, settings=(), **changes):
        arguments = {
            "model": AutoModelForCausalLM.from_pretrained(model_path),
            "processing_class": tokenizer,
            "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
            "train_dataset": color_prompts(16),
            **changes,
        }
        short = {"response_length": 4, "num_sample_generations": 0, "stop_token": "eos", **dict(settings)}
        return make_trainer(trl_fast, tmp_path, method="PPO", arguments=arguments, **short)

    return make


def test_models(make, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    cases = [
        ({"model": None}, "model is missing"),
        ({"reward_model": None}, "reward_model is missing"),
        ({"model": model, "ref_model": model}, "model and ref_model are the same object"),
        ({"reward_model": model}, "reward_model: LlamaForCausalLM has no head 'score'"),
        ({"reward_model": 3}, "reward_model: expected a classifier"),
        ({"value_model": model}, "value_model: LlamaForCausalLM has no head 'score'"),
        (
            {"value_model": tiny_classifier(num_labels=2)},
            "value_model: LlamaForSequenceClassification has num_labels=2",
        ),
        ({"value_model": tiny_classifier(vocab_size=30)}, "value_model: LlamaForSequenceClassification has 30 tokens"),
        ({"ref_model": tiny_model(vocab_size=30)}, "ref_model: LlamaForCausalLM has 30 tokens"),
    ]
    for changes, message in cases:
        with pytest.raises((ValueError, TypeError)) as error:
            make(**changes)
        assert message in str(error.value)


def test_models_that_lack_tokens_which_the_policy_may_sample(make, tokenizer):
    """A head may have more rows than the tokenizer has tokens, and then samples those too."""
    rows = len(tokenizer)
    policy = tiny_model(vocab_size=rows + 8)
    message = rf"has {rows} tokens, but .* samples, of {rows + 8}; .* resize_token_embeddings\({rows + 8}\)"
    for name, model in (
        ("reward_model", tiny_classifier(vocab_size=rows)),
        ("value_model", tiny_classifier(vocab_size=rows)),
        ("ref_model", tiny_model(vocab_size=rows)),
    ):
        others = {"reward_model": tiny_classifier(vocab_size=rows + 8)} | {name: model}
        with pytest.raises(ValueError, match=f"{name}: .* {message}"):
            make(model=policy, **others)


def test_a_stop_token_outside_of_the_head(make):
    with pytest.raises(ValueError, match="stop_token_id=99999 is none of the .* so no completion would stop"):
        make(settings={"stop_token_id": 99999, "stop_token": None})


def test_reward_and_value_model_are_two(make):
    shared = tiny_classifier(vocab_size=len(build_tokenizer()))
    with pytest.raises(ValueError, match="reward_model and value_model are the same object.*leave value_model None"):
        make(reward_model=shared, value_model=shared)


def test_data(make, tokenizer):
    stream = color_prompts(16).to_iterable_dataset()
    cases = [
        ({"train_dataset": None}, "train_dataset is required"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}] * 16)}, "expected 'prompt'"),
        (
            {"train_dataset": Dataset.from_list([{"input_ids": [5]}, {"input_ids": [tokenizer.pad_token_id]}])},
            "row 1, column 'input_ids': the prompt has no tokens",
        ),
        ({"train_dataset": color_prompts(7)}, "has 7 rows, but one rollout takes 8 prompts"),
        (
            {"train_dataset": stream, "settings": {"max_steps": -1}},
            "total_episodes=None",
        ),
        ({"settings": {"response_length": 250}}, "response_length=250 are more than the 256 positions"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError) as error:
            make(**changes)
        assert message in str(error.value)


def test_no_eos_token(make):
    with pytest.raises(ValueError, match="stop_token='eos' needs an EOS token"):
        make(processing_class=build_tokenizer(eos_token=None), model=tiny_model())


REWARDS = [
    (
        lambda completions, **_: [None] * len(completions),
        "returned None for completion 0; PPO needs a number for each",
    ),
    (lambda completions, **_: [0.0], "returned 1 rewards for 8 completions"),
    (lambda completions, **_: [float("nan")] * len(completions), "expected a finite number"),
    (lambda completions, **_: ["good"] * len(completions), "'good' of type str"),
]


@pytest.mark.parametrize(("reward", "message"), REWARDS, ids=["None", "too few", "NaN", "text"])
def test_rewards(reward, message, make, tokenizer):
    trainer = make(reward_model=reward, rollout_engine=FixedEngine(tokenizer))
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert message in str(error.value)
    assert (trainer.model.lm_head.weight == before).all()


def test_an_empty_completion(make, tokenizer, monkeypatch):
    engine = FixedEngine(tokenizer)
    monkeypatch.setattr(engine.rollout, "completions", lambda prompts: [[] for _ in prompts])
    with pytest.raises(ValueError, match="the rollout's completion_ids are empty for the prompt 'What color"):
        make(rollout_engine=engine).train()


def test_the_number_of_rollouts(make):
    def steps(**settings):
        return make(settings={"max_steps": -1, **settings}).args.num_total_batches

    assert SETTINGS["per_device_train_batch_size"] * SETTINGS["gradient_accumulation_steps"] == 8
    assert steps(total_episodes=20) == 3
    assert steps(num_train_epochs=2.5) == 5
    assert steps(max_steps=7, total_episodes=20) == 7
