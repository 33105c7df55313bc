"""The questions about chat templates that TRL 1.16.0 answers for scripts, of tokenizers and processors."""

from importlib.resources import files

import pytest
import torch
import trl.chat_template_utils as theirs

import trl_fast
from support.tokenizer import build_tokenizer
from support.vision_processors import tiny_processor

TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text("utf-8")
    for path in (files("trl") / "chat_templates").iterdir()
    if path.name.endswith(".jinja")
}
# What TRL knows by its text alone, and what its processors are of.
QUICK = ("qwen3", "llama3_1", "deepseekv3", "phi3", "qwen3_training", "cohere2")
PROCESSORS = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5_think": "qwen3_5",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
    "llava_next": "llava_next",
}
QUESTIONS = ("supports_tool_calling", "is_chat_template_prefix_preserving", "is_chat_template_stop_token_trained")
CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SILENT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def answered(function, *arguments):
    """A function's answer, or the name of the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__


def with_template(name):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TEMPLATES)]
)
def test_templates(name):
    for question in QUESTIONS:
        ours, expected = (answered(getattr(each, question), with_template(name)) for each in (trl_fast, theirs))
        assert ours == expected, question
    assert trl_fast.has_generation_markers(TEMPLATES[name]) == theirs.has_generation_markers(TEMPLATES[name])
    given = with_template(name)
    expected = answered(theirs.add_response_schema, with_template(name))
    # TRL knows its own training templates by no response template, and Gemma's of diffusion neither.
    if expected != "ValueError":
        assert trl_fast.add_response_schema(given) is given and given.response_template


@pytest.mark.parametrize(
    "name",
    [name if name in ("qwen3_vl", "smolvlm") else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS],
)
def test_processors(name):
    def processor():
        made = tiny_processor(PROCESSORS[name])
        made.chat_template = TEMPLATES[name]
        return made

    for question in QUESTIONS:
        ours, expected = (answered(getattr(each, question), processor()) for each in (trl_fast, theirs))
        # TRL's question about prefixes has an image, which a tiny processor may want in other words.
        assert ours == expected or (question == QUESTIONS[1] and expected == "ValueError"), question
    given, known = processor(), answered(theirs.add_response_schema, processor()) != "ValueError"
    if known:
        assert trl_fast.add_response_schema(given) is given and given.tokenizer.response_template
    marked = trl_fast.get_training_chat_template(processor())
    given.chat_template = marked or given.chat_template
    assert trl_fast.has_generation_markers(given.chat_template)


@pytest.mark.parametrize("template", [None, CALLING, SILENT, SILENT + "{{ raise_exception('no') }}"])
def test_templates_that_nobody_knows(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    expected = theirs.supports_tool_calling(tokenizer)
    assert trl_fast.supports_tool_calling(tokenizer) == expected == (template == CALLING)
    if template in (CALLING, SILENT):
        preserves = theirs.is_chat_template_prefix_preserving(tokenizer)
        assert trl_fast.is_chat_template_prefix_preserving(tokenizer) == preserves
    if not expected:
        with pytest.raises(ValueError, match="tools: the"):
            trl_fast.add_response_schema(tokenizer)
        return
    ids = tokenizer('<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call><|im_end|>')["input_ids"]
    reader = trl_fast.add_response_schema(tokenizer)
    # As the docstring of TRL's has it; without a prefix TRL itself reads no calls.
    for prefix in (tokenizer("<|im_start|>assistant\n")["input_ids"], None):
        message = trl_fast.parse_response(reader, ids, prefix)
        vectors = [None if each is None else torch.tensor(each) for each in (ids, prefix)]
        assert trl_fast.parse_response(reader, *vectors) == message
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 3}}
    for batch in ([ids, ids], torch.tensor([ids, ids])):
        with pytest.raises(TypeError, match="ids: expected the tokens of one completion, .* a batch of 2 such lists"):
            trl_fast.parse_response(reader, batch)


THOUGHTS = {
    "deepseek_r1_distill": ["two and two\n</think>\n\nFour.{end}", "Four.{end}", "</think>Four.{end}", "Fo"],
    "nemotron_3_nano": ["two and two\n</think>Four.{end}\n", "Four.{end}", "</think>\nFour.{end}", "Fo"],
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_that_the_prompt_opens(name):
    end = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>"}.get(name, "<|im_end|>")
    tokenizers = [with_template(name), with_template(name)]
    theirs.add_response_schema(tokenizers[0])
    trl_fast.add_response_schema(tokenizers[1])
    question = [{"role": "user", "content": "2 + 2?"}]
    prompt = tokenizers[0].apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    for text in THOUGHTS[name]:
        ids, prefix = (
            tokenizers[0](each, add_special_tokens=False)["input_ids"] for each in (text.format(end=end), prompt)
        )
        expected = theirs.parse_response(tokenizers[0], ids, prefix)
        assert trl_fast.parse_response(tokenizers[1], ids, prefix) == expected, text


def test_a_prompt_that_ends_within_the_opened_thought():
    tokenizer = trl_fast.add_response_schema(with_template("nemotron_3_nano"))
    ids, prefix = (
        tokenizer(text)["input_ids"] for text in ("</think>Four.<|im_end|>", "<|im_start|>assistant\n<think>")
    )
    assert trl_fast.parse_response(tokenizer, ids, prefix) == {"role": "assistant", "content": "Four."}


def test_calls_in_a_format_that_is_not_known_are_not_taken_for_thoughts():
    with pytest.raises(ValueError, match="in a format that is not known"):
        trl_fast.add_response_schema(with_template("deepseekv3"))
