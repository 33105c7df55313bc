"""Calls users' functions, sync and async, so that nothing that one of them does ends the run or holds it up unsaid."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds after which a function that is waited for is named, again and again.
_LINE_SECONDS = 60.0
# Seconds that the event loop has to react, before it counts as blocked by a function that does not await.
_LOOP_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """Holds what a function gave: a value, or what it raised, which may be any BaseException."""

    value: Any = None
    error: BaseException | None = None


def described(error: BaseException) -> str:
    """Returns the type and text of an error, which a user's own class may fail to give."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}: (its text cannot be read)"


class TimeLimitError(TimeoutError):
    """Says that a function gave no answer within its time limit."""


class LastingThread:
    """Runs calls one after the other, all in one thread, which begins with the first of them.

    Objects that are bound to the thread that made them, such as connections of sqlite3, can be made and used in it.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: _Jobs | None = None

    def start(self, call: Callable[[], Outcome]) -> queue.SimpleQueue[Outcome]:
        """Begins a call, once those before have ended; its outcome comes to what is returned."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_run_jobs, args=(self._jobs,), name=self.name, daemon=True).start()
        answers: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._jobs.put((_with_callers_state(call), answers))
        return answers

    def leave(self) -> None:
        """Has the thread end after its calls, of which one may never end; a later call gets another thread."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    __del__ = leave


class UserCalls:
    """Calls functions of one kind and returns how each went. Whatever a function raises is its outcome, exits too.

    Only what a signal raises passes through: Ctrl-C ends the run while a function is called. Without a time limit sync
    functions are called in the caller's thread; with one each gets a thread, unless it is given one that lasts. It is
    left behind at the limit, since Python cannot end it. Async functions run in the event loop of a thread that lives
    as long as the process, so that open connections stay usable.

    A warning names each minute what is waited for.

    Args:
        kind: what the functions are, such as "reward function".
        setting: the name of the setting that limits their time.
        timeout: seconds that one call may take; None is no limit.
    """

    def __init__(self, kind: str, setting: str, timeout: float | None = None) -> None:
        self.kind, self.setting, self.timeout = kind, setting, timeout

    def call(
        self, name: str, function: Callable[..., Any], thread: LastingThread | None = None, /, **arguments: Any
    ) -> Outcome:
        """Calls a function. What an async function gives is its coroutine, which has not run yet.

        thread: where a sync function is called, with a time limit or without.
        """
        with self._named_while_waiting(lambda: [name]):
            call = functools.partial(outcome_of, function, arguments)
            if thread is not None:
                return self._call_in_thread(name, call, thread)
            return call() if self.timeout is None else self._call_in_own_thread(name, call)

    def gather(self, awaitables: list[tuple[str, Awaitable[Any]]]) -> list[Outcome]:
        """Awaits named awaitables side by side."""
        if not awaitables:
            return []
        loop = _event_loop()
        futures = [asyncio.run_coroutine_threadsafe(_outcome_of_awaitable(each), loop) for _, each in awaitables]
        names = [name for name, _ in awaitables]
        with self._named_while_waiting(lambda: [n for n, f in zip(names, futures, strict=True) if not f.done()]):
            try:
                _, late = concurrent.futures.wait(futures, self.timeout)
            finally:
                for future in futures:
                    future.cancel()
        if late:
            _leave_if_blocked(loop)
        return [
            Outcome(error=self._too_late(name)) if future in late else _result(future)
            for name, future in zip(names, futures, strict=True)
        ]

    def _call_in_own_thread(self, name: str, call: Callable[[], Outcome]) -> Outcome:
        thread = LastingThread(f"{self.kind} {name}")
        try:
            return self._call_in_thread(name, call, thread)
        finally:
            thread.leave()

    def _call_in_thread(self, name: str, call: Callable[[], Outcome], thread: LastingThread) -> Outcome:
        answers = thread.start(call)
        try:
            return answers.get(timeout=self.timeout)
        except queue.Empty:
            thread.leave()
            return Outcome(error=self._too_late(name))
        except BaseException:  # Ctrl-C, maybe: nobody knows when the call ends
            thread.leave()
            raise

    def _too_late(self, name: str) -> TimeLimitError:
        return TimeLimitError(
            f"{self.kind} {name!r} gave no answer within {self.setting}={self.timeout:g} seconds; raise or unset "
            f"{self.setting}, or have it answer sooner"
        )

    @contextmanager
    def _named_while_waiting(self, names: Callable[[], list[str]]) -> Iterator[None]:
        """Names functions once a minute, until it is left. The watching thread sleeps meanwhile."""
        done = threading.Event()
        start = time.monotonic()
        limit = f"no {self.setting} is set" if self.timeout is None else f"{self.setting}={self.timeout:g}"

        def watch() -> None:
            while not done.wait(_LINE_SECONDS):
                shown = ", ".join(map(repr, dict.fromkeys(names())))
                logger.warning(f"waiting for {self.kind} {shown}, {time.monotonic() - start:.0f} s ({limit})")

        threading.Thread(target=watch, name=f"watch of {self.kind}s", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def side_by_side(jobs: Sequence[Callable[[], T]], workers: int) -> list[T]:
    """Runs jobs, so many at a time in threads, and returns what each gave; a single worker is this thread.

    Raises:
        BaseException: what the first job that raised did.
    """
    if workers == 1 or len(jobs) < 2:
        return [job() for job in jobs]
    waiting = list(enumerate(map(_with_callers_state, jobs)))[::-1]
    done: dict[int, Outcome] = {}

    def work() -> None:
        while waiting:
            with suppress(IndexError):  # another thread took the last one
                index, job = waiting.pop()
                done[index] = _outcome_here(job)

    threads = [threading.Thread(target=work, name="side by side", daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = [done[index] for index in range(len(jobs))]
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]


def _outcome_here(job: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(job())
    except BaseException as error:
        return Outcome(error=error)


def outcome_of(function: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    """Calls a function in this thread. Only what a signal's handler raises passes through."""
    with _raised_by_signals() as by_signals:
        try:
            return Outcome(function(**arguments))
        except BaseException as error:
            # A function may catch Ctrl-C to clean up, and raise it anew.
            if by_signals and (error in by_signals or isinstance(error, KeyboardInterrupt)):
                raise
            return Outcome(error=error)


@contextmanager
def _raised_by_signals() -> Iterator[list[BaseException]]:
    """Collects what the handlers of SIGINT and SIGTERM raise, which tells Ctrl-C from a KeyboardInterrupt raised."""
    raised: list[BaseException] = []
    replaced: list[tuple[signal.Signals, Any, Any]] = []

    def noting(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    # Only the main thread gets signals, and may say what they do.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                replaced.append((number, handler, noting(handler)))
                signal.signal(number, replaced[-1][2])
    try:
        yield raised
    finally:
        for number, handler, ours in replaced:
            # The function may have set its own.
            if signal.getsignal(number) is ours:
                signal.signal(number, handler)


# Calls with where their outcomes go; None is the last one.
_Jobs = queue.SimpleQueue[tuple[Callable[[], Outcome], "queue.SimpleQueue[Outcome]"] | None]


def _run_jobs(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        call, answers = job
        outcome = _outcome_here(call)
        answers.put(outcome.value if outcome.error is None else outcome)
        # What was called, and its answer, may be gone before the next call comes.
        del job, call, answers, outcome


def _with_callers_state(call: Callable[[], T]) -> Callable[[], T]:
    """Returns a call that finds, in another thread, the context, the grad mode and the CUDA device of this one."""
    context = contextvars.copy_context()
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def there() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(grad):
            return context.run(call)

    return there


# ---- async functions


async def _outcome_of_awaitable(awaitable: Awaitable[Any]) -> Outcome:
    # An exit must not reach the event loop, whose thread would end with it.
    try:
        return Outcome(await awaitable)
    except BaseException as error:
        return Outcome(error=error)


def _result(future: concurrent.futures.Future[Outcome]) -> Outcome:
    """Returns the outcome of a future that is done, also where a function cancelled its own task."""
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:
        return Outcome(error=error)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns one loop in one thread as long as the process lives, so that open connections stay usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_for_ever, args=(loop,), name="async functions", daemon=True).start()
    return loop


# The loop's thread is not there in a process that was forked.
os.register_at_fork(after_in_child=_event_loop.cache_clear)


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop, also after a task or callback that a function started has raised SystemExit or stopped it."""
    while not loop.is_closed():
        with suppress(BaseException):
            loop.run_forever()


def _leave_if_blocked(loop: asyncio.AbstractEventLoop) -> None:
    """Has later calls get another loop if a function keeps this one busy without awaiting."""
    alive = threading.Event()
    loop.call_soon_threadsafe(alive.set)
    if not alive.wait(_LOOP_SECONDS):
        _event_loop.cache_clear()
