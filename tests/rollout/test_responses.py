"""Answers in the format of every chat template that TRL ships: read as TRL reads them, and gone on with."""

from importlib.resources import files
from types import SimpleNamespace

import pytest
import trl
import trl.chat_template_utils as theirs
from jinja2 import TemplateError

import trl_fast as chat
from support.tokenizer import EOS, build_tokenizer
from support.tools import TOOLS, ScriptedEngine
from trl_fast.rollout import SamplingSettings, Toolbox, ToolLoop
from trl_fast.rollout.responses import RESPONSE_TEMPLATES, find_response_template, parse_message, tool_turn_ids

TEMPLATES = {
    path.name.removesuffix(".jinja"): path.read_text("utf-8")
    for path in (files("trl") / "chat_templates").iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
}
# The EOS token of the models, by how the template's name begins; that of ChatML for the others.
ENDS = {
    "llama3": "<|eot_id|>",
    "gemma4": "<eos>",
    "diffusion": "<eos>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "phi": "<|end|>",
}
FORMATS = {
    "qwen2_5 qwen3 qwen3_instruct_2507 qwen3_vl": "Qwen 2.5, Qwen 3, Hermes",
    "qwen3_5_think qwen3_5_nothink qwen3_6 qwen3_8": "Qwen 3.5",
    "nemotron_3_nano nemotron_3_super nemotron_3_ultra nemotron_3_5_lightning": "Nemotron 3",
    "glm4moe": "GLM 4",
    "llama3_1 llama3_2": "Llama 3.1, Llama 3.2",
    "gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5 diffusion_gemma": "Gemma 4",
    "lfm2_v2 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl": "LFM 2",
    "gptoss": "gpt-oss",
}
READ = {name: kind for names, kind in FORMATS.items() for name in names.split()}
# The first of a format; the others are slow tests.
NAMES = [
    name if index == 0 else pytest.param(name, marks=pytest.mark.slow)
    for names in FORMATS
    for index, name in enumerate(names.split())
]


def known(name):
    """The small tokenizer with a chat template of TRL's folder and its model's EOS token."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    end = next((end for start, end in ENDS.items() if name.startswith(start)), EOS)
    more = ["<|observation|>", "<|tool_response>", "<turn|>", "<|call|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": more})
    return tokenizer


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = [{"role": "user", "content": "What is 1 and 2?"}]
THOUGHT = {"reasoning_content": "Hm, A.", "thinking": "Hm, A."}
NESTED = {"x": [1, {"a": "b, c"}], "y": None, "z": {}, "t": True, "u": 1.5, "s": "12"}
ANSWERS = {
    "text": {"content": "Three, I think."},
    "thought": {"content": "Yes.", **THOUGHT},
    "call": {"content": "", "tool_calls": [call("add", a=1, b=2)]},
    "thought and call": {"content": "", **THOUGHT, "tool_calls": [call("look_up", word="sky")]},
    "text and call": {"content": "Wait.", "tool_calls": [call("look_up", word="it's {blue} [x] (y)")]},
    "two calls": {"content": "", "tool_calls": [call("add", a=1, b=2), call("look_up", word="sea")]},
    "no arguments": {"content": "", "tool_calls": [call("fail")]},
    "nested arguments": {"content": "", "tool_calls": [call("unknown", **NESTED)]},
    "quotes": {"content": "", "tool_calls": [call("look_up", word='a\nb "q" <x>')]},
}


def written(tokenizer, answer, **options):
    """The prompt, and what the template writes of an answer after it; None if the template refuses the answer."""
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False, **options)
    try:
        whole = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", **answer}], tokenize=False, **options)
    except TemplateError:
        return prompt, None
    # Some end the prompt with a thought that the answer does not have there.
    return prompt, whole.removeprefix(prompt) if whole.startswith(prompt) else whole.rpartition("</think>")[2]


def broken(text):
    """Cut off, said twice, gone on with, without what makes a call a call: as models write it."""
    return [text[:-9], text[: len(text) // 2], text + text, text + " Bye.", text.replace(":", " ", 1), text[3:]]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_read_as_trl_reads_them(name):
    tokenizer = known(name)
    template = find_response_template(tokenizer)
    assert template is RESPONSE_TEMPLATES[READ[name]]
    if name == "diffusion_gemma":
        # TRL has no response template for it; it writes as Gemma 4 does.
        reference = theirs.add_response_schema(known("gemma4")).response_template
    else:
        reference = theirs.add_response_schema(tokenizer).response_template
    schemas = Toolbox(TOOLS).schemas
    read = []
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        for case, answer in ANSWERS.items():
            prompt, text = written(tokenizer, answer, **options)
            prompt_ids = tokenizer(text=prompt)["input_ids"]
            for each in [] if text is None else [text, *broken(text)]:
                ids = tokenizer(text=each)["input_ids"]
                # TRL fails on nothing at all, and takes the second of two functions in plain text for a call of LFM 2.
                if not ids or (READ[name] == "LFM 2" and "<|tool_call_start|>" not in each):
                    continue
                tokenizer.response_template = template
                message = parse_message(tokenizer, ids, prompt_ids, schemas)
                tokenizer.response_template = reference
                assert message == theirs.parse_response(tokenizer, ids, prefix=prompt_ids, tools=TOOLS), (case, each)
                read.append((case, each == text, message))
    for case in ("call", "thought and call"):
        calls = [m.get("tool_calls") for which, whole, m in read if which == case and whole]
        assert calls and all(each == ANSWERS[case]["tool_calls"] for each in calls)
    # Of LFM 2's the beginning is read too.
    assert READ[name] == "LFM 2" or any(not w and "tool_calls" not in m for case, w, m in read if case == "call")
    assert all(message["content"] == "Three, I think." for case, whole, message in read if case == "text" and whole)


def test_other_templates_are_answered_as_trl_answers():
    """Whether tools can be called, whether results change what stands before them; of all templates."""
    for name in TEMPLATES:
        tokenizer = known(name)
        assert chat.supports_tool_calling(tokenizer) == theirs.supports_tool_calling(tokenizer), name
        try:
            expected = theirs.is_chat_template_prefix_preserving(tokenizer)
        except TemplateError:
            continue
        assert chat.is_chat_template_prefix_preserving(tokenizer) == expected, name


# How the model ends a turn with calls, if it does not write what the template writes behind them.
CALL_ENDS = {"GLM 4": "<|observation|>"}
# They write a turn with calls in another way once its results follow: without an empty thought, or with one.
OTHER_HISTORY = {name for name, kind in READ.items() if name == "qwen3" or kind == "Nemotron 3"}


@pytest.mark.parametrize("name", NAMES)
def test_tools_are_called_and_the_answer_goes_on(name):
    """The tokens are those of the whole conversation as the template writes it."""
    tokenizer = known(name)
    asking = {"role": "assistant", "content": "", "tool_calls": [call("add", a=1, b=2)]}
    result = {"role": "tool", "name": "add", "content": "3"}
    prompt, first = written(tokenizer, asking)
    # The model stops at its end token: newlines behind it are the template's.
    first = first.rstrip("\n") + CALL_ENDS.get(READ[name], "")
    last = written(tokenizer, {"content": "It is 3."})[1].rstrip("\n")
    engine = ScriptedEngine(tokenizer, first, last)
    loop = ToolLoop(engine, Toolbox(TOOLS), tokenizer)
    rollout = loop.generate([tokenizer(text=prompt)["input_ids"]], SamplingSettings(400))
    assert [message["role"] for message in rollout.messages[0]] == ["assistant", "tool", "assistant"]
    assert rollout.messages[0][1] == result and rollout.messages[0][2]["content"] == "It is 3."
    assert (rollout.calls, rollout.failures) == (1, 0)
    ids, mask = rollout.completion_ids[0], rollout.mask[0]
    learned = [token for token, sampled in zip(ids, mask, strict=True) if sampled]
    assert tokenizer.decode(learned) == first + last
    whole = tokenizer.apply_chat_template([*ASKED, asking, result], add_generation_prompt=True, tokenize=False)
    if name not in OTHER_HISTORY:
        assert prompt + tokenizer.decode(ids) == whole + last


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_results_are_those_of_trl(name):
    """By its trainer, with its training template where the model's own does not serve."""
    tokenizer = known(name)
    if name == "gemma4_v2":
        # TRL leaves out the newline behind the token that ends the call's turn.
        tokenizer.eos_token = "<turn|>"
    preserved = theirs.is_chat_template_prefix_preserving(tokenizer)
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        _tokenizer=tokenizer,
        _is_vlm=False,
        chat_template_kwargs={},
        chat_template=None if preserved else theirs.get_training_chat_template(tokenizer),
    )
    results = [{"role": "tool", "name": f"f{i}", "content": f"It is {i}."} for i in range(2)]
    for messages in (results[:1], results):
        ours, expected = tool_turn_ids(tokenizer, messages), trl.GRPOTrainer._get_tool_suffix_ids(trainer, messages)
        if READ[name] == "Gemma 4" and len(messages) == 2:
            # TRL gives the result of the second function the name of the first.
            text = tokenizer.decode(expected)
            expected = tokenizer(text="response:f1{".join(text.rsplit("response:f0{", 1)))["input_ids"]
        assert ours == expected


def test_an_end_token_that_does_not_end_calls():
    """Gemma 4 with the EOS token that its chats end with: TRL writes the call a second time."""
    results = [{"role": "tool", "name": "add", "content": "3"}]
    tokenizer = known("gemma4")
    expected = tool_turn_ids(tokenizer, results)
    tokenizer.eos_token = "<turn|>"
    assert tool_turn_ids(tokenizer, results) == expected
    assert tokenizer.decode(expected) == 'response:add{value:<|"|>3<|"|>}<tool_response|>'


# The roles' tags of Granite 4, around calls as Qwen's.
OWN_TURNS = """\
{%- for message in messages %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""


@pytest.mark.parametrize("opened", ["", "<think>\\n"])
def test_calls_in_turns_of_another_kind(opened):
    """No format of the list: its turns are found out."""
    tokenizer = build_tokenizer(eos_token="<|end_of_text|>")
    tokenizer.chat_template = OWN_TURNS.replace(
        "<|end_of_role|>' }}{%- endif", f"<|end_of_role|>{opened}' }}}}{{%- endif"
    )
    asking = {"role": "assistant", "content": "Wait.", "tool_calls": [call("add", a=1, b=2), call("fail")]}
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(opened.replace("\\n", "\n"))
    whole = tokenizer.apply_chat_template([*ASKED, asking], tokenize=False)
    thought = "Hm.\n</think>\n\n" if opened else ""
    first = thought + whole.partition("assistant<|end_of_role|>")[2].rstrip("\n")
    engine = ScriptedEngine(tokenizer, first, thought + "It is 3.<|end_of_text|>")
    rollout = ToolLoop(engine, Toolbox(TOOLS), tokenizer).generate(
        [tokenizer(text=prompt)["input_ids"]], SamplingSettings(400)
    )
    said = rollout.messages[0][0]
    assert said == {**asking, **({"reasoning_content": "Hm."} if opened else {})}
    assert [message.get("content") for message in rollout.messages[0][1:]] == ["3", "{'error': 'no luck'}", "It is 3."]
    between = "<|start_of_role|>tool<|end_of_role|>3<|end_of_text|>\n"
    assert f"{first}\n{between}" in tokenizer.decode(rollout.completion_ids[0])
