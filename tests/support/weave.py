"""Stands for the package weave: its client and the documented interface of EvaluationLogger, which writes all down.

https://weave-docs.wandb.ai/guides/evaluation/evaluation_logger: `log_prediction(inputs, output)` gives a logger of
that prediction, with `log_score(scorer, score)` and `finish()`; `log_summary(summary)` or `finish()` ends the
evaluation.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class PredictionLogger:
    """Writes a prediction down with its scores, until it is finished."""

    def __init__(self, inputs: dict[str, Any], output: Any) -> None:
        self.inputs, self.output = inputs, output
        self.scores: dict[str, float] = {}
        self.is_finished = False

    def log_score(self, scorer: str, score: float) -> None:
        assert not self.is_finished
        self.scores[scorer] = score

    def finish(self) -> None:
        assert not self.is_finished
        self.is_finished = True


class EvaluationLogger:
    """Writes an evaluation down; made anew for each."""

    made: list[EvaluationLogger] = []

    def __init__(self, *, model: str, dataset: str, eval_attributes: dict[str, Any] | None = None) -> None:
        self.model, self.dataset, self.eval_attributes = model, dataset, eval_attributes
        self.predictions: list[PredictionLogger] = []
        self.summary: dict[str, float] | None = None
        self.is_finished = False
        self.made.append(self)

    def log_prediction(self, inputs: dict[str, Any], output: Any) -> PredictionLogger:
        assert not self.is_finished
        self.predictions.append(PredictionLogger(inputs, output))
        return self.predictions[-1]

    def log_summary(self, summary: dict[str, float]) -> None:
        assert all(prediction.is_finished for prediction in self.predictions)
        self.summary = summary
        self.finish()

    def finish(self) -> None:
        assert not self.is_finished
        self.is_finished = True

    def written(self) -> dict[str, Any]:
        """All that was logged."""
        predictions = [vars(prediction) for prediction in self.predictions]
        return {**vars(self), "predictions": predictions}


def install_weave(monkeypatch: pytest.MonkeyPatch, client: object | None = None) -> ModuleType:
    """Puts the stand-in in the place of weave; `projects` of it are those that init was called with."""
    weave: Any = ModuleType("weave")
    weave.__spec__ = SimpleNamespace(name="weave")
    weave.projects, weave.client = [], client

    def init(project: str) -> object:
        weave.projects.append(project)
        weave.client = object()
        return weave.client

    context: Any = ModuleType("weave.trace.context")
    context.weave_client_context = SimpleNamespace(get_weave_client=lambda: weave.client)
    weave.init, weave.EvaluationLogger = init, EvaluationLogger
    weave.trace = ModuleType("weave.trace")
    for module in (weave, weave.trace, context):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(EvaluationLogger, "made", [])
    return weave
