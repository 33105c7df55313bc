"""Checks rows as tokens: what a limit on length cuts, and what tokenization changes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..tokenization import common_prefix_length, end_with
from ..tokenizer_checks import check_tokenizer
from .findings import Hits, Kind, quote
from .preference_record import SIDES, Context, Record, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAILS = Kind(
    "not_tokenizable",
    "error",
    "the tokenizer or its chat template refuses the row",
    "Mend the row as the message says, or use another chat template.",
)
PROMPT_FILLS = Kind(
    "prompt_fills_max_length",
    "warning",
    "the prompt alone fills max_length",
    "Training drops these rows (truncation_mode=keep_start): raise max_length or shorten the prompts.",
)
TRUNCATED = Kind(
    "truncated_response",
    "warning",
    "response cut at max_length",
    "The end of the response is not trained on: raise max_length, or remove the rows.",
)
EQUAL_IF_CUT = Kind(
    "identical_after_truncation",
    "error",
    "chosen equals rejected once cut at max_length",
    "Raise max_length, or remove these rows: what is left of them holds no preference.",
)
PROMPT_CHANGES = Kind(
    "prompt_changes_with_response",
    "warning",
    "the chat template renders the prompt differently when a response follows",
    "The model is trained on another prompt than it will see: use a template that only adds to the prompt.",
)
MERGE = Kind(
    "tokens_merge",
    "info",
    "tokens merge where prompt and response meet",
    "Harmless if rare; else move the space between them from the prompt's end to the response's beginning.",
)
DOUBLE_BOS = Kind(
    "double_bos",
    "warning",
    "two BOS tokens at the beginning",
    "The text has the BOS token that the tokenizer adds: take it out of the text.",
)


def tokenize(records: Iterable[Record], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Gives records their ids, divided as training divides them (see `tokenization.tokenize_preference`).

    Records without a prompt or response to render, and messages without a chat template to render them, get none:
    other findings say why. Many records at a time let the tokenizer work on several cores.

    Raises ValueError if the tokenizer lacks the EOS token that text needs.
    """
    kinds: dict[bool, list[Record]] = {False: [], True: []}
    for record in records:
        complete = all(record.completions.values())
        if complete and (not record.conversational or (record.prompt and tokenizer.chat_template)):
            kinds[record.conversational].append(record)
    for conversational, alike in kinds.items():
        if alike:
            check_tokenizer(tokenizer, needs_eos=not conversational)
            _tokenize_alike(alike, tokenizer, add_special_tokens=not conversational)


def _tokenize_alike(records: list[Record], tokenizer: "PreTrainedTokenizerBase", add_special_tokens: bool) -> None:
    try:
        rendered = [_rendered(record, tokenizer) for record in records]
        texts = [text for texts in rendered for text in texts]
        ids = iter(tokenizer(text=texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    # A template is a program of its author's and raises what it likes.
    except Exception as error:
        if len(records) == 1:
            records[0].tokens = TokenIds(failure=f"{type(error).__name__}: {error}")
            return
        middle = len(records) // 2
        for half in (records[:middle], records[middle:]):
            _tokenize_alike(half, tokenizer, add_special_tokens)
        return
    for record, texts in zip(records, rendered, strict=True):
        record.tokens = _token_ids(record, texts, [next(ids) for _ in texts])


def _token_ids(record: Record, texts: list[str], ids: list[list[int]]) -> TokenIds:
    """Returns the ids of a record. Both lists: of the prompt, then of prompt + completion for each completion."""
    (prompt, *full), (prompt_ids, *full_ids) = texts, ids
    start = min(common_prefix_length(prompt_ids, other) for other in full_ids)
    kept = min(len(prompt) if text.startswith(prompt) else common_prefix_length(prompt, text) for text in full)
    return TokenIds(
        prompt=prompt_ids[:start],
        completions={column: other[start:] for column, other in zip(record.completions, full_ids, strict=True)},
        prompt_alone=len(prompt_ids),
        changed_tail=prompt[kept:] or None,
    )


def _rendered(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Renders the prompt as text, and prompt + completion for each completion."""
    if record.conversational:

        def render(messages: list[dict[str, Any]], **options: Any) -> str:
            text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **record.template_options, **options)
            return text

        completions = record.messages
        messages = completions.pop("prompt")
        return [
            render(messages, add_generation_prompt=True),
            *(render(messages + completion) for completion in completions.values()),
        ]
    texts = [end_with(text, tokenizer.eos_token) for text in record.completions.values() if isinstance(text, str)]
    prompt = str(record.prompt)
    return [prompt, *(prompt + text for text in texts)]


def not_tokenizable(record: Record, context: Context) -> Hits:
    """Finds rows that the tokenizer or its template raises on."""
    if record.tokens and record.tokens.failure:
        yield FAILS, quote(record.tokens.failure, 120)


def truncation(record: Record, context: Context) -> Hits:
    """Finds responses that max_length cuts at the end, as `truncation_mode=keep_start` does."""
    tokens = record.tokens
    if tokens is None or tokens.failure or context.max_length is None:
        return
    room = context.max_length - len(tokens.prompt)
    if room <= 0:
        yield PROMPT_FILLS, f"{len(tokens.prompt)} tokens"
        return
    for column, ids in tokens.completions.items():
        if len(ids) > room:
            yield TRUNCATED, f"{column}: {len(ids) - room} of {len(ids)} tokens cut"
    if record.paired:
        chosen, rejected = (tokens.completions[column] for column in SIDES)
        if chosen != rejected and chosen[:room] == rejected[:room]:
            yield EQUAL_IF_CUT, f"{room} tokens are left of each"


def prompt_boundary(record: Record, context: Context) -> Hits:
    """Finds prompts whose text or tokens are not the beginning of prompt + response."""
    tokens = record.tokens
    if tokens is None or tokens.failure:
        return
    if tokens.changed_tail:
        yield PROMPT_CHANGES, f"only without a response: {quote(tokens.changed_tail)}"
    elif tokens.prompt_alone > len(tokens.prompt):
        yield MERGE, ""


def double_bos(record: Record, context: Context) -> Hits:
    """Finds prompts that begin with BOS twice."""
    bos = None if context.tokenizer is None else context.tokenizer.bos_token_id
    if record.tokens and bos is not None and record.tokens.prompt[:2] == [bos] * 2:
        yield DOUBLE_BOS, ""


TOKEN_CHECKS = (not_tokenizable, truncation, prompt_boundary, double_bos)
