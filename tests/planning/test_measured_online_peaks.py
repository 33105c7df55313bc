"""Compares simulated peaks of KTO and of the online methods with measured ones of real training on this CPU."""

import gc

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_fast
from benchmarks.memory import measure_peak
from support.models import tiny_config
from support.simulated_device import multiply_as_plans_do
from support.tokenizer import build_tokenizer
from trl_fast.ops.backends import load_extension
from trl_fast.planning.memory_timeline import (
    KINDS,
    REFERENCE,
    WEIGHTS,
)
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import PlannedTeacher, TrainingSetup

pytestmark = pytest.mark.plans

SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 4096}
# Prompts that begin alike would share their beginnings, which a plan does not count on.
PROMPTS = [f"{number} times: what color is{14 * ' very'} bright red?" for number in range(12, 90, 11)]
TEACHER = PlannedTeacher(
    tiny_config("llama", max_position_embeddings=2048, **{**SIZE, "hidden_size": 256, "num_hidden_layers": 2}),
    "bfloat16",
)
TRAINERS = {
    "kto": (trl_fast.KTOTrainer, trl_fast.KTOConfig),
    "grpo": (trl_fast.GRPOTrainer, trl_fast.GRPOConfig),
    "rloo": (trl_fast.RLOOTrainer, trl_fast.RLOOConfig),
    "ppo": (trl_fast.PPOTrainer, trl_fast.PPOConfig),
    "distillation": (trl_fast.DistillationTrainer, trl_fast.DistillationConfig),
}


@pytest.fixture(autouse=True)
def _library_s_products(monkeypatch):
    multiply_as_plans_do(monkeypatch)


@pytest.fixture(autouse=True)
def alone():
    """torch's attention on a CPU has buffers a thread; memory that our ops keep may be larger than they ask for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if load_extension().ok:
        from trl_fast import _C

        _C.release_pool()
    yield
    torch.set_num_threads(before)


def by_length(completion_ids, **_):
    """Rewards that differ within every group."""
    return [float(number) for number in range(len(completion_ids))]


def arguments_of(setup, prompt_tokens, length):
    """The method's own settings, and what its trainer is given beside them."""
    completion, count = length - prompt_tokens, setup.per_device_train_batch_size
    if setup.method == "kto":
        row = {"prompt_ids": [5] * prompt_tokens, "completion_ids": [6] * completion, "label": True}
        return {"max_length": length}, {"train_dataset": Dataset.from_list([row, {**row, "label": False}] * count)}
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    if setup.method == "ppo":
        settings = {"response_length": completion, "num_ppo_epochs": 1}
        return settings, {"train_dataset": rows, "reward_model": by_length}
    if setup.method == "distillation":
        teacher = AutoModelForCausalLM.from_config(setup.teacher.config, dtype=getattr(torch, setup.teacher.dtype))
        settings = {"max_completion_length": completion, "num_generations": setup.num_generations}
        return settings, {"train_dataset": rows, "teacher_model": teacher}
    settings = {"max_completion_length": completion, "num_generations": setup.num_generations, "beta": setup.beta}
    settings["steps_per_generation"] = setup.steps_per_generation
    return settings, {"train_dataset": rows, "reward_funcs": by_length}


def measured_peak(setup, prompt_tokens, length, folder):
    """Bytes of tensors at the peak of two steps of training, beyond those that live before."""
    trainer_class, config_class = TRAINERS[setup.method]
    settings, given = arguments_of(setup, prompt_tokens, length)
    args = config_class(
        str(folder),
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_accumulation_steps=setup.gradient_accumulation_steps,
        gradient_checkpointing=setup.gradient_checkpointing,
        activation_budget_bytes=setup.activation_budget_bytes,
        head_workspace_bytes=setup.head_workspace_bytes,
        batch_layout=setup.batch_layout,
        bf16=setup.bf16,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(setup.config, dtype=setup.torch_dtype)
    trainer = trainer_class(model=model, args=args, processing_class=build_tokenizer(), **given)
    gc.collect()
    return measure_peak(trainer.train).bytes_beside_products


def simulated_peak(setup, length):
    """Bytes at the peak beyond the models'."""
    timeline = simulate(setup, length)
    return timeline.peak().bytes - sum(timeline.levels[KINDS.index(kind)].max() for kind in (WEIGHTS, REFERENCE))


@pytest.mark.parametrize(
    "method, length, changes, tolerance",
    [
        pytest.param(*("kto", 256, {}, 0.02), marks=pytest.mark.slow),
        ("kto", 256, {"batch_layout": "padded", "dtype": "float32"}, 0.02),
        ("grpo", 160, {"num_generations": 4}, 0.02),
        pytest.param(
            *("grpo", 160, {"num_generations": 4, "beta": 0.1, "steps_per_generation": 2, "dtype": "float32"}, 0.05),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("rloo", 160, {"num_generations": 4, "gradient_checkpointing": False}, 0.02), marks=pytest.mark.slow
        ),
        pytest.param(*("ppo", 160, {}, 0.02), marks=pytest.mark.slow),
        ("distillation", 160, {"num_generations": 4, "teacher": TEACHER}, 0.02),
        pytest.param(
            *("distillation", 160, {"num_generations": 4, "teacher": TEACHER, "dtype": "float32"}, 0.02),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("ppo", 160, {"gradient_checkpointing": False, "dtype": "float32"}, 0.02), marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: str({**value, "teacher": "wide"}) if "teacher" in str(value) else str(value),
)
def test_simulated_peaks_are_those_of_real_training(method, length, changes, tolerance, tmp_path):
    torch.manual_seed(0)
    config = tiny_config("llama", max_position_embeddings=2048, **SIZE)
    (prompt_tokens,) = {len(ids) for ids in build_tokenizer()(PROMPTS)["input_ids"]}
    setup = TrainingSetup(
        config,
        method=method,
        device="cpu",
        prompt_share=prompt_tokens / length,
        per_device_train_batch_size=4,
        head_workspace_bytes=1 << 20,
        **changes,
    )
    measured = measured_peak(setup, prompt_tokens, length, tmp_path)
    assert simulated_peak(setup, length) == pytest.approx(measured, rel=tolerance)
