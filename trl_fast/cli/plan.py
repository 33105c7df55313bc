"""Plans a training run: the memory of a step, and the settings that make longer contexts fit: `trl-fast plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from trl_fast.console import FILE_WIDTH, make_console, progress_columns
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.position_limits import check_positions
from trl_fast.ops.head.plan import HEAD_GRADS
from trl_fast.planning.comparisons import Row, check_resident, compare, switches, systems
from trl_fast.planning.fake_models import planned_models
from trl_fast.planning.memory_sizes import gib, parse_memory
from trl_fast.planning.model_shapes import SHAPES, model_config
from trl_fast.planning.peak_estimates import head_workspace, longest_context, whole_layers
from trl_fast.planning.report import peak_table, rows_table, save_plot, setup_line, stages_table, tokens
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import DEVICES, DTYPES, METHODS, TrainingSetup
from trl_fast.settings.batch_layouts import LAYOUT_CHOICES
from trl_fast.trainers.base.config import DEFAULT_TILE_TOKENS, BaseConfig

from .parser import TrlParser


@dataclass
class PlanArguments:
    """Describes the run to plan. Settings of training have the names and defaults that they have in training."""

    model: str | None = field(
        default=None,
        metadata={"help": f"Hub name, folder with a config.json, or a built-in shape: {', '.join(SHAPES)}."},
    )
    method: str = field(default="dpo", metadata={"help": "What to train.", "choices": list(METHODS)})
    max_length: int = field(default=1024, metadata={"help": "Tokens of every sequence, prompt and answer together."})
    prompt_tokens: int | None = field(default=None, metadata={"help": "How many of them are the prompt; unset: half."})
    gpu_memory: str | None = field(
        default=None, metadata={"help": "What there is for tensors, such as 80GiB: how long a context fits it."}
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Pairs, sequences or completions at a time."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Above 1, gradients are always there."})
    dtype: str = field(default="bfloat16", metadata={"help": "Weights' dtype.", "choices": list(DTYPES)})
    bf16: bool = field(default=True, metadata={"help": "bfloat16 autocast."})
    peft: str | None = field(default=None, metadata={"help": "Train an adapter: lora.", "choices": ["lora"]})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, or all-linear; unset: PEFT's choice for the architecture."}
    )
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in backward."})
    activation_budget_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Memory for what checkpointing need not compute again; unset: what a GPU has free, on a CPU 1 GiB."
        },
    )
    activation_offloading: bool = field(default=False, metadata={"help": "Keep activations in CPU memory meanwhile."})
    tiled_mlp: str | None = field(
        default=None, metadata={"help": "Compute MLPs in tiles of so many tokens; true: 4096."}
    )
    batch_layout: str = field(default="auto", metadata={"help": "Layout of a batch.", "choices": list(LAYOUT_CHOICES)})
    head_grad: str = field(default="exact", metadata={"help": "Gradient of the head.", "choices": list(HEAD_GRADS)})
    head_workspace_bytes: int | None = field(
        default=None, metadata={"help": "Limit of the memory that grows with tokens times vocabulary; default 1 GiB."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "The reference has scored the dataset before training."}
    )
    num_generations: int | None = field(
        default=None, metadata={"help": "Completions of a prompt (grpo, rloo); unset: the method's default."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches a generation serves (grpo, rloo); unset: accumulation steps."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Updates on the same completions (grpo, rloo)."})
    beta: float | None = field(
        default=None, metadata={"help": "Weight of the KL divergence (grpo, rloo); unset: the method's default."}
    )
    num_mini_batches: int = field(default=1, metadata={"help": "Updates that a pass over a rollout makes (ppo)."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Completions that are sampled and scored at a time (ppo)."}
    )
    device: str = field(default="gpu", metadata={"help": "Whose kernels to assume.", "choices": list(DEVICES)})
    compare: bool = field(default=True, metadata={"help": "Also simulate TRL's step, full logits, and each switch."})
    plot: str | None = field(default="plan.png", metadata={"help": "PNG file of memory over the step; none: no plot."})


def make_setup(arguments: PlanArguments) -> TrainingSetup:
    """Makes the TrainingSetup that the arguments describe.

    Raises:
        ValueError: an argument is missing, out of range or does not go with another.
    """
    if arguments.model is None:
        raise ValueError(f"model is required: a hub name, a folder, or one of {', '.join(SHAPES)}")
    if arguments.max_length < 2:
        raise ValueError(f"max_length={arguments.max_length}: expected at least 2 tokens")
    modules = arguments.lora_target_modules
    return TrainingSetup(
        config=model_config(arguments.model),
        method=arguments.method,
        prompt_share=_prompt_share(arguments),
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dtype=arguments.dtype,
        bf16=arguments.bf16,
        lora_r=arguments.lora_r if arguments.peft else None,
        lora_target_modules=modules[0] if modules and len(modules) == 1 else tuple(modules) if modules else None,
        gradient_checkpointing=arguments.gradient_checkpointing,
        activation_budget_bytes=arguments.activation_budget_bytes,
        activation_offloading=arguments.activation_offloading,
        tiled_mlp=BaseConfig._tile_tokens(arguments.tiled_mlp),
        batch_layout=arguments.batch_layout,
        head_grad=arguments.head_grad,
        head_workspace_bytes=arguments.head_workspace_bytes,
        precompute_ref_log_probs=arguments.precompute_ref_log_probs,
        num_generations=arguments.num_generations,
        steps_per_generation=arguments.steps_per_generation,
        num_iterations=arguments.num_iterations,
        beta=arguments.beta,
        num_mini_batches=arguments.num_mini_batches,
        local_rollout_forward_batch_size=arguments.local_rollout_forward_batch_size,
        device=arguments.device,
    )


def _prompt_share(arguments: PlanArguments) -> float:
    given = arguments.prompt_tokens
    if given is None:
        return 0.5
    if arguments.method == "sft":
        raise ValueError(f"prompt_tokens={given} has no meaning for sft, which learns whole sequences; leave it out")
    if not 0 <= given < arguments.max_length:
        raise ValueError(f"prompt_tokens={given}: expected a number from 0 to below max_length={arguments.max_length}")
    return given / arguments.max_length


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Checks the arguments; returns what simulates, prints and gives the exit status."""
    (parsed,) = TrlParser(PlanArguments, prog="trl-fast plan").parse_args_and_config(arguments)
    setup = make_setup(parsed)
    if parsed.plot is not None and not Path(parsed.plot).parent.is_dir():
        raise ValueError(f"plot={parsed.plot!r}: there is no such folder; make it, or give plot=none")
    limit = None if parsed.gpu_memory is None else parse_memory(parsed.gpu_memory)
    models = planned_models(setup, parsed.max_length)
    check_positions(base_model(models.policy), parsed.max_length, parsed.max_length, "planned")
    if limit is not None:
        check_resident(models, limit)
    return lambda: run(parsed, setup, limit)


def run(arguments: PlanArguments, setup: TrainingSetup, limit: int | None) -> int:
    """Simulates and prints."""
    console = make_console(file_width=FILE_WIDTH)
    length = arguments.max_length
    console.print(f"Simulated, not measured: {setup_line(setup, arguments.model, length)}.", soft_wrap=True)
    timeline = simulate(setup, length)
    peak = timeline.peak()
    console.print(peak_table(peak, "Peak of an optimizer step"))
    console.print(stages_table(timeline))
    if arguments.plot is not None:
        save_plot(Path(arguments.plot), timeline, setup_line(setup, arguments.model, length), limit)
        console.print(f"Memory over the step: {arguments.plot}", soft_wrap=True)
    if limit is not None:
        verdict = "fits" if peak.bytes <= limit else "does not fit"
        console.print(f"{gib(peak.bytes)} GiB {verdict} gpu_memory={gib(limit)} GiB.")
        if setup.leaves_whole_layers:
            whole, size = whole_layers(setup, length, limit)
            console.print(
                f"Of what is free, {gib(size)} GiB let {whole} of {setup.num_layers} layers go uncheckpointed.",
                soft_wrap=True,
            )
        workspace = head_workspace(setup, peak, limit)
        if setup.head_workspace_bytes is None and setup.device == "gpu":
            console.print(f"The head's workspace will be {gib(workspace)} GiB there, of what is free.", soft_wrap=True)
    if arguments.compare:
        _compare(console, setup, length, limit)
    elif limit is not None:
        found = longest_context(setup, limit, length)
        console.print(f"Longest context that fits: {tokens(found)} tokens.")
        _note_positions(console, setup, found.max_length)
    return 0


def _compare(console: Console, setup: TrainingSetup, length: int, limit: int | None) -> None:
    ours, changed = systems(setup), switches(setup, DEFAULT_TILE_TOKENS)
    with Progress(*progress_columns(), console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=len(ours) + len(changed) - 1)

        def rows(named: list[tuple[str, TrainingSetup]]) -> list[Row]:
            found = []
            for name, one in named:
                progress.update(task, description=name[:40])
                found.append(compare(name, one, length, limit))
                progress.advance(task)
            return found

        beside = rows(ours)
        with_switches = [Row("this plan", beside[0].peak, beside[0].longest), *rows(changed[1:])]
    console.print(rows_table(beside, "The same run by other systems", length))
    console.print(rows_table(with_switches, "What each switch buys", length))
    if limit is not None:
        _note_positions(console, setup, beside[0].longest.max_length)


def _note_positions(console: Console, setup: TrainingSetup, longest: int) -> None:
    if setup.max_positions is not None and longest > setup.max_positions:
        console.print(
            f"Memory allows {longest:,} tokens; the model was made for {setup.max_positions:,} positions.",
            soft_wrap=True,
        )
