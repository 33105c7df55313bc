"""KTOTrainer against TRL 1.16.0's on the same model, data and seed: loss, gradient norm and every logged metric."""

import functools

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

import trl_fast
from support.models import save_tiny_model
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# The second step has what the first one made of the weights.
STEPS = {"max_steps": 2}


def logs_of(module, output_dir, arguments=None, **settings):
    arguments = {"train_dataset": color_labels(), "eval_dataset": color_labels(7), **(arguments or {})}
    built = {name: value() if callable(value) else value for name, value in arguments.items()}
    trainer = make_trainer(module, output_dir, method="KTO", arguments=built, **{**STEPS, **settings})
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, arguments, ours_only=None, **settings):
    expected = logs_of(trl, tmp_path / "trl", arguments, **settings)
    logs = logs_of(trl_fast, tmp_path / "ours", arguments, **settings, **(ours_only or {}))
    assert_same_logs(logs, expected)
    return logs


def another(path):
    """A reference that differs from the policy, so that the estimate of the KL divergence is well above 0."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    model.model.norm.weight.data.mul_(1.6)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 12, "desirable_weight": 0.7, "undesirable_weight": 1.9, "beta": 0.4},
        {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
    ],
    ids=["kto", "apo_zero_unpaired"],
)
def test_every_layout(settings, main_layout, model_path, tmp_path):
    """The workspace is too small for all of a batch's logits, so its sequences come a few at a time."""
    ours_only = {"batch_layout": main_layout, "head_workspace_bytes": 1 << 16}
    arguments = {"model": model_path, "ref_model": lambda: another(model_path)}
    logs = compare(tmp_path, arguments, ours_only, **settings)
    assert (logs[0]["kl"] > 0.1) == ("loss_type" not in settings)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_lora(loss_type, model_path, tmp_path):
    arguments = {"model": model_path, "peft_config": lambda: LoraConfig(**LORA)}
    compare(tmp_path, arguments, loss_type=loss_type, learning_rate=1e-2)


SETTINGS = {
    "no limit": {"max_length": None, "gradient_checkpointing": False},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 3},
    "a last batch of one row, which pairs with itself": {
        "per_device_train_batch_size": 23,
        "gradient_accumulation_steps": 1,
        "max_steps": -1,
        "num_train_epochs": 1,
    },
    "one log for several micro-batches": {"logging_steps": 3, "gradient_accumulation_steps": 1, "max_steps": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, model_path, tmp_path):
    compare(tmp_path, {"model": model_path}, **settings)


def long_prompts(count=12):
    """Rows whose prompts are so long that own and mismatched completions are scored in one pass."""
    return color_labels(count).map(lambda row: {"prompt": row["prompt"] * 12})


@pytest.mark.parametrize("peft", [False, True], ids=["whole model", "LoRA"])
def test_own_and_mismatched_completions_in_one_pass(peft, model_path, tmp_path, monkeypatch):
    together = []
    original = trl_fast.KTOTrainer._scores_together
    monkeypatch.setattr(
        trl_fast.KTOTrainer, "_scores_together", lambda *a: together.append(original(*a)) or together[-1]
    )
    arguments = {"model": model_path, "train_dataset": long_prompts, "eval_dataset": long_prompts}
    if peft:
        arguments["peft_config"] = lambda: LoraConfig(**LORA)
    arguments["ref_model"] = lambda: another(model_path)
    assert compare(tmp_path, arguments, max_steps=2)[0]["kl"] > 0.1
    assert all(together) and len(together) > 4


def test_an_adapter_as_it_came(model_path, tmp_path, tokenizer):
    def adapted():
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
        set_seed(3)
        return get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))

    compare(tmp_path, {"model": adapted, "processing_class": lambda: tokenizer}, learning_rate=1e-2)


PRECOMPUTED = {
    "model": {"ref_model": another},
    "adapter off": {"peft_config": lambda path: LoraConfig(**LORA, init_lora_weights=False)},
}


@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reference", PRECOMPUTED.values(), ids=PRECOMPUTED.keys())
def test_precomputed(reference, loss_type, model_path, tmp_path):
    arguments = {name: functools.partial(make, model_path) for name, make in reference.items()}
    compare(tmp_path, {"model": model_path, **arguments}, precompute_ref_log_probs=True, loss_type=loss_type)


def conversations():
    return color_labels().map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )


def implicit_prompts():
    return color_pairs().map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )


def labels_of_numbers():
    rows = color_labels().to_list()
    return Dataset.from_list([{**row, "label": int(row["label"])} for row in rows])


OTHER_FORMATS = [pytest.param(make, marks=pytest.mark.slow) for make in (implicit_prompts, labels_of_numbers)]


@pytest.mark.parametrize("dataset", [conversations, color_pairs, *OTHER_FORMATS])
def test_formats(dataset, model_path, tmp_path):
    # Adam would divide by gradients that are hardly more than roundings, which fused layers have other ones of.
    data = {"train_dataset": dataset, "eval_dataset": dataset}
    compare(tmp_path, {"model": model_path, **data}, max_steps=2, optim="sgd", learning_rate=0.1)


def test_a_stream(model_path, tmp_path):
    streams = {name: lambda: color_labels().to_iterable_dataset() for name in ("train_dataset", "eval_dataset")}
    compare(tmp_path, {"model": model_path, **streams})


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory, tokenizer):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("tiny-moe"), tokenizer, "qwen3_moe", **changes)


def test_mixture_of_experts(experts_path, tmp_path):
    """The router's loss is that of the own completions, also where long prompts would put the others beside them."""
    arguments = {"train_dataset": long_prompts, "eval_dataset": long_prompts}
    compare(tmp_path, {"model": experts_path, **arguments}, max_steps=2)


def test_several_evaluation_sets(model_path, tmp_path):
    sets = {"easy": color_labels(4), "hard": color_labels(9)}
    compare(tmp_path, {"model": model_path, "eval_dataset": sets}, eval_strategy="steps", eval_steps=2, max_steps=2)


def test_compute_metrics_sees_what_trls_sees(model_path, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"agreement": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    compare(tmp_path, {"model": model_path, "compute_metrics": lambda: compute_metrics}, max_steps=1)
    (theirs, their_labels), (ours, our_labels) = seen
    assert ours.shape == theirs.shape and (our_labels == their_labels).all()
    assert abs(ours - theirs)[our_labels != 2].max() < 1e-3
