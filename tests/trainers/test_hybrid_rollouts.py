"""Online methods on models with recurrent layers and windows: they sample by themselves, each prompt read once."""

import math

import pytest
from transformers import AutoModelForSequenceClassification

import trl_fast
from support.families import FAMILIES
from support.models import tiny_model
from support.rollouts import color_prompts, vowels
from support.training import make_trainer

slow = pytest.mark.slow
GROUPS = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8, "beta": 0.1}
PPO = {"response_length": 6, "per_device_train_batch_size": 4, "num_mini_batches": 2, "num_sample_generations": 0}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("GRPO", "lfm2"),
        *(pytest.param("GRPO", family, marks=slow) for family in ("qwen3_5_text", "gpt_oss", "gemma3_text")),
        *(pytest.param("RLOO", family, marks=slow) for family in ("qwen3_5_text", "gpt_oss")),
        *(pytest.param("PPO", family, marks=slow) for family in ("falcon_h1", "gemma3_text")),
    ],
)
def test_a_step(method, family, tokenizer, reward_model_path, tmp_path):
    model = tiny_model(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **FAMILIES[family])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    given = {"model": model, "processing_class": tokenizer, "train_dataset": color_prompts(8)}
    if method == "PPO":
        classifiers = (AutoModelForSequenceClassification.from_pretrained(reward_model_path) for _ in range(2))
        given |= dict(zip(("reward_model", "value_model"), classifiers, strict=True))
    else:
        given["reward_funcs"] = vowels
    settings = {**(PPO if method == "PPO" else GROUPS), "gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = make_trainer(trl_fast, tmp_path, method=method, arguments=given, **settings)
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    trainer.train()
    if method != "PPO":
        # Eight completions of two prompts.
        (prompts, width), one_token = shapes[:2]
        assert prompts == 2 and width > 1 and one_token == (8, 1)
    losses = [value for log in trainer.state.log_history for name, value in log.items() if "loss" in name]
    assert losses and all(map(math.isfinite, losses))
    assert any((parameter != before[name]).any() for name, parameter in model.named_parameters())
