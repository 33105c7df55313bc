"""Two processes under DeepSpeed ZeRO train as one does: losses, gradient norms, evaluation, and the weights saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import trl_fast
from support.models import save_tiny_classifier, save_tiny_model
from support.process_cases import CASES
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from support.training import make_trainer

pytestmark = pytest.mark.processes

# Plain steps, since Adam makes of a rounding a step where a gradient is nearly nothing; two micro-batches in each.
# Small ones: at 0.05 one process with other micro-batches is 7e-7 from itself after two steps, all by rounding.
# Rows are evaluated one by one: a mean over batches would depend on how many rows are in one.
SETTINGS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.02, "per_device_eval_batch_size": 1}
# Gradients of reward models are larger.
CASE_SETTINGS = {"Reward": {"learning_rate": 0.01}}


def adapter(method: str) -> LoraConfig:
    """An adapter that does something from the first step on."""
    task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)


def make(case: str, model: str, folder: Path, batch_size: int, *, lora: bool = False, **settings: object):
    """A trainer of a model given by its folder: under ZeRO-3 it is in parts as soon as it is loaded."""
    method, make_rows, own = CASES[case]
    rows = make_rows()
    arguments = {"model": model, "processing_class": build_tokenizer(), "train_dataset": rows}
    arguments |= {"eval_dataset": rows.select(range(4)), "peft_config": adapter(method) if lora else None}
    settings = {**SETTINGS, **own, **CASE_SETTINGS.get(case, {}), **settings}
    settings |= {"per_device_train_batch_size": batch_size}
    return make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)


def train_each(cases: list[tuple], folder: Path, batch_size: int) -> list[tuple]:
    """Of each case the logged numbers, the loss of evaluation, and what the saved files hold."""
    found = []
    for number, (case, model, lora) in enumerate(cases):
        trainer = make(case, model, folder / str(number), batch_size, lora=lora)
        trainer.train()
        steps = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        found.append(([*steps, (evaluated, 0.0)], load_file(next((folder / str(number)).glob("*model.safetensors")))))
    return found


def assert_same(got: tuple, expected: tuple, case: tuple) -> None:
    torch.testing.assert_close(
        torch.tensor(got[0]), torch.tensor(expected[0]), rtol=5e-7, atol=1e-7, msg=lambda text: f"{case}: {text}"
    )
    # DeepSpeed copies a tied head before it is saved, so that it stands in the file too.
    assert got[1].keys() - {"lm_head.weight"} == expected[1].keys() - {"lm_head.weight"}
    for name, weight in expected[1].items():
        torch.testing.assert_close(got[1][name], weight, rtol=0, atol=1e-6, msg=lambda text: f"{case} {name}: {text}")  # noqa: B023


def cases_of(folder: Path, family: str, chosen: list[tuple[str, bool]]) -> list[tuple]:
    language_model = save_tiny_model(folder / "model", build_tokenizer(), family)
    classifier = save_tiny_classifier(folder / "classifier", build_tokenizer(), family)
    return [(case, classifier if case == "Reward" else language_model, lora) for case, lora in chosen]


EVERY = [(case, lora) for case in CASES if case != "KTO" for lora in (False, True)]
QUICK = {"zero2": [("DPO", False), ("BCO", False)], "zero3": [("DPO", False), ("ORPO", False)]}


@pytest.mark.parametrize(
    ("family", "engine", "chosen"),
    [
        *(("llama", engine, QUICK[engine]) for engine in ("zero2", "zero3")),
        *(
            pytest.param(family, engine, EVERY, marks=pytest.mark.slow)
            for family in ("llama", "qwen2")
            for engine in ("zero1", "zero2", "zero3")
        ),
    ],
)
def test_two_processes_train_as_one(family, engine, chosen, tmp_path):
    """Cases with (True) and without an adapter; of one family with a head of its own, one with a tied one."""
    cases = cases_of(tmp_path, family, chosen)
    first, second = run_on_ranks(train_each, cases, tmp_path / "two", 2, engine=engine, patience=300)
    one = train_each(cases, tmp_path / "one", 4)
    for case, got, other, expected in zip(cases, first, second, one, strict=True):
        assert_same(got, expected, case)
        assert got[0] == other[0]


def go_on(case: tuple, folder: Path) -> tuple[list, list, bool]:
    """The steps of a run and of one that goes on from its middle; if DeepSpeed's tool reads the saved weights."""
    name, model, lora = case
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "save_steps": 1}
    runs = []
    for resume in (None, str(folder / "checkpoint-1")):
        trainer = make(name, model, folder, 2, lora=lora, save_strategy="steps", optim="adamw_torch", **settings)
        trainer.train(resume_from_checkpoint=resume)
        runs.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    saved = load_file(folder / "checkpoint-2" / "model.safetensors")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(folder / "checkpoint-2"))
    return *runs, all(torch.equal(found[name], weight) for name, weight in saved.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_resumed_run_is_the_unbroken_one(engine, tmp_path):
    """Also its reference, which follows the policy; small parameters of it are kept whole between steps."""
    (case,) = cases_of(tmp_path, "llama", [("DPO", False)])
    (whole, resumed, same), other = run_on_ranks(go_on, case, tmp_path / "run", engine=engine)
    assert whole == resumed
    assert same and other == (whole, resumed, same)


def config_of_deepspeed(stage: int) -> dict:
    """A configuration of DeepSpeed's own, with weights and optimizer in the CPU's memory."""
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": stage, **dict.fromkeys(sizes, "auto"), "offload_optimizer": {"device": "cpu"}}
    zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    batches = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    # DeepSpeed's own Adam for CPUs would be compiled.
    settings = {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_force_ds_cpu_optimizer": False}
    return {**dict.fromkeys(batches, "auto"), **settings, "zero_optimization": zero}


def steps_of(case: tuple, folder: Path, batch_size: int, config: dict | str | None) -> list[tuple]:
    """The numbers of each step, of a run whose arguments may bring DeepSpeed's configuration."""
    settings = {}
    if config is not None:
        import deepspeed

        # What TrainingArguments does on a GPU.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        settings["deepspeed"] = config
    trainer = make(*case[:2], folder, batch_size, lora=case[2], **settings)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


@pytest.mark.slow
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_arguments_bring_deepspeeds_configuration(stage, as_file, tmp_path):
    config = config_of_deepspeed(stage)
    if as_file:
        (tmp_path / "zero.json").write_text(json.dumps(config))
        config = str(tmp_path / "zero.json")
    (case,) = cases_of(tmp_path, "llama", [("DPO", False)])
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    two = run_on_ranks(steps_of, case, tmp_path / "two", 2, config, engine=None, environment=variables)
    one = steps_of(case, tmp_path / "one", 4, None)
    assert two[0] == two[1]
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(one), rtol=5e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_mlps_in_tiles_are_gathered_once_a_call(lora, tmp_path):
    model = str(save_tiny_model(tmp_path / "model", build_tokenizer()))

    def train(folder, batch_size, **settings):
        trainer = make("SFT", model, tmp_path / folder, batch_size, lora=lora, **settings)
        trainer.train()
        return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]

    found = run_on_ranks(lambda: train("two", 2, tiled_mlp=8), engine="zero3")
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(train("one", 4)), rtol=5e-7, atol=1e-7)
