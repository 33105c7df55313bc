"""Makes report.html: a run's numbers, curves and settings in one file that needs nothing else."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts
from .quantities import count_text, share_text, size_text, time_text
from .run_file import REPORT_FILE, write_text

_TEMPLATE = "report.html"


def report_page(run: Mapping[str, Any], history: Sequence[Mapping[str, float]], first: Sequence[str]) -> str:
    """Returns the page.

    run: the contents of run.json. history: the logs of the whole run, also before it was resumed. first: names of
    the metrics whose curves come first.
    """
    return _template().render(
        run=run,
        charts=charts.make_charts(history, first),
        frame=charts,
        facts=_facts(run),
        planned=_planned(run),
    )


@functools.cache
def _template() -> Any:
    # It is needed at a run's end, and takes longer to compile than to fill.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    options |= {"trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=PackageLoader(str(__package__)), **options).get_template(_TEMPLATE)


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the page's first table says (name, text)."""
    model, kernels, steps, measured = (run[name] for name in ("model", "kernels", "steps", "measured"))
    trained = share_text(model["trained"], model["parameters"])
    head = f"{kernels['backend']} ({kernels['backend_reason']})" if kernels["backend"] else "none over the vocabulary"
    facts = [
        ("model", f"{model['name']}, {count_text(model['parameters'])} parameters, {model['dtype']}"),
        ("trained", f"{model['adapter'] or 'weights'}: {count_text(model['trained'])} ({trained})"),
        ("head", head),
        ("rows", kernels["layout"] + (f", because {kernels['layout_reason']}" if kernels["layout_reason"] else "")),
        ("memory", run["memory"]["checkpointing"]),
        ("data", "a stream" if run["data"]["rows"] is None else f"{run['data']['rows']:,} rows"),
        ("a step", f"{steps['rows']} {steps['unit']}"),
        ("steps", f"{measured['first_step'] + measured['steps']:,} of {steps['steps']:,}"),
    ]
    if measured["tokens"] is not None:
        facts.append(("tokens", count_text(measured["tokens"])))
    if measured["saved"] is not None:
        facts.append(("fewer computed than in padded rows", f"{100 * measured['saved']:.0f}%"))
    return facts


def _planned(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the rows (name, planned, measured) of the table of cost."""
    plan, measured = run["plan"] or {}, run["measured"]
    steps, step, speed = measured["steps"], measured["step_seconds"], measured["tokens_a_second"]
    peak, second = plan.get("peak_bytes"), plan.get("step_seconds")
    return [
        ("time", time_text(second * steps) if second else "", time_text(measured["seconds"])),
        ("of it evaluating", "", time_text(measured["evaluating"]) if measured["evaluating"] else ""),
        ("a step", time_text(second) if second else "", "" if step is None else time_text(step)),
        ("tokens a second", "", "" if speed is None else count_text(speed)),
        (f"peak ({measured['peak_of']})", size_text(peak) if peak else "", size_text(measured["peak_bytes"])),
    ]


def write_page(
    folder: Path, run: Mapping[str, Any], history: Sequence[Mapping[str, float]], first: Sequence[str]
) -> None:
    """Writes report.html into a folder; raises OSError if it cannot be written."""
    write_text(folder / REPORT_FILE, report_page(run, history, first))
