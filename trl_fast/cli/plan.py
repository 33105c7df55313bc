"""Plans a training run: the memory of a step, and the settings that make longer contexts fit: `trl-fast plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from trl_fast.settings.choices import one_of
from trl_fast.trainers.base.config import DEFAULT_TILE_TOKENS, BaseConfig

from .parser import TrlParser


@dataclass
class PlanArguments:
    """Describes the run to plan. Settings of training have the names and defaults that they have in training."""

    model: str | None = None
    """Hub name, folder with a config.json, or the name of a built-in shape such as smollm2-135m."""

    method: str = one_of(METHODS, default="dpo")
    """Method to plan, named as the training command."""

    max_length: int = 1024
    """Tokens of every sequence, prompt and answer together."""

    prompt_tokens: int | None = None
    """How many of these tokens are the prompt. None: half of them."""

    gpu_memory: str | None = None
    """Memory for tensors, such as 80GiB: how long a context fits it. None: that is not asked."""

    per_device_train_batch_size: int = 1
    """Pairs, sequences or completions at a time."""

    gradient_accumulation_steps: int = 1
    """Micro-batches of an update. Above 1, gradients are kept between them."""

    dtype: str = one_of(DTYPES, default="bfloat16")
    """Number format of the weights: bfloat16 or float32."""

    bf16: bool = True
    """Compute in bfloat16 (autocast)."""

    peft: str | None = one_of(("lora",), default=None)
    """Train an adapter: lora. None: train the whole model."""

    lora_r: int = 16
    """Rank of the LoRA matrices."""

    lora_target_modules: list[str] | None = None
    """Modules that get an adapter, by name, or all-linear. None: PEFT's choice for the model."""

    gradient_checkpointing: bool = True
    """Recompute activations in backward: less memory, about a fifth slower."""

    activation_budget_bytes: int | None = None
    """Bytes for activations that checkpointing need not compute again. None: what a GPU has free, on a CPU 1 GiB."""

    activation_offloading: bool = False
    """Keep what backward needs in CPU memory meanwhile."""

    tiled_mlp: str | None = None
    """Compute MLPs in tiles of so many tokens; true: 4096. None: whole rows."""

    batch_layout: str = one_of(LAYOUT_CHOICES, default="auto")
    """Layout of a batch: auto, shared_prefix, packed or padded."""

    head_grad: str = one_of(HEAD_GRADS, default="exact")
    """Gradient of the head: exact or sparse."""

    head_workspace_bytes: int | None = None
    """Limit in bytes of the memory that grows with tokens times vocabulary. None: 1 GiB."""

    precompute_ref_log_probs: bool = False
    """The reference has scored the dataset before training."""

    num_generations: int | None = None
    """Completions of a prompt (grpo, rloo). None: the method's default."""

    steps_per_generation: int | None = None
    """Micro-batches that a generation serves (grpo, rloo). None: the accumulation steps."""

    num_iterations: int = 1
    """Updates on the same completions (grpo, rloo)."""

    beta: float | None = None
    """Weight of the KL divergence (grpo, rloo). None: the method's default."""

    num_mini_batches: int = 1
    """Updates that a pass over a rollout makes (ppo)."""

    local_rollout_forward_batch_size: int = 64
    """Completions that are sampled and scored at a time (ppo)."""

    device: str = one_of(DEVICES, default="gpu")
    """Device whose kernels are assumed: gpu or cpu."""

    compare: bool = True
    """Also simulate TRL's step, full logits, and each switch."""

    plot: str | None = "plan.png"
    """PNG file of memory over the step. None: no plot."""


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
