"""Calls as models write them whose chat templates TRL does not ship: read, answered, and gone on with.

The templates here are as short as can be. What they write is what the models' own write around calls and results.
"""

import pytest

from support.tokenizer import build_tokenizer
from support.tools import TOOLS, ScriptedEngine
from trl_fast.data.training_chat_template import get_training_chat_template
from trl_fast.rollout import SamplingSettings, Toolbox, ToolLoop
from trl_fast.rollout.responses import find_response_template, parse_message

CHATML = {"user": ("<|im_start|>user\n", "<|im_end|>\n"), "header": "<|im_start|>assistant\n", "end": "<|im_end|>\n"}
MISTRAL = {
    "user": ("[INST]", "[/INST]"),
    "header": "",
    "end": "<|im_end|>",
    "thought": ("[THINK]", "[/THINK]"),
    "result": "[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]",
}
DEEPSEEK = {
    "user": ("<｜User｜>", ""),
    "header": "<｜Assistant｜>",
    "end": "<｜end▁of▁sentence｜>",
    "result": "<｜tool▁output▁begin｜>{{ message.content }}<｜tool▁output▁end｜>",
    # The answer follows at once.
    "header after results": "",
    "calls": ("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
}
NAME, GIVEN = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"
EACH = "{%- for key, value in call.function.arguments.items() -%}"

# How a turn and its calls are written: Jinja for a call and a result; what stands before, between and behind calls.
FAMILIES = {
    "Ministral 3": {**MISTRAL, "call": f"[TOOL_CALLS]{NAME}[ARGS]{GIVEN}"},
    "Mistral Small 3.2": {
        **MISTRAL,
        "call": f"[TOOL_CALLS]{NAME}[CALL_ID]{{{{ call.id }}}}[ARGS]{GIVEN}",
        "result": "[TOOL_RESULTS]{{ message.tool_call_id }}[TOOL_CONTENT]{{ message.content }}[/TOOL_RESULTS]",
        "id": "functi{number:03}",
    },
    "Mistral Nemo": {
        **MISTRAL,
        "call": f'{{"name": "{NAME}", "arguments": {GIVEN}}}',
        "calls": ("[TOOL_CALLS][", ", ", "]"),
        "result": '[TOOL_RESULTS]{"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}'
        "[/TOOL_RESULTS]",
    },
    "Command A": {
        "user": ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "header": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "end": "<|END_OF_TURN_TOKEN|>",
        "thought": ("<|START_THINKING|>", "<|END_THINKING|>"),
        "content": ("<|START_TEXT|>", "<|END_TEXT|>"),
        "call": f'{{"tool_call_id": "{{{{ call.id }}}}", "tool_name": "{NAME}", "parameters": {GIVEN}}}',
        "calls": ("<|START_ACTION|>[", ", ", "]<|END_ACTION|>"),
        "result": "<|START_TOOL_RESULT|>{{ message.tool_call_id }}: {{ message.content }}<|END_TOOL_RESULT|>",
        "id": "{number}",
    },
    "Kimi K2": {
        "user": ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
        "header": "<|im_assistant|>assistant<|im_middle|>",
        "end": "<|im_end|>",
        "call": f"<|tool_call_begin|>functions.{NAME}:{{{{ loop.index0 }}}}<|tool_call_argument_begin|>{GIVEN}"
        "<|tool_call_end|>",
        "calls": ("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"),
        "result": "<|im_system|>tool<|im_middle|>## {{ message.tool_call_id }}: {{ message.content }}<|im_end|>",
        "id": "functions.{name}:{number}",
    },
    "DeepSeek V3.1": {
        **DEEPSEEK,
        "call": f"<｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>{GIVEN}<｜tool▁call▁end｜>",
    },
    "DeepSeek V3": {
        **DEEPSEEK,
        "call": f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\n```json\n{GIVEN}\n```<｜tool▁call▁end｜>",
    },
    "DeepSeek V4": {
        **DEEPSEEK,
        "call": f'<｜DSML｜invoke name="{NAME}">{EACH}<｜DSML｜parameter name="{{{{ key }}}}" string="false">'
        "{{ value }}</｜DSML｜parameter>{% endfor %}</｜DSML｜invoke>",
        "calls": ("<｜DSML｜tool_calls>", "", "</｜DSML｜tool_calls>"),
    },
    "MiniMax M2": {
        **CHATML,
        "call": f'<invoke name="{NAME}">{EACH}<parameter name="{{{{ key }}}}">{{{{ value }}}}</parameter>'
        "{% endfor %}</invoke>",
        "calls": ("<minimax:tool_call>\n", "\n", "\n</minimax:tool_call>"),
    },
    "Seed": {
        "user": ("<seed:bos>user\n", "<seed:eos>"),
        "header": "<seed:bos>assistant\n",
        "end": "<seed:eos>",
        "thought": ("<seed:think>", "</seed:think>"),
        "call": f"<seed:tool_call>\n<function={NAME}>{EACH}<parameter={{{{ key }}}}>{{{{ value }}}}</parameter>"
        "{% endfor %}</function></seed:tool_call>",
    },
    "GLM 4.7 in other turns": {
        **CHATML,
        "call": f"<tool_call>{NAME}{EACH}<arg_key>{{{{ key }}}}</arg_key><arg_value>{{{{ value }}}}</arg_value>"
        "{% endfor %}</tool_call>",
    },
    "Jamba": {
        "user": ("<|bom|><|user|> ", "<|eom|>"),
        "header": "<|bom|><|assistant|>",
        "end": "<|eom|>",
        "call": f'{{"name": "{NAME}", "arguments": {GIVEN}}}',
        "calls": ("<tool_calls>[\n  ", ",\n  ", "\n]</tool_calls>"),
    },
    "OLMo 3": {
        **CHATML,
        "call": f"{NAME}({EACH}{{{{ key }}}}={{{{ value | tojson }}}}{{% if not loop.last %}}, {{% endif %}}"
        "{% endfor %})",
        "calls": ("<function_calls>", "\n", "</function_calls>"),
    },
    "EXAONE 4": {
        "user": ("[|user|]\n", "[|endofturn|]\n"),
        "header": "[|assistant|]\n",
        "end": "[|endofturn|]\n",
        "call": "<tool_call>{{ call.function | tojson }}</tool_call>",
        "calls": ("", "\n", ""),
    },
}
TEMPLATE = """\
{%- for message in messages -%}
{%- set follows = loop.index0 and messages[loop.index0 - 1].role == 'tool' -%}
{%- if message.role == 'user' -%}{{ user[0] }}{{ message.content }}{{ user[1] }}
{%- elif message.role == 'tool' -%}RESULT
{%- else -%}
{{ after if follows else header }}
{%- if message.reasoning_content -%}{{ thought[0] }}{{ message.reasoning_content }}{{ thought[1] }}{%- endif -%}
{%- if message.content -%}{{ content[0] }}{{ message.content }}{{ content[1] }}{%- endif -%}
{%- if message.tool_calls -%}{{ calls[0] }}
{%- for call in message.tool_calls -%}CALL{%- if not loop.last -%}{{ calls[1] }}{%- endif -%}{%- endfor -%}
{{ calls[2] }}{%- endif -%}
{{ end }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ after if messages[-1].role == 'tool' else header }}{%- endif -%}"""
DEFAULTS = {"thought": ("<think>", "</think>"), "content": ("", ""), "calls": ("", "", "")}


def build(name):
    """The small tokenizer with a template that writes as the family does."""
    family = {**DEFAULTS, **FAMILIES[name]}
    family.setdefault("after", family.get("header after results", family["header"]))
    result = family.pop("result", f"{family['user'][0]}{{{{ message.content }}}}{family['user'][1].rstrip()}")
    template = TEMPLATE.replace("RESULT", result).replace("CALL{", family.pop("call") + "{")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": family["end"].strip()})
    settings = "".join(
        f"{{%- set {key} = {value!r} -%}}"
        for key, value in family.items()
        if key not in ("id", "header after results")
    )
    tokenizer.chat_template = settings + template
    return tokenizer


def called(family, *calls):
    """Calls by name and arguments, with ids where the family's models write them."""
    made = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    if "id" not in FAMILIES[family]:
        return made
    ids = [FAMILIES[family]["id"].format(name=name, number=number) for number, (name, _) in enumerate(calls)]
    return [
        {"type": "function", "id": each, "function": call["function"]} for each, call in zip(ids, made, strict=True)
    ]


ASKED = [{"role": "user", "content": "What is 1 and 2?"}]
ANSWERS = {
    "text": {"content": "Three, I think."},
    "thought": {"content": "Yes.", "reasoning_content": "Hm, A."},
    "call": {"calls": [("add", {"a": 1, "b": 2})]},
    "thought and call": {"reasoning_content": "Hm.", "calls": [("look_up", {"word": "sky"})]},
    "text and call": {"content": "Wait.", "calls": [("look_up", {"word": "it's {blue} [x], (y)"})]},
    "two calls": {"calls": [("add", {"a": 1, "b": 2}), ("look_up", {"word": "sea"})]},
    "no arguments": {"calls": [("fail", {})]},
    "quotes": {"calls": [("look_up", {"word": 'a\nb "q" <x>'})]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_read_back(family):
    tokenizer = build(family)
    tokenizer.response_template = find_response_template(tokenizer)
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    for case, answer in ANSWERS.items():
        answer = {"content": "", **answer}
        calls = called(family, *answer.pop("calls", []))
        message = {"role": "assistant", **answer, **({"tool_calls": calls} if calls else {})}
        shown = {**message, "tool_calls": [{"id": "id0000000", **call} for call in calls]}
        text = tokenizer.apply_chat_template([*ASKED, shown], tokenize=False).removeprefix(prompt)
        ids = [tokenizer(text=each)["input_ids"] for each in (text, prompt)]
        assert parse_message(tokenizer, *ids, Toolbox(TOOLS).schemas) == message, case
        for cut in (text[:-12], text[: len(text) // 2], text.replace('"', "", 1), text[3:]):
            read = parse_message(tokenizer, tokenizer(text=cut)["input_ids"], ids[1], Toolbox(TOOLS).schemas)
            assert read["role"] == "assistant" and isinstance(read["content"], str)


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_called_twice_and_the_answer_goes_on(family):
    """The tokens are those of the whole conversation as the template writes it, ids of calls among them."""
    tokenizer = build(family)
    both = [*called(family, ("add", {"a": 1, "b": 2})), *called(family, ("add", {"a": 3, "b": 4}))]
    conversation = [*ASKED]
    for call, result in zip(both, "37", strict=True):
        number = {"tool_call_id": call["id"]} if "id" in call else {}
        conversation.append({"role": "assistant", "content": "", "tool_calls": [call]})
        conversation.append({"role": "tool", "name": "add", **number, "content": result})
    conversation.append({"role": "assistant", "content": "It is 7."})
    # A call or a result that the model gave no id has one for the template alone.
    shown = [*conversation]
    for place, index in ((2, 0), (4, 1)):
        shown[place] = {"tool_call_id": f"{index:09}", **shown[place]}
    whole = tokenizer.apply_chat_template(shown, tokenize=False)
    said = []
    for end in (1, 3, 5):
        before = tokenizer.apply_chat_template(shown[:end], tokenize=False, add_generation_prompt=True)
        said.append(tokenizer.apply_chat_template(shown[: end + 1], tokenize=False).removeprefix(before).rstrip("\n"))
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    engine = ScriptedEngine(tokenizer, *said)
    loop = ToolLoop(engine, Toolbox(TOOLS), tokenizer)
    rollout = loop.generate([tokenizer(text=prompt)["input_ids"]], SamplingSettings(900))
    assert rollout.messages[0] == conversation[1:]
    assert prompt + tokenizer.decode(rollout.completion_ids[0]) == whole.rstrip("\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_assistant_says_is_marked(family):
    """Calls and the end of a turn are learned, results are not."""
    tokenizer = build(family)
    calls = [{"id": "id0000000", **call} for call in called(family, ("add", {"a": 1, "b": 2}))]
    messages = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "tool_call_id": "id0000000", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=get_training_chat_template(tokenizer),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    masked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    learned = tokenizer.decode([token for token, mask in masked if mask])
    expected = ""
    for end in (1, 3):
        before = tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
        expected += tokenizer.apply_chat_template(messages[: end + 1], tokenize=False).removeprefix(before)
    assert learned == expected
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


# The places that count are those of Command R7B's; the prompt for the next answer is at the end of all it writes.
PROMPT_AT_EACH_END = """\
{%- for message in messages %}
{%- if message.role == 'user' -%}<|USER_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>
{%- elif message.role == 'tool' -%}<|SYSTEM_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>
{%- else -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% if message.tool_calls %}<|START_ACTION|>[
    {%- for call in message.tool_calls -%}
    {"tool_call_id": "{{ call.id }}", "tool_name": "{{ call.function.name }}", "parameters": \
{{ call.function.arguments | tojson }}}
    {%- endfor -%}
]<|END_ACTION|><|END_OF_TURN_TOKEN|>{% else %}<|START_RESPONSE|>{{ message.content }}\
<|END_RESPONSE|><|END_OF_TURN_TOKEN|>{% endif %}
{%- endif %}
{%- endfor -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"""


def test_a_template_that_ends_every_conversation_with_the_prompt():
    tokenizer = build_tokenizer(eos_token="<|END_OF_TURN_TOKEN|>")
    tokenizer.chat_template = PROMPT_AT_EACH_END
    call = {"type": "function", "id": "0", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "add", "tool_call_id": "0", "content": "3"}
    answer = {"role": "assistant", "content": "It is 3."}

    def text(*messages):
        return tokenizer.apply_chat_template([*ASKED, *messages], tokenize=False)

    lasting = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    said = [
        whole.removeprefix(before).removesuffix(lasting)
        for before, whole in ((text(), text(asking)), (text(asking, result), text(asking, result, answer)))
    ]
    loop = ToolLoop(ScriptedEngine(tokenizer, *said), Toolbox(TOOLS), tokenizer)
    rollout = loop.generate([tokenizer(text=text())["input_ids"]], SamplingSettings(900))
    assert rollout.messages[0] == [asking, result, answer]
    assert text() + tokenizer.decode(rollout.completion_ids[0]) + lasting == text(asking, result, answer)
    encoded = tokenizer.apply_chat_template(
        [*ASKED, asking, result, answer],
        chat_template=get_training_chat_template(tokenizer),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    masked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, mask in masked if mask]) == "".join(said)


def test_a_format_that_is_not_known_is_named():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = build("Ministral 3").chat_template.replace("[ARGS]", "[GIVEN]")
    with pytest.raises(ValueError, match=r"format that is not known.*Kimi K2; .*It writes a call as .*GIVEN"):
        find_response_template(tokenizer)
