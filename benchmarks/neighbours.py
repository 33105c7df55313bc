"""Measures how far a sequence's log-probs move with the sequences beside it in the batch.

    python -m benchmarks.neighbours [--layers 4 --tokens 64 --sequences 1 --json FILE]

A Llama of random weights with the head of SmolLM2-135M scores sequences alone, then each in the middle of a batch of
others, half of which have its prompt. Differences are in nats a token. "rounding" is the median distance, for the
sequence alone, from the same weights in float64: what the dtype itself costs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trl_fast.data import pack_trees
from trl_fast.data.token_trees import Tree
from trl_fast.modeling.scoring import attach_scoring, evaluating, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.planning.model_shapes import SHAPES
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from .machine_info import cpu_name

HEAD = SHAPES["smollm2-135m"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OTHERS = (1, 7, 31)
PAD = 0


def random_llama(layout: str, dtype: torch.dtype, **shape: int) -> PreTrainedModel:
    """Returns a model of random weights that scores batches of a layout; its logits spread as a trained model's do."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in HEAD.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **shape}, initializer_range=0.1)).to(dtype)
    attach_scoring(model)
    if not BATCH_LAYOUTS[layout].pads:
        use_segment_attention(model)
    return model


def trees_beside(prompt: list[int], completion: list[int], others: int, vocab_size: int, seed: int) -> list[Tree]:
    """Returns the tree of a sequence, whose completion stands first in it, in the middle of others' trees.

    The others are half of its prompt, half of prompts of their own, and of half to twice its length.
    """
    rng = random.Random(seed)

    def tokens(like: list[int]) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(rng.randint(max(1, len(like) // 2), 2 * len(like)))]

    own = Tree(prompt, [completion, *(tokens(completion) for _ in range(others // 2))])
    strangers = [Tree(tokens(prompt), [tokens(completion)]) for _ in range(others - others // 2)]
    middle = len(strangers) // 2
    return [*strangers[:middle], own, *strangers[middle:]]


def logprobs_of(model: PreTrainedModel, layout: str, trees: list[Tree], completion: list[int]) -> torch.Tensor:
    """Computes the log-probs (n,) float32 of a completion of n tokens, the first one of its tree, in a batch."""
    branches = [branch for tree in trees for branch in tree.branches]
    batch = pack_trees(trees, layout, PAD)
    with evaluating(model):
        found = score(model, batch).tokens.logprobs
    place = next(index for index, branch in enumerate(branches) if branch is completion)
    return found[batch.branch == place]


def measure(layout: str, dtype: str, *, sequences: int, tokens: int, **shape: int) -> list[dict]:
    """Measures a layout and dtype: for each number of others the largest and the median difference."""
    model = random_llama(layout, DTYPES[dtype], **shape)
    vocab_size, rng = model.config.vocab_size, random.Random(0)
    gaps: dict[int, list[torch.Tensor]] = {others: [] for others in OTHERS}
    exact, errors = random_llama(layout, DTYPES[dtype], **shape).double(), []
    for seed in range(sequences):
        prompt, completion = ([rng.randrange(1, vocab_size) for _ in range(tokens)] for _ in range(2))
        trees = [Tree(prompt, [completion])]
        alone = logprobs_of(model, layout, trees, completion)
        errors.append((logprobs_of(exact, layout, trees, completion) - alone).abs())
        for others, found in gaps.items():
            trees = trees_beside(prompt, completion, others, vocab_size, seed)
            found.append((logprobs_of(model, layout, trees, completion) - alone).abs())
    kind = {"dtype": dtype, "layout": layout, "rounding": torch.cat(errors).median().item()}
    pooled = {others: torch.cat(found) for others, found in gaps.items()}
    return [
        {**kind, "others": others, "largest": gap.max().item(), "median": gap.median().item()}
        for others, gap in pooled.items()
    ]


def print_table(console: Console, rows: list[dict]) -> None:
    """Prints the measurements."""
    table = Table(title=f"Moved by the sequences beside it, nats a token; {cpu_name()}, torch {torch.__version__}")
    figure_names = ("largest", "median", "rounding")
    for column in ("dtype", "layout", "others", *figure_names):
        table.add_column(column, justify="left" if column in ("dtype", "layout") else "right")
    for row in rows:
        figures = (f"{row[name]:.1e}" for name in figure_names)
        table.add_row(row["dtype"], row["layout"], str(row["others"]), *figures)
    console.print(table)


def main() -> None:
    """Measures all layouts in float32 and bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of a completion")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = {"sequences": arguments.sequences, "tokens": arguments.tokens, "num_hidden_layers": arguments.layers}
    rows = [row for dtype in DTYPES for layout in BATCH_LAYOUTS for row in measure(layout, dtype, **sizes)]
    print_table(Console(), rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
