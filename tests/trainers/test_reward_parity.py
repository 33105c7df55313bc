"""RewardTrainer against TRL 1.16.0's on the same model, data and seed: loss, gradient norm and every logged metric."""

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, set_seed
from trl.trainer.reward_trainer import DataCollatorForPreference

import trl_fast
import trl_fast.data.packing as packing
from support.models import save_tiny_classifier, tiny_classifier
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.data import LAYOUTS

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# The second step has what the first one made of the weights.
STEPS = {"max_steps": 2}


@pytest.fixture(autouse=True)
def _short_prompts_are_shared(monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)


def logs_of(module, output_dir, arguments, **settings):
    arguments = {"train_dataset": color_pairs(), "eval_dataset": color_pairs(6), **arguments}
    built = {name: value() if callable(value) else value for name, value in arguments.items()}
    trainer = make_trainer(module, output_dir, method="Reward", arguments=built, **{**STEPS, **settings})
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, arguments, *layouts, **settings):
    expected = logs_of(trl, tmp_path / "trl", arguments, **settings)
    for layout in layouts or ("shared_prefix",):
        got = logs_of(trl_fast, tmp_path / layout, arguments, **settings, batch_layout=layout)
        assert_same_logs(got, expected)


SETTINGS = {
    "as it is": {},
    "centred rewards": {"center_rewards_coefficient": 0.1},
    "long rows left out": {"max_length": 18},
    "no limit, no checkpointing": {"max_length": None, "gradient_checkpointing": False},
    "last batches that are smaller": {
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 4,
        "max_steps": -1,
        "num_train_epochs": 1,
    },
    "end token": {"eos_token": "<|pad|>"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_in_every_layout(settings, model_path, tmp_path):
    compare(tmp_path, {"model": model_path}, *LAYOUTS, **settings)


ADAPTERS = {
    "head saved whole": {"modules_to_save": ["score"]},
    "classifier": {"task_type": "SEQ_CLS"},
    "head frozen": {},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters(adapter, model_path, tmp_path):
    arguments = {"model": model_path, "peft_config": lambda: LoraConfig(**LORA, **adapter)}
    compare(tmp_path, arguments, *LAYOUTS, learning_rate=1e-2)


def test_a_model_that_came_with_an_adapter(model_path, tmp_path, tokenizer):
    def adapted():
        set_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype="float32")
        return get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS", init_lora_weights=False))

    compare(tmp_path, {"model": adapted, "processing_class": lambda: tokenizer}, learning_rate=1e-2)


def with_margins():
    return color_pairs().map(lambda row, index: {"margin": index / 8 - 1}, with_indices=True)


def implicit_prompts():
    return color_pairs().map(
        lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}, remove_columns="prompt"
    )


def conversations():
    return color_pairs().map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
    )


def tokenized():
    rows = [
        {"chosen_ids": [5 + i, 6, 7], "rejected_ids": [9, 10 + i] * (1 + i % 4), "margin": 0.1 * i} for i in range(24)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("dataset", [with_margins, implicit_prompts, conversations, tokenized])
def test_formats(dataset, model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": dataset, "eval_dataset": dataset}
    compare(tmp_path, arguments, "shared_prefix", "padded")


def test_a_pad_token_that_is_the_end_token(model_path, tmp_path):
    # The reward is then read before the end token, as transformers does it.
    arguments = {"model": model_path, "processing_class": lambda: build_tokenizer(pad_token=None)}
    compare(tmp_path, arguments, *LAYOUTS)


def test_a_stream(model_path, tmp_path):
    stream = {"train_dataset": lambda: color_pairs(60).to_iterable_dataset()}
    compare(tmp_path, {"model": model_path, **stream}, max_length=22)


def test_several_evaluation_sets(model_path, tmp_path):
    sets = {"easy": color_pairs(4), "hard": color_pairs(9)}
    compare(tmp_path, {"model": model_path, "eval_dataset": sets}, eval_strategy="steps", eval_steps=2)


def test_trls_collator(model_path, tmp_path):
    collator = {"data_collator": lambda: DataCollatorForPreference(pad_token_id=2, pad_to_multiple_of=8)}
    compare(tmp_path, {"model": model_path, "train_dataset": with_margins, **collator}, *LAYOUTS)


def test_a_reward_model_goes_on(tmp_path):
    path = save_tiny_classifier(tmp_path / "reward", build_tokenizer(), seed=5)
    compare(tmp_path, {"model": path})


def test_an_encoder(tmp_path):
    arguments = {
        "model": lambda: tiny_classifier("bert", max_position_embeddings=64),
        "processing_class": build_tokenizer,
    }
    # Only the centring gives the head's bias a gradient; without it, Adam would make steps of rounding errors.
    compare(tmp_path, arguments, "auto", center_rewards_coefficient=0.1)


@pytest.mark.parametrize("batch_size", [4, 6])
def test_compute_metrics_sees_what_trls_sees(batch_size, model_path, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"mean": float(prediction.predictions.mean())}

    arguments = {"model": model_path, "compute_metrics": lambda: compute_metrics}
    compare(tmp_path, arguments, per_device_eval_batch_size=batch_size)
    (theirs, their_labels), (ours, our_labels) = seen
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert our_labels == their_labels == ()
