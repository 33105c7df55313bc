"""DPOTrainer against TRL 1.16.0's on the same model, data and seed: loss, gradient norm and every logged metric."""

import functools

import pytest
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

import trl_fast
from support.models import save_tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.losses.dpo import PAIR_LOSSES

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

# Loss types of different kinds; those with an adapter are slow tests of the others.
QUICK = ("sigmoid", "ipo", "aot", "sft")
SLOWER = tuple(name for name in PAIR_LOSSES if name not in QUICK)
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# The second step has what the first one made of the weights.
STEPS = {"max_steps": 2}


def logs_of(module, output_dir, arguments=None, **settings):
    arguments = {"train_dataset": color_pairs(), "eval_dataset": color_pairs(6), **(arguments or {})}
    built = {name: value() if callable(value) else value for name, value in arguments.items()}
    trainer = make_trainer(module, output_dir, arguments=built, **{**STEPS, **settings})
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, arguments, ours_only=None, **settings):
    expected = logs_of(trl, tmp_path / "trl", arguments, **settings)
    assert_same_logs(logs_of(trl_fast, tmp_path / "ours", arguments, **settings, **(ours_only or {})), expected)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_type(name, model_path, tmp_path):
    compare(tmp_path, {"model": model_path}, loss_type=[name], label_smoothing=0.1)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)])
def test_every_loss_type_with_lora(name, model_path, tmp_path):
    arguments = {"model": model_path, "peft_config": lambda: LoraConfig(**LORA)}
    compare(tmp_path, arguments, loss_type=[name], label_smoothing=0.1, learning_rate=1e-2)


SETTINGS = {
    "weighted combination": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward kl": {"f_divergence_type": "forward_kl"},
    "js divergence": {"f_divergence_type": "js_divergence"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"ld_alpha": 0.4},
    "use_weighting": {"use_weighting": True},
    "keep_end": {"truncation_mode": "keep_end", "max_length": 12},
    "truncated": {"max_length": 12},
    "no limit": {"max_length": None},
    "no checkpointing": {"gradient_checkpointing": False},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 3},
    "a last batch that is smaller": {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, main_layout, model_path, tmp_path):
    compare(tmp_path, {"model": model_path}, {"batch_layout": main_layout}, **settings)


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory, tokenizer):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("tiny-moe"), tokenizer, "qwen3_moe", **changes)


def test_mixture_of_experts(layout, experts_path, tmp_path):
    """A shared prompt counts once for each of its branches in the router's loss, as it does where it is not shared."""
    compare(tmp_path, {"model": experts_path}, {"batch_layout": layout})


def load(path, **changes):
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    for name, factor in changes.items():
        model.get_parameter(name).data.mul_(factor)
    return model


def test_reference_given(model_path, tmp_path):
    reference = {"ref_model": lambda: load(model_path, **{"model.norm.weight": 0.7})}
    compare(tmp_path, {"model": model_path, **reference})


def test_reference_given_with_lora(model_path, tmp_path):
    reference = {"ref_model": lambda: load(model_path, **{"model.norm.weight": 0.7})}
    compare(tmp_path, {"model": model_path, "peft_config": lambda: LoraConfig(**LORA), **reference})


def test_a_model_with_an_adapter_is_compared_with_the_adapter_as_it_came(model_path, tmp_path, tokenizer):
    def adapted():
        set_seed(3)
        return get_peft_model(load(model_path), LoraConfig(**LORA, init_lora_weights=False))

    compare(tmp_path, {"model": adapted, "processing_class": lambda: tokenizer}, learning_rate=1e-2)


# The references here differ from the policy: else each margin of the first step is rounding noise, whose sign counts.
PRECOMPUTED = {
    "model": {"ref_model": lambda path: load(path, **{"model.norm.weight": 0.7})},
    "adapter off": {"peft_config": lambda path: LoraConfig(**LORA, init_lora_weights=False)},
}


@pytest.mark.parametrize("reference", PRECOMPUTED.values(), ids=PRECOMPUTED.keys())
def test_precomputed(reference, layout, model_path, tmp_path):
    arguments = {name: functools.partial(make, model_path) for name, make in reference.items()}
    compare(
        tmp_path,
        {"model": model_path, **arguments},
        {"batch_layout": layout},
        precompute_ref_log_probs=True,
        ld_alpha=0.5,
    )


def conversations():
    return color_pairs().map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
    )


def implicit_prompts():
    return color_pairs().map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )


@pytest.mark.parametrize("dataset", [conversations, implicit_prompts])
def test_formats(dataset, model_path, tmp_path):
    compare(tmp_path, {"model": model_path, "train_dataset": dataset, "eval_dataset": dataset})


def test_several_evaluation_sets(model_path, tmp_path):
    sets = {"easy": color_pairs(4), "hard": color_pairs(9)}
    compare(tmp_path, {"model": model_path, "eval_dataset": sets}, eval_strategy="steps", eval_steps=2)


def test_compute_metrics_sees_what_trls_sees(model_path, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"agreement": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    compare(tmp_path, {"model": model_path, "compute_metrics": lambda: compute_metrics}, per_device_eval_batch_size=6)
    (theirs, their_labels), (ours, our_labels) = seen
    assert ours.shape == theirs.shape and (our_labels == their_labels).all()
    assert abs(ours - theirs)[our_labels != 2].max() < 1e-3
