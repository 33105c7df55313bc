"""Trains GRPO in an environment end to end: a tiny model learns to find a number by listening to what it is told.

    python -m examples.demo_environment [--steps 120] [--warm_up_steps 200] [--output_dir runs/environment]

A Llama of half a million parameters with random weights is first shown clumsy games: it learns to call the tool
`guess`, and when to stop. GRPO then plays in the environment, which tells of each guess whether the number is higher
or lower, and at the end whether it was found. Three guesses find each of seven numbers, if what is left is halved.
Prints how often games are won before and after, and one of them, and draws the training curves. The exit status is 1
if they are not won clearly more often.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_fast import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from .number_game import GUESSES, NUMBERS, NumberGame, clumsy_plays, games, heed, make_model, make_tokenizer
from .online_demo import common_settings, make_console, plot, quiet

GENERATIONS = 48
# What the share of won games has to gain.
CLEARLY = 0.2
WON = "rewards/NumberGame/mean"
CURVES = (WON, "rewards/heed/mean", "tools/call_frequency", "entropy")


def make_parser() -> argparse.ArgumentParser:
    """Returns a parser of the demo's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/environment"))
    parser.add_argument("--steps", type=int, default=120, help="steps of GRPO")
    parser.add_argument("--warm_up_steps", type=int, default=200, help="supervised steps before")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def warm_up(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace, console: Console
) -> None:
    """Shows the model games that were played at random."""
    config = SFTConfig(
        max_steps=arguments.warm_up_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        bf16=False,
        **common_settings(arguments, "warm_up"),
    )
    rows = clumsy_plays(64 * 32, arguments.seed)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    quiet(trainer, console)
    trainer.train()


def make_trainer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> GRPOTrainer:
    """Returns a GRPO trainer that plays all numbers at each step."""
    config = GRPOConfig(
        max_steps=arguments.steps,
        per_device_train_batch_size=NUMBERS * GENERATIONS,
        per_device_eval_batch_size=NUMBERS * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=64,
        max_tool_calling_iterations=GUESSES,
        learning_rate=1e-3,
        beta=0.05,
        bf16=False,
        **common_settings(arguments, "grpo"),
    )
    return GRPOTrainer(
        model,
        reward_funcs=heed,
        args=config,
        train_dataset=games(),
        eval_dataset=games(),
        processing_class=tokenizer,
        environment_factory=NumberGame,
    )


def example_game(trainer: GRPOTrainer) -> str:
    """Returns one of the games that the policy plays now, on a line."""
    row = dict(trainer.train_dataset[NUMBERS - 1])
    samples = trainer.make_samples([row] * GENERATIONS)
    return trainer.tokenizer.decode(samples.completion_ids[0]).replace("\n", " ")


def results_table(before: dict[str, float], after: dict[str, float], seconds: float, steps: int) -> Table:
    """Returns a table of the figures before and after."""
    table = Table(title="games, before → after", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("won", f"{before[f'eval_{WON}']:.0%} → {after[f'eval_{WON}']:.0%}")
    for name in ("rewards/heed/mean", "tools/call_frequency", "entropy", "kl"):
        table.add_row(name, f"{before[f'eval_{name}']:.2f} → {after[f'eval_{name}']:.2f}")
    table.add_row("seconds a step", f"{seconds / steps:.2f}")
    return table


def main(words: list[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    arguments = make_parser().parse_args(words)
    console = make_console()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    warm_up(model, tokenizer, arguments, console)
    trainer = make_trainer(model, tokenizer, arguments)
    quiet(trainer, console)
    before, start = trainer.evaluate(), time.perf_counter()
    trainer.train()
    seconds, after = time.perf_counter() - start, trainer.evaluate()
    picture = arguments.output_dir / "training.png"
    plot(trainer.state.log_history, CURVES, picture)
    console.print(results_table(before, after, seconds, arguments.steps))
    console.print(f"a game: {example_game(trainer)}", soft_wrap=True, markup=False)
    console.print(f"training curves: {picture}", soft_wrap=True)
    if after[f"eval_{WON}"] >= before[f"eval_{WON}"] + CLEARLY:
        return 0
    console.print("FAILED: games were not won clearly more often", style="red")
    return 1


if __name__ == "__main__":
    sys.exit(main())
