"""GRPO with tools that give images, against TRL 1.16.0 for the same turns."""

import pytest
import trl

import trl_fast
import trl_fast.data.packing as packing
from support.image_rollouts import logs_of, picture_prompts
from support.tools import ToolPolicy, call, questions
from support.training import assert_same_logs, make_trainer
from support.vision_processors import pictures, save_tiny_vision_model, tiny_processor
from trl_fast.rollout.responses import RESPONSE_TEMPLATES

END = "<|im_end|>"
SEE, LATER = call("zoom", '{"factor": 2}'), call("zoom", '{"factor": 3}')
TURNS = [
    *(text + END for text in (SEE, LATER, SEE + "\n" + LATER, "Wait. " + SEE)),
    "It is",
    *["It is blue." + END] * 4,
]
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'text' %}{{ part.text }}
{%- endif %}
{%- endfor %}{% endif %}
{%- for call in message.tool_calls %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SETTINGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 200,
    "max_steps": 2,
    "adam_epsilon": 1e-2,
}
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}


def zoom(factor: int) -> list:
    """
    Shows a part of the picture.

    Args:
        factor: How large.
    """
    picture = pictures(1, (28 * factor, 28), seed=factor)[0]
    return [{"type": "text", "text": "seen"}, {"type": "image", "image": picture}]


def processor():
    made = tiny_processor("qwen2_5_vl")
    made.chat_template = made.tokenizer.chat_template = TEMPLATE
    made.tokenizer.response_template = next(iter(RESPONSE_TEMPLATES.values()))
    return made


def sight(completions, **_):
    """By how many pictures of which size were seen."""
    parts = [
        [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        for messages in completions
    ]
    return [sum(part["image"].width / 28 for part in own if part["type"] == "image") + len(own) for own in parts]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_vision_model(tmp_path_factory.mktemp("tiny"), "qwen2_5_vl")


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.setattr("support.tools.TURNS", TURNS)
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)


def make(module, folder, model_path, dataset, **settings):
    given = processor()
    policy = ToolPolicy(given.tokenizer)
    arguments = {"model": model_path, "reward_funcs": sight, "processing_class": given}
    arguments |= {"tools": [zoom], "train_dataset": dataset}
    if module is trl_fast:
        arguments["rollout_engine"] = policy
        policy.generate = lambda ids, settings, images=None: ToolPolicy.generate(policy, ids, settings)
    trainer = make_trainer(module, folder, method="GRPO", arguments=arguments, **{**SETTINGS, **settings})
    if module is trl:
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: (policy.turns(prompt_ids), None)
    return trainer


def test_steps_equal_trl(turns, model_path, tmp_path):
    """Prompts with images of their own, and completions in which tools gave some."""
    logs = []
    for module in (trl, trl_fast):
        settings = {"beta": 0.1, **(OURS if module is trl_fast else {})}
        trainer = make(module, tmp_path / module.__name__, model_path, picture_prompts(), **settings)
        trainer.train()
        logs.append(logs_of(trainer))
    assert logs[1][0]["tools/call_frequency"] > 0.5
    assert_same_logs(logs[1], logs[0])


def test_tools_that_give_images_to_a_model_of_text(turns, model_path, tmp_path):
    with pytest.raises(ValueError, match="tool 'zoom' gave an image, but the model is trained as one of text"):
        make(trl_fast, tmp_path, model_path, questions()).train()
