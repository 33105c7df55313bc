"""Holds what tells how rows become token ids and labels for supervised fine-tuning, and how long they may be."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.choices import TRUNCATION_MODES


@dataclass(frozen=True)
class SFTFormat:
    """Tells how rows become token ids and labels.

    - `text_field`: the column of plain text.
    - `completion_only_loss`: only completions are learned, of rows that have a prompt.
    - `assistant_only_loss`: only what the assistant says is learned; the chat template has to mark it.
    - `chat_template`: to be used instead of the tokenizer's own.
    - `separates_turns`: each of the assistant's turns is a sequence of its own, of which it alone is learned.
    """

    text_field: str = "text"
    completion_only_loss: bool = False
    assistant_only_loss: bool = False
    chat_template: str | None = None
    separates_turns: bool = False


@dataclass(frozen=True)
class SFTLength:
    """Tells how rows longer than `max_length` tokens (None: no limit) are cut or packed.

    They lose their end (`truncation_mode` keep_start) or their beginning (keep_end). With a `packing_strategy`, rows
    are packed into rows of that length instead, by `pack_dataset`.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    packing_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} is unknown; expected one of {', '.join(TRUNCATION_MODES)}."
            )
        if self.packing_strategy is not None and self.max_length is None:
            raise ValueError("packing needs the length to pack to, but max_length is None; set max_length.")
