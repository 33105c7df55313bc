"""Counts how long processes wait for the slowest one, with rows dealt in their order and by their cost.

    python -m benchmarks.balance

Nothing is measured: a micro-batch takes as long as its floating-point operations (`CostModel`), and all processes wait
for each other in every micro-batch, as under FSDP and ZeRO-3. Numbers are the time of the slowest process over the
mean, over many steps; 1.00 is a perfect deal. The same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from trl_fast.data.balanced_batches import CostModel, TreeSizes, deal, tree_sizes
from trl_fast.planning.model_shapes import model_config

MODEL = "qwen2.5-7b"
RANKS = (2, 8, 64)
STEPS = 100
# Rows of a process at a time, and its micro-batches a step.
BATCHES = ((8, 1), (4, 2), (1, 8))
GROUP = 8


@dataclass(frozen=True)
class Lengths:
    """Describes a log-normal distribution of lengths in tokens, cut at `most`."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator, count: int, factors: np.ndarray | None = None) -> np.ndarray:
        """Returns (count,) int64; factors (count,): what each length is multiplied by before it is cut."""
        drawn = rng.lognormal(np.log(self.median), self.sigma, count)
        return np.rint(drawn if factors is None else drawn * factors).clip(1, self.most).astype(np.int64)


PROMPT = Lengths(median=120, sigma=1.0, most=1024)
ANSWER = Lengths(median=250, sigma=0.8, most=1024)
CHAT = Lengths(median=600, sigma=1.0, most=4096)
# What completions of one prompt have in common, and how they differ.
THOUGHTS_OF_PROMPT, THOUGHTS = 0.8, Lengths(median=800, sigma=0.5, most=4096)


def preference_pairs(rng: np.random.Generator, count: int) -> TreeSizes:
    """Returns prompts with two answers, for DPO."""
    answers = np.stack([ANSWER.draw(rng, count), ANSWER.draw(rng, count)], axis=1)
    return tree_sizes(PROMPT.draw(rng, count), answers, shares_prompts=True)


def conversations(rng: np.random.Generator, count: int) -> TreeSizes:
    """Returns conversations, for SFT."""
    return tree_sizes(np.zeros(count, np.int64), CHAT.draw(rng, count)[:, None], shares_prompts=True)


def help_pages(rng: np.random.Generator, count: int) -> TreeSizes:
    """Returns pages of Python's own documentation, at 4 letters a token, for SFT: lengths of real texts."""
    lengths = np.array([len(topics[name]) // 4 for name in sorted(topics)]).clip(1, CHAT.most)
    return tree_sizes(np.zeros(count, np.int64), rng.choice(lengths, count)[:, None], shares_prompts=True)


def groups(rng: np.random.Generator, count: int) -> TreeSizes:
    """Returns prompts with a group of completions, for GRPO: a hard one makes all of them long."""
    factors = rng.lognormal(0, THOUGHTS_OF_PROMPT, count).repeat(GROUP)
    completions = THOUGHTS.draw(rng, count * GROUP, factors).reshape(count, GROUP)
    return tree_sizes(PROMPT.draw(rng, count), completions, shares_prompts=True)


KINDS: dict[str, Callable[[np.random.Generator, int], TreeSizes]] = {
    "DPO, pairs": preference_pairs,
    "SFT, conversations": conversations,
    "SFT, help pages": help_pages,
    f"GRPO, groups of {GROUP}": groups,
}


def slowest_over_mean(costs: np.ndarray) -> float:
    """Returns the time of the slowest process over the mean: costs (S, A, W) of steps, micro-batches, processes."""
    return float(costs.max(axis=2).sum() / costs.mean(axis=2).sum())


def count(kind: str, num_ranks: int, num_rows: int, micro_batches: int, steps: int = STEPS) -> dict[str, float]:
    """Returns the waiting by how rows are dealt: in their order, and by each of `balance_batches`."""
    rng = np.random.default_rng(0)
    model = CostModel.of_config(model_config(MODEL), has_head=True)
    shape = (micro_batches, num_ranks, num_rows)
    found: dict[str, list[np.ndarray]] = {"never": [], "micro_batch": [], "step": []}
    for _ in range(steps):
        costs = model.costs(KINDS[kind](rng, micro_batches * num_ranks * num_rows))
        orders = {
            name: deal(costs, num_ranks, num_rows, across_micro_batches=name == "step")
            for name in found
            if name != "never"
        }
        for name, dealt in found.items():
            dealt.append(costs[orders.get(name, np.arange(len(costs)))].reshape(shape).sum(axis=2))
    return {name: slowest_over_mean(np.stack(dealt)) for name, dealt in found.items()}


def table(ranks: Sequence[int], steps: int) -> Table:
    """Returns the table of all kinds of rows."""
    shown = Table(box=box.MARKDOWN, title=None)
    for name in ("Rows", "Processes", "Rows × micro-batches", "never", "micro_batch", "step"):
        shown.add_column(name, justify="left" if name == "Rows" else "right")
    for kind in KINDS:
        for num_ranks in ranks:
            for num_rows, micro_batches in BATCHES:
                found = count(kind, num_ranks, num_rows, micro_batches, steps)
                numbers = [f"{value:.2f}" for value in found.values()]
                shown.add_row(kind, str(num_ranks), f"{num_rows} × {micro_batches}", *numbers)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of processes")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are drawn of each kind of rows")
    given = parser.parse_args()
    Console(width=120).print(table(given.ranks, given.steps))


if __name__ == "__main__":
    main()
