"""Times real optimizer steps of one trainer, ours or TRL's, on a model with random weights: one process each.

Weights, rows and order are the same for both, so their losses stand side by side. A run's first steps warm up.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import statistics
import tempfile

import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PrinterCallback,
    Qwen2Config,
    Trainer,
)

from tests.support.tokenizer import build_tokenizer

from ..random_models import QWEN_05B
from ..step import StepClock
from ..step_workloads import GENERATIONS, SHAPES, Shape, completions, random_rewards, rows
from .phase_context import Kit

WARM_UPS, STEPS = 2, 5
TINY = {"dpo": (2, 12, 6), "sft": (2, 0, 16), "grpo": (8, 8, 8)}


def run(kit: Kit, words: list[str]) -> None:
    """Adds facts: milliseconds a step, tokens per second, peak memory, the GPU's busy share, losses."""
    arguments = parse_arguments(words)
    if kit.tiny:
        batch, prompt, completion = TINY[arguments.method]
        shape = Shape(batch=batch, prompt=prompt, completion=completion)
    else:
        shape = SHAPES[arguments.method]
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(arguments, shape, kit, folder)
        if kit.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if kit.is_gpu else 0
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        ms = 1e3 * statistics.median(clock.seconds[WARM_UPS - 1 :])
        tokens = shape.batch * (shape.prompt + shape.completion) * (2 if arguments.method == "dpo" else 1)
        kit.facts.add(
            f"{arguments.method} {arguments.library}",
            shape=vars(shape),
            checkpointing=not arguments.no_checkpointing,
            liger=arguments.liger,
            ms=ms,
            tokens_per_second=1e3 * tokens / ms,
            peak_bytes=peak,
            losses=losses,
            grad_norms=norms,
        )
        if kit.is_gpu and not kit.late("share of the time that the GPU is busy", 6):
            kit.facts.add(f"{arguments.method} {arguments.library} profile", **busy_share(trainer, ms))
        if arguments.host and not kit.late("profile of the host", 4):
            kit.facts.add(f"{arguments.method} {arguments.library} host", functions=host_profile(trainer))


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=sorted(SHAPES), required=True)
    parser.add_argument("--library", choices=["trl_fast", "trl"], required=True)
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--host", action="store_true", help="also say which functions the host's time goes into")
    return parser.parse_args(words)


def make_trainer(
    arguments: argparse.Namespace,
    shape: Shape,
    kit: Kit,
    folder: str,
    config: PretrainedConfig | None = None,
    *,
    lora_r: int | None = None,
    **more: object,
) -> tuple[Trainer, StepClock]:
    """Returns a trainer on rows of `shape`, and its clock.

    config: of a model with random weights, by default Qwen2.5-0.5B's; lora_r: trains adapters of that rank; more:
    settings of the trainer.
    """
    library = __import__(arguments.library)
    stem = arguments.method.upper()
    tokenizer = build_tokenizer()
    given: dict[str, object] = {}
    config = config or Qwen2Config(**(QWEN_05B if not kit.tiny else TINY_QWEN))
    torch.manual_seed(0)
    with kit.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if kit.is_gpu else torch.float32)
    if lora_r is not None:
        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=lora_r)
    elif arguments.method == "dpo":
        # TRL would load a reference by the model's name, and this one has none.
        given["ref_model"] = copy.deepcopy(model)
    settings = {"max_length": 2 * (shape.prompt + shape.completion)}
    if arguments.method == "grpo":
        settings = {"max_completion_length": shape.completion, "num_generations": GENERATIONS}
        given |= {"rollout_func": completions(shape, tokenizer), "reward_funcs": random_rewards}
    settings = {"max_steps": WARM_UPS + STEPS, **settings, **more}
    args = getattr(library, f"{stem}Config")(
        folder,
        **settings,
        per_device_train_batch_size=shape.batch,
        logging_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=not arguments.no_checkpointing,
        use_liger_kernel=arguments.liger,
        bf16=kit.is_gpu,
        use_cpu=not kit.is_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )
    clock = StepClock()
    trainer = getattr(library, f"{stem}Trainer")(
        model=model,
        args=args,
        train_dataset=rows(arguments.method, shape, shape.batch * settings["max_steps"]),
        processing_class=tokenizer,
        callbacks=[clock],
        **given,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


TINY_QWEN = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def host_profile(trainer: Trainer, most: int = 60) -> list[list]:
    """Runs two more steps under Python's profiler: functions, calls and milliseconds a step, own and in all."""
    trainer.args.max_steps = 2
    profiler = cProfile.Profile()
    profiler.runcall(trainer.train)
    stats = pstats.Stats(profiler).stats
    rows = []
    for (path, line, name), (_, calls, own, total, _) in stats.items():
        place = "/".join(path.split("/")[-3:])
        rows.append([f"{place}:{line}:{name}", calls // 2, round(500 * own, 2), round(500 * total, 2)])
    own, total = (sorted(rows, key=lambda row: -row[column])[:most] for column in (2, 3))
    return own + [row for row in total if row not in own]


def busy_share(trainer: Trainer, ms: float) -> dict[str, object]:
    """Profiles one more run of two steps: kernel time a step over `ms`, and the longest kernels."""
    trainer.args.max_steps = 2
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.train()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    total = sum(event.self_device_time_total for event in events) / 2e3
    longest = sorted(events, key=lambda event: event.self_device_time_total, reverse=True)[:12]
    return {
        "busy_ms": total,
        "busy_share": total / ms,
        "launches": sum(event.count for event in events) // 2,
        "kernels": [[e.key[:110], e.count // 2, round(e.self_device_time_total / 2e3, 3)] for e in longest],
    }
