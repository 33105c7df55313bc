"""Checks that the rows of a dataset are no longer than a model has positions."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_positions(model: PreTrainedModel, longest: int | None, max_length: int | None, name: str) -> None:
    """Makes sure, before training, that no row is longer than the model's positions reach.

    longest: tokens of the longest sequence of the dataset `name`, cut to `max_length`; None where rows are not known
    beforehand. A rotary model computes on past its maximum, so that is a warning; a table of positions ends.

    Raises:
        ValueError: a sequence is longer than the model's table of positions.
    """
    maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    reach = max_length if longest is None else longest
    if not maximum or (reach is not None and reach <= maximum):
        return
    kind, table = type(model).__name__, _has_position_table(model, maximum)
    if longest is None:
        logger.warning(
            f"max_length={max_length}: rows of the {name} dataset may be longer than the {maximum} positions of "
            f"{kind}{', and training would stop at one' if table else ''}. Set max_length={maximum} to cut them."
        )
        return
    what = f"max_length={max_length}: the longest sequence of the {name} dataset has {longest} tokens"
    if table:
        raise ValueError(
            f"{what}, but {kind} has a table of {maximum} positions (max_position_embeddings); set "
            f"max_length={maximum} or less"
        )
    logger.warning(
        f"{what}, more than the {maximum} positions that {kind} was made for (max_position_embeddings). It computes "
        f"on, but may have learned nothing there; set max_length={maximum}, or scale its rotary embeddings."
    )


def _has_position_table(model: PreTrainedModel, maximum: int) -> bool:
    """Returns whether positions are looked up: in an embedding, with two spare rows in OPT, or GPT-J's buffer."""
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words]
    learned = any(maximum <= table.num_embeddings <= maximum + 2 for table in tables)
    return learned or any(buffer.endswith("embed_positions") for buffer, _ in model.named_buffers())
