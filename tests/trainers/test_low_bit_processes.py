"""QLoRA in two processes, by each engine: the losses, gradient norms and saved adapters of one process."""

from itertools import product

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import trl_fast
from support.low_bit import low_bit_layers, quantization
from support.models import save_tiny_model
from support.process_cases import CASES
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from support.training import make_trainer
from trl_fast.parallel.engines import Engine, engine_of

modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.processes

SETTINGS = {"gradient_accumulation_steps": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
KINDS = {"nf4": {"bnb_4bit_quant_storage": torch.float32}, "int8": {}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # Blocks of 64 weights do not go over the end of a row.
    return save_tiny_model(tmp_path_factory.mktemp("wide"), build_tokenizer(), hidden_size=64)


def train(case, kind, path, folder, batch_size):
    """The numbers of each step, and the adapter that is saved. It trains in float32: 16 bits round each gradient."""
    method, make_rows, own = CASES[case]
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = {"model": path, "train_dataset": make_rows(), "peft_config": adapter}
    arguments["quantization_config"] = quantization(kind, **KINDS[kind])
    settings = {**SETTINGS, **own, "per_device_train_batch_size": batch_size}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    assert len(low_bit_layers(trainer.model)) == 14
    for weight in trainer.model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    trainer.train()
    steps = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    if engine_of(trainer.accelerator) is Engine.FSDP1:
        # On a CPU it crashes where it makes a state dict, of any model.
        return steps, {}
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return steps, load_file(folder / "adapter_model.safetensors")


QUICK = [("fsdp2", "nf4", "DPO"), ("ddp", "int8", "SFT")]
ENGINES = ("ddp", "fsdp2", "fsdp1", "zero2", "zero3")
# FSDP shards no weights of 8 bits.
REST = [
    row
    for row in product(ENGINES, KINDS, ("SFT", "DPO"))
    if row not in QUICK and not (row[0].startswith("fsdp") and row[1] == "int8")
]


@pytest.mark.parametrize(
    ("engine", "kind", "case"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in REST)]
)
def test_two_processes_train_as_one(engine, kind, case, path, tmp_path, monkeypatch):
    # One process would train without gradients once bitsandbytes has packed its layers, on CPUs where it does.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    (first, adapter), (second, _) = run_on_ranks(train, case, kind, path, tmp_path / "two", 2, engine=engine)
    assert first == second
    one, expected = train(case, kind, path, tmp_path / "one", 4)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(one), rtol=5e-7, atol=1e-7)
    assert adapter.keys() == (set() if engine == "fsdp1" else expected.keys())
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
