"""Environments whose methods the policy of `support.tools` calls."""

from __future__ import annotations

from datasets import Dataset


class Sums:
    """Adds up what it is told; it writes on every other prompt, and knows its reward."""

    def __init__(self) -> None:
        self.total = 0

    def reset(self, **row) -> str | None:
        self.total = row.get("start") or 0
        self.given = row
        return f" Begin with {self.total}." if self.total % 2 else None

    def add(self, a: int, b: int) -> int:
        """
        Adds.

        Args:
            a: A number.
            b: Another.
        """
        self.total += a + b
        return self.total

    async def look_up(self, word: str) -> str:
        """
        Looks a word up.

        Args:
            word: What to look for.
        """
        return f"{word} is {self.total}"

    def fail(self) -> str:
        """Fails."""
        raise RuntimeError(f"no luck at {self.total}")

    def get_reward(self) -> float:
        return float(self.total)


class Words:
    """Counts the words that are looked up; the reward functions know its worth."""

    def reset(self, start: int, **row) -> str:
        self.words = [f"w{start}"]
        return f" Say {self.words[0]}."

    def look_up(self, word: str) -> str:
        """
        Finds a word.

        Args:
            word: What to look for.
        """
        self.words.append(word)
        return " ".join(self.words)


class Judged(Words):
    """The same with a reward of its own, which is async."""

    async def get_reward(self) -> float | None:
        return float(len(self.words)) if len(self.words) > 1 else None


class Visits(Sums):
    """Writes the whole prompt, another one at each reset of the same environment."""

    def __init__(self) -> None:
        self.visits = 0

    def reset(self, **row) -> str:
        self.visits += 1
        self.total, self.given = self.visits, row
        return f"Visit {self.visits}."


def questions_with_start(count: int = 6, kinds: tuple[str, ...] = ()) -> Dataset:
    """Conversations of one question, with a number for `reset`, and the kind of environment if there are several."""
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "start": i} for i in range(count)]
    return Dataset.from_list(
        [{**row, "environment": kinds[i % len(kinds)]} if kinds else row for i, row in enumerate(rows)]
    )
