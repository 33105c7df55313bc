"""Where tokens end in the bytes of a text, whatever tokenizer wrote them."""

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tokenizer import build_other_tokenizer, build_tokenizer
from trl_fast.data.byte_spans import is_byte_level, spanned_tokens, spans_of_text, token_bytes

TEXTS = ["What color? It is blue", "é 日本 🎈 \n\n x<|im_end|>\n", "", " ", "<|im_start|>user\nHi"]


@pytest.mark.parametrize("build", [build_tokenizer, build_other_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_tell_the_bytes_of_their_text(build, text):
    tokenizer = build()
    ids, ends = spans_of_text(tokenizer, text)
    pieces = token_bytes(tokenizer, ids)
    assert b"".join(pieces) == text.encode() and is_byte_level(tokenizer)
    assert ends == [sum(map(len, pieces[: place + 1])) for place in range(len(ids))]
    assert spanned_tokens(pieces) == (text, ends)


def test_any_tokens_have_the_text_that_the_tokenizer_decodes():
    tokenizer, draw = build_tokenizer(), random.Random(0)
    broken = 0
    for _ in range(100):
        ids = [draw.randrange(len(tokenizer)) for _ in range(12)]
        text, ends = spanned_tokens(token_bytes(tokenizer, ids))
        assert text == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert ends[-1] == len(text.encode()) and ends == sorted(ends)
        broken += "\ufffd" in text
    assert broken > 20


def test_a_token_of_other_letters_has_its_bytes():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁text｜>"]})
    ids, ends = spans_of_text(tokenizer, "a<｜end▁of▁text｜>")
    assert token_bytes(tokenizer, ids) == [b"a", "<｜end▁of▁text｜>".encode()]
    assert ends == [1, 1 + len("<｜end▁of▁text｜>".encode())]


def test_a_tokenizer_that_changes_the_text_tells_by_its_places():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ids, ends = spans_of_text(tokenizer, "blue é")
    assert b"".join(token_bytes(tokenizer, ids)) == " blue é".encode()
    assert ends[-1] == len("blue é".encode()) and ends[0] <= len("blue")


def test_a_tokenizer_of_words_is_none_of_bytes():
    words = Tokenizer(models.WordLevel({"é": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert not is_byte_level(tokenizer)
    assert spans_of_text(tokenizer, "é b")[1] == [2, 4]
