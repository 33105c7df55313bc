"""Simulated peaks against measured ones of real steps of the trainers on this CPU."""

import copy

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

import trl_fast
from support.models import tiny_config
from support.simulated_device import multiply_as_plans_do, set_bf16_products
from support.step_peaks import peak_of_a_step, simulated_peak
from support.tokenizer import build_tokenizer
from trl_fast.ops.backends import load_extension
from trl_fast.planning import baseline_steps
from trl_fast.planning.training_setup import OURS, TRL, TrainingSetup

pytestmark = pytest.mark.plans

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32},
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "head_dim": 64},
    "wide MLP": {"hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 16},
}
TRAINERS = {
    "dpo": (trl_fast.DPOTrainer, trl_fast.DPOConfig, AutoModelForCausalLM),
    "sft": (trl_fast.SFTTrainer, trl_fast.SFTConfig, AutoModelForCausalLM),
    "reward": (trl_fast.RewardTrainer, trl_fast.RewardConfig, AutoModelForSequenceClassification),
}
ALL_LINEAR = {"lora_target_modules": "all-linear"}


def rows_of(method, length, count):
    prompt, answer = [5] * (length // 2), length - length // 2
    chosen, rejected = [6] * answer, [7] * answer
    row = {
        "dpo": {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
        "sft": {"input_ids": prompt + chosen},
        "reward": {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected},
    }
    return Dataset.from_list([row[method]] * count)


def make_trainer(setup, length, folder):
    trainer_class, config_class, auto = TRAINERS[setup.method]
    options = {"num_labels": 1} if setup.method == "reward" else {}
    model = auto.from_config(type(setup.config)(**{**setup.config.to_dict(), **options}), dtype=setup.torch_dtype)
    extra = {"precompute_ref_log_probs": setup.precompute_ref_log_probs} if setup.method == "dpo" else {}
    args = config_class(
        str(folder),
        max_length=length,
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_checkpointing=setup.gradient_checkpointing,
        activation_budget_bytes=setup.activation_budget_bytes,
        head_workspace_bytes=setup.head_workspace_bytes,
        batch_layout=setup.batch_layout,
        fused_layers=setup.fused_layers,
        tiled_mlp=setup.tiled_mlp,
        bf16=setup.bf16,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        **extra,
    )
    lora = None
    if setup.lora_r is not None:
        task = "SEQ_CLS" if setup.method == "reward" else "CAUSAL_LM"
        lora = LoraConfig(r=setup.lora_r, target_modules=setup.lora_target_modules, task_type=task)
    rows = rows_of(setup.method, length, setup.per_device_train_batch_size)
    return trainer_class(model, args=args, train_dataset=rows, processing_class=build_tokenizer(), peft_config=lora)


def measured_peak(setup, length, folder):
    """Bytes of tensors at the peak of the second step, beyond those that live before it."""
    trainer = make_trainer(setup, length, folder)
    return peak_of_a_step(trainer, next(iter(trainer.get_train_dataloader())), setup)


@pytest.fixture(autouse=True)
def _library_s_products(monkeypatch):
    multiply_as_plans_do(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_held():
    """Memory that our ops hold between calls may be up to twice what the next call asks for."""
    if load_extension().ok:
        from trl_fast import _C

        _C.release_pool()


@pytest.fixture(autouse=True)
def _one_thread():
    """torch's attention on a CPU has buffers a thread, which belong to the machine and not to the step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "size, length, changes",
    [
        pytest.param("small", 64, {}, marks=pytest.mark.slow),
        pytest.param(
            "small", 384, {"per_device_train_batch_size": 3, "dtype": "float32", "bf16": False}, marks=pytest.mark.slow
        ),
        ("wide", 192, {"gradient_checkpointing": False, "batch_layout": "packed"}),
        ("wide", 192, {"gradient_checkpointing": False, "batch_layout": "packed", "fused_layers": False}),
        ("wide", 256, {"dtype": "float32", "batch_layout": "padded", "precompute_ref_log_probs": True}),
        ("wide MLP", 384, {"tiled_mlp": 128, "precompute_ref_log_probs": True}),
        pytest.param("wide", 256, {"lora_r": 8, "lora_target_modules": "all-linear"}, marks=pytest.mark.slow),
        pytest.param("small", 256, {"method": "sft", "per_device_train_batch_size": 3}, marks=pytest.mark.slow),
        pytest.param("wide", 256, {"activation_budget_bytes": 0}, marks=pytest.mark.slow),
        ("wide", 256, {"activation_budget_bytes": 1_000_000, "head_workspace_bytes": 1 << 18}),
        ("wide", 256, {"method": "reward"}),
    ],
    ids=str,
)
def test_simulated_peaks_are_those_of_real_steps(size, length, changes, tmp_path):
    config = tiny_config("llama", vocab_size=4096, max_position_embeddings=2048, **SIZES[size])
    setup = TrainingSetup(config, device="cpu", **changes)
    # 10% is what was asked for; it is nearer to 0.1%.
    assert simulated_peak(setup, length) == pytest.approx(measured_peak(setup, length, tmp_path), rel=0.02)


class Launches:
    """In the place of a Triton kernel, which takes no memory: launched on any grid, it does nothing."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.fixture
def trl_as_on_a_gpu(monkeypatch):
    """TRL's own step with the kernels that it runs on a GPU, which read and write tiles of logits in place.

    On a CPU it would score every position, prompts too, and have float32 temporaries of a tile's size.
    """
    monkeypatch.setattr(baseline_steps, "has_tile_kernels", lambda setup: True)
    for module in (chunked_logprob, trl_utils):
        monkeypatch.setattr(module, "_use_triton", lambda _: True)
    monkeypatch.setattr(chunked_logprob, "_forward_kernel", Launches())
    monkeypatch.setattr(chunked_logprob, "_backward_kernel", Launches())
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", lambda *_: None)


def measured_peak_of_trl(setup, length, folder):
    model = AutoModelForCausalLM.from_config(setup.config, dtype=setup.torch_dtype)
    args = trl.DPOConfig(
        str(folder),
        max_length=length,
        gradient_checkpointing=setup.gradient_checkpointing,
        bf16=setup.bf16,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    lora = LoraConfig(r=setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM") if setup.lora_r else None
    trainer = trl.DPOTrainer(
        model,
        None if lora else copy.deepcopy(model),
        args=args,
        # It wants text; the batch below is what the step gets.
        train_dataset=Dataset.from_list([{"prompt": "What?", "chosen": " This", "rejected": " That"}]),
        processing_class=build_tokenizer(),
        peft_config=lora,
    )
    rows = list(rows_of("dpo", length, setup.per_device_train_batch_size))
    return peak_of_a_step(trainer, trainer.data_collator(rows), setup)


@pytest.mark.parametrize(
    "columns, changes",
    [
        # The peak is in the last layer's backward with small tiles of logits, else in the head.
        (256, {"lora_r": 8, **ALL_LINEAR}),
        pytest.param(32768, {}, marks=pytest.mark.slow),
        pytest.param(256, {"dtype": "float32", "bf16": False}, marks=pytest.mark.slow),
        pytest.param(256, {"lora_r": 8, **ALL_LINEAR, "gradient_checkpointing": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_simulated_peaks_of_trl_are_those_of_its_real_steps(columns, changes, trl_as_on_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", columns)
    monkeypatch.setattr(baseline_steps, "TILE_COLUMNS", columns)
    config = tiny_config("llama", vocab_size=4096, max_position_embeddings=2048, **SIZES["wide"])
    setup = TrainingSetup(config, system=TRL, device="cpu", **changes)
    measured = measured_peak_of_trl(setup, 512, tmp_path)
    assert simulated_peak(setup, 512) == pytest.approx(measured, rel=0.02)


def test_only_our_linear_layers_become_float32_where_16_bit_products_are_slow(monkeypatch):
    config = tiny_config("llama", vocab_size=4096, max_position_embeddings=2048, **SIZES["wide"])
    peaks = {}
    for fast in (True, False):
        set_bf16_products(monkeypatch, fast)
        for system in (OURS, TRL):
            peaks[system, fast] = simulated_peak(TrainingSetup(config, system=system, device="cpu"), 256)
    assert peaks[TRL, False] == peaks[TRL, True]
    assert peaks[OURS, False] != peaks[OURS, True]


@pytest.mark.parametrize("changes", [{"lora_r": 8, **ALL_LINEAR}, pytest.param({}, marks=pytest.mark.slow)], ids=str)
def test_simulated_peaks_of_trl_on_a_cpu_are_those_of_its_real_steps(changes, monkeypatch, tmp_path):
    """Its tiles have float32 temporaries there, and prompts are scored too: the head is the peak."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 4096)
    monkeypatch.setattr(baseline_steps, "TILE_COLUMNS", 4096)
    config = tiny_config("llama", vocab_size=8192, max_position_embeddings=2048, **SIZES["small"])
    setup = TrainingSetup(config, system=TRL, device="cpu", **changes)
    measured = measured_peak_of_trl(setup, 512, tmp_path)
    assert simulated_peak(setup, 512) == pytest.approx(measured, rel=0.05)


def test_trl_has_tiles_as_large_as_is_said_of_it():
    assert baseline_steps.TILE_ROWS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert baseline_steps.TILE_COLUMNS == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
