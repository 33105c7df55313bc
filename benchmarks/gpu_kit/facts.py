"""Writes facts, what a phase found, one JSON object a line, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def default_path() -> Path:
    """Returns the file of facts: in the folder that the variable OUT names, else with the other results."""
    return Path(os.environ.get("OUT") or RESULTS) / "gpu_facts.jsonl"


class Facts:
    """Appends facts of one phase to a file.

    Every fact has `phase` and `what`; `ms` are milliseconds, `bytes` and `flops` of one call. A fact that could not be
    found has `skipped`, the reason.
    """

    def __init__(self, path: Path, phase: str) -> None:
        self.path, self.phase = path, phase
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, **values: object) -> None:
        """Writes a fact down; numbers are rounded to five digits."""
        rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in values.items()}
        line = json.dumps({"phase": self.phase, "what": what, **rounded}, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def skip(self, what: str, reason: object, **values: object) -> None:
        """Says that something was left out, and why."""
        text = str(reason).strip().partition("\n")[0][:300]
        if isinstance(reason, BaseException):
            text = f"{type(reason).__name__}: {text}"
        self.add(what, skipped=text, **values)


def read_facts(path: Path) -> list[dict]:
    """Returns all facts of a file, in order; a line that a killed process left half-written is dropped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
