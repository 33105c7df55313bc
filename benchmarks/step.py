"""Times whole optimizer steps on a real model and real text against TRL 1.16.0, and measures their memory.

    python -m benchmarks.step --method sft|dpo|kto|bco|orpo|cpo|tpo|reward [--batch 4 --steps 3 --rounds 3]
    python -m benchmarks.step --method grpo|gmpo|rloo|sdpo|ppo --batch 8 --prompt_tokens 256 --completion_tokens 64
    python -m benchmarks.step --method dpo --prompt_tokens 512 --completion_tokens 128
    python -m benchmarks.step --method dpo --model random-hybrid-100m --prompt_tokens 512 --completion_tokens 128
    python -m benchmarks.step --method dpo --images --prompt_tokens 64 --completion_tokens 64
    python -m benchmarks.step --method sft --packing
    python -m benchmarks.step --method sft --profile
    OMP_NUM_THREADS=1 python -m benchmarks.step --method dpo --model random-narrow --cpu_time --prompt_tokens 4 \\
        --completion_tokens 2
    python -m benchmarks.step --method sft --sweep 256 512 1024 2048

SmolLM2-135M-Instruct (or --model) learns from English prose (Python's own documentation). Both trainers get the same
model, rows, order, dtype and batch, and train in turns in one process; a run's first step is its warm-up. Tokens are
those that TRL counts: no padding, a pair's prompt twice. Peak memory is that of a process of its own for each trainer.
--packing fills rows of --max_length with several texts each. --profile trains once, ours only, and prints what the
last step's time goes into. --sweep trains on single rows of growing length, ours only, and shows that cost grows with
the number of tokens. random-narrow has many layers and next to no arithmetic: with --cpu_time its step is what the
host of a GPU has to do.
With grpo, gmpo, rloo, sdpo and ppo it is the update that is timed: completions are cut from the same prose, 8 for each
prompt (ppo: one) and all of --completion_tokens, and rewards are random numbers; --batch counts completions. TRL
1.16.0 has no BCO and no PPO: ours run alone. With --images every prompt has a picture before its text, and the model
is random-vision-100m.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from .machine_info import describe_machine
from .memory import MIB, process_peak_bytes
from .picture_rows import tokenizer_of, with_pictures
from .random_models import RANDOM_MODELS, RANDOM_VISION, model_folder
from .step_methods import METHODS, OURS, TRL
from .step_profile import profile_last_step

RESULTS = Path(__file__).parent / "results"
NAMES = {OURS: "ours", TRL: "TRL 1.16.0"}


class StepClock(TrainerCallback):
    """Measures seconds from one step's end to the next: collating, forward, backward and the optimizer.

    now: the clock that is read; that of the process's CPU time counts the work of its threads.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: list[float] = []
        self._now = now
        self._last: float | None = None

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._last = None

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self._now()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


@dataclass
class Run:
    """Holds a trainer with its clock."""

    name: str
    trainer: Trainer
    clock: StepClock

    @property
    def tokens(self) -> int:
        """Returns the tokens of all steps of the last run, of a trainer of ours."""
        return self.trainer._tokens.seen


def make_run(library: str, arguments: argparse.Namespace, folder: str) -> Run:
    """Returns the method's trainer of `trl_fast` or of `trl`, on rows enough for one run."""
    method = METHODS[arguments.method]
    config_class, trainer_class = method.classes(library)
    processor = (AutoProcessor if arguments.images else AutoTokenizer).from_pretrained(arguments.model)
    tokenizer = tokenizer_of(processor)
    torch.manual_seed(0)
    model_class = AutoModelForImageTextToText if arguments.images else method.model_class
    model = model_class.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), **dict(method.model_options)
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    # One step more than is timed, the warm-up.
    rows = method.rows(arguments, tokenizer, arguments.batch * (arguments.steps + 1))
    if arguments.images:
        rows = with_pictures(rows)
    config = config_class(
        folder,
        **method.config(arguments),
        per_device_train_batch_size=arguments.batch,
        max_steps=arguments.steps + 1,
        logging_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=not arguments.no_checkpointing,
        **({"activation_budget_bytes": arguments.budget} if library == OURS else {}),
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    peft_config = None
    if arguments.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    clock = StepClock(time.process_time if arguments.cpu_time else time.perf_counter)
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=processor,
        callbacks=[clock],
        peft_config=peft_config,
        **method.trainer(arguments, processor),
    )
    trainer.remove_callback(PrinterCallback)
    return Run(NAMES[library], trainer, clock)


def race(arguments: argparse.Namespace) -> list[Run]:
    """Times both trainers in turns; ours alone where TRL has none."""
    with tempfile.TemporaryDirectory() as folder:
        libraries = METHODS[arguments.method].libraries
        runs = [make_run(library, arguments, f"{folder}/{library}") for library in libraries]
        for _ in track(range(arguments.rounds), description=arguments.method, transient=True):
            for run in runs:
                run.trainer.train()
    return runs


def print_profile(console: Console, arguments: argparse.Namespace) -> None:
    """Trains ours once and prints what its last step's time goes into."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(OURS, arguments, folder)
        found = profile_last_step(run.trainer)
    found.print(console, f"{arguments.method}, a whole optimizer step: batch of {arguments.batch}, {arguments.dtype}")


def process_memory(library: str, words: list[str]) -> dict[str, int]:
    """Measures peak memory of a fresh process that trains once: before the first step, and in all."""
    command = [sys.executable, "-m", "benchmarks.step", *words, "--memory_of", library]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def print_memory(arguments: argparse.Namespace) -> None:
    """Runs one trainer once, without the other, and prints what `process_memory` reads."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(arguments.memory_of, arguments, folder)
        before, start = process_peak_bytes(), time.perf_counter()
        run.trainer.train()
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "peak": process_peak_bytes(), "seconds": seconds}))


def report(console: Console, runs: list[Run], memory: list[dict[str, int]], arguments: argparse.Namespace) -> dict:
    """Prints the table; the figures in it."""
    table = Table(title=f"{arguments.method}, a whole optimizer step: batch of {arguments.batch}, {arguments.dtype}")
    for column in ("", "median s", "min – max s", "tokens per second", "TRL is slower by", "peak MiB of the process"):
        table.add_column(column, justify="left" if not column else "right")
    medians = [statistics.median(run.clock.seconds) for run in runs]
    rows: list[dict[str, object]] = []
    for run, median, peak in zip(runs, medians, memory, strict=True):
        # The runs' rows are the same, so every run of either has the tokens of ours.
        speed = runs[0].tokens / (arguments.steps + 1) / median
        rows.append(
            {
                "name": run.name,
                "seconds": run.clock.seconds,
                "tokens_per_second": speed,
                "trl_over_this": medians[-1] / median if len(runs) > 1 else None,
                "peak_bytes": peak["peak"],
                "before_bytes": peak["before"],
            }
        )
        spread = f"{min(run.clock.seconds):.2f} – {max(run.clock.seconds):.2f}"
        ratio = f"{medians[-1] / median:.2f}×" if len(runs) > 1 else "TRL has none"
        cells = (f"{median:.2f}", spread, f"{speed:.0f}", ratio, f"{peak['peak'] / MIB:.0f}")
        table.add_row(run.name, *cells)
    console.print(table)
    return {"machine": describe_machine(), "arguments": vars(arguments), "runs": rows}


def sweep(console: Console, arguments: argparse.Namespace) -> dict:
    """Measures seconds a step and a token over growing lengths, ours; with a plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = Table(title=f"{arguments.method}: rows of growing length, batch of {arguments.batch}")
    for column in ("tokens a step", "s a step", "µs a token"):
        table.add_column(column, justify="right")
    points = []
    for length in track(arguments.sweep, description="lengths", transient=True):
        # A completion of a quarter, so that pairs have a prompt in common as people's do.
        sizes = {"prompt_tokens": length - length // 4, "completion_tokens": length // 4}
        given = argparse.Namespace(**{**vars(arguments), **sizes, "max_length": 2 * length})
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(OURS, given, folder)
            run.trainer.train()
        tokens, seconds = run.tokens / (arguments.steps + 1), statistics.median(run.clock.seconds)
        points.append({"tokens": tokens, "seconds": seconds})
        table.add_row(f"{tokens:.0f}", f"{seconds:.2f}", f"{1e6 * seconds / tokens:.0f}")
    console.print(table)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([p["tokens"] for p in points], [p["seconds"] for p in points], "o-")
    axes.set(xlabel="tokens a step", ylabel="seconds a step", title=f"{arguments.method}: cost by length", ylim=0)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"step_{arguments.method}_lengths.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return {"machine": describe_machine(), "arguments": vars(arguments), "points": points}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    names = ", ".join(RANDOM_MODELS)
    parser.add_argument("--model", help=f"hub name, folder or one of {names}; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--prompt_tokens", type=int, default=0)
    parser.add_argument("--completion_tokens", type=int, default=0, help="0: whole paragraphs, of their own lengths")
    parser.add_argument("--images", action="store_true", help="prompts have pictures; default: random-vision-100m")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--budget", type=int, help="activation_budget_bytes of ours; default: its own")
    parser.add_argument("--packing", action="store_true", help="with sft: rows of --max_length, several texts in each")
    parser.add_argument("--cpu_time", action="store_true", help="count the process's CPU time, not the clock's")
    parser.add_argument("--profile", action="store_true", help="print what our step's time goes into")
    parser.add_argument("--sweep", type=int, nargs="+", help="lengths in tokens")
    parser.add_argument("--name", help="of the JSON file; default: the method")
    parser.add_argument("--memory_of", choices=[OURS, TRL], help="run only this trainer and print its peak memory")
    arguments = parser.parse_args(words)
    method, group = METHODS[arguments.method], METHODS[arguments.method].group
    if group and not (arguments.prompt_tokens and arguments.completion_tokens):
        parser.error(f"--method {arguments.method} needs --prompt_tokens and --completion_tokens")
    if group and arguments.batch % group:
        parser.error(
            f"--batch {arguments.batch}: --method {arguments.method} takes whole groups, a multiple of {group}"
        )
    if arguments.memory_of not in (None, *method.libraries):
        parser.error(f"--memory_of {arguments.memory_of}: TRL 1.16.0 has no {method.stem}Trainer")
    if arguments.packing and arguments.method != "sft":
        parser.error("--packing is for --method sft")
    if arguments.images and not arguments.completion_tokens:
        parser.error("--images needs --prompt_tokens and --completion_tokens")
    arguments.model = model_folder(arguments.model or (RANDOM_VISION if arguments.images else None))
    return arguments


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parse_arguments(words)
    if arguments.memory_of:
        print_memory(arguments)
        return
    console = Console(width=max(120, Console().width))
    console.print(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    if arguments.profile:
        print_profile(console, arguments)
        return
    RESULTS.mkdir(exist_ok=True)
    if arguments.sweep:
        figures = sweep(console, arguments)
    else:
        runs = race(arguments)
        libraries = METHODS[arguments.method].libraries
        figures = report(console, runs, [process_memory(library, words) for library in libraries], arguments)
    name = arguments.name or (f"{arguments.method}_lengths" if arguments.sweep else arguments.method)
    (RESULTS / f"step_{name}.json").write_text(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    main()
