"""Counts the work of the head and of whole optimizer steps, ours and TRL 1.16's, against a roofline.

    python -m benchmarks.roofline [head] [divergence] [steps] [--gpu h100-80|h200|...] [--operators] [--waits]
                                  [--json FILE]
        head:  [--sizes 8192/4096/151936 ...] [--modes "trained token" ...] [--workspace BYTES]
        divergence: of two heads, [--divergence_sizes 8192/4096/151936 ...] [--workspace BYTES]
        steps: [--methods dpo sft grpo] [--models qwen2.5-0.5b llama-3.2-1b llama-3.1-8b]
               [--num_gpus N] [--accelerate_config fsdp2|zero3|...]: also what each of N GPUs sends in such a step

No GPU is needed and nothing is timed. Both libraries run on fake tensors, which have shapes but no data, on a GPU that
is not there, and every operator is intercepted: FLOPs of products and attention, bytes read and written, launches,
places where the host waits, and the peak of memory: of the head beyond inputs and gradients, of a step beyond weights
and the optimizer's averages. TRL's code is its own; of its Triton kernels, which cannot be run, `triton_kernels.py`
says what they touch, with their places. A step is the trainer's own on a batch of its own collator, eager model code
with random weights, gradient checkpointing as both have it by default, clipping and fused AdamW; the 8B model trains
adapters on all linear layers. Ours is counted twice, with fused layers, as is the default, and without ("plain").
GRPO's sampling and rewards are not counted, nor is logging.

A tensor that an operator is given is read once from memory, one that it makes is written once, whatever a cache holds
in between. Views are free. A product's factors that were there before (the head's hidden states, weights) are not
counted: the floor's products read them too, and the rate of products contains it. All else counts, for TRL alike.

Milliseconds are ESTIMATES by a named roofline (`trl_fast/planning/gpu_facts.py`): FLOPs at the rate that a GPU's
large products reach, plus bytes at the rate that its memory reaches. Bytes are taken as not hidden behind products,
attention as fast as products, launches and host waits as free, padding of small tiles as nothing: small models are
slower than this, being bound by the host. The head's floor is 1, 2 or 3 passes (scoring, frozen, trained) of 2·N·V·H
FLOPs and no byte. Of ours the head and the layers are those of the backend "cuda", with the head's fused Triton kernel
where the GPU has one (`trl_fast/planning/roofline/launches.py` says what our Triton kernels touch), and losses on one
number a token are their PyTorch formulas.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trl_fast.ops.head.cutlass_scores import CAPABILITY
from trl_fast.planning.gpu_facts import GPUS
from trl_fast.planning.sharding import SHARINGS
from trl_fast.planning.training_setup import DEFAULT_ENGINE

from ..head_size import Size, parse_size
from .divergence import MODES as DIVERGENCE_MODES
from .divergence import SIZES as DIVERGENCE_SIZES
from .divergence import count_divergence
from .head import MODES, SIZES, HeadCase, count_head, misses
from .overlapped_scoring import overlapped_milliseconds
from .report import head_facts, print_cases, roofline_of, step_facts, wire_of_step
from .steps import METHODS, MODELS, Step, StepCase, count_step, quiet

PARTS = ("head", "divergence", "steps")


def main() -> None:
    """Counts what was asked for and prints it."""
    arguments = _parse()
    console, gpu = Console(), GPUS[arguments.gpu]
    wanted: list[Callable[[], HeadCase | StepCase]] = []
    if "head" in arguments.parts:
        heads = [(size, mode) for mode in arguments.modes for size in arguments.sizes]
        wanted += [lambda case=case: count_head(*case, gpu, arguments.workspace) for case in heads]
    if "divergence" in arguments.parts:
        pairs = [(size, mode) for mode in DIVERGENCE_MODES for size in arguments.divergence_sizes]
        wanted += [lambda case=case: count_divergence(*case, gpu, arguments.workspace) for case in pairs]
    if "steps" in arguments.parts:
        steps = [Step(method, model, MODELS[model]) for model in arguments.models for method in arguments.methods]
        wanted += [lambda step=step: count_step(step, gpu) for step in steps]
    with quiet():
        cases = [count() for count in track(wanted, "Counting", console=console, transient=True)]
    heads = [case for case in cases if isinstance(case, HeadCase)]
    steps = [case for case in cases if isinstance(case, StepCase)]
    print_cases(console, heads, steps, operators=arguments.operators, waits=arguments.waits)
    if arguments.num_gpus > 1:
        for case in steps:
            console.print(f"{case.step}: {wire_of_step(case, arguments.accelerate_config, arguments.num_gpus)}")
    for case in heads:
        if case.mode == "scoring" and gpu.capability == CAPABILITY:
            overlapped = overlapped_milliseconds(case.size, gpu) / case.floor
            console.print(f"{case.name} by the kernel made with CUTLASS: {overlapped:.2f} x the floor")
    console.print(roofline_of(gpu))
    for miss in misses([case for case in heads if case.mode in MODES]):
        console.print(f"[red]beyond its bound:[/] {miss}")
    if arguments.json:
        facts = [*map(head_facts, heads), *map(step_facts, steps)]
        arguments.json.write_text(json.dumps(facts, indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", type=_part, default=["head"], help="head, divergence, steps; default: head"
    )
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(SIZES), help="rows/hidden/vocabulary")
    parser.add_argument("--divergence_sizes", nargs="+", type=_size, default=list(DIVERGENCE_SIZES), metavar="SIZE")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--workspace", type=int, help="workspace_bytes of ours; default: its own choice")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100-80", help="whose roofline")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs that share a step")
    parser.add_argument("--accelerate_config", choices=tuple(SHARINGS), default=DEFAULT_ENGINE, help="how they do")
    parser.add_argument("--operators", action="store_true", help="print what each case consists of")
    parser.add_argument("--waits", action="store_true", help="print where the host waits")
    parser.add_argument("--json", type=Path, help="write everything that was counted to this file")
    return parser.parse_args()


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PARTS)}")
    return text


def _size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()
