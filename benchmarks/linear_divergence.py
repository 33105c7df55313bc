"""Times the divergence of two heads against its peers and against its floor, the bare matrix products.

    python -m benchmarks.linear_divergence [--shape smollm2 --rows 1024 --betas 0.5 --modes trained frozen --rounds 3]

Prints, for a trained and a frozen student's head: median seconds with min and max, the ratio to the floor and to TRL,
and the peak of memory beyond inputs and gradients. Liger runs where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console

from trl_fast.ops import BACKENDS, linear_divergence, supports
from trl_fast.ops.matmul import gemm_dtype

from .head_problem import Problem, make_problem
from .linear_logprob import FLOOR, TRL, gradient_bytes, report
from .machine_info import cpu_name
from .timing import Contender, race

MODES = ("trained", "frozen")
# Widths of student and teacher, and their vocabulary: SmolLM2-135M and 360M, Qwen2.5-0.5B and 1.5B.
SHAPES = {"smollm2": (576, 960, 49152), "qwen": (896, 1536, 151936)}
LIGER, PLAIN = "Liger 0.8.5", "plain PyTorch, fp32 log-softmax"


@dataclass
class Pair:
    """Holds a student's and a teacher's head, of the same rows and vocabulary, and the divergence's beta."""

    student: Problem
    teacher: Problem
    beta: float

    def finish(self, loss: torch.Tensor) -> None:
        """Runs backward, and drops the gradients again."""
        loss.backward()
        self.student.hidden.grad = self.student.weight.grad = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns hidden and weight of the student, then of the teacher."""
        return self.student.hidden, self.student.weight, self.teacher.hidden, self.teacher.weight


def ours(pair: Pair, backend: str) -> Callable[[], None]:
    """Computes the divergence with its scores by a backend."""

    def run() -> None:
        outputs = ("divergence", "entropy")
        pair.finish(linear_divergence(*pair.tensors, beta=pair.beta, outputs=outputs, backend=backend).loss)

    return run


def trl(pair: Pair) -> Callable[[], None]:
    """Computes the divergence and the entropy as TRL's DistillationTrainer does."""

    def run() -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        hidden, weight, *teacher = pair.tensors
        pair.finish(ChunkedDivergenceFunction.apply(hidden, weight, None, *teacher, None, pair.beta)[0].sum())

    return run


def plain(pair: Pair) -> Callable[[], None]:
    """Computes the divergence from whole logits by autograd."""

    def run() -> None:
        hidden, weight, *teacher = pair.tensors
        logp_s = (hidden @ weight.t()).float().log_softmax(-1)
        logp_t = (teacher[0] @ teacher[1].t()).float().log_softmax(-1)
        share = torch.tensor(pair.beta, device=hidden.device)
        mixture = torch.logaddexp(logp_s + torch.log1p(-share), logp_t + torch.log(share))
        student, teacher_part = (logp.exp() * (logp - mixture) for logp in (logp_s, logp_t))
        pair.finish((pair.beta * teacher_part + (1 - pair.beta) * student).sum())

    return run


def liger(pair: Pair) -> Callable[[], None]:
    """Computes Liger's fused linear JSD, without its loss on labels."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=pair.beta)

    def run() -> None:
        hidden, weight, *teacher = pair.tensors
        pair.finish(loss(hidden, weight, *teacher, pair.student.targets))

    return run


def floor(pair: Pair, mode: str) -> Callable[[], None]:
    """Computes the matrix products that nobody can do without."""
    student, teacher = pair.student.floor.step(mode), pair.teacher.floor.step("scoring")

    def run() -> None:
        student()
        teacher()

    return run


def contenders(student: Problem, teacher: Problem, beta: float, mode: str, skip: list[str]) -> list[Contender]:
    """Returns ours by backend, the peers and the floor, without those whose name contains a word of `skip`."""
    pair = Pair(student.for_mode(mode), teacher.for_mode("scoring"), beta)
    device = student.hidden.device
    names = [name for name in BACKENDS if supports("linear_divergence", name, device, student.hidden.dtype).ok]
    runs = {f"ours, {name}": ours(pair, name) for name in names} | {TRL: trl(pair)}
    if 0 < beta < 1:
        runs[PLAIN] = plain(pair)
    if importlib.util.find_spec("liger_kernel"):
        runs[LIGER] = liger(pair)
    found = [Contender(name, run, result_bytes=gradient_bytes(pair.student)) for name, run in runs.items()]
    found.append(Contender(FLOOR, floor(Pair(student, teacher, beta), mode)))
    return [one for one in found if not any(word in one.name for word in skip)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds; slower contenders run only once")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out contenders whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=max(110, Console().width))
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    width, teacher_width, vocab = SHAPES[arguments.shape]
    student = make_problem(arguments.rows, width, vocab, dtype, device)
    teacher = make_problem(arguments.rows, teacher_width, vocab, dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    console.print(
        f"N={arguments.rows} H={width} teacher's H={teacher_width} V={vocab} {dtype}, {device.type} ({name}), "
        f"{torch.get_num_threads()} threads, load {psutil.getloadavg()[0]:.1f}, torch {torch.__version__}; our "
        f"products and the floor's run in {gemm_dtype(student.hidden)}"
    )
    figures = []
    for mode in arguments.modes:
        for beta in arguments.betas:
            raced = contenders(student, teacher, beta, mode, arguments.skip)
            race(raced, arguments.rounds, arguments.patience, device, f"{mode}, beta {beta}", keep_going=True)
            figures += report(console, f"beta {beta:g}, {mode}", raced)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"arguments": vars(arguments), "figures": figures}, indent=1, default=str)
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
