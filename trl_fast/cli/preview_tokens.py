"""Writes tokens so that each can be seen: its text, where it begins, whether it is learned, special or cut away."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

LEARNED, CONTEXT, CUT = "learned", "not learned", "cut"
# Neighbouring tokens have different shades, so that their borders are seen.
_SHADES = {
    LEARNED: ("black on green3", "black on chartreuse2"),
    CONTEXT: ("white on grey23", "white on grey35"),
    CUT: ("strike white on red3", "strike white on dark_red"),
}
_SPECIAL = "bold "
# Below a token where there is no colour: its first cell, and the others.
_MARKS = {LEARNED: ("^", "~"), CONTEXT: (".", " "), CUT: ("x", "x")}
_SPECIAL_MARK = "#"
LEGEND = "^~~ learned    .   not learned    xxx cut away    .## and ^## a special token"
_NEWLINE = "⏎"
_LONGEST_CHARACTER = 8  # tokens


@dataclass(frozen=True)
class PlacedImage:
    """Holds an image with the indices of its first and last + 1 token among the ids of a part."""

    picture: Image
    start: int
    end: int

    @property
    def text(self) -> str:
        """Returns the mark that stands for the tokens: with width and height in pixels, and how many tokens."""
        width, height = self.picture.size
        count = self.end - self.start
        return f"<image {width}×{height}, {count:,} token{'' if count == 1 else 's'}>"


@dataclass(frozen=True)
class ShownToken:
    """Holds a token as it is shown: its text, whether a line ends with it, its kind, and whether it is special.

    All tokens of an image are shown as one. image: that image; None: it is a single token.
    """

    text: str
    ends_line: bool
    kind: str
    special: bool
    image: PlacedImage | None = None

    @property
    def count(self) -> int:
        """Returns how many tokens it stands for."""
        return 1 if self.image is None else self.image.end - self.image.start

    @property
    def mark(self) -> str:
        """Returns what stands below the text, as many cells wide."""
        first, others = _MARKS[self.kind]
        width = cell_len(self.text)
        return first + (_SPECIAL_MARK if self.special else others) * (width - 1) if width else ""


class TokenTexts:
    """Turns token ids into texts that show what each token holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        self._names = {number: token for token, number in vocabulary.items()}
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._special = {*tokenizer.all_special_ids} | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        self._alphabet = alphabet if any(token.startswith("Ġ") for token in vocabulary) else {}

    def is_special(self, token_id: int) -> bool:
        """Says whether a token stands for no text, such as the one that ends a turn."""
        return token_id in self._special

    def shown(self, ids: Sequence[int], kinds: Sequence[str], images: Sequence[PlacedImage] = ()) -> list[ShownToken]:
        """Returns the tokens as they are shown, those of an image as one; images: in the order of their places."""
        found, at = [], 0
        for image in images:
            found += self._of_text(ids[at : image.start], kinds[at : image.start])
            found.append(ShownToken(image.text, False, kinds[image.end - 1], True, image))
            at = image.end
        return found + self._of_text(ids[at:], kinds[at:])

    def _of_text(self, ids: Sequence[int], kinds: Sequence[str]) -> list[ShownToken]:
        """Returns tokens of text; those that make up one character are shown by their bytes."""
        found: list[ShownToken] = []
        pieces = [self._bytes(token) for token in ids]
        at = 0
        while at < len(ids):
            count = _whole_character(pieces[at:])
            if count == 1:
                texts = [_visible(pieces[at].decode())]
            else:
                texts = [f"⟨{piece.hex(' ').upper()}⟩" for piece in pieces[at : at + max(count, 1)]]
                texts[-1] += f"={_visible(b''.join(pieces[at : at + count]).decode())}" if count else ""
            for index, text in enumerate(texts, start=at):
                ends = pieces[index].endswith(b"\n") and ids[index] not in self._special
                found.append(ShownToken(text, ends, kinds[index], ids[index] in self._special))
            at += len(texts)
        return found

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._names.get(token_id, f"<{token_id}>")
        if self._alphabet and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def _whole_character(pieces: list[bytes]) -> int:
    """Returns how many of the first tokens make up whole characters; 0 if none do."""
    joined = b""
    for count, piece in enumerate(pieces[:_LONGEST_CHARACTER], start=1):
        joined += piece
        try:
            joined.decode()
        except UnicodeDecodeError:
            continue
        return count
    return 0


def _visible(text: str) -> str:
    """Returns a text in one line, in which white space that cannot be seen and control characters are written out."""
    if text.strip(" ") == "" and len(text) > 1:
        text = "·" * len(text)
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return _NEWLINE
    if character == "\t":
        return "⇥"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") or not cell_len(character)
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def token_lines(tokens: Iterable[ShownToken], width: int, *, coloured: bool) -> Iterator[Text]:
    """Yields lines of tokens at most `width` cells wide; without colours each has a line of marks below it."""
    text, marks, shade = Text(), "", 0

    def finished() -> Iterator[Text]:
        yield text
        if not coloured:
            yield Text(marks.rstrip())

    for token in tokens:
        style = (_SPECIAL if token.special else "") + _SHADES[token.kind][shade]
        shade = 1 - shade
        for character, mark in _cells(token):
            if text.cell_len + cell_len(character) > width:
                yield from finished()
                text, marks = Text(), ""
            text.append(character, style if coloured else "")
            marks += mark
        if token.ends_line:
            yield from finished()
            text, marks = Text(), ""
    if text:
        yield from finished()


def _cells(token: ShownToken) -> Iterator[tuple[str, str]]:
    """Yields the characters of a token with the marks below each."""
    marks = token.mark
    for character in token.text:
        width = cell_len(character)
        yield character, marks[:width]
        marks = marks[width:]


def legend(*, coloured: bool) -> Text:
    """Returns the line that says how tokens are marked."""
    if not coloured:
        return Text(LEGEND)
    text = Text()
    for kind, shades in _SHADES.items():
        text.append(f" {kind} ", shades[0])
        text.append("  ")
    text.append(" special ", f"{_SPECIAL}{_SHADES[CONTEXT][0]}")
    return text.append("  (each token in its own shade)")
