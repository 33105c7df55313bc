"""Tools, and a policy that calls them: it says the same to every trainer, by what it read."""

from __future__ import annotations

import random
from collections import Counter

from datasets import Dataset

from support.tokenizer import EOS, build_tokenizer
from trl_fast.rollout import Rollout

# As short as a template can be that writes calls as Qwen's does.
TOOL_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tool_tokenizer():
    """The small tokenizer with that template, and the tags as tokens."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": '])
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def add(a: int, b: int) -> int:
    """
    Adds.

    Args:
        a: A number.
        b: Another.
    """
    return a + b


async def look_up(word: str) -> str:
    """
    Looks a word up.

    Args:
        word: What to look for.
    """
    return f"{word} is blue"


def fail() -> str:
    """Fails."""
    raise RuntimeError("no luck")


TOOLS = [add, look_up, fail]


def call(name: str, arguments: str = "{}") -> str:
    """A call as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ADD, LOOK_UP, FAIL = call("add", '{"a": 1, "b": 2}'), call("look_up", '{"word": "sky"}'), call("fail")
ANSWER = "It is 3." + EOS
TURNS = [
    *(text + EOS for text in (ADD, LOOK_UP, FAIL, ADD + "\n" + LOOK_UP, LOOK_UP + "\n" + ADD, "Wait. " + ADD)),
    *(text + EOS for text in (call("gone"), call("add", '{"a": 1}'), call("add", "[1]"), call("look_up", "{}"))),
    *(text + EOS for text in ("<tool_call>\n{broken</tool_call>", ADD + "Not the end.")),
    *(ADD, "It is blue. " * 8, "It is"),
    *[ANSWER, "Of course." + EOS] * 6,
]


class ToolPolicy:
    """A rollout engine that says one of TURNS, by the tokens that it reads and how often it read them."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen: Counter = Counter()

    def turns(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """One for each prompt."""
        return [self._turn(ids) for ids in prompt_ids]

    def _turn(self, prompt: list[int]) -> list[int]:
        rng = random.Random(f"{prompt} {self.seen[tuple(prompt)]}")
        self.seen[tuple(prompt)] += 1
        return self.tokenizer(text=rng.choice(TURNS))["input_ids"]

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, self.turns(prompt_ids))

    def sync_weights(self, model, step):
        pass


class ScriptedEngine:
    """A rollout engine that gives one prompt's turns, and keeps what it was asked."""

    def __init__(self, tokenizer, *turns: str, logprobs: bool = False) -> None:
        self.tokenizer, self.turns, self.logprobs = tokenizer, list(turns), logprobs
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, prompt_ids, settings):
        self.asked += [(ids, settings.max_completion_length) for ids in prompt_ids]
        ids = [self.tokenizer(text=self.turns.pop(0))["input_ids"] for _ in prompt_ids]
        return Rollout(prompt_ids, ids, [[-0.5] * len(row) for row in ids] if self.logprobs else None)

    def sync_weights(self, model, step):
        pass


def questions(count: int = 6) -> Dataset:
    """Conversations of one question."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(count)])
