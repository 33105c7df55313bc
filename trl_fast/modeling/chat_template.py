"""Puts chat templates and end tokens from elsewhere on a model's tokenizer and vocabulary."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# What scripts for TRL 0.12 to 0.22 give to tokenizers that have no template: "User: ...", "Assistant: ...".
SIMPLE_CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role.capitalize() + ": " + message.content + "\n\n" }}{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""

# OpenAI's ChatML.
_CHATML_START, _CHATML_END = "<|im_start|>", "<|im_end|>"
_CHATML_TEMPLATE = f"""\
{{%- for message in messages %}}
{{{{- "{_CHATML_START}" + message.role + "\n" + message.content + "{_CHATML_END}\n" }}}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ "{_CHATML_START}assistant\n" }}}}{{% endif %}}"""


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Gives a tokenizer the chat template, the added tokens and the end token of another, and makes room in the model.

    The embeddings grow to the vocabulary, rounded up to a multiple of resize_to_multiple_of; tokens <extra_id_0>, ...
    fill the tokenizer up to them. Model and tokenizer are changed in place.

    Returns:
        The model, the tokenizer, and the ids of the tokens that are new in it.

    Raises:
        OSError: there is no tokenizer at source_tokenizer_path.
        ValueError: it has no chat template.
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    tokenizer.chat_template = source.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    # The length of the vocabulary, since tokenizers differ in what they count as vocab_size.
    embeddings = model.resize_token_embeddings(
        len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of, mean_resizing=_has_values(model)
    )
    number = 0
    while len(tokenizer.get_vocab()) < embeddings.num_embeddings:
        filler = AddedToken(f"<extra_id_{number}>")
        number += 1
        if tokenizer.add_tokens(filler):
            new.append(filler)
    ids: Any = tokenizer.convert_tokens_to_ids([token.content for token in new])
    return model, tokenizer, ids


def _has_values(model: PreTrainedModel) -> bool:
    """Says whether a model's embeddings have values, of which the mean can be taken."""
    embeddings: Any = model.get_input_embeddings()
    return not embeddings.weight.is_meta


def setup_chat_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: str = "chatml",
    resize_to_multiple_of: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gives a tokenizer ChatML's template and tokens, and makes room for them in the model, as TRL did until 0.25.

    <|im_start|> becomes the begin token, <|im_end|> the end and pad token, in the model's configs too. The embeddings
    grow or shrink to the vocabulary, rounded up to a multiple of resize_to_multiple_of. Both are changed in place.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: the tokenizer has a chat template already, or format is not "chatml".
    """
    warnings.warn(
        "`setup_chat_format` is a name of an older TRL; it works; `clone_chat_template` is the present way.",
        FutureWarning,
        stacklevel=2,
    )
    if format != "chatml":
        raise ValueError(f"setup_chat_format: format={format!r} is unknown; the only one is 'chatml'")
    if tokenizer.chat_template is not None:
        raise ValueError(
            "setup_chat_format: the tokenizer has a chat template already; leave the call out to train with that one, "
            "or set tokenizer.chat_template = None before it"
        )
    tokenizer.add_special_tokens({"bos_token": _CHATML_START, "eos_token": _CHATML_END, "pad_token": _CHATML_END})
    tokenizer.chat_template = _CHATML_TEMPLATE
    model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of)
    configs: list[Any] = [model.config.get_text_config()]
    configs += [model.generation_config] if model.can_generate() else []
    for config in configs:
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def set_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> list[int]:
    """Gives a tokenizer the chat template of a Jinja file (.jinja, .j2), or that of another tokenizer by
    `clone_chat_template`.

    Returns:
        The ids of tokens that are new, to which the model has random embeddings.

    Raises:
        OSError: there is neither a file nor a tokenizer at `path`.
    """
    if path.endswith((".jinja", ".j2")) and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return []
    try:
        return clone_chat_template(model, tokenizer, path)[2]
    except OSError as error:
        raise OSError(f"chat_template_path={path!r} is no .jinja file, and no tokenizer: {error}") from error


def set_eos_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token: str) -> None:
    """Makes a token of the vocabulary the one that ends a text, for tokenizer and model.

    Raises:
        ValueError: it is not in the vocabulary.
    """
    if eos_token not in tokenizer.get_vocab():
        raise ValueError(f"eos_token={eos_token!r} is not in the tokenizer's vocabulary")
    tokenizer.eos_token = eos_token
    eos = tokenizer.eos_token_id
    model.config.get_text_config().eos_token_id = eos
    if not model.can_generate():
        return
    # Any of several end tokens stops generation, so the others stay.
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    model.generation_config.eos_token_id = stops if eos in stops else [eos, *stops]


def with_trained_tokens(peft_config: PeftConfig, model: PreTrainedModel, token_ids: list[int]) -> PeftConfig:
    """Returns a copy of an adapter's configuration that also trains the embeddings of some tokens of the model."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings).split(".")[-1]
    copied: Any = copy.deepcopy(peft_config)
    indices = copied.trainable_token_indices or {}
    # A list means the input embeddings.
    indices = {name: indices} if isinstance(indices, list) else indices
    copied.trainable_token_indices = {**indices, name: [*indices.get(name, []), *token_ids]}
    return copied
