"""ORPOTrainer, CPOTrainer and TPOTrainer against TRL 1.16.0's on the same model, data and seed: every logged number.

TRL puts a BOS token before each prompt, so the tokenizer here does too; TRL's means of logits are mended.
"""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

import trl_fast
from support.models import save_tiny_model
from support.reference_free import color_triples, trls
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_pairs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(add_bos=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, tokenizer):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-with-bos"), tokenizer)


def logs_of(module, method, output_dir, arguments, **settings):
    rows = color_triples if method == "TPO" else color_pairs
    arguments = {"train_dataset": rows(16), "eval_dataset": rows(5), **arguments}
    built = {name: value() if callable(value) else value for name, value in arguments.items()}
    trainer = make_trainer(module, output_dir, method=method, arguments=built, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(method, tmp_path, arguments, ours_only=None, **settings):
    settings = {"max_steps": 2, **settings}
    expected = logs_of(trls(method), method, tmp_path / "trl", arguments, **settings)
    logs = logs_of(trl_fast, method, tmp_path / "ours", arguments, **settings, **(ours_only or {}))
    assert_same_logs(logs, expected)
    return logs


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


LOSSES = [
    ("ORPO", {"beta": 0.6}),
    ("CPO", {"label_smoothing": 0.1, "cpo_alpha": 0.4}),
    ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.3, "label_smoothing": 0.1, "beta": 2.0}),
    ("TPO", {"label_smoothing": 0.1, "tpo_alpha": 0.3}),
    slow("CPO", {"loss_type": "simpo"}),
    slow("CPO", {"loss_type": "hinge"}),
    slow("CPO", {"loss_type": "ipo"}),
    slow("CPO", {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5}),
    # Sums of few tokens: TRL's reward of a probability that float32 does not hold is infinite.
    slow("CPO", {"loss_type": "sigmoid", "alpha": 0.02, "max_length": 14}),
    slow("CPO", {"loss_type": "ipo", "alpha": 0.25, "cpo_alpha": 0.5}),
    slow("CPO", {"loss_type": "hinge", "alpha": 0.02, "max_length": 14}),
    slow("TPO", {"loss_type": "hinge", "beta": 0.1}),
    slow("TPO", {"loss_type": "ipo", "beta": 0.5}),
    slow("TPO", {"loss_type": "tpo-l", "beta": 2.0, "label_smoothing": 0.1}),
    slow("TPO", {"tpo_alpha": 0.0}),
]


@pytest.mark.parametrize(("method", "settings"), LOSSES)
def test_every_loss(method, settings, main_layout, model_path, tmp_path):
    """The workspace is too small for all of a batch's logits, so its pairs come a few at a time."""
    ours_only = {"batch_layout": main_layout, "head_workspace_bytes": 1 << 16}
    compare(method, tmp_path, {"model": model_path}, ours_only, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ORPO", {}),
        slow("CPO", {}),
        *(slow("CPO", {"loss_type": name}) for name in ("hinge", "ipo", "simpo", "alphapo")),
        *(slow("TPO", {"loss_type": name}) for name in ("sigmoid", "hinge", "ipo", "tpo-l")),
    ],
)
def test_lora(method, settings, model_path, tmp_path):
    arguments = {"model": model_path, "peft_config": lambda: LoraConfig(**LORA)}
    compare(method, tmp_path, arguments, learning_rate=1e-2, **settings)


SETTINGS = {
    "truncated": {"max_length": 14},
    "no checkpointing": {"gradient_checkpointing": False},
    # Where a step has several micro-batches, TRL's metrics of the last step leave rows out.
    "a last batch that is smaller": {
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 1,
        "max_steps": -1,
        "num_train_epochs": 1,
    },
    "one log for several micro-batches": {"logging_steps": 3, "gradient_accumulation_steps": 1, "max_steps": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ORPO", "CPO", "TPO"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(method, settings, main_layout, model_path, tmp_path):
    compare(method, tmp_path, {"model": model_path}, {"batch_layout": main_layout}, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ORPO", "TPO"])
def test_an_adapter_as_it_came(method, model_path, tmp_path, tokenizer):
    def adapted():
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
        set_seed(3)
        return get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))

    compare(method, tmp_path, {"model": adapted, "processing_class": lambda: tokenizer}, learning_rate=1e-2)


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory, tokenizer):
    """A mixture of experts whose config asks for the router's loss, which TRL's ORPO and CPO then add, unlogged."""
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    folder = tmp_path_factory.mktemp("tiny-moe")
    return save_tiny_model(folder, tokenizer, "qwen3_moe", output_router_logits=True, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ORPO", "CPO"])
def test_mixture_of_experts(method, layout, experts_path, tmp_path):
    expected = logs_of(trls(method), method, tmp_path / "trl", {"model": experts_path}, max_steps=2)
    logs = logs_of(trl_fast, method, tmp_path / "ours", {"model": experts_path}, max_steps=2, batch_layout=layout)
    aux_losses = [log.pop("aux_loss", log.pop("eval_aux_loss", None)) for log in logs]
    assert all(value is not None and value > 0 for value in aux_losses[:2])
    assert_same_logs(logs, expected)


def conversations():
    return color_triples(16).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected", "reference")},
        }
    )


def implicit_prompts():
    columns = ("chosen", "rejected", "reference")
    return color_triples(16).map(
        lambda row: {name: row["prompt"] + row[name] for name in columns}, remove_columns="prompt"
    )


@pytest.mark.parametrize("dataset", [conversations, slow(implicit_prompts)])
def test_formats_of_triples(dataset, model_path, tmp_path):
    arguments = {"model": model_path, "train_dataset": dataset, "eval_dataset": dataset}
    compare("TPO", tmp_path, arguments, max_steps=1)


@pytest.mark.slow
def test_prompts_that_are_implicit(model_path, tmp_path):
    def rows():
        return implicit_prompts().remove_columns("reference")

    compare("CPO", tmp_path, {"model": model_path, "train_dataset": rows, "eval_dataset": rows}, max_steps=1)


@pytest.mark.slow
def test_a_stream_of_triples(model_path, tmp_path):
    streams = {name: lambda: color_triples().to_iterable_dataset() for name in ("train_dataset", "eval_dataset")}
    compare("TPO", tmp_path, {"model": model_path, **streams})
