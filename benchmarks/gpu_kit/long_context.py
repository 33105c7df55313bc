"""Checks that steps on long rows fit, and that their peak is what the planner says.

The planner's estimates are made while earlier phases have the GPU.
"""

from __future__ import annotations

import functools
import tempfile
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from trl_fast.planning.peak_estimates import estimate
from trl_fast.planning.training_setup import TrainingSetup

from ..random_models import QWEN_05B
from ..step_workloads import Shape
from .phase_context import Kit
from .steps import TINY_QWEN, make_trainer, parse_arguments

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
QWEN_15B = {**QWEN_05B, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
QWEN_15B |= {"num_attention_heads": 12, "num_key_value_heads": 2}
_LEAST_SECONDS = 15


class Case(NamedTuple):
    """Describes a DPO run on pairs of `length` tokens, half of them prompt; settings: of trainer and planner."""

    name: str
    config: PretrainedConfig
    length: int
    settings: dict[str, object]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("tiny, 64 tokens", Qwen2Config(**TINY_QWEN), 64, {})]
    checkpointed = {"activation_budget_bytes": 0}
    offloaded = {"activation_offloading": True, "tiled_mlp": 4096, "lora_r": 16}
    return [
        Case("1.5B, all weights, 32k tokens", Qwen2Config(**QWEN_15B), 32768, checkpointed),
        Case("8B, LoRA, offloaded, tiled, 32k tokens", LlamaConfig(**LLAMA_8B), 32768, offloaded),
    ]


@functools.cache
def predicted_bytes(name: str, tiny: bool, device: str) -> int:
    """Returns the planner's peak of a case."""
    case = next(case for case in cases(tiny) if case.name == name)
    setup = TrainingSetup(
        case.config, device="gpu" if device == "cuda" else "cpu", bf16=device == "cuda", **case.settings
    )
    return estimate(setup, case.length).bytes


def prepare(device: torch.device, tiny: bool) -> None:
    for case in cases(tiny):
        predicted_bytes(case.name, tiny, device.type)


def run(kit: Kit) -> None:
    for case in cases(kit.tiny):
        if kit.late(case.name, 0 if kit.tiny else _LEAST_SECONDS):
            return
        predicted = predicted_bytes(case.name, kit.tiny, kit.device.type)
        try:
            kit.facts.add(f"long rows: {case.name}", predicted_bytes=predicted, **measured(case, kit))
        except torch.OutOfMemoryError as error:
            kit.facts.skip(f"long rows: {case.name}", error, predicted_bytes=predicted)
        kit.clock.release()


def measured(case: Case, kit: Kit) -> dict[str, object]:
    """Measures peak bytes and milliseconds of the second of two steps."""
    half = case.length // 2
    arguments = parse_arguments(["--method", "dpo", "--library", "trl_fast"])
    settings = {**case.settings, "max_steps": 2, "max_length": case.length}
    lora_r = settings.pop("lora_r", None)
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(batch=1, prompt=half, completion=half)
        trainer, clock = make_trainer(arguments, shape, kit, folder, case.config, lora_r=lora_r, **settings)
        if kit.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if kit.is_gpu else 0
    return {"peak_bytes": peak, "ms": 1e3 * clock.seconds[-1]}
