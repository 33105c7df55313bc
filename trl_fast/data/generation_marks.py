"""Puts generation marks into chat templates of known families, at the places where they write the assistant's turns.

It serves templates that write a turn differently once others follow: they drop its thought, put tools' results into
it, or end it with the next speaker's role. Places are found by a few lines of the template, so that revisions and
fine-tuned models that share these lines are served too.
"""

from __future__ import annotations

START, END = "{%- generation -%}", "{%- endgeneration -%}"


def _around(text: str) -> tuple[str, str]:
    return text, f"{START}{text}{END}"


def _of_model(text: str) -> tuple[str, str]:
    """Marks what Gemma 4 writes for every role where the role is the model's."""
    return text, f"{{%- if role == 'model' -%}}{START}{text}{END}{{%- else -%}}{text}{{%- endif -%}}"


def _after_header(header: str, text: str) -> tuple[str, str]:
    """Marks a turn but its header, which one expression writes together."""
    return f"{{{{- '{header}{text} }}}}", f"{{{{- '{header}' }}}}{START}{{{{- '{text} }}}}{END}"


def _next_speaker(before: str, role: str, after: str = "") -> tuple[str, str]:
    """Marks the role that follows an assistant's turn: GLM 4 ends its turns by it. A newline behind it stays."""
    follows = "{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}"
    either = f"{follows}{START}{{{{- '{role}' -}}}}{END}{{%- else -%}}{{{{- '{role}' -}}}}{{%- endif -%}}"
    return f"{before}{role}{after}", f"{before}{either}" + after.replace("\n", "{{ '\\n' }}")


_CHATML = "<|im_start|>assistant\\n"
_GEMMA_THOUGHT = _around("{{- '<|channel>thought\\n' + thinking_text + '\\n<channel|>' -}}")
_GEMMA_TURN = (
    ("{{- '<|tool_call>call:'", f"{START}{{{{- '<|tool_call>call:'"),
    ("{{- '}<tool_call|>' -}}", f"{{{{- '}}<tool_call|>' -}}}}{END}"),
    # Behind twelve spaces it ends a turn, behind four the system prompt.
    ("            {{- '<turn|>\\n' -}}", "            " + _of_model("{{- '<turn|>\\n' -}}")[1]),
)
_GEMMA_CONTENT = (
    _around("{{- strip_thinking(message['content']) -}}"),
    _around("{{- strip_thinking(item['text']) -}}"),
)

# What to replace by what, by family. The first family serves all of whose places a template has.
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "Nemotron 3": (
        ("{%- set include_content = ", f"{START}{{%- set include_content = "),
        (
            "{{- '<|im_end|>\\n' }}\n        {%- else %}",
            f"{{{{- '<|im_end|>\\n' }}}}{END}\n        {{%- else %}}",
        ),
        (
            f"{{{{- '{_CHATML}' ~ (content | default('', true) | string | trim) ~ '<|im_end|>\\n' }}}}",
            f"{{{{- '{_CHATML}' }}}}{START}"
            f"{{{{- (content | default('', true) | string | trim) ~ '<|im_end|>\\n' }}}}{END}",
        ),
        (
            f"{{{{- '{_CHATML}' ~ c ~ '<|im_end|>\\n' }}}}",
            f"{{{{- '{_CHATML}' }}}}{START}{{{{- c ~ '<|im_end|>\\n' }}}}{END}",
        ),
        _after_header(_CHATML, "<|im_end|>\\n'"),
    ),
    "GLM 4": (
        _next_speaker("{%- if m.role == 'user' -%}", "<|user|>", "\n{{ visible_text"),
        _next_speaker("{%- elif m.role == 'system' -%}\n", "<|system|>", "\n{{ visible_text"),
        _next_speaker("{%- else -%}\n", "<|observation|>", "{% for tr in m.content %}"),
        (
            "{{- '<|observation|>' }}",
            _next_speaker("", "<|observation|>")[1],
        ),
        (
            "{%- if loop.index0 > ns.last_user_index and reasoning_content -%}",
            f"{START}{{%- if loop.index0 > ns.last_user_index and reasoning_content -%}}",
        ),
        (
            "{%- elif m.role == 'tool' -%}",
            "{%- if loop.last -%}{{- '<|observation|>' if m.tool_calls else '<|user|>' -}}{%- endif -%}"
            f"{END}{{%- elif m.role == 'tool' -%}}",
        ),
    ),
    "Gemma 4": (*_GEMMA_TURN, _GEMMA_THOUGHT, _of_model("{{- captured_content -}}")),
    "Gemma 4, second revision": (*_GEMMA_TURN, _GEMMA_THOUGHT, *_GEMMA_CONTENT),
    "Gemma 4, as released": (*_GEMMA_TURN, *_GEMMA_CONTENT),
    # The blank behind the end token is a part of the next turn's first token.
    "LLaVA-NeXT": (
        (
            "{{ ' ' + message['content'][0]['text'] + '</s> '}}",
            f"{START}{{{{ ' ' + message['content'][0]['text'] + '</s>' }}}}{END}{{{{ ' ' }}}}",
        ),
    ),
    # It writes the generation prompt at the end of every conversation.
    "Command R7B": (
        ("<|CHATBOT_TOKEN|>{% if message.tool_calls %}", f"<|CHATBOT_TOKEN|>{START}{{% if message.tool_calls %}}"),
        (
            "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>{% endif %}",
            f"<|END_RESPONSE|><|END_OF_TURN_TOKEN|>{{% endif %}}{END}",
        ),
    ),
    # The role counts as said, as in TRL.
    "gpt-oss": (
        (
            "{#- Checks to ensure the messages are being passed in the format we expect #}",
            START,
        ),
        (
            "{%- elif message.role == 'tool' -%}\n        {%- if last_tool_call.name is none %}",
            f"{END}{{%- elif message.role == 'tool' -%}}\n        {{%- if last_tool_call.name is none %}}",
        ),
    ),
}


def with_marks(template: str) -> str | None:
    """Returns a template of a known family with marks around what the assistant says; None if it is of none."""
    for places in PLACES.values():
        if all(place in template for place, _ in places):
            for place, marked in places:
                template = template.replace(place, marked)
            return template
    return None
