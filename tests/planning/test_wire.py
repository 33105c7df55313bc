"""Bytes that ranks hold and send, as planned, against two real ones: their parts, and the collectives they call."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from support.models import tiny_config, tiny_model
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from trl_fast.parallel.weights import local_shard
from trl_fast.planning.memory_timeline import GRADIENTS, OPTIMIZER, WEIGHTS
from trl_fast.planning.sharding import model_sizes, resident
from trl_fast.planning.step_times import planned_wire
from trl_fast.planning.training_setup import TrainingSetup
from trl_fast.trainers import SFTConfig, SFTTrainer

pytestmark = pytest.mark.plans

LENGTH, RANKS = 16, 2
MODEL = {"vocab_size": 340, "num_hidden_layers": 2}
SHARE = (RANKS - 1) / RANKS
# Which tensor of a collective's arguments is whole, and how often a rank sends its share of it.
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0, 1),
    # FSDP1 on a CPU, into parts.
    "allgather_": ("all_gather", 0, 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
    "allreduce_": ("all_reduce", 0, 2),
    # To the rank that has these rows of the head: of all pieces together a rank sends its share.
    "reduce_": ("reduce_scatter", 0, 1),
}
# Lengths, norms and flags.
SMALL = 128


class Collectives(TorchDispatchMode):
    """Counts the bytes that a rank sends, by kind of collective."""

    def __init__(self):
        super().__init__()
        self.sent = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and (found := COLLECTIVES.get(func.overloadpacket.__name__)):
            kind, place, times = found
            for tensor in tree_leaves(args[place]):
                if tensor.nbytes >= SMALL:
                    self.sent[kind] += times * SHARE * tensor.nbytes
        return out


class Measures(TrainerCallback):
    """Measures the last step: what a rank sends, and the parts that it has of weights, gradients and averages."""

    def __init__(self, counted):
        self.counted, self.trainer, self.found = counted, None, {}

    def on_step_begin(self, *_, **__):
        self.counted.sent = dict.fromkeys(self.counted.sent, 0.0)

    def on_substep_end(self, *_, **__):
        """After the first micro-batch of two: gradients that FSDP2 keeps whole."""
        states = [getattr(module, "_get_fsdp_state", lambda: None)() for module in self.trainer.model.modules()]
        groups = {getattr(state, "_fsdp_param_group", None) for state in states} - {None}
        weights = [weight.unsharded_param for group in groups for weight in group.fsdp_params]
        self.found["waiting"] = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)

    def on_pre_optimizer_step(self, *_, **__):
        trained = [weight for weight in self.trainer.model.parameters() if weight.grad is not None]
        self.found[GRADIENTS] = sum(bytes_of(weight.grad) for weight in trained)

    def on_step_end(self, *_, **__):
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        # Of each weight the step is counted too, in one number.
        averages = [value for state in optimizer.state.values() for value in state.values()]
        kept = sum(bytes_of(value) for value in averages if isinstance(value, torch.Tensor) and value.numel() > 1)
        if self.trainer.is_deepspeed_enabled:
            zero = self.trainer.deepspeed.optimizer
            copies = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
            kept += sum(map(bytes_of, copies))
        self.found[OPTIMIZER] = kept
        self.found[WEIGHTS] = sum(bytes_of(weight) for weight in self.trainer.model.parameters())
        self.found["sent"] = dict(self.counted.sent)


def bytes_of(tensor):
    return local_shard(tensor).nbytes


def measure(folder, accumulation, lora):
    counted = Collectives()
    measures = Measures(counted)
    arguments = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    trainer = SFTTrainer(
        tiny_model("llama", **MODEL),
        SFTConfig(
            str(folder), **arguments, max_length=LENGTH, bf16=False, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_list([{"input_ids": list(range(1, LENGTH + 1))} for _ in range(16)]),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
        callbacks=[measures],
    )
    measures.trainer = trainer
    with counted:
        trainer.train()
    return measures.found


def planned(engine, accumulation, lora):
    return TrainingSetup(
        tiny_config("llama", **MODEL),
        method="sft",
        max_length=LENGTH,
        dtype="float32",
        bf16=False,
        device="cpu",
        lora_r=4 if lora else None,
        lora_target_modules=("q_proj",),
        gradient_accumulation_steps=accumulation,
        num_gpus=RANKS,
        engine=engine,
    )


@pytest.mark.parametrize(
    ("engine", "accumulation", "lora"),
    [
        ("fsdp2", 2, False),
        ("fsdp2", 1, True),
        pytest.param("ddp", 2, False, marks=pytest.mark.slow),
        pytest.param("fsdp2", 1, False, marks=pytest.mark.slow),
        pytest.param("fsdp1", 1, False, marks=pytest.mark.slow),
        pytest.param("zero1", 2, False, marks=pytest.mark.slow),
        pytest.param("zero2", 2, False, marks=pytest.mark.slow),
        pytest.param("zero3", 2, False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_hold_and_send_what_is_planned(engine, accumulation, lora, tmp_path):
    setup = planned(engine, accumulation, lora)
    sizes, deepspeed = model_sizes(setup), engine.startswith("zero")
    found = run_on_ranks(measure, tmp_path, accumulation, lora, engine=engine)[0]
    whole = {WEIGHTS: 4 * sizes.all, GRADIENTS: 4 * sizes.trained, OPTIMIZER: 8 * sizes.trained}
    expected = resident(whole, setup)
    if deepspeed:
        # Its gradients are gone when the trainer could look at them.
        del expected[GRADIENTS]
    assert {kind: found[kind] for kind in expected} == expected
    if engine == "fsdp2" and accumulation > 1:
        assert found["waiting"] == 4 * sizes.whole_gradients < 4 * sizes.trained
    wire = planned_wire(setup, LENGTH)
    assert {kind: pytest.approx(getattr(wire, kind)) for kind in found["sent"]} == found["sent"]
