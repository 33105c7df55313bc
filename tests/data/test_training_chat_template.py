"""Marks around what the assistant said: against TRL's hand-made training templates, and where TRL has none."""

from importlib.resources import files

import pytest
import trl.chat_template_utils
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from support.tokenizer import EOS, build_tokenizer
from trl_fast.data.training_chat_template import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

TRL_TEMPLATES = files("trl") / "chat_templates"

SYSTEM = {"role": "system", "content": "Be short."}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


THOUGHT = "<think>\n{}\n</think>\n\nYes."
CONVERSATIONS = {
    "one turn": [user("Hi"), assistant("Yes. ")],
    "system": [SYSTEM, user("Hi"), assistant("Yes.")],
    "two turns": [user("Hi"), assistant("Yes."), user("More?"), assistant("No.")],
    "open end": [user("Hi"), assistant("Yes."), user("More?")],
    "thoughts": [user("Hi"), assistant(THOUGHT.format("A")), user("So?"), assistant(THOUGHT.format("B"))],
    "reasoning": [
        user("Hi"),
        assistant("Yes.", reasoning_content="A"),
        user("So?"),
        assistant("", reasoning_content="B"),
    ],
    "tools": [
        user("1+2?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "3"},
        assistant("3."),
        user("Ok."),
        assistant("Bye."),
    ],
    "several calls": [
        SYSTEM,
        user("1+1?"),
        assistant("Wait.", reasoning_content="A", thinking="A", tool_calls=[CALL, CALL]),
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "tool", "name": "add", "content": "2"},
        assistant("2.", reasoning_content="B", thinking="B"),
    ],
    "ends with a call": [user("1+2?"), assistant("", tool_calls=[CALL])],
}

# Where TRL's training templates are not right, and ours differ.
DIFFERENT = {
    # A tool's closing tag counts as said.
    "deepseek_r1_distill": {"tools", "several calls"},
    # That too, and thoughts that are to be learned are dropped.
    "deepseekv3": {"tools", "several calls", "thoughts"},
}
NAMES = [path.name for path in TRL_TEMPLATES.iterdir()]
FAMILIES = {name.removesuffix("_training.jinja") for name in NAMES if "_training" in name}
# These have marks already, or TRL has no training template.
OTHERS = {name.removesuffix(".jinja") for name in NAMES if name.endswith(".jinja") and "_training" not in name}
OTHERS -= FAMILIES
# These render lists of texts and images only.
WITH_IMAGES = {"idefics3", "llava_next", "smolvlm"}


def in_parts(messages):
    """The messages with an image in the user's."""
    return [
        {
            **message,
            "content": [{"type": "image"}] * (message["role"] == "user")
            + [{"type": "text", "text": message["content"]}],
        }
        for message in messages
    ]


def said(template, messages, tools=None):
    """The rendered text and the parts of it that are marked, or why the template refuses.

    Parts without anything between them are one.
    """
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    try:
        texts, [spans] = render_jinja_template(
            [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **special
        )
    except TemplateError as error:
        return str(error)
    joined = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif start < end:
            joined.append([start, end])
    return texts[0], [texts[0][start:end] for start, end in joined]


def with_template(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_marks_what_trls_training_template_marks(family):
    original = (TRL_TEMPLATES / f"{family}.jinja").read_text("utf-8")
    reference = (TRL_TEMPLATES / f"{family}_training.jinja").read_text("utf-8")
    marked = get_training_chat_template(with_template(original))
    compared = 0
    for name, messages in CONVERSATIONS.items():
        messages = in_parts(messages) if family in WITH_IMAGES else messages
        for tools in (None, TOOLS):
            ours, theirs = said(marked, messages, tools), said(reference, messages, tools)
            assert (ours == theirs) == (name not in DIFFERENT.get(family, ())), name
            compared += isinstance(ours, tuple)
    assert compared >= 8


def test_marks_where_trl_has_no_training_template():
    """Thought, calls, text and end of a turn are marked; the header before it and results of tools are not."""
    said_of = {}
    for family in OTHERS:
        template = (TRL_TEMPLATES / f"{family}.jinja").read_text("utf-8")
        marked = get_training_chat_template(with_template(template)) or template
        for name in ("one turn", "two turns", "open end", "reasoning", "tools", "ends with a call"):
            (text, parts), (plain, _) = (said(each, CONVERSATIONS[name], TOOLS) for each in (marked, template))
            assert text == plain, (family, name)
            said_of[family, name] = parts
    call = "<|tool_call>call:add{a:1}<tool_call|>"
    for family in sorted(OTHERS - {"gemma4_v2"}):
        if family.startswith("gemma4"):
            assert said_of[family, "two turns"] == ["Yes.<turn|>\n", "No.<turn|>\n"]
            assert said_of[family, "tools"] == [call, "3.<turn|>\n", "Bye.<turn|>\n"]
            assert said_of[family, "ends with a call"] == [call]
    assert said_of["gemma4_v5", "reasoning"] == ["Yes.<turn|>\n", "<|channel>thought\nB\n<channel|><turn|>\n"]
    assert said_of["gemma4_v2", "tools"] == [f"{call}<turn|>\n", "3.<turn|>\n", "Bye.<turn|>\n"]
    llama_call = '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    for family in ("llama3_1", "llama3_2"):
        assert said_of[family, "two turns"] == ["Yes.<|eot_id|>", "No.<|eot_id|>"]
        assert said_of[family, "tools"] == [llama_call, "3.<|eot_id|>", "Bye.<|eot_id|>"]
    python_call = "<|tool_call_start|>[add(a=1)]<|tool_call_end|><|im_end|>"
    for family in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"):
        assert said_of[family, "tools"][0].strip() == python_call
    assert {family for family, _ in said_of} == OTHERS


OWN_TEMPLATES = {
    "chatml": """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "default system prompt": """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "header and end token": """{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>

{{ message['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}""",
    "no header": """{% for message in messages %}{% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}""",
    "EOS at the end only": """{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}""",
}
ENDS = {"no header": "<eos>", "header and end token": "<|eot|>", "EOS at the end only": "<|end|>\n"}


@pytest.mark.parametrize("name", OWN_TEMPLATES)
def test_marks_any_template_that_grows_with_the_conversation(name):
    template = OWN_TEMPLATES[name]
    tokenizer = with_template(template)
    marked = get_training_chat_template(tokenizer)
    for messages in (CONVERSATIONS["one turn"], CONVERSATIONS["two turns"], CONVERSATIONS["open end"]):
        text, parts = said(marked, messages)
        assert text == said(template, messages)[0]
        end = ENDS.get(name, "<|im_end|>\n")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert [part.strip() for part in parts][:-1] == [f"{answer}{end}".strip() for answer in answers][:-1]
        assert parts[-1].strip().startswith(answers[-1].strip()) and end.strip() in parts[-1]


def test_a_conversation_that_the_assistant_opens():
    marked = get_training_chat_template(with_template(OWN_TEMPLATES["header and end token"]))
    assert said(marked, [assistant("Hello."), user("Hi")])[1] == ["Hello.<|eot|>"]


def test_the_generation_prompt_of_the_template_is_untouched():
    template = OWN_TEMPLATES["chatml"]
    tokenizer = with_template(template)
    marked = get_training_chat_template(tokenizer)
    for messages in CONVERSATIONS["two turns"], CONVERSATIONS["open end"]:
        plain, other = (
            tokenizer.apply_chat_template(messages, chat_template=t, tokenize=False, add_generation_prompt=True)
            for t in (template, marked)
        )
        assert plain == other


def test_a_template_with_marks_needs_no_other():
    marked = "{% for m in messages %}{%- generation -%}{{ m.content }}{%- endgeneration -%}{% endfor %}"
    assert has_generation_markers(marked) and has_generation_markers({"default": marked})
    assert not has_generation_markers(None) and not has_generation_markers({"tool_use": marked})
    assert get_training_chat_template(with_template(marked)) is None


FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
)
MUTE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [(FORGETFUL, "renders earlier messages differently"), (MUTE, "leaves out"), (None, "has no chat template")],
)
def test_a_template_that_cannot_tell_is_named_with_the_remedy(template, reason):
    with pytest.raises(ValueError, match=f"^processing_class.*{reason}.*(generation|chat_template_path)"):
        get_training_chat_template(with_template(template))


ENDING_INSIDE = "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
ENDING_OUTSIDE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("template", [ENDING_INSIDE, ENDING_OUTSIDE, OWN_TEMPLATES["chatml"], FORGETFUL])
def test_whether_the_stop_token_is_learned(template):
    tokenizer = with_template(template)
    expected = trl.chat_template_utils.is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer) == expected
    assert expected == (template == ENDING_INSIDE)


def test_the_stop_token_is_learned_where_we_put_the_marks():
    tokenizer = with_template(OWN_TEMPLATES["chatml"])
    marked = get_training_chat_template(tokenizer)
    assert EOS == "<|im_end|>" and is_chat_template_stop_token_trained(tokenizer, marked)


def test_gpt_oss_learns_both_of_its_ends():
    # Its last turn ends with the EOS token, the others with another.
    original, reference = ((TRL_TEMPLATES / f"gptoss{kind}.jinja").read_text("utf-8") for kind in ("", "_training"))
    tokenizer = with_template(original)
    extra = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"]
    tokenizer.add_special_tokens({"eos_token": "<|return|>", "additional_special_tokens": extra})
    marked = get_training_chat_template(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer, marked)
    for name in ("one turn", "two turns", "open end"):
        ours, theirs = (
            tokenizer.apply_chat_template(
                CONVERSATIONS[name],
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            for template in (marked, reference)
        )
        assert ours["assistant_masks"] == theirs["assistant_masks"] and any(ours["assistant_masks"]), name
