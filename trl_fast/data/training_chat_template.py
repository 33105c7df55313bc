"""Marks in chat templates what the assistant said, for a loss on the assistant's tokens alone.

transformers finds those tokens by `{% generation %}` marks, which most templates do not have. They can be put around
any template from outside: render the conversation up to each of the assistant's messages, and what the message adds
to it is what the assistant said. That is done in Jinja itself, so the result is a template like any other.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from .generation_marks import with_marks
from .text_side import text_side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# `closed` is the conversation up to a message, without an EOS token that some templates write at the very end only.
# What the assistant said starts behind as much of the generation prompt as the whole conversation has there, a thought
# that the prompt opens not counted.
_WRAPPER = """\
{% macro conversation(messages, add_generation_prompt) %}
<template>{% endmacro %}
{%- macro closed(messages, whole) -%}
{%- set text = conversation(messages, false) -%}
{%- if not whole.startswith(text) and eos_token and text.endswith(eos_token) -%}
{%- set text = text[:-(eos_token|length)] -%}
{%- endif -%}
{%- if not whole.startswith(text) -%}
{{- raise_exception("it renders earlier messages differently when others follow") -}}
{%- endif -%}
{{- text -}}
{%- endmacro -%}
{%- set whole = conversation(messages, add_generation_prompt) -%}
{%- set said = namespace(start=0, end=0, in_prompt=true) -%}
{%- for message in messages -%}
{%- if message["role"] == "assistant" -%}
{%- set before = messages[:loop.index0] or messages[:1] -%}
{%- set start = closed(before, whole)|length -%}
{%- set prompt = conversation(before, true)[start:].split("<think>")[0] -%}
{%- set said.start = start if loop.index0 else [whole.find(prompt), 0]|max -%}
{%- set said.in_prompt = true -%}
{%- for character in prompt -%}
{%- set said.in_prompt = said.in_prompt and whole[said.start] == character -%}
{%- set said.start = said.start + (1 if said.in_prompt else 0) -%}
{%- endfor -%}
{%- if said.in_prompt and prompt.endswith("<lead>") -%}
{%- set said.start = said.start - ("<lead>"|length) -%}
{%- endif -%}
{{- whole[said.end:said.start] -}}
{%- set said.end = whole|length if loop.last else closed(messages[:loop.index], whole)|length -%}
{%- generation -%}{{- whole[said.start:said.end] -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{{- whole[said.end:] -}}
"""

# Templates of reasoning models drop thoughts, all of them or those of earlier turns. In training they are to be
# learned, and a turn has to look the same whether another follows or not.
_KEEP_THOUGHTS = {
    "loop.index0 > ns.last_query_index": "true",
    "loop.last or (not loop.last and reasoning_content)": "true",
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}": "",
}

# DeepSeek-V3's template takes arguments of tool calls as text only; data has them as an object.
_ARGUMENTS = "tool['function']['arguments']"
_ANY_ARGUMENTS = f"({_ARGUMENTS} if {_ARGUMENTS} is string else {_ARGUMENTS} | tojson)"

# The end of the generation prompt that TRL counts as said by the assistant, by the template's SHA-256. Qwen2.5: the
# newline after the role. DeepSeek-R1's distilled models, DeepSeek-V3, Muse: the role itself.
_LEADS = {
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "\\n",
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "<｜Assistant｜>",
    "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64": "<｜Assistant｜>",
    "cfc67e5f349f37690dfd31ed1f18bc4442a9dd32fe39a648f993cb4eb3cae678": "<|start|>assistant",
}

_PROBE = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


def has_generation_markers(chat_template: str | dict[str, str] | None) -> bool:
    """Says whether a template marks what the assistant said; of named templates the `default` one counts."""
    template = default_template(chat_template)
    return template is not None and _GENERATION_MARK.search(template) is not None


def get_training_chat_template(
    processing_class: PreTrainedTokenizerBase | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """Returns the tokenizer's chat template with marks around the assistant's words; None if it has them already.

    The text is that of the template itself, but for models that reason: each turn keeps its thought, which their
    templates drop once another turn follows. `tokenizer` is an older name of `processing_class`.

    Raises ValueError if there is no template, or if it renders the start of a conversation differently depending on
    what follows, so that nothing tells which part the assistant said.
    """
    if tokenizer is not None:
        warnings.warn("`tokenizer` is now called `processing_class`", FutureWarning, stacklevel=2)
    tokenizer = text_side(tokenizer if processing_class is None else processing_class)
    template = None if tokenizer is None else default_template(tokenizer.chat_template)
    if tokenizer is None or template is None:
        raise ValueError(
            "processing_class has no chat template, so nothing tells what the assistant said. Set "
            "processing_class.chat_template, or chat_template_path."
        )
    if has_generation_markers(template):
        return None
    marked = _marked(template)
    try:
        found = any(_assistant_mask(tokenizer, marked)[1])
        reason = "it leaves out what the assistant says"
    except (TemplateError, TypeError) as error:
        found, reason = False, str(error)
    if not found:
        raise ValueError(
            f"processing_class.chat_template cannot tell what the assistant said: {reason}. Put {{% generation %}} "
            "and {% endgeneration %} around the assistant's messages in the template."
        )
    return marked


def is_chat_template_stop_token_trained(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> bool:
    """Says whether a template (None: the tokenizer's own) marks the token that ends the assistant's turn."""
    tokenizer = text_side(tokenizer)
    try:
        input_ids, mask = _assistant_mask(tokenizer, chat_template)
    except (TemplateError, TypeError):
        return False
    added = set(tokenizer.get_added_vocab().values())
    said = [token for token, marked in zip(input_ids, mask, strict=True) if marked]
    words = [token for token in said if str(tokenizer.decode([token])).strip()]
    return bool(words) and words[-1] in added


def default_template(chat_template: str | dict[str, str] | None) -> str | None:
    """Returns a chat template; of named ones the `default` one, None if there is none."""
    return chat_template.get("default") if isinstance(chat_template, dict) else chat_template


def _marked(template: str) -> str:
    marked = with_marks(template)
    if marked is not None:
        return marked
    wrapper = _WRAPPER.replace("<lead>", _LEADS.get(hashlib.sha256(template.encode()).hexdigest(), ""))
    for dropping, keeping in _KEEP_THOUGHTS.items():
        template = template.replace(dropping, keeping)
    template = template.replace(f"+ {_ARGUMENTS} +", f"+ {_ANY_ARGUMENTS} +")
    # Jinja drops one newline at the end of a template, but not at the end of a macro.
    return wrapper.replace("<template>", template.removesuffix("\n"))


def _assistant_mask(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> tuple[list[int], list[int]]:
    """Returns the tokens of a short conversation, and 1 for those that the assistant said, else 0.

    Templates of models that read images may take lists of parts only.
    """
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        encoded: Any = tokenizer.apply_chat_template(_PROBE, chat_template=chat_template, **options)
    except (TemplateError, TypeError) as error:
        parts: list[Any] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} for message in _PROBE
        ]
        try:
            encoded = tokenizer.apply_chat_template(parts, chat_template=chat_template, **options)
        except (TemplateError, TypeError):
            raise error from None
    return encoded["input_ids"], encoded["assistant_masks"]
