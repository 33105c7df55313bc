"""Adapters that read whole rows or prepend virtual tokens, against TRL 1.16.0: they train on padded rows."""

import logging

import pytest
import trl
from datasets import Dataset
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

import trl_fast
from support.supervised import sft_rows
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
CONFIGS = {
    "prompt tuning": lambda: PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
    "prefix tuning": lambda: PrefixTuningConfig(**VIRTUAL),
}
ROWS = {
    # Not the rows of texts: TRL also scores a text's first token, by the last virtual one.
    "SFT": lambda: {name: sft_rows("prompt and completion") for name in ("train_dataset", "eval_dataset")},
    "DPO": lambda: {"train_dataset": color_pairs()},
    "KTO": lambda: {"train_dataset": color_labels()},
}


def logs_of(module, method, output_dir, arguments, **settings):
    settings = {"max_steps": 2, "learning_rate": 2e-2, "gradient_checkpointing": False, **settings}
    trainer = make_trainer(module, output_dir, method=method, arguments=arguments, **settings)
    trainer.train()
    if arguments.get("eval_dataset") is not None:
        trainer.evaluate()
    return trainer.state.log_history


def compare(method, path, adapter, tmp_path, **settings):
    def run(module):
        arguments = {"model": path, **ROWS[method](), "peft_config": adapter()}
        return logs_of(module, method, tmp_path / module.__name__, arguments, **settings)

    assert_same_logs(run(trl_fast), run(trl))


@pytest.mark.parametrize("adapter", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("method", ROWS)
def test_virtual_tokens(method, adapter, model_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_fast"):
        compare(method, model_path, adapter, tmp_path)
    assert "prepends virtual tokens to each row" in caplog.text


def test_virtual_tokens_that_the_model_came_with(model_path, tmp_path):
    def run(module):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), CONFIGS["prompt tuning"]())
        model.prompt_encoder["default"].embedding.weight.data.fill_(0.01)
        arguments = {"model": model, **ROWS["SFT"]()}
        return logs_of(module, "SFT", tmp_path / module.__name__, arguments, gradient_checkpointing=True)

    assert_same_logs(run(trl_fast), run(trl))


def test_prefix_tuning_is_not_dropped_by_checkpointing(model_path, tmp_path):
    arguments = {"model": model_path, **ROWS["SFT"](), "peft_config": CONFIGS["prefix tuning"]()}
    with pytest.raises(ValueError, match="PrefixTuningConfig prepends.*set gradient_checkpointing=False"):
        make_trainer(trl_fast, tmp_path, method="SFT", arguments=arguments, gradient_checkpointing=True)


def test_a_classifier_refuses_virtual_tokens(model_path, tmp_path):
    rows = color_pairs()
    arguments = {"model": model_path, "train_dataset": rows, "peft_config": CONFIGS["prompt tuning"]()}
    with pytest.raises(ValueError, match="PromptTuningConfig prepends virtual tokens.*use LoRA"):
        make_trainer(trl_fast, tmp_path, method="Reward", arguments=arguments)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_activated_lora(checkpointing, model_path, tokenizer, tmp_path, caplog):
    # The answers have the invocation's token in different places; what stands before runs without the adapter.
    invocation = tokenizer(" is", add_special_tokens=False)["input_ids"][:1]

    def adapter():
        more = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        return LoraConfig(r=4, alora_invocation_tokens=invocation, **more)

    with caplog.at_level(logging.WARNING, "trl_fast"):
        compare("DPO", model_path, adapter, tmp_path, gradient_checkpointing=checkpointing)
    assert caplog.text.count("starts behind the last invocation in each row") == 1


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_rows_of_several_sequences_are_refused_by_name(layout, model_path, tmp_path):
    arguments = {"model": model_path, **ROWS["DPO"](), "peft_config": CONFIGS["prompt tuning"]()}
    with pytest.raises(ValueError, match=f"batch_layout='{layout}' cannot be used: PromptTuningConfig prepends"):
        make_trainer(trl_fast, tmp_path, arguments=arguments, batch_layout=layout)


def _distinct_characters(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_virtual_tokens_in_rollouts_and_updates(method, model_path, tokenizer, tmp_path):
    prompts = Dataset.from_list([{"prompt": f"What is {i}?" * (1 + i % 2)} for i in range(8)])

    def run(module):
        arguments = {"model": model_path, "train_dataset": prompts, "reward_funcs": [_distinct_characters]}
        arguments |= {"processing_class": tokenizer, "peft_config": CONFIGS["prompt tuning"]()}
        settings = {"max_completion_length": 8, "num_generations": 4, "gradient_accumulation_steps": 1, "beta": 0.1}
        logs = logs_of(module, method, tmp_path / module.__name__, arguments, **settings)
        names = ("loss", "grad_norm", "kl", "reward", "entropy")
        return [{name: row[name] for name in names} for row in logs if "loss" in row]

    assert_same_logs(run(trl_fast), run(trl))
