"""Checks messages, and the marks of a chat template in them."""

from collections.abc import Iterable

from ..images.messages import clean_messages, images_of
from .findings import Hits, Kind, quote
from .preference_record import Context, Record, message_text

ROLES = ("system", "developer", "user", "assistant", "tool")
# What may follow what; None is the beginning.
SUCCESSORS = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

UNKNOWN_ROLE = Kind(
    "unknown_role",
    "error",
    "unknown role",
    f"Rename it to one of {', '.join(ROLES)}.",
)
NOT_ALTERNATING = Kind(
    "roles_not_alternating",
    "warning",
    "roles do not alternate",
    "Merge or reorder the messages: an optional system message, then user and assistant in turns.",
)
PROMPT_END = Kind(
    "prompt_ends_wrong",
    "error",
    "prompt does not end with a user (or tool) message",
    "Move the messages after the last user message from the prompt to the responses.",
)
RESPONSE_START = Kind(
    "response_starts_wrong",
    "error",
    "response does not start with an assistant message",
    "Leave what the prompt has out of the responses, and give them the role assistant.",
)
NO_PROMPT = Kind(
    "no_prompt",
    "error",
    "messages without a prompt",
    "Training refuses such rows: give them a prompt column, or responses that begin with the same messages.",
)
EMPTY_MESSAGE = Kind(
    "empty_message", "warning", "message with empty content", "Fill the message or leave it out of its conversation."
)
NO_TEMPLATE = Kind(
    "no_chat_template",
    "error",
    "messages, but the tokenizer has no chat template",
    "Set tokenizer.chat_template, or use the tokenizer of the instruction-tuned model.",
)
SPECIAL_IN_MESSAGE = Kind(
    "special_tokens_in_messages",
    "error",
    "special tokens inside messages",
    "The template adds them: content must not. Take them out; text about them would act as control tokens too.",
)
SPECIAL_IN_TEXT = Kind(
    "special_tokens_in_text",
    "info",
    "special tokens inside text",
    "Right if the text went through the model's own chat template; else take them out.",
)


def roles(record: Record, context: Context) -> Hits:
    """Checks the order of roles in the prompt and in each response."""
    if not record.conversational:
        return
    columns = {column: [message["role"] for message in messages] for column, messages in record.messages.items()}
    unknown = [f"{column}: {quote(role)}" for column, found in columns.items() for role in found if role not in ROLES]
    if unknown:
        yield UNKNOWN_ROLE, unknown[0]
        return
    prompt = columns.pop("prompt")
    yield from _out_of_turn("prompt", None, prompt)
    if not prompt:
        yield NO_PROMPT, ""
    elif prompt[-1] not in ("user", "tool"):
        yield PROMPT_END, f"it ends with {prompt[-1]}"
    for column, found in columns.items():
        if found and found[0] != "assistant":
            yield RESPONSE_START, f"{column} starts with {found[0]}"
        if found:
            yield from _out_of_turn(column, found[0], found[1:])


def _out_of_turn(column: str, before: str | None, following: Iterable[str]) -> Hits:
    """Finds the first role that must not follow the one before it."""
    for role in following:
        if role not in SUCCESSORS[before]:
            yield NOT_ALTERNATING, f"{column}: {role} after {before or 'nothing'}"
            return
        before = role


def empty_messages(record: Record, context: Context) -> Hits:
    """Finds messages without text and tool calls; a response that is empty as a whole is another finding."""
    if not record.conversational:
        return
    for column, messages in record.messages.items():
        if column == "prompt" or record.texts[column].strip():
            for message in messages:
                images = images_of(clean_messages([message]))
                if not message_text(message).strip() and not message.get("tool_calls") and not images:
                    yield EMPTY_MESSAGE, f"{column}: {message['role']}"


def no_chat_template(record: Record, context: Context) -> Hits:
    """Finds messages that no chat template can render."""
    if record.conversational and context.tokenizer is not None and not context.tokenizer.chat_template:
        yield NO_TEMPLATE, ""


def special_tokens(record: Record, context: Context) -> Hits:
    """Finds the tokenizer's special tokens written out in text, but for an EOS token that ends a response."""
    if context.tokenizer is None or context.special_tokens is None:
        return
    for column, text in record.texts.items():
        if column != "prompt" and not record.conversational and context.tokenizer.eos_token:
            text = text.rstrip().removesuffix(context.tokenizer.eos_token)
        found = context.special_tokens.search(text)
        if found:
            kind = SPECIAL_IN_MESSAGE if record.conversational else SPECIAL_IN_TEXT
            yield kind, f"{column}: {found.group()}"


CONVERSATION_CHECKS = (roles, empty_messages, no_chat_template, special_tokens)
