"""Makes the contents of run.json and writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .facts import RunFacts
from .outcome import Outcome
from .surroundings import git_commit, machine, versions

RUN_FILE, REPORT_FILE = "run.json", "report.html"
# Counted up when an entry gets another name or meaning.
SCHEMA = 1
RUNNING = "running"


def now() -> str:
    """Returns the time now, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def begun_run(
    facts: RunFacts,
    *,
    command: list[str],
    settings: Mapping[str, Any],
    changed: Mapping[str, Any],
    data: Mapping[str, Any],
    earlier: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the contents of run.json at the start of a run.

    Args:
        facts: what is known of it.
        command: the words of the command line.
        settings: all of them, as JSON holds them.
        changed: those that differ from the defaults.
        data: what the training data are.
        earlier: the sessions before, of which this one is the continuation.
    """
    return {
        "schema": SCHEMA,
        "status": RUNNING,
        "method": facts.method,
        "command": command,
        "git_commit": git_commit(os.getcwd()),
        "seed": settings.get("seed"),
        "versions": versions(),
        "machine": machine(),
        "model": asdict(facts.model),
        "data": dict(data),
        "kernels": asdict(facts.kernels),
        "memory": {"checkpointing": facts.checkpointing, "resident": asdict(facts.resident)},
        "steps": {**asdict(facts.steps), "rows": facts.steps.rows},
        "plan": None if facts.forecast is None else asdict(facts.forecast),
        "measured": None,
        "metrics": {},
        "model_folder": None,
        "settings": {"changed": dict(changed), "all": dict(settings)},
        "sessions": [*earlier, {"started": now(), "ended": None, "first_step": facts.steps.first_step}],
    }


def ended_run(run: Mapping[str, Any], outcome: Outcome, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Returns the contents of run.json at the end of a run.

    run: those at its start. metrics: the last value of each.
    """
    measured = {**asdict(outcome), "step_seconds": outcome.step_seconds, "tokens_a_second": outcome.tokens_a_second}
    *earlier, session = run["sessions"]
    session = {**session, "ended": now(), "last_step": outcome.first_step + outcome.steps, "status": outcome.status}
    return {
        **run,
        "status": outcome.status,
        "measured": measured,
        "metrics": dict(metrics),
        "sessions": [*earlier, session],
    }


def earlier_sessions(folder: Path) -> list[dict[str, Any]]:
    """Returns the sessions that a folder's run.json tells of; none if there is no such file that can be read."""
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        return run["sessions"] if run["schema"] == SCHEMA else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_text(path: Path, text: str) -> None:
    """Writes a file so that there is always a whole one.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes run.json into a folder; raises OSError if it cannot be written."""
    write_text(folder / RUN_FILE, json.dumps(run, indent=1, default=str))
