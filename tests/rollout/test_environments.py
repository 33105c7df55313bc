"""Environments: one a completion, made once and reset often, side by side if they are async, lost where they fail."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import torch

from support.environments import Judged, Sums, Words
from support.source_tree import ROOT
from support.tools import ADD, ANSWER, ScriptedEngine, call, tool_tokenizer
from trl_fast.rollout import SamplingSettings, ToolLoop
from trl_fast.rollout.environments import Environments
from trl_fast.rollout.tools import run_tools
from trl_fast.rollout.user_calls import UserCalls


def rows(count, **more):
    return [{"start": 2 * i + 1, **more} for i in range(count)]


def turn(name, **arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def test_each_row_has_its_own_and_they_are_made_once_and_reset_often():
    made = []

    def factory():
        made.append(Sums())
        return made[-1]

    environments = Environments(factory)
    assert environments.reset([None] * 3, rows(3)) == [f" Begin with {n}." for n in (1, 3, 5)]
    first = environments.instances
    assert environments.seats[1].toolbox.run([turn("add", a=1, b=1)]).messages[0][0]["content"] == "5"
    assert [each.total for each in first] == [1, 5, 5]
    environments.reset([None] * 2, rows(2))
    environments.reset([None] * 4, rows(4))
    assert environments.instances[:3] == first == made[:3] and len(made) == 4


def test_rows_choose_by_name_and_see_the_methods_of_their_own():
    environments = Environments({"sums": Sums, "words": Words, "judged": Judged}, [len_of])
    names = ["words", "sums", "judged", "words", "sums"]
    environments.reset(names, rows(5))
    assert [type(each) for each in environments.instances] == [Words, Sums, Judged, Words, Sums]
    tools = [[schema["function"]["name"] for schema in seat.toolbox.schemas] for seat in environments.seats]
    assert tools[:2] == [["len_of", "look_up"], ["len_of", "add", "fail", "look_up"]]
    environments.seats[3].toolbox.run([turn("look_up", word="a")])
    assert environments.seats[3].toolbox.run([turn("look_up", word="b")]).messages[0][0]["content"] == "w7 a b"
    assert environments.seats[0].toolbox.run([turn("add", a=1, b=1)]).failures == 1


def len_of(text: str) -> int:
    """
    Counts letters.

    Args:
        text: What to count in.
    """
    return len(text)


def test_a_class_tells_the_rewards_of_its_own_and_of_no_subclass():
    environments = Environments({"sums": Sums, "words": Words, "judged": Judged, "door": Door, "again": Sums})
    environments.reset(["sums", "judged", "words", "judged", "door", "again"], rows(6))
    environments.instances[3].words.append("more")
    sources = environments.reward_sources()
    assert [source.__name__ for source in sources] == ["Sums", "Judged", "Door"]
    found = [source(environments.instances) for source in sources]
    assert found[0] == [1.0, *[None] * 4, 11.0]
    assert found[1] == [*[None] * 3, 2.0, None, None] and found[2] == [*[None] * 4, 9.0, None]


class Together:
    """Waits in each of its methods until as many others wait there."""

    number = 3
    arrived: dict = {}

    async def _meet(self, place):
        meeting = self.arrived.setdefault(place, [])
        meeting.append(self)
        while len(meeting) < self.number:
            await asyncio.sleep(0.001)

    async def reset(self, **row):
        await self._meet("reset")
        return "Go."

    async def step(self) -> str:
        """Steps."""
        await self._meet("step")
        return "done"

    async def get_reward(self):
        await self._meet("reward")
        return 1.0

    async def close(self):
        await self._meet("close")


def test_async_environments_run_side_by_side():
    Together.arrived = {}
    environments = Environments(Together, timeout=5, tool_timeout=5)
    assert environments.reset([None] * 3, [{}] * 3) == ["Go."] * 3
    tokenizer = tool_tokenizer()
    engine = ScriptedEngine(tokenizer, *[call("step")] * 3, *[ANSWER] * 3)
    loop = ToolLoop(engine, lambda _: [seat.toolbox for seat in environments.seats], tokenizer)
    rollout = loop.generate([[5, 6]] * 3, SamplingSettings(120))
    assert [messages[1]["content"] for messages in rollout.messages] == ["done"] * 3
    assert environments.reward_sources()[0](environments.instances) == [1.0] * 3
    environments.close()
    assert environments.errors == [None] * 3 and len(Together.arrived["close"]) == 3


class Crowd:
    """Waits in each of its methods, none of which is async, until all others wait there."""

    barrier = threading.Barrier(3)

    def __init__(self):
        if len(self.made) > 0:
            self.barrier.wait(5)
        self.made.append(self)

    made: list = []

    def reset(self, place, **row):
        self.barrier.wait(5)
        return f"Place {place}."

    def step(self) -> str:
        """Steps."""
        self.barrier.wait(5)
        return f"{torch.is_grad_enabled()}"

    def get_reward(self):
        self.barrier.wait(5)
        return 1.0

    def close(self):
        self.barrier.wait(5)


def test_sync_environments_run_side_by_side_where_workers_are_asked_for():
    Crowd.made = []
    environments = Environments(Crowd, timeout=5, workers=4)
    environments.kinds[None].pool = []
    assert environments.reset([None] * 3, [{"place": i} for i in range(3)]) == [f"Place {i}." for i in range(3)]
    tokenizer = tool_tokenizer()
    engine = ScriptedEngine(tokenizer, *[call("step")] * 3, *[ANSWER] * 3)
    loop = ToolLoop(engine, lambda _: [seat.toolbox for seat in environments.seats], tokenizer, workers=3)
    with torch.no_grad():
        rollout = loop.generate([[5, 6]] * 3, SamplingSettings(120))
    assert [messages[1]["content"] for messages in rollout.messages] == ["False"] * 3
    assert environments.reward_sources()[0](environments.instances) == [1.0] * 3
    environments.close()
    assert environments.errors == [None] * 3


class Flaky(Sums):
    """Fails where its row says so; it notes what was closed."""

    closed: list = []

    def reset(self, **row):
        super().reset(**row)
        self.fails = row.get("fails")
        if self.fails == "reset":
            raise ConnectionError("no server")
        if self.fails == "hang":
            time.sleep(3)
        return 7 if self.fails == "type" else None

    def wait(self) -> str:
        """Waits."""
        time.sleep(3)
        return "late"

    def get_reward(self):
        if self.fails == "reward":
            raise KeyError("score")
        return float("nan") if self.fails == "nan" else 1.0

    def close(self):
        self.closed.append(self)
        if self.fails == "type":
            raise OSError("already gone")


class Ledger:
    """Keeps its sums in a connection, which is bound to the thread that made it."""

    closed: list = []

    def __init__(self):
        self.thread = threading.current_thread()
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table sums (n)")

    def reset(self, start, **row):
        self.connection.execute("delete from sums")
        self.add(start)

    def add(self, n: int) -> int:
        """
        Adds.

        Args:
            n: What.
        """
        self.connection.execute("insert into sums values (?)", (n,))
        return self.get_reward()

    def wait(self) -> str:
        """Waits."""
        time.sleep(0.5)
        return "late"

    def get_reward(self):
        return self.connection.execute("select sum(n) from sums").fetchone()[0]

    def close(self):
        self.connection.close()
        self.closed.append(self)


OWN_THREADS = [{"timeout": 5}, {"tool_timeout": 5}, {"workers": 2}, {"in_threads": True}]


@pytest.mark.parametrize("settings", OWN_THREADS, ids=lambda settings: next(iter(settings)))
def test_what_is_bound_to_a_thread_works_where_calls_are_made_in_threads(settings):
    Ledger.closed = []
    environments = Environments(Ledger, [len_of], **settings)
    for count in (2, 3):
        environments.reset([None] * count, rows(count))
    boxes = [seat.toolbox for seat in environments.seats]
    results = run_tools(boxes, [turn("add", n=1), [*turn("add", n=1) * 2, *turn("len_of", text="abc")], []], 2)
    contents = [[message["content"] for message in messages] for messages in results.messages]
    assert contents == [["2"], ["4", "5", "3"], []]
    # As with a time limit of the reward functions.
    source = environments.reward_sources()[0]
    calls = UserCalls("reward function", "reward_timeout", 5)
    answer = calls.call("Ledger", source, environments=environments.instances)
    assert answer.value == [2, 5, 5] and environments.errors == [None] * 3
    threads = {each.thread for each in environments.instances}
    environments.close()
    assert len(Ledger.closed) == len(threads) == 3
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_one_that_hangs_leaves_its_thread_to_itself():
    environments = Environments(Ledger, tool_timeout=0.1)
    environments.reset([None] * 2, rows(2))
    first = environments.instances[0]
    assert environments.seats[0].toolbox.run([turn("wait")]).failures == 1
    environments.reset([None] * 2, rows(2))
    assert environments.errors == [None] * 2 and environments.instances[0].thread is not first.thread
    first.thread.join(5)
    assert not first.thread.is_alive()


@pytest.mark.parametrize("workers", [1, 3])
def test_one_that_fails_is_lost_alone_and_another_takes_its_place(workers, caplog):
    Flaky.closed = []
    environments = Environments(Flaky, timeout=0.2, tool_timeout=0.1, workers=workers)
    fails = [None, "reset", "hang", "type", "reward", "reset", "nan"]
    environments.reset([None] * 7, [{"start": 1, "fails": each} for each in fails])
    source = environments.reward_sources()[0]
    assert source(environments.instances) == [1.0, *[None] * 6]
    # What hangs goes on behind the environment's back.
    assert environments.seats[0].toolbox.run([turn("wait")]).failures == 1
    assert all(environments.errors)
    lost = environments.instances
    for _ in range(2):
        environments.report()
    told = [record.message for record in caplog.records if "is not learned from" in record.message]
    parts = (
        "a method (TimeLimit",
        "reset() (Conn",
        "environment_timeout=0.2",
        "returned 7",
        "get_reward() (Key",
        "returned nan",
    )
    for part, message in zip(parts, told, strict=True):
        assert message.startswith("environment Flaky failed in ") and part in message
    caplog.clear()
    environments.reset([None] * 7, [{"start": 1}] * 7)
    assert set(map(id, Flaky.closed)) == set(map(id, lost)) and not any(environments.errors)
    assert not set(map(id, lost)) & set(map(id, environments.instances))
    assert "environment Flaky.close() raised OSError: already gone" in caplog.text


def test_a_factory_that_fails_later_costs_its_completion():
    made = []

    def factory():
        made.append(1)
        if len(made) == 2:
            raise OSError("no more")
        return Sums() if len(made) < 4 else Words()

    environments = Environments(factory)
    environments.reset([None] * 4, rows(4))
    none, odd = environments.errors[1], environments.errors[3]
    assert environments.instances[1] is None and str(none) == "no more" and environments.errors[2] is None
    assert isinstance(odd, AttributeError) and "add" in str(odd)
    assert environments.seats[1].toolbox.functions == {}
    assert environments.reward_sources()[0](environments.instances) == [1.0, None, 5.0, None]


def test_a_lost_environment_ends_its_completion():
    environments = Environments(Flaky, tool_timeout=0.1)
    environments.reset([None] * 3, [{"start": 1, "fails": each} for each in (None, None, "reset")])
    tokenizer = tool_tokenizer()
    engine = ScriptedEngine(tokenizer, ADD, call("wait"), ADD, ANSWER)
    loop = ToolLoop(engine, lambda _: [seat.toolbox for seat in environments.seats], tokenizer)
    rollout = loop.generate([[5, 6]] * 3, SamplingSettings(120))
    assert [len(messages) for messages in rollout.messages] == [3, 1, 1]
    assert [error is None for error in environments.errors] == [True, False, False]


class Door(Sums):
    """Closing is a move here; ending is private."""

    ended = 0

    def close(self, slowly: bool) -> str:
        """
        Closes the door.

        Args:
            slowly: How.
        """
        return f"slowly: {slowly}"

    def _close(self) -> None:
        Door.ended += 1


def test_what_closes_an_environment_is_no_tool_but_a_move_is():
    environments = Environments(Door)
    environments.reset([None] * 2, rows(2))
    result = environments.seats[0].toolbox.run([turn("close", slowly=True)])
    assert result.messages[0][0]["content"] == "slowly: True"
    for _ in range(2):
        environments.close()
    assert Door.ended == 2
    assert "close" not in Environments(Flaky).kinds[None].methods
    # They can be used again, as new ones.
    assert environments.reset([None], rows(1)) == [" Begin with 1."]


@pytest.mark.slow
def test_they_are_closed_when_python_ends():
    script = """
import weakref
from trl_fast.rollout.environments import Environments
class Server:
    def reset(self, **row): ...
    def go(self) -> str:
        "Goes."
    async def close(self): print("closed", flush=True)
class Trainer: ...
environments, trainer = Environments(Server), Trainer()
environments.reset([None] * 2, [{}, {}])
weakref.finalize(trainer, environments.close)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "closed\nclosed\n", done.stderr


def test_what_an_environment_holds_need_not_be_copied():
    class Locked(Sums):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    environments = Environments(Locked)
    row = {"start": 1, "list": [1]}
    environments.reset([None], [row])
    environments.instances[0].given["list"].append(2)
    assert row["list"] == [1] and environments.reward_sources()[0](environments.instances) == [1.0]


class NoReset:
    def go(self) -> str:
        """Goes."""


class NoMethods:
    reset = close = Flaky.close

    def get_reward(self):
        return 1.0


class NoDocstring(Sums):
    def go(self) -> str:
        return "there"


class NoHint(Sums):
    def go(self, where) -> str:
        """Goes.

        Args:
            where: To.
        """


async def later():
    return Sums()


def broken():
    raise OSError("no server")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "environment_factory: expected a class or function .* got 3 of type int"),
        ({"a": Sums, "b": None}, TypeError, r"environment_factory\['b'\]: expected a class or function .* got None"),
        ({}, ValueError, "the dict has no factories"),
        ({1: Sums}, TypeError, "expected texts as names of environments, got 1"),
        (lambda: None, TypeError, "environment_factory returned None; expected an environment"),
        (lambda: Sums, TypeError, "environment_factory returned <class .*Sums"),
        (later, TypeError, "returned <coroutine .*connect in an async reset"),
        (broken, RuntimeError, "environment_factory raised OSError: no server"),
        (NoReset, ValueError, r"NoReset has no method reset\(\)"),
        (NoMethods, ValueError, "NoMethods has no public methods"),
        (NoDocstring, ValueError, "environment NoDocstring: tools: 'go' cannot be described"),
        (
            {"a": NoHint},
            ValueError,
            r"environment_factory\['a'\], environment NoHint: tools: 'go' cannot be described",
        ),
    ],
)
def test_what_cannot_be_is_named(given, error, message):
    with pytest.raises(error, match=message):
        Environments(given)


def test_a_tool_beside_the_methods_makes_up_for_them_but_has_a_name_of_its_own():
    assert Environments(NoMethods, [len_of]).kinds[None].methods == []
    with pytest.raises(ValueError, match="environment Sums: tools: two functions have the name 'fail'"):
        Environments(Sums, [Sums().fail])
    with pytest.raises(ValueError, match=r"environment='c' is none of environment_factory's \['a'\]"):
        Environments({"a": Sums}).reset(["c"], [{}])


def test_a_reset_that_does_not_take_the_columns_is_named():
    class Narrow(Sums):
        def reset(self, start):
            return None

    kind = Environments(Narrow).kinds[None]
    kind.check_reset(["start"], "train")
    with pytest.raises(
        ValueError, match=r"Narrow.reset\(\) is called with the columns \['prompt', 'start'\] .*add \*\*row"
    ):
        kind.check_reset(["start", "prompt"], "train")


def test_a_slow_one_is_named_while_it_is_waited_for(monkeypatch, caplog):
    from trl_fast.rollout import user_calls

    class Slow(Sums):
        def reset(self, **row):
            time.sleep(0.1)

    monkeypatch.setattr(user_calls, "_LINE_SECONDS", 0.04)
    with caplog.at_level(logging.WARNING):
        Environments(Slow).reset([None], [{}])
    assert "waiting for environment 'Slow.reset', 0 s (no environment_timeout is set)" in caplog.messages
