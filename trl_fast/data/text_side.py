"""Reads the chat template of a processor of images as that of a tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from .images.messages import prepare_multimodal_messages


class TextSide:
    """Answers for a processor as a tokenizer does: with the processor's chat template, on messages without images.

    Such templates take contents in parts, so that text becomes a part; and a processor itself would read images and
    give batches. All other questions go to the processor's tokenizer.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        reader: Any = processor
        self.chat_template: Any = reader.chat_template
        self._tokenizer: Any = reader.tokenizer
        self.name_or_path: str = reader.tokenizer.name_or_path or type(processor).__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Renders messages as the tokenizer would."""
        template = options.pop("chat_template", None) or self.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        parts = prepare_multimodal_messages(messages)
        return self._tokenizer.apply_chat_template(parts, chat_template=template, **options)


def text_side(processing_class: Any) -> Any:
    """Returns a tokenizer as it is, and of a processor its text side."""
    return TextSide(processing_class) if isinstance(processing_class, ProcessorMixin) else processing_class
