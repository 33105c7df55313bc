"""Plans a training run, `trl-fast plan`: whether a step fits a GPU, how long a context does, what settings buy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from trl_fast.console import make_console, progress_columns
from trl_fast.data.images import ImageInput
from trl_fast.input_errors import error_line
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.position_limits import check_positions
from trl_fast.planning.comparisons import SYSTEMS_NOTE, Row, check_resident, compare, switches, systems
from trl_fast.planning.fake_models import planned_models
from trl_fast.planning.gpu_facts import Gpu, gpu_named, gpu_of_device
from trl_fast.planning.host_memory import host_memory
from trl_fast.planning.memory_sizes import gib, parse_memory
from trl_fast.planning.model_shapes import SHAPES, model_config
from trl_fast.planning.peak_estimates import stage_peaks, whole_layers
from trl_fast.planning.planned_images import parse_image_size, planned_image
from trl_fast.planning.planned_layers import fused_layers_line, layers_line
from trl_fast.planning.planned_methods import PLANNED
from trl_fast.planning.planned_optimizers import is_known
from trl_fast.planning.report import (
    peak_table,
    remedies,
    rows_table,
    save_plot,
    setup_line,
    stages_table,
    step_time,
    teacher_line,
    tokens,
    verdict,
    wire_line,
)
from trl_fast.planning.sharding import engine_named
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.step_times import planned_wire
from trl_fast.planning.training_setup import (
    DEFAULT_ENGINE,
    METHODS,
    PlannedTeacher,
    TrainingSetup,
    dtype_name,
    setup_from_training,
)
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.ranges import check_ranges
from trl_fast.trainers.base.config import DEFAULT_TILE_TOKENS
from trl_fast.trainers.distillation.teacher import check_is_another

from .argument_places import argument_types
from .arguments import get_quantization_config
from .launch import launcher_flags, launcher_options, read_config
from .parser import TrlParser
from .training import RunArguments, policy_name, teacher_options


@dataclass
class PlanArguments:
    """Holds the arguments of `trl-fast plan` that training does not have."""

    gpu: str | None = None
    """GPU to plan for, by name, such as h100-80 or rtx4090. None: the one of this machine, if it is known."""

    gpu_memory: str | None = None
    """Memory that there is for tensors, such as 75GiB. None: that of the GPU."""

    num_gpus: int = 1
    """GPUs that share the run."""

    accelerate_config: str | None = None
    """How they share it: ddp, zero1, zero2, zero3, fsdp1, fsdp2, tp, sp, or a file of accelerate. None: fsdp2."""

    prompt_tokens: int | None = None
    """Tokens of a sequence that are prompt. None: half of max_length; of sampled sequences 512."""

    image_size: str | None = None
    """Width and height in pixels of the images that a model reads, such as 1280x720. None: it reads text alone."""

    images_per_prompt: int = 1
    """Images of each prompt, where `image_size` is set."""

    compare: bool = True
    """Also simulate TRL's step, and each switch that buys memory or time."""

    plot: str | None = None
    """PNG file to draw memory over the step into. None: no plot."""

    def __post_init__(self) -> None:
        check_ranges(self)


class _PlanParser(TrlParser):
    """Parses a training command's arguments for another device than this machine's.

    transformers checks whether this machine has the dtypes that are asked for. A plan has those of the planned device.
    """

    plans_cpu = False
    engine = DEFAULT_ENGINE

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and takes what depends on the device out of the checks."""
        found, remaining = super().parse_known_args(args, namespace)
        self.plans_cpu = bool(found.use_cpu)
        self.engine, found.num_gpus = _engine(found.accelerate_config, found.num_gpus)
        if not self.plans_cpu:
            # Numbers of both 16-bit dtypes take the same memory.
            found.bf16, found.fp16 = found.bf16 is not False or bool(found.fp16), False
            found.use_cpu, found.tf32 = True, None
        # Configs divide batches among processes, of which there is one here and will be one for each GPU.
        found.per_device_train_batch_size *= max(1, found.num_gpus)
        return found, remaining


def _engine(config: str | None, num_gpus: int) -> tuple[str, int]:
    """Returns the engine that an --accelerate_config names, and of how many GPUs.

    Raises:
        ValueError: it is neither an engine nor a file of accelerate, or nothing says how many GPUs there are.
    """
    if config is None:
        return DEFAULT_ENGINE, num_gpus
    if not Path(config).is_file():
        engine = engine_named(config)
        if num_gpus == 1:
            raise ValueError(f"accelerate_config={config!r} shares a run over GPUs; say over how many: --num_gpus 8")
        return engine, num_gpus
    settings = vars(read_config(config))
    if num_gpus == 1:
        num_gpus = settings.get("num_processes") or 1
    return _engine_of_settings(settings), num_gpus


def _engine_of_settings(settings: Mapping[str, Any]) -> str:
    """Returns the engine of the settings in a file of accelerate."""
    parallelism = settings.get("parallelism_config") or {}
    for engine in ("tp", "sp"):
        if int(parallelism.get(f"parallelism_config_{engine}_size") or 1) > 1:
            return engine
    kind = str(settings.get("distributed_type"))
    if kind.endswith("FSDP"):
        return f"fsdp{(settings.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    if kind.endswith("DEEPSPEED"):
        return engine_named(f"zero{(settings.get('deepspeed_config') or {}).get('zero_stage', 2)}")
    return "ddp"


@dataclass(frozen=True)
class PlannedRun:
    """Holds what a command line asks to be planned. limit: the bytes for tensors; None: no device was named."""

    arguments: PlanArguments
    setup: TrainingSetup
    model: str
    gpu: Gpu | None
    limit: int | None
    has_dataset: bool
    teacher: str | None = None


def read_arguments(method: str, arguments: Sequence[str]) -> PlannedRun:
    """Reads the arguments of a training command and of its plan.

    Raises:
        ValueError: an argument is unknown, out of range, missing or does not go with another.
    """
    parser = _PlanParser((PlanArguments, *argument_types(METHODS[method]), RunArguments), prog="trl-fast plan")
    plan, script, training, model, mixture, _, flags = parser.parse_args_and_config(
        arguments, return_remaining_strings=True
    )
    training.per_device_train_batch_size //= plan.num_gpus
    _refuse_unknown(parser, flags)
    try:
        name = policy_name(training, model)
        config = model_config(name, trust_remote_code=training.trust_remote_code)
        images: tuple[ImageInput, ...] = ()
        if plan.image_size is not None:
            if not PLANNED[method].reads_images:
                able = ", ".join(name for name, planned in PLANNED.items() if planned.reads_images)
                raise ValueError(
                    f"image_size={plan.image_size!r} has no plan for {method}; plans of images are for {able}. "
                    "Without image_size the run is planned on text alone"
                )
            size = parse_image_size(plan.image_size)
            image = planned_image(name, config, size, trust_remote_code=training.trust_remote_code)
            images = (image,) * plan.images_per_prompt
        setup = setup_from_training(
            method,
            training,
            model,
            config,
            prompt_tokens=plan.prompt_tokens,
            images=images,
            teacher=_teacher(training, model, name),
            device="cpu" if parser.plans_cpu else "gpu",
            num_gpus=plan.num_gpus,
            engine=parser.engine,
        )
    except ValueError as error:
        raise parser.located(error, arguments) from error
    if plan.plot is not None and plan.num_gpus > 1:
        raise ValueError(f"plot={plan.plot!r} shows one device that holds everything; leave it out with num_gpus")
    if plan.plot is not None and not Path(plan.plot).parent.is_dir():
        raise ValueError(f"plot={plan.plot!r}: there is no such folder; make it, or leave plot out")
    gpu, limit = _device(plan, setup)
    if gpu is not None:
        setup = setup.but(capability=gpu.capability)
    has_dataset = bool(script.dataset_name or mixture.datasets)
    return PlannedRun(
        plan, setup, name, gpu, limit, has_dataset, getattr(training, "teacher_model_name_or_path", None)
    )


def _teacher(training: Any, model: Any, student: str) -> PlannedTeacher | None:
    """Returns the teacher that the arguments of a distillation name; None where none is named, or none is needed.

    Raises:
        ValueError: it is unknown, or the student.
    """
    name = getattr(training, "teacher_model_name_or_path", None)
    if name is None:
        return None
    check_is_another(student, name, training, get_quantization_config(model))
    try:
        config = model_config(name, trust_remote_code=training.trust_remote_code)
    except ValueError as error:
        raise ValueError(str(error).replace("model_name_or_path", "teacher_model_name_or_path", 1)) from error
    return PlannedTeacher(config, dtype_name(teacher_options(training, model)["dtype"], config))


def _refuse_unknown(parser: TrlParser, flags: list[str]) -> None:
    """Raises ValueError about flags that neither training nor `accelerate launch` has."""
    _, unknown = launcher_flags(flags)
    if unknown:
        raise parser.unknown(unknown, launcher_options())


def _device(plan: PlanArguments, setup: TrainingSetup) -> tuple[Gpu | None, int | None]:
    """Returns the GPU to plan for, if it is known, and the bytes that there are for tensors."""
    gpu = None
    if plan.gpu is not None:
        gpu = gpu_named(plan.gpu)
    elif setup.device == "gpu":
        gpu = _gpu_here()
    if plan.gpu_memory is not None:
        return gpu, parse_memory(plan.gpu_memory)
    return gpu, None if gpu is None else gpu.usable_bytes


def _gpu_here() -> Gpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return gpu_of_device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)


def usage() -> str:
    """Returns how the command is called."""
    return "\n".join(
        [
            "usage: trl-fast plan METHOD [arguments of trl-fast METHOD] [arguments of the plan]",
            "",
            f"METHOD: {', '.join(METHODS)}. For example:",
            "",
            "  trl-fast plan dpo --config training.yaml --gpu h100-80",
            "  trl-fast plan sft --model_name_or_path llama-3.1-8b --use_peft --gpu rtx4090",
            "",
            f"Models that need no download: {', '.join(SHAPES)}.",
            "trl-fast plan METHOD --help lists all arguments.",
        ]
    )


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Checks the arguments; returns what simulates, prints and gives the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return lambda: (print(usage()), 0)[1]
    method = arguments[0]
    if method not in METHODS:
        hint = did_you_mean(method, METHODS) or f"; expected one of {', '.join(METHODS)}"
        raise ValueError(f"method {method!r} is unknown{hint}: trl-fast plan METHOD ...")
    planned = read_arguments(method, arguments[1:])
    setup, limit = planned.setup, planned.limit
    with planned_models(setup, setup.max_length) as models:
        check_positions(base_model(models.policy), setup.max_length, setup.max_length, "planned")
        if limit is not None:
            check_resident(setup, models, limit)
    return lambda: run(planned)


class _Stages:
    """Shows what a plan is at: a bar on a terminal, else a line a stage; on the standard error, beside the results."""

    def __init__(self, total: int) -> None:
        self._console = make_console(stderr=True)
        self._progress = Progress(*progress_columns(), console=self._console, transient=True)
        self._task = self._progress.add_task("", total=total)
        self._done = 0
        self._total = total

    def __enter__(self) -> _Stages:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, name: str) -> None:
        """Begins the next stage."""
        self._progress.update(self._task, description=name[:40], completed=self._done)
        self._done += 1
        if not self._console.is_terminal:
            self._console.print(f"simulating {self._done}/{self._total}: {name}", soft_wrap=True)


def run(planned: PlannedRun) -> int:
    """Simulates and prints."""
    setup, limit, console = planned.setup, planned.limit, make_console()
    named = [("this plan", setup)]
    changed: list[tuple[str, TrainingSetup]] = []
    if planned.arguments.compare:
        named, changed = systems(setup), switches(setup, DEFAULT_TILE_TOKENS)[1:]
    with _Stages(len(named) + len(changed)) as stages:
        rows: dict[str, Row] = {}
        left_out: dict[str, str] = {}
        for name, one in (*named, *changed):
            stages.start(name)
            try:
                rows[name] = compare(name, one, setup.max_length, limit, with_work=planned.gpu is not None)
            except ValueError as error:
                if one is setup:
                    raise
                # The model cannot have this setting, such as tiles without an MLP.
                left_out[name] = error_line(error)
    present = rows[named[0][0]]
    beside = [rows[name] for name, _ in named if name in rows]
    with_switches = [present, *(rows[name] for name, _ in changed if name in rows)]
    _print_verdict(console, planned, present, with_switches)
    peaks = stage_peaks(setup, setup.max_length)
    console.print(peak_table(present.peak, "What the peak consists of"))
    console.print(stages_table(peaks))
    if planned.arguments.plot is not None:
        title = f"{planned.model}: {setup_line(setup)}"
        save_plot(Path(planned.arguments.plot), simulate(setup, setup.max_length), title, limit)
        console.print(f"Memory over the step: {planned.arguments.plot}", soft_wrap=True)
    if planned.arguments.compare:
        if len(beside) > 1:
            console.print(rows_table(beside, "By other systems", setup.max_length, planned.gpu))
            console.print(SYSTEMS_NOTE)
        console.print(rows_table(with_switches, "With one setting changed", setup.max_length, planned.gpu))
    for name, reason in left_out.items():
        console.print(f"Left out, {name}: {reason}", soft_wrap=True, markup=False)
    return 0


def _print_verdict(console: Console, planned: PlannedRun, row: Row, with_switches: list[Row]) -> None:
    """Prints what a user wants to know first: whether it fits, how long a context does, and what to switch on."""
    setup, limit = planned.setup, planned.limit
    console.print(verdict(row.peak, limit, planned.gpu))
    if limit is not None:
        console.print(f"Longest context that fits: {tokens(row.longest)} tokens.")
        _note_positions(console, setup, row.longest.max_length)
        if row.peak.bytes > limit:
            console.print(remedies(with_switches, limit))
        _note_free_memory(console, setup, row, limit)
    if setup.num_gpus > 1:
        console.print(wire_line(planned_wire(setup, setup.max_length), setup, planned.gpu))
    if planned.gpu is not None:
        console.print(step_time(row.work, planned.gpu))
    if setup.device == "gpu":
        console.print(f"CPU memory of a process, about: {host_memory(setup, setup.max_length)}.")
    console.print(f"Simulated, not measured, of {planned.model}:", soft_wrap=True)
    console.print(f"{setup_line(setup)}.")
    with planned_models(setup, setup.max_length) as models:
        console.print(layers_line(base_model(models.policy), models.layout.name))
        console.print(fused_layers_line(base_model(models.policy), setup.fused_layers))
    if not is_known(setup.optim):
        console.print(f"optim={setup.optim} is planned as AdamW.")
    if not setup.generates and setup.lmbda > 0:
        console.print("vLLM samples: its memory is not part of this plan.")
    if setup.has_teacher:
        console.print(teacher_line(setup, planned.teacher), soft_wrap=True, markup=False)
    if planned.has_dataset:
        console.print("The dataset is not read: every sequence is taken to be as long as the settings allow.")


def _note_free_memory(console: Console, setup: TrainingSetup, row: Row, limit: int) -> None:
    """Says what a run will do with the memory that a step leaves free."""
    if row.peak.bytes > limit:
        return
    if setup.leaves_whole_layers:
        whole, size = whole_layers(setup, setup.max_length, limit)
        console.print(f"Of what is free, {gib(size)} GiB let {whole} of {setup.num_layers} layers go uncheckpointed.")


def _note_positions(console: Console, setup: TrainingSetup, longest: int) -> None:
    if setup.max_positions is not None and longest > setup.max_positions:
        console.print(f"Memory allows {longest:,} tokens; the model was made for {setup.max_positions:,} positions.")
