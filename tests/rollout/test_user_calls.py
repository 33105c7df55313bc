"""Users' functions: what they raise, exits too, is their error; those that hang are named, and given up."""

import asyncio
import logging
import os
import signal
import sys
import threading
import time

import pytest
import torch

from trl_fast.rollout import RewardFunctions, Toolbox
from trl_fast.rollout import user_calls as module
from trl_fast.rollout.user_calls import TimeLimitError, UserCalls

RAISED = [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError("no"), GeneratorExit(), BaseException("odd")]
CALL = [[{"type": "function", "function": {"name": "leave", "arguments": {}}}]]


@pytest.fixture(autouse=True)
def _hang_no_longer_than_this():
    """A call that hangs ends the test, and its loop is left behind."""

    def fail(*_):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    module._event_loop.cache_clear()


def leaving(error, is_async):
    """A function that raises; an async one also within a task of its own."""

    def leave() -> int:
        """Leaves."""
        raise error

    async def task():
        raise error

    async def leave_later() -> int:
        """Leaves."""
        if is_async == "in a task":
            return await asyncio.create_task(task())
        raise error

    leave_later.__name__ = "leave"
    return leave_later if is_async else leave


def ask(function, **settings):
    return RewardFunctions(function, **settings)(["p"], ["c"], [[1]], {})


@pytest.mark.parametrize("timeout", [None, 5])
@pytest.mark.parametrize("is_async", [False, True, "in a task"])
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_function_raises_is_its_error(error, is_async, timeout):
    name = type(error).__name__
    with pytest.raises(RuntimeError, match=f"reward function 'leave' raised {name}") as caught:
        ask(leaving(error, is_async), timeout=timeout)
    assert type(caught.value.__cause__).__name__ == name

    results = Toolbox([leaving(error, is_async)], timeout=timeout).run([CALL[0] * 2])
    contents = [message["content"] for message in results.messages[0]]
    assert all(content.startswith(f"{{'error': '{name}: ") for content in contents)
    assert (results.calls, results.failures) == (2, 2)

    # What is asked later is answered.
    async def one(completions):
        return [await asyncio.sleep(0, 1)]

    assert ask(one, timeout=timeout).tolist() == [[1]]


def test_an_error_whose_text_cannot_be_read():
    class Silent(Exception):
        def __str__(self):
            raise ValueError("no words")

    with pytest.raises(RuntimeError, match=r"'leave' raised Silent: \(its text cannot be read\)"):
        ask(leaving(Silent(), False))
    messages = Toolbox([leaving(Silent(), False)]).run(CALL).messages[0]
    assert messages[0]["content"] == "{'error': '(its text cannot be read)'}"


def test_an_event_loop_that_functions_stop_goes_on():
    async def stops(completions):
        loop = asyncio.get_running_loop()
        loop.stop()
        loop.call_soon(sys.exit)
        await asyncio.sleep(0.01)
        return [1]

    async def cancels_itself(completions):
        asyncio.current_task().cancel()
        return [1]

    assert ask(stops).tolist() == [[1]]
    with pytest.raises(RuntimeError, match="'cancels_itself' raised CancelledError"):
        ask(cancels_itself)
    assert ask(stops).tolist() == [[1]]


@pytest.mark.parametrize("timeout", [None, 10])
@pytest.mark.parametrize("is_async", [False, True])
def test_ctrl_c_ends_the_run(is_async, timeout):
    def interrupt(later=0.0):
        time.sleep(later)
        os.kill(os.getpid(), signal.SIGINT)

    def waits(completions):
        interrupt()
        time.sleep(10)

    async def waits_later(completions):
        threading.Thread(target=interrupt, args=(0.05,)).start()
        await asyncio.sleep(10)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ask(waits_later if is_async else waits, timeout=timeout)
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_a_handler_of_sigterm_raises_passes():
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit, match="143"):
            ask(lambda completions: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def slow(completions):
    time.sleep(5)


async def slow_later(completions):
    await asyncio.sleep(5)


async def blocks(completions):
    time.sleep(2)


@pytest.mark.parametrize("function", [slow, slow_later, blocks])
def test_the_time_limit_of_rewards(function, monkeypatch):
    monkeypatch.setattr(module, "_LOOP_SECONDS", 0.1)
    with pytest.raises(
        TimeLimitError,
        match=f"^reward function '{function.__name__}' gave no answer within reward_timeout=0.05 seconds; raise or",
    ):
        ask([function], timeout=0.05)

    async def one(completions):
        return [1]

    start = time.monotonic()
    assert ask(one, timeout=1).tolist() == [[1]]
    assert time.monotonic() - start < 1


def test_the_time_limit_of_tools(monkeypatch):
    monkeypatch.setattr(module, "_LOOP_SECONDS", 0.1)

    def wait() -> int:
        """Waits."""
        time.sleep(5)

    async def wait_later() -> int:
        """Waits."""
        await asyncio.sleep(5)

    async def answer() -> int:
        """Answers."""
        return 3

    tools = [wait, wait_later, answer]
    call = [{"type": "function", "function": {"name": tool.__name__, "arguments": {}}} for tool in tools]
    results = Toolbox(tools, timeout=0.05).run([call])
    contents = [message["content"] for message in results.messages[0]]
    assert ["tool_timeout=0.05" in content for content in contents] == [True, True, False]
    assert contents[2] == "3" and results.failures == 2


def test_a_line_each_minute_names_what_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.03)

    async def quick():
        return 1

    with caplog.at_level(logging.WARNING):
        UserCalls("reward function", "reward_timeout").call("still", lambda: time.sleep(0.1))
        UserCalls("tool", "tool_timeout", 9).gather([("fast", quick()), ("lazy", asyncio.sleep(0.1))])
        count = len(caplog.messages)
        time.sleep(0.1)
    assert caplog.messages[0] == "waiting for reward function 'still', 0 s (no reward_timeout is set)"
    assert caplog.messages[-1] == "waiting for tool 'lazy', 0 s (tool_timeout=9)"
    assert 4 <= count == len(caplog.messages) <= 8
    assert module._LINE_SECONDS == 0.03 and not any("fast" in message for message in caplog.messages)


def test_a_thread_has_the_callers_grad_mode():
    with torch.no_grad():
        assert not UserCalls("tool", "tool_timeout", 9).call("f", torch.is_grad_enabled).value
    assert UserCalls("tool", "tool_timeout", 9).call("f", torch.is_grad_enabled).value
