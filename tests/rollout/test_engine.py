"""Settings and prompts that are refused, and tokens that end a completion."""

import re

import pytest

from support.models import tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.rollout import SamplingSettings, check_prompts, end_token_ids


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_completion_length", 0, "an integer >= 1"),
        ("max_completion_length", None, "an integer >= 1"),
        ("temperature", 0.0, "a finite number > 0"),
        ("top_p", 1.5, "a finite number in (0, 1]"),
        ("top_k", -2, "an integer >= -1"),
        ("min_p", 2.0, "a finite number in [0, 1] or None"),
        ("repetition_penalty", 0.0, "a finite number > 0"),
    ],
)
def test_settings_out_of_range(name, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {expected}, got {value}; ")):
        SamplingSettings(**{"max_completion_length": 4, name: value})


def test_end_tokens_of_model_and_tokenizer():
    model, tokenizer = tiny_model(), build_tokenizer()
    for named in (1, [1], [1, 7], [7], None):
        model.generation_config.eos_token_id = named
        others = {named} if isinstance(named, int) else set(named or ())
        assert end_token_ids(model, tokenizer) == others | {tokenizer.eos_token_id}


def test_end_tokens_that_the_head_lacks():
    model, tokenizer = tiny_model(vocab_size=40), build_tokenizer()
    model.generation_config.eos_token_id = [40, 99]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"none of the end tokens \[40, 99\] is among the 40 tokens of the model's"):
        end_token_ids(model, tokenizer)


def test_no_end_token():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no completion would ever end"):
        end_token_ids(model, build_tokenizer(eos_token=None))


def test_refused_prompts():
    check_prompts([[1] * 6], 4, 10)
    check_prompts([[1] * 600], 4, None)
    with pytest.raises(ValueError, match="there are no prompts"):
        check_prompts([], 4, 10)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        check_prompts([[1], []], 4, 10)
    with pytest.raises(ValueError, match="prompt 1 has 7 tokens, which with max_completion_length=4 .* 10 positions"):
        check_prompts([[1], [1] * 7], 4, 10)
