"""GRPOTrainer with tools, against TRL 1.16.0's for the same turns, and as a person uses it."""

import pandas as pd
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.models import save_tiny_model
from support.rollouts import FixedRollout, color_prompts
from support.tokenizer import EOS
from support.tools import ADD, ANSWER, TOOLS, ToolPolicy, questions, tool_tokenizer
from support.training import assert_same_logs, make_trainer
from trl_fast.data.segments import segments_of
from trl_fast.rollout import Toolbox
from trl_fast.rollout.responses import RESPONSE_TEMPLATES

SETTINGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 90,
    "max_steps": 2,
}
# With these the metrics are TRL's to the last digit.
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}


@pytest.fixture(scope="module")
def tool_model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-tools"), tool_tokenizer())


def talk(completions, completion_ids, **_):
    """By what was said, called and answered."""
    return [
        float(len(str(messages[-1]["content"])) + 3 * len(messages) - len(ids) / 5)
        for messages, ids in zip(completions, completion_ids, strict=True)
    ]


def make(module, folder, model_path, *, policy=None, reward=talk, seen=None, **settings):
    """A trainer whose turns come from a ToolPolicy, and the completions that its reward function sees in `seen`."""
    given = {"tools": TOOLS, "train_dataset": questions()}
    names = ("tools", "train_dataset", "eval_dataset", "rollout_func", "processing_class")
    given |= {name: settings.pop(name) for name in names if name in settings}

    def watching(completions, completion_ids, **columns):
        if seen is not None:
            seen.append((completions, completion_ids))
        return reward(completions=completions, completion_ids=completion_ids, **columns)

    tokenizer = tool_tokenizer()
    if module is trl:
        # TRL knows chat templates by their text.
        tokenizer.response_template = next(iter(RESPONSE_TEMPLATES.values()))
    arguments = {"model": model_path, "reward_funcs": watching, "processing_class": tokenizer, **given}
    policy = policy or ToolPolicy(tokenizer)
    if module is trl_fast:
        arguments["rollout_engine"] = policy
    trainer = make_trainer(module, folder, method="GRPO", arguments=arguments, **{**SETTINGS, **settings})
    if module is trl:
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: (policy.turns(prompt_ids), None)
    return trainer


CASES = {
    "defaults": {},
    "one iteration, truncated are masked": {"max_tool_calling_iterations": 1, "mask_truncated_completions": True},
    "little room, two updates, evaluation": {
        "max_completion_length": 45,
        "num_iterations": 2,
        "learning_rate": 5e-3,
        "eval_dataset": questions(2),
        "per_device_eval_batch_size": 8,
    },
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_it_does_what_trl_does(settings, tool_model_path, tmp_path, monkeypatch):
    # Whatever completions begin alike with is shared.
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    logs, seen = {}, {trl: [], trl_fast: []}
    for module in (trl, trl_fast):
        ours = OURS if module is trl_fast else {}
        trainer = make(module, tmp_path / module.__name__, tool_model_path, seen=seen[module], **ours, **settings)
        trainer.train()
        if "eval_dataset" in settings:
            trainer.evaluate()
        history = trainer.state.log_history
        logs[module] = [{name: value for name, value in log.items() if name != "step_time"} for log in history]
    assert seen[trl_fast] == seen[trl]
    assert any(len(messages) > 2 for completions, _ in seen[trl] for messages in completions)
    assert logs[trl][0]["tools/call_frequency"] > 0 and logs[trl][0]["tools/failure_frequency"] > 0
    assert_same_logs(logs[trl_fast], logs[trl])


def test_turns_that_completions_begin_alike_with_are_computed_once(tool_model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 4)
    trainer = make(trl_fast, tmp_path, tool_model_path)
    rows = [dict(trainer.train_dataset[0])] * 8
    samples = trainer.make_samples(rows)
    samples = samples.select(samples.by_beginning(range(8)))
    shared, apart = (samples.batch(layout, 0) for layout in ("shared_prefix", "padded"))
    assert max(segment.depth for segment in segments_of(shared.tree_lengths)) > 1
    assert shared.input_ids.numel() < len(samples.prompt_ids[0]) + sum(map(len, samples.completion_ids))
    for name in ("targets", "branch", "offset"):
        assert torch.equal(shared[name], apart[name])


def test_it_tells_the_policy_of_tools_and_logs_what_was_called(tool_model_path, tmp_path, capsys):
    trainer = make(trl_fast, tmp_path, tool_model_path, log_completions=True)
    prompt = trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"])
    assert prompt.startswith("<|im_start|>system\nadd look_up fail <|im_end|>")
    rows = [dict(row) for row in trainer.train_dataset for _ in range(4)][:8]
    samples = trainer.make_samples(rows)
    texts = [
        "".join(trainer.processing_class.decode([token]) for token, own in zip(ids, mask, strict=True) if not own)
        for ids, mask in zip(samples.completion_ids, samples.mask, strict=True)
    ]
    assert any(texts) and all(text.startswith("\n<|im_start|>tool\n") for text in texts if text)
    trainer.train()
    shown = capsys.readouterr().out
    assert 'add({"a": 1, "b": 2})' in shown and "tool: 3" in shown
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    messages = [message for messages in table["completion"] for message in messages]
    calls = [call for message in messages if message["tool_calls"] is not None for call in message["tool_calls"]]
    assert '{"a": 1, "b": 2}' in {call["function"]["arguments"] for call in calls}


def test_the_policy_itself_generates(tool_model_path, tmp_path):
    settings = {"max_completion_length": 8, "max_steps": 1}
    arguments = {"model": tool_model_path, "reward_funcs": talk, "train_dataset": questions(), "tools": TOOLS}
    trainer = make_trainer(trl_fast, tmp_path, method="GRPO", arguments=arguments, **{**SETTINGS, **settings})
    trainer.train()
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0
    assert trainer.processing_class.response_template is not None


@pytest.mark.slow
def test_it_learns_that_calling_pays(tmp_path, tool_model_path):
    """A model that was shown both calls a tool for some of its answers; where only those are right, for most."""
    model = shown_both(tool_model_path)
    arguments = {"model": model, "reward_funcs": right, "train_dataset": questions(1), "tools": TOOLS}
    settings = {"num_generations": 32, "per_device_train_batch_size": 32, "max_steps": 12, "learning_rate": 5e-4}
    settings = {**SETTINGS, **settings, "lr_scheduler_type": "constant"}
    arguments["processing_class"] = tool_tokenizer()
    trainer = make_trainer(trl_fast, tmp_path, method="GRPO", arguments=arguments, **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    rewards = [log["reward"] for log in logs]
    assert rewards[0] < 0.5 and sum(rewards[-4:]) / 4 > 0.75
    assert logs[-1]["tools/call_frequency"] > logs[0]["tools/call_frequency"]


def right(completions, **_):
    return [float(messages[-1]["content"] == "It is 3.") for messages in completions]


def shown_both(model_path):
    """The model after some steps on two answers to the question, one with a call and one without."""
    tokenizer = tool_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(model_path)
    prompt = tokenizer.apply_chat_template(
        questions(1)[0]["prompt"], tools=Toolbox(TOOLS).schemas, add_generation_prompt=True, tokenize=False
    )
    result = "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    answers = (f"{ADD}{EOS}{result}{ANSWER}", f"It is 4.{EOS}")
    rows = [torch.tensor([tokenizer(text=prompt + answer)["input_ids"]]) for answer in answers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_reasoning_is_read_without_tools(tool_model_path, tmp_path):
    class Thinker(ToolPolicy):
        def turns(self, prompt_ids):
            return [self.tokenizer(text="<think>Hm.</think>Blue.<|im_end|>")["input_ids"] for _ in prompt_ids]

    seen = []
    tokenizer = tool_tokenizer()
    tokenizer.response_template = next(iter(RESPONSE_TEMPLATES.values()))
    policy, given = Thinker(tokenizer), {"tools": None, "processing_class": tokenizer, "max_steps": 1}
    make(trl_fast, tmp_path, tool_model_path, policy=policy, seen=seen, **given).train()
    assert seen[0][0][0] == [{"role": "assistant", "reasoning_content": "Hm.", "content": "Blue."}]


def shout(text):
    return text.upper()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tools": [shout]}, ValueError, "tools: 'shout' cannot be described"),
        ({"tools": [*TOOLS, TOOLS[0]]}, ValueError, "two functions have the name 'add'"),
        (
            {"train_dataset": color_prompts()},
            ValueError,
            "train dataset, row 0, column 'prompt': .*no place for tools",
        ),
        ({"rollout_func": FixedRollout(None)}, ValueError, "tools and rollout_func"),
    ],
)
def test_what_cannot_be(given, error, message, tool_model_path, tmp_path):
    with pytest.raises(error, match=message):
        make(trl_fast, tmp_path, tool_model_path, **given)


def test_other_ways_that_there_are_not(model_path, tool_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = questions()
    with pytest.raises(ValueError, match="chat template of .*leaves tool calls or their results out"):
        trl_fast.GRPOTrainer(model_path, talk, train_dataset=rows, tools=TOOLS)
    with pytest.raises(NotImplementedError, match="tools: RLOOTrainer has none; use GRPOTrainer"):
        trl_fast.RLOOTrainer(tool_model_path, talk, train_dataset=rows, tools=TOOLS)


def test_arguments_of_every_type_can_be_kept(tmp_path):
    from trl_fast.trainers.online.completions_log import CompletionsLog

    log = CompletionsLog(4)
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": given}} for given in ({}, {"a": 1}, {"a": "x"})
    ]
    completions = [[{"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    log.add({"r": [0.0] * 3}, prompt=["?"] * 3, completion=completions, advantage=[0.0] * 3)
    table = pd.read_parquet(log.save(tmp_path, 1))
    kept = [messages[0]["tool_calls"][0]["function"]["arguments"] for messages in table["completion"]]
    assert kept == ["{}", '{"a": 1}', '{"a": "x"}']
    assert completions[0][0]["tool_calls"][0]["function"]["arguments"] == {}
