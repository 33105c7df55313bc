"""Finds which bytes of a text each of its tokens stands for, so that tokens of two tokenizers can be told apart.

A byte-level tokenizer writes each byte of a text as one character of a token, by a table that all of them share. Its
added tokens are texts of their own.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpannedText(NamedTuple):
    """Holds a text, and of each of its T tokens where it ends in the text's UTF-8 bytes."""

    text: str
    ends: list[int]


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Says whether a tokenizer is a byte-level one of the tokenizers library."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """Returns the bytes that each token of a byte-level tokenizer stands for; none for an id without a token."""
    added, table = tokenizer.added_tokens_decoder, _bytes_of_characters()
    found = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if index in added:
            found.append(added[index].content.encode())
        else:
            found.append(b"".join(table.get(character, character.encode()) for character in token or ""))
    return found


def spanned_tokens(pieces: Sequence[bytes]) -> SpannedText:
    """Returns the text that tokens' bytes are, and where each token ends in it.

    Bytes that are no UTF-8 become U+FFFD, as tokenizers decode them; where there are such, a character that several
    tokens make together ends with the last of them.
    """
    whole = b"".join(pieces)
    try:
        return SpannedText(whole.decode(), list(accumulate(map(len, pieces))))
    except UnicodeDecodeError:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(pieces) - 1
        texts = [decoder.decode(piece, index == last) for index, piece in enumerate(pieces)]
        return SpannedText("".join(texts), list(accumulate(len(text.encode()) for text in texts)))


def spans_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a text's tokens, without special tokens around it, and where each ends in its bytes.

    The tokens of a byte-level tokenizer tell it themselves, unless it changes the text (puts a space before it, say):
    then, and for others, it is told from the places in the text that the tokenizer keeps.
    """
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if is_byte_level(tokenizer):
        pieces = token_bytes(tokenizer, ids)
        if b"".join(pieces) == text.encode():
            return ids, list(accumulate(map(len, pieces)))
    ends = list(accumulate((len(character.encode()) for character in text), initial=0))
    return ids, list(accumulate((ends[end] for _, end in encoded["offset_mapping"]), max))


@cache
def _bytes_of_characters() -> dict[str, bytes]:
    """Returns the bytes by the characters that byte-level tokens write them as.

    Printable characters of Latin-1 stand for themselves, the other bytes, in order, for characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)}
