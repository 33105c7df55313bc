"""A small byte-level BPE tokenizer with a chat template, built in a moment and without a hub."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|im_end|>", "<|pad|>"

CORPUS = [
    "The sky is blue and the sea is green. The answer is 42, not 43.",
    "What color is the sky? It is blue. What color is the sea? It is green, of course.",
    "user assistant system tool user assistant system tool",
]

# The generation prompt ends in an empty thought if `thinking` is false, which whole conversations do not have.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if thinking is defined and not thinking %}<think></think>{% endif %}{% endif %}"""


# Of another tokenizer: its special tokens have other names, and it joins other letters.
OTHER_TOKENS = ["<s>", "</s>", "<|im_start|>"]
OTHER_CORPUS = [
    "What is the color? It is the same as that of the sky, bluest of all, and 7 times bluer than 49 or 56."
]


@cache
def _trained_model(special: tuple[str, ...], size: int, corpus: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def build_tokenizer(
    *, add_bos: bool = False, eos_token: str | None = EOS, pad_token: str | None = PAD
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of 340 tokens or fewer; `add_bos` puts the BOS token before every text."""
    special = (BOS, EOS, PAD, "<|im_start|>", "<think>", "</think>")
    tokenizer = Tokenizer.from_str(_trained_model(special, 340, tuple(CORPUS)))
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=eos_token,
        pad_token=pad_token,
        chat_template=CHAT_TEMPLATE,
    )


def build_other_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer with other tokens, which puts its BOS token before every text."""
    tokenizer = Tokenizer.from_str(_trained_model(tuple(OTHER_TOKENS), 300, tuple(OTHER_CORPUS)))
    bos, eos, _ = OTHER_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
