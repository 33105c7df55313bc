"""SFTTrainer against TRL 1.16.0's on the same model, data and seed: loss, gradient norm and every logged metric."""

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

import trl_fast
from support.models import save_tiny_model
from support.supervised import ROWS, sft_rows
from support.tokenizer import build_tokenizer
from support.training import SETTINGS as BASICS
from support.training import assert_same_logs, make_trainer
from trl_fast.data import DataCollatorForLanguageModeling

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# A rate at which the model learns something to predict, so that the accuracy is not always zero.
STEPS = {"max_steps": 2, "learning_rate": 2e-2}
LAYOUTS = ("packed", "padded")


def logs_of(module, output_dir, arguments, **settings):
    arguments = {"train_dataset": sft_rows("text"), "eval_dataset": sft_rows("text", 6), **arguments}
    built = {name: value() if callable(value) else value for name, value in arguments.items()}
    trainer = make_trainer(module, output_dir, method="SFT", arguments=built, **{**STEPS, **settings})
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(tmp_path, arguments, layouts=LAYOUTS, **settings):
    expected = logs_of(trl, tmp_path / "trl", arguments, **settings)
    for layout in layouts:
        ours = logs_of(trl_fast, tmp_path / layout, arguments, **settings, batch_layout=layout)
        assert_same_logs(ours, expected)
    return expected


def rows(kind):
    return {"train_dataset": sft_rows(kind), "eval_dataset": sft_rows(kind, 6)}


KIND_SETTINGS = {"story": {"dataset_text_field": "story"}, "tokens and completions": {"completion_only_loss": True}}


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_data(kind, model_path, tmp_path):
    logs = compare(tmp_path, {"model": model_path, **rows(kind)}, ("packed",), **KIND_SETTINGS.get(kind, {}))
    assert logs[-1]["eval_mean_token_accuracy"] > 0


SETTINGS = {
    "dft": {"loss_type": "dft"},
    "truncated": {"max_length": 14},
    "truncated to the end": {"max_length": 14, "truncation_mode": "keep_end"},
    "no limit": {"max_length": None},
    "shuffled": {"shuffle_dataset": True},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "a last batch that is smaller": {"per_device_train_batch_size": 3, "max_steps": -1, "num_train_epochs": 1},
    "no checkpointing": {"gradient_checkpointing": False},
    "end token": {"eos_token": "<|pad|>"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "tokens not averaged": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, model_path, tmp_path):
    # Padding to a multiple is all that the layouts could differ in.
    layouts = LAYOUTS if "pad_to_multiple_of" in settings else ("packed",)
    compare(tmp_path, {"model": model_path}, layouts, **settings)


# Each strategy and each loss in every layout; the slow tests have all of their pairs, with an adapter.
PACKED = [("bfd", "nll", False), ("bfd_split", "dft", False), ("wrapped", "nll", False)]
PACKED += [
    pytest.param(strategy, loss_type, True, marks=pytest.mark.slow)
    for strategy in ("bfd", "bfd_split", "wrapped")
    for loss_type in ("nll", "dft")
]


@pytest.mark.parametrize("strategy, loss_type, lora", PACKED)
def test_packing(strategy, loss_type, lora, model_path, tmp_path):
    arguments = {"model": model_path, **rows("prompt and completion")}
    if lora:
        arguments["peft_config"] = lambda: LoraConfig(**LORA)
    settings = {"packing_strategy": strategy, "max_length": 24, "loss_type": loss_type}
    compare(tmp_path, arguments, ("packed",) if lora else LAYOUTS, packing=True, **settings)


PACKED_SETTINGS = {
    "shuffled": {"shuffle_dataset": True},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "evaluation not packed": {"eval_packing": False},
}


@pytest.mark.parametrize("settings", PACKED_SETTINGS.values(), ids=PACKED_SETTINGS.keys())
def test_packing_settings(settings, model_path, tmp_path):
    # In the padded layout there is other padding, and the token count is that of the padding that is there.
    compare(tmp_path, {"model": model_path}, ("packed",), packing=True, max_length=40, **settings)


def test_padding_free(model_path, tmp_path):
    compare(tmp_path, {"model": model_path}, ("packed",), padding_free=True, max_length=None)


@pytest.mark.parametrize("kind, loss_type", [("text", "dft"), ("prompt and completion messages", "nll")])
def test_lora(kind, loss_type, model_path, tmp_path):
    arguments = {"model": model_path, "peft_config": lambda: LoraConfig(**LORA), **rows(kind)}
    compare(tmp_path, arguments, LAYOUTS if loss_type == "nll" else ("packed",), loss_type=loss_type)


def test_a_model_with_an_adapter(model_path, tmp_path):
    def adapted():
        set_seed(3)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
        return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))

    compare(tmp_path, {"model": adapted, "processing_class": build_tokenizer})


MARKED = "{% for m in messages %}{{ m.role }} {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"


def with_marks():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


@pytest.mark.parametrize("kind, packing", [("messages", True), ("prompt and completion messages", False)])
def test_assistant_only_loss(kind, packing, model_path, tmp_path):
    arguments = {"model": model_path, "processing_class": with_marks, **rows(kind)}
    compare(tmp_path, arguments, ("packed",), assistant_only_loss=True, packing=packing, max_length=60)


def test_assistant_only_loss_where_the_template_has_no_marks(model_path, tmp_path):
    def qwen():
        tokenizer = build_tokenizer()
        tokenizer.chat_template = trl.chat_template_utils.qwen2_5_chat_template
        return tokenizer

    arguments = {"model": model_path, "processing_class": qwen, **rows("messages")}
    compare(tmp_path, arguments, ("packed",), assistant_only_loss=True, max_length=None)


def test_begin_tokens(model_path, tmp_path):
    arguments = {"model": model_path, "processing_class": lambda: build_tokenizer(add_bos=True)}
    for kind in ("text", "prompt and completion"):
        compare(tmp_path / kind, {**arguments, **rows(kind)}, ("packed",))


def test_prompts_are_learned_if_asked_for(model_path, tmp_path):
    compare(tmp_path, {"model": model_path, **rows("prompt and completion")}, ("packed",), completion_only_loss=False)


@pytest.mark.parametrize("packing", [False, True])
def test_streams(packing, model_path, tmp_path):
    streams = {
        "train_dataset": lambda: sft_rows("prompt and completion").to_iterable_dataset(),
        "eval_dataset": lambda: sft_rows("text", 6).to_iterable_dataset(),
    }
    compare(tmp_path, {"model": model_path, **streams}, ("packed",), packing=packing, max_length=40)


def test_formatting_func(model_path, tmp_path):
    arguments = {"model": model_path, **rows("story")}
    arguments["formatting_func"] = lambda: lambda row: f"Story: {row['story']}"
    compare(tmp_path, arguments, ("packed",))


def test_a_dataset_that_is_taken_as_it_is(model_path, tmp_path):
    arguments = {"model": model_path, **rows("tokens and labels")}
    compare(tmp_path, arguments, ("packed",), dataset_kwargs={"skip_prepare_dataset": True})


COLLATORS = {"ours": DataCollatorForLanguageModeling, "TRL's": trl.trainer.sft_trainer.DataCollatorForLanguageModeling}


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS.keys())
def test_another_collator(collator, model_path, tmp_path):
    compare(tmp_path, {"model": model_path, "data_collator": lambda: collator(2)}, ("packed",))


def test_several_evaluation_sets(model_path, tmp_path):
    sets = {"easy": sft_rows("text", 4), "train": sft_rows("prompt and completion", 9)}
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    compare(tmp_path, {"model": model_path, "eval_dataset": sets}, ("packed",), **settings)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 40}], ids=["", "packing"])
def test_compute_metrics_sees_what_trls_sees(settings, model_path, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"agreement": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = {"model": model_path, "compute_metrics": lambda: compute_metrics}
    # A packed row in the padded layout is a row an example.
    compare(tmp_path, arguments, ("packed",) if settings else LAYOUTS, **settings, per_device_eval_batch_size=6)
    (theirs, their_labels), *ours = seen
    for logits, labels in ours:
        assert logits.shape == theirs.shape and (labels == their_labels).all()
        assert abs(logits - theirs)[labels != -100].max() < 1e-3


def test_compute_loss_func(model_path, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return 0.5 * total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    compare(tmp_path, {"model": model_path, "compute_loss_func": lambda: loss})


def test_plain_training_arguments(model_path, tmp_path):
    logs = []
    for module in (trl, trl_fast):
        args = TrainingArguments(str(tmp_path / module.__name__), **{**BASICS, **STEPS})
        trainer = module.SFTTrainer(model_path, args, train_dataset=sft_rows("text"))
        trainer.train()
        logs.append(trainer.state.log_history)
    assert_same_logs(logs[1], logs[0])


@pytest.fixture(scope="module")
def mixture_path(tmp_path_factory):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("moe"), build_tokenizer(), "qwen3_moe", **changes)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 40}, {"router_aux_loss_coef": 0.0}])
def test_mixture_of_experts(settings, mixture_path, tmp_path):
    logs = compare(tmp_path, {"model": mixture_path}, ("packed",) if settings else LAYOUTS, **settings)
    assert ("aux_loss" in logs[0]) == (settings.get("router_aux_loss_coef") is None)


def test_a_model_whose_forward_takes_no_count(model_path, tmp_path):
    """As Gemma 3's: every micro-batch is then a mean of its own."""

    def model():
        loaded = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
        loaded.accepts_loss_kwargs = False
        return loaded

    arguments = {"model": model, "processing_class": build_tokenizer}
    compare(tmp_path, arguments, per_device_train_batch_size=3, max_steps=-1, num_train_epochs=1)
