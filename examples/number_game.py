"""Makes the task of the demo of environments: a game of finding a number, and a tiny model that can play it."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

# The numbers are 1 to NUMBERS. Who halves what is left finds each of them with GUESSES guesses.
NUMBERS, GUESSES = 7, 3
# How often the players that a model is shown heed what they were told.
HEED = 0.5
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
# What a call is written as, around its number: a token each.
_CALL = ('<tool_call>\n{"name": "guess", "arguments": {"number": ', "}}\n</tool_call>")
_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
{%- if message.content %}
{% endif %}<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_QUESTION = "Find my number."
_DONE = "Done."


class NumberGame:
    """Knows a number. Each guess is told if the number is higher or lower, until it is found or guesses are out."""

    def reset(self, number: int, **row: Any) -> str:
        """Hides a number, and tells the rules."""
        self.number, self.left, self.is_found, self.wasted = number, GUESSES, False, 0
        self.possible = list(range(1, NUMBERS + 1))
        return f" It is between 1 and {NUMBERS}, and you have {GUESSES} guesses."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.
        """
        if self.is_found or not self.left:
            return "The game is over."
        self.left -= 1
        self.is_found = number == self.number
        self.wasted += number not in self.possible
        self.possible = [
            each for each in self.possible if (each > number) == (self.number > number) and each != number
        ]
        if self.is_found:
            return "found"
        return "higher" if number < self.number else "lower"

    def get_reward(self) -> float:
        """Tells whether the number was found."""
        return float(self.is_found)


def heed(environments: list[NumberGame], **_: Any) -> list[float]:
    """Takes something for guesses that what was told rules out: a reward function."""
    return [-game.wasted / GUESSES for game in environments]


def games(repeats: int = 1) -> Dataset:
    """Returns rows for `NumberGame`, each number so many times."""
    prompt = [{"role": "user", "content": _QUESTION}]
    return Dataset.from_list([{"prompt": prompt, "number": 1 + i % NUMBERS} for i in range(repeats * NUMBERS)])


def clumsy_plays(count: int, seed: int) -> Dataset:
    """Returns rows of `prompt`, `completion` and `tools` for SFT: each turn of games that are played clumsily.

    The player heeds what it was told before about half of the guesses, and guesses anything else.
    """
    rng = random.Random(seed)
    tools = [get_json_schema(NumberGame().guess)]
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        for prompt, completion in _play(rng.randint(1, NUMBERS), rng):
            rows.append({"prompt": prompt, "completion": [completion], "tools": tools})
    return Dataset.from_list(rows[:count])


def _play(number: int, rng: random.Random) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Returns each turn of a game, with all that was said before it."""
    game = NumberGame()
    said: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION + game.reset(number)}]
    turns = []
    while game.left and not game.is_found:
        chosen = rng.choice(game.possible) if rng.random() < HEED else rng.randint(1, NUMBERS)
        call = {"type": "function", "function": {"name": "guess", "arguments": {"number": chosen}}}
        turns.append((list(said), {"role": "assistant", "content": "", "tool_calls": [call]}))
        said += [turns[-1][1], {"role": "tool", "name": "guess", "content": game.guess(chosen)}]
    return [*turns, (list(said), {"role": "assistant", "content": _DONE})]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer to which the game's words, and what stands around a guess, are a token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = f"user assistant system tool guess: Guesses the number. higher lower found {_DONE} {_QUESTION}"
    tokenizer.train_from_iterator([words, NumberGame().reset(1), "The game is over."] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD, chat_template=_TEMPLATE)
    made.add_tokens(list(_CALL))
    return made


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns a Llama of half a million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)
