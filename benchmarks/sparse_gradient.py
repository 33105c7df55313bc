"""Measures the head's sparse gradient on a real model: error against time, and training beside the exact one.

    python -m benchmarks.sparse_gradient [--tokens 1024 --steps 30]

SmolLM2-135M-Instruct reads English prose (Python's own documentation topics). Errors are relative, in the 2-norm,
against a float64 gradient of the same hidden states; times are ratios to the exact op's, in turns. Writes
benchmarks/results/sparse_gradient.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.smollm2 import smollm2_folder
from trl_fast.ops import linear_cross_entropy

from .english_text import token_stream
from .timing import Contender, race

RESULTS = Path(__file__).parent / "results"
THRESHOLDS = (10, 12, 14)


@dataclass
class Activations:
    """Holds hidden (N, H), weight (V, H) float32, targets (N,), and float64 gradients of the mean loss."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    grad_hidden: torch.Tensor = field(init=False)
    grad_weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        delta = self.probabilities() - torch.nn.functional.one_hot(self.targets, len(self.weight))
        self.grad_hidden, self.grad_weight = self.products(delta)

    def probabilities(self) -> torch.Tensor:
        """Computes the probabilities (N, V) float64."""
        return (self.hidden.double() @ self.weight.double().T).softmax(-1)

    def products(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the gradients of hidden and weight from those of the logits, times N."""
        return delta @ self.weight.to(delta.dtype), delta.T @ self.hidden.to(delta.dtype)

    def errors(self, grad_hidden: torch.Tensor, grad_weight: torch.Tensor) -> tuple[float, float]:
        pairs = ((grad_hidden, self.grad_hidden), (grad_weight, self.grad_weight))
        hidden, weight = ((got.double() - exact).norm().item() / exact.norm().item() for got, exact in pairs)
        return hidden, weight


@torch.no_grad()
def activations(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> Activations:
    hidden = torch.cat([model.base_model(part[None]).last_hidden_state[0] for part in tokens[:count].split(512)])
    weight = model.get_output_embeddings().weight
    return Activations(hidden.float(), weight.detach().float(), tokens[1 : count + 1])


def gradient_step(problem: Activations, **options: object) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = linear_cross_entropy(hidden, weight, problem.targets, reduction="sum", **options)
        return torch.autograd.grad(loss, (hidden, weight))

    return run


def dropped(problem: Activations, threshold: float) -> tuple[float, float, float]:
    """Measures errors, and entries a row, when small probabilities are simply left out."""
    p = problem.probabilities()
    kept = torch.where(p >= threshold, p, 0.0)
    delta = kept - torch.nn.functional.one_hot(problem.targets, len(problem.weight))
    return *problem.errors(*problem.products(delta)), (kept > 0).sum(1).double().mean().item()


def narrow_products(problem: Activations) -> tuple[float, float]:
    """Measures errors of dense bfloat16 products of bfloat16 gradients: those of training in bfloat16."""
    delta = problem.probabilities() - torch.nn.functional.one_hot(problem.targets, len(problem.weight))
    return problem.errors(*problem.products(delta.bfloat16()))


def entries_per_row(problem: Activations, threshold: float) -> float:
    """Computes the expected number: all the large ones, and the mass of the small ones over the threshold."""
    p = problem.probabilities()
    small = p < threshold
    return ((~small).sum(1) + torch.where(small, p, 0.0).sum(1) / threshold).mean().item()


def measure(problem: Activations, rounds: int) -> list[dict]:
    steps = {"exact": gradient_step(problem)}
    for power in THRESHOLDS:
        steps[f"sparse 2^-{power}"] = gradient_step(problem, head_grad="sparse", sparse_threshold=2.0**-power)
    raced = [Contender(name, run) for name, run in steps.items()]
    race(raced, rounds, 600.0, torch.device("cpu"), "gradients")
    seconds = {contender.name: contender.median for contender in raced}
    rows = []
    for name, run in steps.items():
        errors = problem.errors(*run())
        entries = len(problem.weight) if name == "exact" else entries_per_row(problem, 2.0 ** -int(name.split("-")[1]))
        rows.append({"name": name, "entries": entries, "errors": errors, "time": seconds[name] / seconds["exact"]})
    rows.append({"name": "dense, bfloat16", "entries": len(problem.weight), "errors": narrow_products(problem)})
    for power in (12, 14):
        *errors, entries = dropped(problem, 2.0**-power)
        rows.append({"name": f"drop below 2^-{power}", "entries": entries, "errors": errors})
    return rows


def print_table(console: Console, rows: list[dict], count: int) -> None:
    table = Table(title=f"SmolLM2-135M, {count} tokens of prose, V=49152")
    for column in ("gradient of the head", "entries a row", "error dX", "error dW", "time of the exact op"):
        table.add_column(column, justify="left" if column.startswith("gradient") else "right")
    for row in rows:
        time = f"{row['time']:.2f}×" if "time" in row else ""
        errors = (f"{100 * error:.2f}%" for error in row["errors"])
        table.add_row(row["name"], f"{row['entries']:.0f}", *errors, time)
    console.print(table)


def train(tokens: torch.Tensor, steps: int, **options: object) -> list[float]:
    """Returns the losses of fine-tuning on the text, whole model, 512 tokens a step, the same for every run."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    losses = []
    for step in track(range(steps), description=str(options.get("head_grad", "exact")), transient=True):
        part = tokens[512 * step : 512 * (step + 1) + 1]
        hidden = model.base_model(part[None, :-1]).last_hidden_state[0]
        loss = linear_cross_entropy(hidden, model.get_output_embeddings().weight, part[1:], **options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for style, (name, losses) in zip(("-", "--", ":"), curves.items(), strict=False):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a token", title="SmolLM2-135M on prose: gradient of the head")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    tokens = token_stream(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    rows = measure(activations(model, tokens, arguments.tokens), arguments.rounds)
    del model
    print_table(console, rows, arguments.tokens)
    runs = {"exact": {}, "sparse 2^-12": {"sparse_threshold": 2.0**-12}, "sparse 2^-14": {}}
    curves = {
        name: train(tokens, arguments.steps, head_grad=name.split()[0], **options) for name, options in runs.items()
    }
    RESULTS.mkdir(exist_ok=True)
    plot(curves, RESULTS / "sparse_gradient.png")
    apart = {name: max(abs(a - b) for a, b in zip(curves["exact"], curves[name], strict=True)) for name in curves}
    console.print({f"largest distance of the loss of {name} from exact": round(apart[name], 5) for name in apart})
    figures = {"tokens": arguments.tokens, "gradients": rows, "losses": curves}
    (RESULTS / "sparse_gradient.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
