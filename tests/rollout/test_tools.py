"""Tools are checked, called, and their results read; completions of several turns have masks and limits."""

import ast
import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import trl
import trl.chat_template_utils as theirs
from accelerate import PartialState
from accelerate.utils import gather_object

from support.ranks import run_on_ranks
from support.tokenizer import EOS, build_tokenizer
from support.tools import ADD, ANSWER, FAIL, LOOK_UP, TOOLS, ScriptedEngine, add, call, tool_tokenizer
from trl_fast.rollout import SamplingSettings, Toolbox, ToolLoop
from trl_fast.rollout.responses import find_response_template, parse_message

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def calls(*named):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in named]


# ---- the functions


def test_results_of_sync_calls_then_of_async_ones():
    turns = [
        calls(("look_up", {"word": "sky"}), ("add", {"a": 1, "b": 2})),
        [],
        calls(("add", {"a": "1", "b": 2}), ("gone", {}), ("fail", {}), ("look_up", {}), ("add", [1])),
    ]
    results = Toolbox(TOOLS).run(turns)
    assert results.messages[0] == [
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "tool", "name": "look_up", "content": "sky is blue"},
    ]
    assert results.messages[1] == []
    errors = [message["content"] for message in results.messages[2]]
    assert all(error.startswith("{'error': ") for error in errors)
    assert "Tool gone not found." in errors[1] and "no luck" in errors[2] and "'word'" in errors[3]
    assert (results.calls, results.failures) == (7, 5)


def test_async_calls_run_side_by_side_and_their_errors_are_results():
    met = asyncio.Event()

    async def wait() -> str:
        """Waits."""
        await asyncio.wait_for(met.wait(), 5)
        return "met"

    async def arrive(late: bool) -> str:
        """
        Arrives.

        Args:
            late: Whether it is too late.
        """
        met.set()
        if late:
            raise TimeoutError("too late")
        return "there"

    turns = [calls(("wait", {})), calls(("arrive", {"late": False}), ("arrive", {"late": True}))]
    results = Toolbox([wait, arrive]).run(turns)
    contents = [[message["content"] for message in messages] for messages in results.messages]
    assert contents == [["met"], ["there", "{'error': 'too late'}"]] and results.failures == 1


def test_results_as_text_and_as_blocks():
    given = [["sky", 1], {"a": 1}, None, [], [{"type": "text", "text": "blue"}], "half \ud800"]

    def give(index: int) -> object:
        """
        Gives.

        Args:
            index: Which one.
        """
        return given[index]

    messages = Toolbox([give]).run([calls(*(("give", {"index": i}) for i in range(6)))]).messages[0]
    contents = ["['sky', 1]", "{'a': 1}", "None", "[]", given[4], "half ?"]
    assert [message["content"] for message in messages] == contents


def order(
    dish: str,
    count: int = 1,
    price: float | None = None,
    size: Literal["small", "large"] = "small",
    extras: list[str] | None = None,
    table: tuple[int, str] = (1, "a"),
    prices: dict[str, float] | None = None,
    either: int | str = 1,
    note: str = None,
    hot: bool = True,
    anything: Any = None,
) -> str:
    """
    Orders.

    Args:
        dish: What to eat.
        count: How many.
        price: At most.
        size: How large. (choices: ["small", "large"])
        extras: What else.
        table: Which table.
        prices: By extra.
        either: A number or a name.
        note: For the cook.
        hot: Whether it is to be hot.
        anything: Whatever.
    """
    return "ordered"


TYPES = {
    "count": (["2", 2.5, True, None, [1], float("nan")], [2, 3.0, -1, 10**400]),
    "price": (["1", False], [1, 1.5, None]),
    "size": (["medium", 1, None], ["large"]),
    "extras": (["salt", [1], ["salt", None]], [[], ["salt"], None]),
    "table": ([[1], ["a", 1], 7], [[1, "b"]]),
    "prices": ([{"salt": "1"}, [1]], [{"salt": 1}, {}, None]),
    "either": ([1.5, True, None], [1, "a"]),
    "note": ([1], ["a", None]),
    "hot": (["true", 1], [False]),
    "anything": ([], [1, "a", None, {"a": [1]}]),
}


@pytest.mark.parametrize("name", TYPES)
def test_arguments_are_held_against_the_schema(name):
    wrong, right = TYPES[name]
    turn = calls(*(("order", {"dish": "soup", name: value}) for value in [*wrong, *right]))
    results = Toolbox([order]).run([turn])
    contents = [message["content"] for message in results.messages[0]]
    assert contents[len(wrong) :] == ["ordered"] * len(right)
    for value, content in zip(wrong, contents, strict=False):
        assert content.startswith("{'error': ") and f"order: argument '{name}'" in ast.literal_eval(content)["error"]
        assert "; it takes dish: string, count: integer, price: number or null, size: string" in content, value
    assert (results.calls, results.failures) == (len(turn), len(wrong))


def test_what_is_wrong_with_arguments_is_named():
    arguments = [
        {"dish": "soup", "extras": ["salt", 7]},
        {"dish": "soup", "prices": {"salt": "1"}},
        {"dish": "soup", "dip": "ketchup"},
        {},
        [1],
        '{"dish": "soup"',
        '{"dish": "soup"}',
    ]
    messages = Toolbox([order]).run([calls(*(("order", each) for each in arguments))]).messages[0]
    parts = [
        "argument 'extras'[1]: expected string, got 7",
        "argument 'prices'['salt']: expected number, got '1'",
        "unexpected keyword argument 'dip'",
        "missing 1 required positional argument: 'dish'",
        "must be a mapping, not list",
        "order: the arguments are no JSON",
        "ordered",
    ]
    for message, part in zip(messages, parts, strict=True):
        assert part in message["content"].replace("\\'", "'")


def test_tools_change_nothing_but_their_own():
    state = [{"type": "text", "text": "blue"}]

    def grow(items: list[str]) -> list:
        """
        Grows.

        Args:
            items: What grows.
        """
        items.append("more")
        return state

    turn = calls(("grow", {"items": ["a"]}))
    message = Toolbox([grow]).run([turn]).messages[0][0]
    state[0]["text"] = "green"
    assert turn == calls(("grow", {"items": ["a"]})) and message["content"] == [{"type": "text", "text": "blue"}]


def test_results_that_cannot_be_read_are_errors():
    class Silent:
        def __str__(self):
            raise RuntimeError("no words")

    def give() -> object:
        """Gives."""
        return Silent()

    async def give_later() -> object:
        """Gives."""
        return Silent()

    turn = calls(("give", {}), ("give_later", {}))
    results = Toolbox([give, give_later]).run([turn])
    assert [message["content"] for message in results.messages[0]] == ["{'error': 'no words'}"] * 2
    assert results.failures == 2


def undocumented(a: int) -> int:
    return a


def untyped(a):
    """
    Nothing.

    Args:
        a: A number.
    """


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        (add, TypeError, "tools: expected a list of functions"),
        ([add, "add"], TypeError, "tools: expected functions .* got 'add' of type str"),
        ([undocumented], ValueError, "tools: 'undocumented' cannot be described .*docstring"),
        ([untyped], ValueError, r"tools: 'untyped' cannot be described .*type hint in function untyped\. Expected"),
        ([add, TOOLS[1], add], ValueError, "tools: two functions have the name 'add'"),
    ],
)
def test_refused_tools(tools, error, message):
    with pytest.raises(error, match=message):
        Toolbox(tools)


# ---- reading calls


def known(name, **special):
    """The small tokenizer with a chat template that TRL knows."""
    tokenizer = build_tokenizer(**special)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


TEXTS = {
    "thought": f"<think>\nHm.\n</think>\n\nIt is blue.\n{ADD}\n{LOOK_UP}{EOS}",
    "broken": f"Sky. <tool_call>\n{{</tool_call>{EOS}",
    "cut off": ADD[:-12],
    "no name": f'<tool_call>{{"arguments": {{}}}}</tool_call>{EOS}',
    "no object": f"<tool_call>[1]</tool_call>{EOS}",
    "no arguments": f'<tool_call>{{"name": "fail"}}</tool_call>{EOS}',
    "other order": f'<tool_call>{{"arguments": {{"a": 1}}, "name": "add"}}</tool_call>{EOS}',
    "nothing": EOS,
}


ANSWERS = "<|im_start|>assistant\n"


def assert_read_as_trl_reads_it(tokenizer, text):
    """By the response template that we find; it stays the tokenizer's."""
    ids, prompt_ids = tokenizer(text=text)["input_ids"], tokenizer(text=ANSWERS)["input_ids"]
    expected = theirs.parse_response(theirs.add_response_schema(tokenizer), ids, prefix=prompt_ids, tools=TOOLS)
    tokenizer.response_template = None
    tokenizer.response_template = find_response_template(tokenizer)
    assert parse_message(tokenizer, ids, prompt_ids, Toolbox(TOOLS).schemas) == expected


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_messages_are_those_of_trl(text):
    assert_read_as_trl_reads_it(known("qwen3"), text)


PYTHON_CALLS = "add(a=1, b=2), look_up(word='the sky, (or so)'), f(x=[1, {'a': 'b, c'}], y=None, z={}), fail()"


@pytest.mark.parametrize(
    "text",
    [
        f"<think>Hm.</think>Well. <|tool_call_start|>[{PYTHON_CALLS}]<|tool_call_end|>{EOS}",
        f"<|tool_call_start|>[{PYTHON_CALLS}",
        f"No call.{EOS}",
    ],
)
def test_calls_written_as_python_does_are_read_as_trl_reads_them(text):
    tokenizer = known("lfm2_2_5")
    assert_read_as_trl_reads_it(tokenizer, text)
    # TRL takes the second of two functions in plain text for a call.
    text = f"It is f(x), g(y).{EOS}"
    message = parse_message(tokenizer, tokenizer(text=text)["input_ids"], tokenizer(text=ANSWERS)["input_ids"])
    assert message == {"role": "assistant", "content": "It is f(x), g(y)."}


def test_templates_that_do_not_serve():
    tokenizer = tool_tokenizer()
    engine, box = ScriptedEngine(tokenizer), Toolbox(TOOLS)
    own = {"start_anchor": "assistant\n", "fields": {"content": {}}}
    tokenizer.response_template = own
    assert find_response_template(tokenizer) is own
    tokenizer.response_template = None
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "function>")
    with pytest.raises(ValueError, match="chat template of .* format that is not known; expected .*Qwen.*<function>"):
        ToolLoop(engine, box, tokenizer)
    with pytest.raises(ValueError, match="leaves tool calls or their results out; expected one that writes"):
        ToolLoop(engine, box, build_tokenizer())
    with pytest.raises(ValueError, match="fails on a tool call"):
        ToolLoop(engine, box, known("gemma"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ToolLoop(engine, box, tokenizer)


def test_a_template_that_changes_what_it_wrote():
    tokenizer = tool_tokenizer()
    changing = "{% if messages[-1].role == 'tool' %}again {% endif %}" + tokenizer.chat_template
    tokenizer.chat_template = changing.replace(EOS, "")
    with pytest.raises(
        ValueError, match="differently when its results follow, and does not end it with the end token"
    ):
        ToolLoop(ScriptedEngine(tokenizer), Toolbox(TOOLS), tokenizer)


# ---- the loop


def roll_out(*turns, budget=200, prompts=1, logprobs=False, **limits):
    tokenizer = tool_tokenizer()
    engine = ScriptedEngine(tokenizer, *turns, logprobs=logprobs)
    loop = ToolLoop(engine, Toolbox(TOOLS), tokenizer, **limits)
    rollout = loop.generate(
        [tokenizer(text="<|im_start|>assistant\n")["input_ids"]] * prompts, SamplingSettings(budget)
    )
    for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True):
        assert len(ids) == len(mask) <= budget
    return tokenizer, engine, rollout


def length(text):
    return len(tool_tokenizer()(text=text)["input_ids"])


RESULT = "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"


def test_turns_become_one_completion():
    tokenizer, engine, rollout = roll_out(ADD + EOS, LOOK_UP + EOS, ANSWER, logprobs=True)
    found = "\n<|im_start|>tool\nsky is blue<|im_end|>\n<|im_start|>assistant\n"
    pieces = [(ADD + EOS, 1), (RESULT, 0), (LOOK_UP + EOS, 1), (found, 0), (ANSWER, 1)]
    assert tokenizer.decode(rollout.completion_ids[0]) == "".join(text for text, _ in pieces)
    assert rollout.mask[0] == [sampled for text, sampled in pieces for _ in range(length(text))]
    assert rollout.logprobs[0] == [-0.5 * sampled for sampled in rollout.mask[0]]
    assert [message["role"] for message in rollout.messages[0]] == ["assistant", "tool"] * 2 + ["assistant"]
    assert rollout.messages[0][-1] == {"role": "assistant", "content": "It is 3."}
    assert (rollout.calls, rollout.failures) == (2, 0)
    prompt = rollout.prompt_ids[0]
    assert engine.asked[2][0] == prompt + rollout.completion_ids[0][: -length(ANSWER)]
    # Each turn has the room that is left.
    assert [room for _, room in engine.asked] == [200 - len(ids) + len(prompt) for ids, _ in engine.asked]


@pytest.mark.parametrize("limit", [0, 1, None])
def test_the_limit_of_iterations(limit):
    _, engine, rollout = roll_out(ADD + EOS, FAIL + EOS, ANSWER, max_iterations=limit)
    made = 2 if limit is None else limit
    assert len(engine.asked) == made + 1 and rollout.calls == made and rollout.failures == max(made - 1, 0)
    assert len(rollout.messages[0]) == 2 * made + 1
    assert bool(rollout.messages[0][-1].get("tool_calls")) == (limit is not None)


@pytest.mark.parametrize("spare", [-1, 0, 3])
def test_results_that_do_not_fit(spare):
    tokenizer, engine, rollout = roll_out(ADD + EOS, ANSWER, budget=length(ADD + EOS) + length(RESULT) + spare)
    text = {-1: ADD + EOS, 0: ADD + EOS + RESULT}.get(spare)
    if text is None:
        text = ADD + EOS + RESULT + tokenizer.decode(tokenizer(text=ANSWER)["input_ids"][:spare])
    assert tokenizer.decode(rollout.completion_ids[0]) == text
    assert [message["role"] for message in rollout.messages[0]] == ["assistant", "tool", "assistant"][: spare + 2 or 2]
    assert rollout.calls == 1 and sum(rollout.mask[0]) == length(ADD + EOS) + max(spare, 0)
    assert len(engine.asked) == (2 if spare > 0 else 1)


def test_dialogues_go_on_together_unless_positions_are_short():
    turns = [ADD + EOS, ANSWER, "Wait. " * 20 + ADD + EOS, call("gone") + EOS]
    prompt = length("<|im_start|>assistant\n")
    # Of 200 tokens each has a number of its own left.
    for positions, rooms in ((None, 1), (prompt + 400, 1), (prompt + 200, 3)):
        _, engine, rollout = roll_out(*turns, ANSWER, ANSWER, ANSWER, prompts=4, max_positions=positions)
        assert len({room for _, room in engine.asked[4:]}) == rooms
        assert all(positions is None or len(ids) + room <= positions for ids, room in engine.asked)
        assert [len(messages) for messages in rollout.messages] == [3, 1, 3, 3]
        assert (rollout.calls, rollout.failures) == (3, 1)
    with_limit = length("<|im_start|>assistant\n" + ADD + EOS + RESULT)
    _, _, rollout = roll_out(ADD + EOS, max_positions=with_limit)
    assert len(rollout.messages[0]) == 1


class SharedEngine(ScriptedEngine):
    """An engine that all processes have to ask together: it counts everybody's prompts."""

    asks_together = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counts = []

    def generate(self, prompt_ids, settings):
        self.counts.append((gather_object([len(prompt_ids)]), settings.max_completion_length))
        return super().generate(prompt_ids, settings)


def test_processes_ask_together_where_one_has_turns_left():
    def ask():
        tokenizer, rank = tool_tokenizer(), PartialState(cpu=True).process_index
        # Async tools would need the event loop of a thread, which a fork does not have.
        engine = SharedEngine(tokenizer, *([ADD + EOS, ADD + EOS, ANSWER] if rank else [ANSWER]))
        loop = ToolLoop(engine, Toolbox(TOOLS), tokenizer)
        loop.generate([tokenizer(text="<|im_start|>assistant\n")["input_ids"]], SamplingSettings(200))
        return engine.counts

    first, second = run_on_ranks(ask)
    assert first == second and [counts for counts, _ in first] == [[1, 1], [0, 1], [0, 1]]
