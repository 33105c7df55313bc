"""Holds TRL's helpers around experiment trackers and model cards."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard
from transformers.integrations import is_comet_available, is_trackio_available

from trl_fast.trainers.base.model_card import model_card


def generate_model_card(
    base_model: str | None,
    model_name: str,
    hub_model_id: str,
    dataset_name: str | None,
    tags: list[str],
    wandb_url: str | None,
    trackio_url: str | None,
    trainer_name: str,
    **others: Any,
) -> ModelCard:
    """Makes the card of a trained model: its name, origin, method, data and runs.

    others: TRL's texts about papers and its file of a template are accepted and have no place on this card, but
    `comet_url` has.
    """
    card = ModelCard(model_card(model_name, base_model or "", trainer_name.lower(), f"{trainer_name} trainer"))
    data: Any = card.data
    data.tags = [*dict.fromkeys([*(data.tags or []), "generated_from_trainer", *tags])]
    data.datasets = dataset_name
    lines = {"Model": hub_model_id, "Dataset": dataset_name, "Weights & Biases": wandb_url, "Trackio": trackio_url}
    lines["Comet"] = others.get("comet_url")
    card.text = "\n".join([card.text.rstrip(), "", *(f"- {name}: {value}" for name, value in lines.items() if value)])
    return card


def get_comet_experiment_url() -> str | None:
    """Returns the address of the running Comet experiment; None if there is none."""
    experiment = _comet_experiment() if is_comet_available() else None
    return None if experiment is None else experiment.url


def get_trackio_space_url() -> str | None:
    """Returns the address of the running Trackio run's space; None if there is none."""
    if not is_trackio_available():
        return None
    from trackio import context_vars

    run = context_vars.current_run.get()
    if run is None or run._space_id is None:
        return None
    space = run._space_id.replace("/", "-")
    return f"https://{space}.hf.space?project={run.project}&runs={run.name}&sidebar=collapsed"


def log_table_to_comet_experiment(name: str, table: Any) -> None:
    """Logs a pandas table to the running Comet experiment, if there is one.

    Raises:
        ModuleNotFoundError: comet-ml is not installed.
    """
    if not is_comet_available():
        raise ModuleNotFoundError("comet-ml is not installed; pip install comet-ml")
    experiment = _comet_experiment()
    if experiment is not None:
        experiment.log_table(tabular_data=table, filename=name)


def _comet_experiment() -> Any:
    import comet_ml

    return comet_ml.get_running_experiment()
