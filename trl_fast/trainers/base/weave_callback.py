"""Logs completions and their scores to W&B Weave at each evaluation."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_wandb_available

from .prompt_completions import PromptCompletions

logger = logging.getLogger(__name__)

Scorer = Callable[[str, str], float]


class WeaveCallback(TrainerCallback):
    """Generates completions of the evaluation dataset's prompts at each evaluation, and logs them to W&B Weave.

    With scorers, each prediction gets its scores, and the evaluation a summary: total_predictions,
    successful_predictions, and avg_NAME of each scorer. What fails of one prediction is a warning, and the others are
    logged. Without `weave` installed one warning says so, and nothing is logged. It is the main process that logs.

    Args:
        trainer: its eval_dataset must have the column "prompt", of texts or of conversations.
        project_name: of Weave. None: that of the Weave client that is there already, else of the running W&B run.
        scorers: from names to functions of the prompt's and the completion's text; None means predictions alone.
        generation_config: None means the model's own.
        num_prompts: only the first so many; None means all.
        dataset_name, model_name: what Weave calls them; None means the name that the model was loaded by.

    Raises:
        ValueError: there is no evaluation dataset with a column "prompt", or it has fewer rows than num_prompts.
    """

    def __init__(
        self,
        trainer: Trainer,
        project_name: str | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
    ) -> None:
        self.completions = PromptCompletions(trainer, generation_config, num_prompts, type(self).__name__)
        self.trainer, self.project_name, self.scorers = trainer, project_name, dict(scorers or {})
        self.generation_config, self.dataset_name, self.model_name = generation_config, dataset_name, model_name
        self._last_logged_step = -1
        self._has_client: bool | None = None

    @property
    def is_evaluation_mode(self) -> bool:
        """Says whether predictions are scored."""
        return bool(self.scorers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Connects to Weave.

        Raises:
            ValueError: nothing names the project.
        """
        self._connect()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Generates and logs, once a step."""
        if state.global_step == self._last_logged_step or not self._connect():
            return
        self._last_logged_step = state.global_step
        batch_size = args.per_device_eval_batch_size
        prompts, completions = self.completions.generate(kwargs["processing_class"], batch_size)
        if self.trainer.accelerator.is_main_process:
            self._log(prompts, completions, state.global_step)

    def _connect(self) -> bool:
        """Returns whether there is something to log to; connects the main process the first time."""
        if self._has_client is None:
            self._has_client = importlib.util.find_spec("weave") is not None
            if not self._has_client:
                logger.warning("WeaveCallback logs nothing, since weave is not installed: `pip install weave`.")
            elif self.trainer.accelerator.is_main_process:
                self._make_client()
        return self._has_client

    def _make_client(self) -> None:
        import weave
        from weave.trace.context import weave_client_context

        if self.model_name is None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
            self.model_name = getattr(model.config, "_name_or_path", None) or "unknown_model"
        if weave_client_context.get_weave_client():
            return
        self.project_name = self.project_name or _project_of_wandb()
        if self.project_name is None:
            raise ValueError(
                "WeaveCallback: nothing names the project; give project_name, call weave.init('project') before, or "
                "start a W&B run"
            )
        weave.init(self.project_name)

    def _log(self, prompts: list[str], completions: list[str], step: int) -> None:
        from weave import EvaluationLogger

        generation = None if self.generation_config is None else self.generation_config.to_dict()
        attributes = {"training_step": step, "model_name": self.model_name, "generation_config": generation}
        evaluation = EvaluationLogger(model=self.model_name, dataset=self.dataset_name, eval_attributes=attributes)
        scores: dict[str, list[float]] = {}
        pairs = zip(prompts, completions, strict=True)
        logged = sum(self._log_prediction(evaluation, prompt, completion, scores) for prompt, completion in pairs)
        try:
            if scores:
                averages = {f"avg_{name}": sum(values) / len(values) for name, values in scores.items()}
                counts = {"total_predictions": len(prompts), "successful_predictions": logged}
                evaluation.log_summary({**counts, **averages})
            else:
                evaluation.finish()
        except Exception as error:
            logger.warning(f"WeaveCallback: the evaluation at step {step} was not finished: {error}")

    def _log_prediction(self, evaluation: Any, prompt: str, completion: str, scores: dict[str, list[float]]) -> bool:
        """Logs a prediction and adds its scores, without those of scorers that fail; returns whether it is logged."""
        try:
            prediction = evaluation.log_prediction(inputs={"prompt": prompt}, output=completion)
            for name, scorer in self.scorers.items():
                try:
                    score = scorer(prompt, completion)
                    prediction.log_score(scorer=name, score=score)
                    scores.setdefault(name, []).append(score)
                except Exception as error:
                    logger.warning(f"WeaveCallback: scorer {name!r} failed: {error}")
            prediction.finish()
        except Exception as error:
            logger.warning(f"WeaveCallback: a prediction was not logged: {error}")
            return False
        return True


def _project_of_wandb() -> str | None:
    """Returns ENTITY/PROJECT of the running W&B run; None if there is none."""
    if not is_wandb_available():
        return None
    import wandb

    return None if wandb.run is None else f"{wandb.run.entity}/{wandb.run.project}"
