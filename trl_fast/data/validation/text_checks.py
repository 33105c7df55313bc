"""Checks the text of one row."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import cache

from .findings import Hits, Kind, quote
from .preference_record import SIDES, Context, Record

NEAR_IDENTICAL_SHARE = 0.95
NEAR_IDENTICAL_MIN_WORDS = 20
MOST_COMPARED_WORDS = 400
REPEATED_PROMPT_MIN_CHARACTERS = 8
SCRIPT_MIN_LETTERS = 4
# Japanese mixes kana and Chinese characters; so much kana among them makes a text Japanese.
KANA_SHARE = 0.1

IDENTICAL = Kind(
    "identical_pair", "error", "chosen equals rejected", "Remove these rows: they hold no preference to learn."
)
NEAR_IDENTICAL = Kind(
    "near_identical_pair",
    "warning",
    "chosen and rejected nearly equal",
    "Look at them: is the small difference the one that should be learned? If not, remove them.",
)
EMPTY_RESPONSE = Kind(
    "empty_response", "error", "empty response", "Fill the response or remove the row; training refuses such rows."
)
EMPTY_PROMPT = Kind(
    "empty_prompt", "warning", "empty prompt", "Fill the prompt, or make sure that responses without one are meant."
)
PROMPT_REPEATED = Kind(
    "prompt_in_response",
    "warning",
    "responses begin with the prompt",
    "Cut the prompt off the responses, or drop the prompt column: it is found again as their common beginning.",
)
SCRIPTS_DIFFER = Kind(
    "scripts_differ",
    "warning",
    "chosen and rejected in different scripts",
    "Check that the preference is not for a language; remove the rows if it is.",
)
NUL = Kind("nul_characters", "warning", "NUL characters", "Strip them: text does not have any; see how it was read.")
CONTROL = Kind(
    "control_characters", "warning", "control characters", "Strip them (tab and line breaks are fine and not counted)."
)
REPLACEMENT = Kind(
    "replacement_characters",
    "warning",
    "replacement characters (U+FFFD)",
    "The text was decoded wrongly before: read its source again, with the right encoding.",
)
SURROGATE = Kind(
    "lone_surrogates",
    "error",
    "lone surrogates",
    "Not Unicode text: tokenizers fail on it. Repair or remove the rows.",
)
PRIVATE_USE = Kind(
    "private_use_characters",
    "info",
    "private-use or unassigned code points",
    "They mean nothing outside their font or program: see what they stand for.",
)


def identical_pair(record: Record, context: Context) -> Hits:
    """Finds pairs whose two responses are the same, character for character."""
    if record.paired and record.completions["chosen"] == record.completions["rejected"]:
        yield IDENTICAL, quote(record.response("chosen"))


def near_identical_pair(record: Record, context: Context) -> Hits:
    """Finds pairs that differ only in case, spacing or final punctuation, or that share nearly all words."""
    if not record.paired or record.completions["chosen"] == record.completions["rejected"]:
        return
    chosen, rejected = (record.response(column) for column in SIDES)
    if not chosen.strip() or not rejected.strip():
        return
    if _loosely(chosen) == _loosely(rejected):
        yield NEAR_IDENTICAL, "they differ in case, spacing or final punctuation"
        return
    chosen_words, rejected_words = chosen.split(), rejected.split()
    if min(len(chosen_words), len(rejected_words)) >= NEAR_IDENTICAL_MIN_WORDS:
        share = word_similarity(chosen_words, rejected_words, NEAR_IDENTICAL_SHARE)
        if share >= NEAR_IDENTICAL_SHARE:
            yield NEAR_IDENTICAL, f"they share {share:.0%} of their words"


def _loosely(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .!?…。")


def word_similarity(first: list[str], second: list[str], at_least: float) -> float:
    """Computes 2 × words in common, in order / all words: 1 for equal lists, 0 without a common word.

    Two lists that cannot reach `at_least` are given an upper bound instead, which is cheap. Between their common
    beginning and end at most MOST_COMPARED_WORDS words of each are aligned, which bounds the cost of a pair; what lies
    beyond counts as different.
    """
    total = len(first) + len(second)
    bound = 2 * sum((Counter(first) & Counter(second)).values()) / total
    if bound < at_least:
        return bound
    start = _common_start(first, second)
    end = _common_start(first[start:][::-1], second[start:][::-1])
    middle, other_middle = (words[start : len(words) - end][:MOST_COMPARED_WORDS] for words in (first, second))
    blocks = SequenceMatcher(None, middle, other_middle, autojunk=False).get_matching_blocks()
    return 2 * (start + end + sum(block.size for block in blocks)) / total


def _common_start(first: list[str], second: list[str]) -> int:
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def empty_response(record: Record, context: Context) -> Hits:
    """Finds responses without any visible character; messages that only call a tool are not empty."""
    for column, value in record.completions.items():
        calls_tool = isinstance(value, list) and any(message.get("tool_calls") for message in value)
        if not record.texts[column].strip() and not calls_tool:
            yield EMPTY_RESPONSE, column


def empty_prompt(record: Record, context: Context) -> Hits:
    """Finds text without a prompt: an empty one, or an implicit one that the responses have no beginning for."""
    if isinstance(record.prompt, str) and not record.prompt.strip():
        yield EMPTY_PROMPT, ""


def prompt_repeated(record: Record, context: Context) -> Hits:
    """Finds text whose responses all repeat the prompt: trained on, it would stand there twice."""
    prompt = record.texts["prompt"].strip()
    if record.conversational or len(prompt) < REPEATED_PROMPT_MIN_CHARACTERS:
        return
    if all(record.texts[column].lstrip().startswith(prompt) for column in record.completions):
        yield PROMPT_REPEATED, quote(prompt)


def scripts_differ(record: Record, context: Context) -> Hits:
    """Finds pairs whose responses are mostly in different scripts.

    Scripts are not languages: English and French do not differ.
    """
    if record.paired:
        scripts = [main_script(record.characters[column]) for column in SIDES]
        if None not in scripts and scripts[0] != scripts[1]:
            yield SCRIPTS_DIFFER, " / ".join(map(str, scripts))


def main_script(characters: Counter[str]) -> str | None:
    """Returns the script of more than half of the letters; "mixed" if there is none.

    None stands for fewer than SCRIPT_MIN_LETTERS letters.

    characters: how often each character occurs. The script is read off the first word of a letter's Unicode name
    (LATIN, CYRILLIC, HANGUL, CJK, …), with kana and Chinese characters together as "Japanese" where kana has a share.
    """
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        script = _script(character)
        if script:
            scripts[script] += count
    letters = scripts.total()
    if letters < SCRIPT_MIN_LETTERS:
        return None
    if scripts["Kana"] >= KANA_SHARE * (scripts["Kana"] + scripts["Han"]) > 0:
        scripts["Japanese"] = scripts.pop("Kana") + scripts.pop("Han", 0)
    script, count = scripts.most_common(1)[0]
    return script if count > letters / 2 else "mixed"


@cache
def _script(character: str) -> str | None:
    """Returns the script of a letter, None for anything else. Different characters are few, hence the cache."""
    if not character.isalpha():
        return None
    words = unicodedata.name(character, "UNKNOWN").split()
    word = next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "OLD")), words[0])
    if "KATAKANA" in word or word == "HIRAGANA":
        return "Kana"
    return {"CJK": "Han"}.get(word, word.capitalize())


def strange_characters(record: Record, context: Context) -> Hits:
    """Finds code points that text has no use for."""
    for column, characters in record.characters.items():
        for kind, found in _strange_kinds(characters):
            yield kind, f"{column}: U+{ord(found):04X}"


def _strange_kinds(characters: Iterable[str]) -> Hits:
    for character in characters:
        category = _category(character)
        if category == "Cc" and character not in "\t\n\r":
            yield NUL if character == "\0" else CONTROL, character
        elif character == "\ufffd":
            yield REPLACEMENT, character
        elif category == "Cs":
            yield SURROGATE, character
        elif category in ("Co", "Cn"):
            yield PRIVATE_USE, character


_category = cache(unicodedata.category)

CONTENT_CHECKS = (
    identical_pair,
    near_identical_pair,
    empty_response,
    empty_prompt,
    prompt_repeated,
    scripts_differ,
    strange_characters,
)
