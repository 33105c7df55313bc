"""QLoRA on weights of 4 and 8 bits by bitsandbytes on the CPU, against TRL 1.16.0."""

import functools
import logging

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.low_bit import low_bit_layers, quantization
from support.models import save_tiny_classifier, save_tiny_model
from support.resuming import assert_resumes
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer
from trl_fast.modeling import layouts
from trl_fast.modeling.loading import base_model

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is not installed")


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """TRL trains without gradients once bitsandbytes has packed its layers, on CPUs where it does."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # Blocks of 64 weights do not go over the end of a row.
    return save_tiny_model(tmp_path_factory.mktemp("wide"), build_tokenizer(), hidden_size=64)


def distinct_characters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture(scope="module")
def reward_path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("wide-reward"), build_tokenizer(), hidden_size=64)


def rows(method):
    if method == "SFT":
        return {"train_dataset": sft_rows("prompt and completion")}
    if method == "KTO":
        return {"train_dataset": color_labels()}
    if method in ("DPO", "Reward"):
        return {"train_dataset": color_pairs()}
    prompts = Dataset.from_list([{"prompt": f"What is {i}?" * (1 + i % 2)} for i in range(8)])
    return {"train_dataset": prompts, "reward_funcs": [distinct_characters], "processing_class": build_tokenizer()}


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


ONLINE = {"max_completion_length": 8, "num_generations": 4, "gradient_accumulation_steps": 1, "beta": 0.1}


def trained(module, method, path, folder, quantized=None, arguments=(), whole_steps=False, **settings):
    """A trainer after its steps; whole_steps: its adapter is made float32 first, so that none of them is rounded."""
    given = {"model": path, **rows(method), "peft_config": lora(), "quantization_config": quantized, **dict(arguments)}
    settings = {"learning_rate": 1e-2, **(ONLINE if method in ("GRPO", "RLOO") else {}), **settings}
    trainer = make_trainer(module, folder / module.__name__, method=method, arguments=given, **settings)
    adapter = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in adapter} == {torch.bfloat16}
    for weight in adapter if whole_steps else ():
        weight.data = weight.data.float()
    trainer.train()
    return trainer


def logs(trainer):
    return [{name: value for name, value in log.items() if name != "step_time"} for log in trainer.state.log_history]


def compare(method, path, folder, *, rel=1e-4, abs=1e-5, padded=False, **how):
    """Trains by both; functions among the arguments make them anew. Returns our trainer."""

    def run(module):
        made = {name: value() if callable(value) else value for name, value in how.items()}
        if module is trl_fast and padded:
            made |= {"batch_layout": "padded", "fused_layers": False}
        return trained(module, method, path, folder, **made)

    ours, theirs = run(trl_fast), run(trl)
    assert_same_logs(logs(ours), logs(theirs), rel=rel, abs=abs)
    dtypes = [{name: weight.dtype for name, weight in each.model.named_parameters()} for each in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    return ours


CASES = [("SFT", "nf4"), ("DPO", "int8"), ("GRPO", "nf4")]
MORE = [("SFT", "int8"), ("SFT", "fp4"), ("DPO", "nf4"), ("GRPO", "int8"), ("KTO", "nf4"), ("RLOO", "int8")]


def but(*slow, first=()):
    """Cases of which those after the first ones are slow tests."""
    return [*first, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("method, kind", but(*MORE, first=CASES))
def test_equal_to_trl(method, kind, path, tmp_path):
    trainer = compare(method, path, tmp_path, quantized=lambda: quantization(kind), whole_steps=True)
    assert len(low_bit_layers(trainer.model)) == 14


@pytest.mark.parametrize("method, kind", but(*CASES[:2], *MORE, first=CASES[2:]))
def test_equal_to_trl_but_for_the_rounding_of_an_adapter(method, kind, path, tmp_path):
    compare(method, path, tmp_path, quantized=lambda: quantization(kind), learning_rate=1e-3, rel=1e-2, abs=1e-3)


# KTO's estimate of a KL divergence is all rounding there.
@pytest.mark.parametrize(
    "method, kind", but(*CASES[1:], *(case for case in MORE if case[0] != "KTO"), first=CASES[:1])
)
def test_products_in_bfloat16(method, kind, path, tmp_path):
    # Padded rows and plain layers: what a row holds besides, and fused layers, change how sums are rounded. The first
    # norm of GRPO's gradients is 1.81 in float32, and in bfloat16 1.66 for TRL and 1.92 with fused layers.
    def quantized():
        return quantization(kind, torch.bfloat16)

    settings = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-3}
    compare(method, path, tmp_path, quantized=quantized, padded=True, rel=2e-2, abs=1e-2, **settings)


def loaded(path, *, prepared=False, adapted=False):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization("nf4"))
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return get_peft_model(model, lora()) if adapted else model


WAYS = {
    "by name with double quantisation": lambda path: {
        "quantized": lambda: quantization("nf4", bnb_4bit_use_double_quant=True)
    },
    "in model_init_kwargs": lambda path: {"model_init_kwargs": lambda: {"quantization_config": quantization("nf4")}},
    "a loaded model": lambda path: {"arguments": lambda: {"model": loaded(path)}},
    "prepared by peft, with an adapter": lambda path: {
        "arguments": lambda: {"model": loaded(path, prepared=True, adapted=True), "peft_config": None}
    },
}
DEFAULT = ("prepared by peft, with an adapter",)


@pytest.mark.parametrize("way", [way if way in DEFAULT else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_ways_to_give_a_low_bit_model(way, path, tmp_path):
    compare("DPO", path, tmp_path, whole_steps=True, **WAYS[way](path))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"activation_offloading": True}], ids=str)
def test_what_is_kept_for_backward_changes_nothing(settings, path, tmp_path):
    settings = {"gradient_checkpointing": False, **settings}
    runs = [
        logs(trained(trl_fast, "SFT", path, tmp_path, quantization("nf4"), whole_steps=True, **changed))
        for changed in ({"gradient_checkpointing": False}, settings)
    ]
    assert_same_logs(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_layout(kind, path, tmp_path):
    runs = [
        logs(trained(trl_fast, "DPO", path, tmp_path, quantization(kind), whole_steps=True, batch_layout=layout))
        for layout in ("padded", "packed", "shared_prefix")
    ]
    for run in runs[1:]:
        assert_same_logs(run, runs[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_a_head_that_is_trained_whole_beside_float32_layers(method, path, tmp_path):
    def arguments():
        return {"peft_config": lora(modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])}

    quantized = functools.partial(quantization, "nf4")
    trainer = compare(method, path, tmp_path, quantized=quantized, arguments=arguments, rel=1e-2, abs=1e-3)
    assert base_model(trainer.model).trl_fast_fused_head


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reward_models(dtype, reward_path, tmp_path):
    def run(module, **settings):
        adapter = lora(task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"])
        quantized = quantization("nf4", getattr(torch, dtype))
        settings |= {"model_init_kwargs": {"dtype": dtype}, "learning_rate": 1e-3}
        return logs(trained(module, "Reward", reward_path, tmp_path, quantized, {"peft_config": adapter}, **settings))

    # TRL's stops on float32 layers without autocast, since the score head that is trained is bfloat16.
    ours = run(trl_fast, bf16=True, batch_layout="padded")
    theirs = run(trl, bf16=True)
    if dtype == "bfloat16":
        assert_same_logs(ours, theirs, rel=2e-2, abs=2e-2)
    # Rounding of products is all that makes these differ.
    losses = [[log["loss"] for log in each if "loss" in log] for each in (ours, run(trl_fast, bf16=False), theirs)]
    assert losses[0] == pytest.approx(losses[2], rel=3e-2) and losses[1] == pytest.approx(losses[2], rel=3e-2)


@pytest.mark.parametrize(
    "kind, method", but(("nf4", "DPO"), ("nf4", "SFT"), ("int8", "GRPO"), first=[("int8", "SFT")])
)
def test_a_head_of_low_bits(kind, method, path, tmp_path, monkeypatch, caplog):
    # TRL 1.16 takes the stored integers for the head's weight: it fails with 4 bits, and trains on nonsense with 8.
    def run(fused):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(layouts, "head_reads_states", lambda model: give_up(model))
            quantized = quantization(kind, llm_int8_skip_modules=["none"])
            return trained(trl_fast, method, path, tmp_path, quantized, whole_steps=True)

    def give_up(model):
        model.trl_fast_fused_head = False
        return True

    with caplog.at_level(logging.WARNING, "trl_fast"):
        fused, own = run(True), run(False)
    heads = [base_model(each.model) for each in (fused, own)]
    assert [model.trl_fast_fused_head for model in heads] == [True, False]
    assert type(heads[0].lm_head).__name__.startswith("Linear" + ("4" if kind == "nf4" else "8"))
    assert_same_logs(logs(fused), logs(own))


def test_a_low_bit_head_cannot_be_float32(path, tmp_path):
    quantized = quantization("nf4", llm_int8_skip_modules=["none"])
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True: the head is held in 4 bits; .*skip_modules"):
        trained(trl_fast, "GRPO", path, tmp_path, quantized, cast_lm_head_to_fp32=True)


def test_evaluation_between_steps_leaves_the_gradient(path, tmp_path, monkeypatch):
    # bitsandbytes would pack the layers here, on a CPU that has the products for it.
    evaluated = {"eval_dataset": sft_rows("prompt and completion", 4)}

    def run(packs, **settings):
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: packs)
        trainer = trained(trl_fast, "SFT", path, tmp_path, quantization("nf4"), evaluated, True, **settings)
        return trainer, [log for log in logs(trainer) if "loss" in log]

    trainer, found = run(True, eval_strategy="steps", eval_steps=1)
    assert_same_logs(found, run(False)[1])
    states = [layer.weight.quant_state for layer in low_bit_layers(trainer.model)]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


def test_packed_weights_are_refused(path, tmp_path):
    model = loaded(path)
    low_bit_layers(model)[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="its 4-bit weights were packed for inference.*load the model anew"):
        trained(trl_fast, "SFT", path, tmp_path, arguments={"model": model})


REFUSED = {
    "given twice": (
        lambda path: {"quantized": quantization("nf4"), "model_init_kwargs": {"quantization_config": None}},
        "quantization_config is given twice",
    ),
    "of a loaded model": (
        lambda path: {"quantized": quantization("nf4"), "arguments": {"model": loaded(path)}},
        "quantization_config needs a model given by name",
    ),
    "without an adapter": (
        lambda path: {"quantized": quantization("nf4"), "arguments": {"peft_config": None}},
        "weights in 4 or 8 bits cannot train; give a peft_config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be(case, path, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trained(trl_fast, "SFT", path, tmp_path, **make(path))


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_goes_on(kind, path, tmp_path):
    def make(folder, **settings):
        arguments = {"model": path, **rows("DPO"), "peft_config": lora(lora_dropout=0.1)}
        arguments["quantization_config"] = quantization(kind)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
        return make_trainer(trl_fast, folder, arguments=arguments, **settings)

    assert_resumes(make, tmp_path, (2,))
