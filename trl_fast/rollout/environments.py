"""Gives each completion an environment of its own: an object with a state, whose methods the policy calls as tools.

An environment is TRL's: its `reset` takes the dataset's row and may return text for the prompt, its other public
methods are tools, and its `get_reward`, if it has one, tells the reward. Each of them may be async.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reward_answers import checked_reward, copied, shown
from .tools import Toolbox
from .user_calls import LastingThread, Outcome, UserCalls, described, side_by_side

logger = logging.getLogger(__name__)

EnvironmentFactory = Callable[[], Any]

# Methods with a meaning of their own, which are no tools.
_RESET, _GET_REWARD = "reset", "get_reward"
# The first of these ends an environment, if it takes no arguments and returns nothing.
_CLOSING = ("close", "_close")


@dataclass
class Seat:
    """Holds one completion's environment.

    - `kind`, `place`: whose it is, and its number among the kind's.
    - `environment`: None where the factory failed.
    - `toolbox`: its methods, and the tools of the run; `toolbox.lost` says why it is of no use any more.
    - `thread`: where its sync methods are called, and it was made; None: in the caller's.
    - `failed_in`: the method that failed.
    """

    kind: EnvironmentKind
    place: int
    environment: Any
    toolbox: Toolbox
    thread: LastingThread | None
    failed_in: str = "a method"

    def read(self, method: str, outcome: Outcome) -> Any:
        """Returns what a method gave; where it failed, the environment is lost and gives None."""
        if outcome.error is not None:
            self.toolbox.lost, self.failed_in = outcome.error, f"{method}()"
        return outcome.value


class EnvironmentKind:
    """Makes and keeps the environments of one factory: each is made once, and reset for every completion.

    Args:
        key: what rows call it; None: there is no other kind.
        factory: makes an environment; it is called once now.
        tools: functions that the policy may call beside the environment's methods.
        tool_timeout: seconds that a tool may take; None is no limit.
        calls: what calls the factory.
        in_threads: whether each environment has a thread of its own, in which it is made, used and closed.

    Attributes:
        type: the environments' class.
        methods: the names of those that are tools.
        toolbox: the functions of the first environment.
        pool: the environments so far; None in the place of one that was lost.

    Raises:
        TypeError: the factory cannot be called, or does not make an environment.
        ValueError: an environment lacks `reset`, has no methods, or one that cannot be described to a model.
        RuntimeError: the factory raised.
    """

    def __init__(
        self,
        key: str | None,
        factory: EnvironmentFactory,
        tools: Sequence[Callable],
        tool_timeout: float | None,
        calls: UserCalls,
        in_threads: bool,
    ) -> None:
        self._where = "environment_factory" if key is None else f"environment_factory[{key!r}]"
        if not callable(factory):
            raise TypeError(
                f"{self._where}: expected a class or function that makes an environment, got {shown(factory)} of type "
                f"{type(factory).__name__}"
            )
        self.factory = factory
        self._calls, self._in_threads = calls, in_threads
        self._threads: dict[int, LastingThread] = {}
        first = self._first()
        self.type: type = type(first)
        self.methods = _tool_methods(self.type)
        if not callable(getattr(self.type, _RESET, None)):
            raise ValueError(
                f"{self._where}: {self.name} has no method reset(); define reset(self, **row), which returns None or "
                "text for the prompt"
            )
        if not self.methods and not tools:
            raise ValueError(
                f"{self._where}: {self.name} has no public methods, so that the policy could do nothing in it; give "
                "it methods with type hints and a docstring (reset, get_reward and close are no such ones)"
            )
        functions = {name: getattr(first, name) for name in self.methods}
        try:
            self.toolbox = Toolbox([*tools, *functions.values()], tool_timeout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._where}, environment {self.name}: {error}") from error
        self._tools = {name: each for name, each in self.toolbox.functions.items() if name not in functions}
        self._reset = inspect.signature(first.reset)
        self.pool: list[Any] = [first]

    @property
    def name(self) -> str:
        """Returns the name of the environments' class."""
        return self.type.__name__

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """Returns what the policy may call: the tools of the run, and the first environment's methods."""
        return list(self.toolbox.functions.values())

    @property
    def tells_reward(self) -> bool:
        """Says whether the environments tell their reward."""
        return callable(getattr(self.type, _GET_REWARD, None))

    def _first(self) -> Any:
        outcome = self._calls.call(self._where, self.factory, self._thread(0))
        if outcome.error is not None:
            raise RuntimeError(f"{self._where} raised {described(outcome.error)}") from outcome.error
        environment = outcome.value
        if inspect.iscoroutine(environment):
            environment.close()
        if environment is None or inspect.isawaitable(environment) or inspect.isclass(environment):
            raise TypeError(
                f"{self._where} returned {shown(environment)}; expected an environment, which is an object with "
                "reset() and further methods, from a function that is not async (connect in an async reset)"
            )
        return environment

    def check_reset(self, columns: Sequence[str], name: str) -> None:
        """Checks that `reset` takes the columns of a dataset; `name` is the dataset's.

        Raises:
            ValueError: it does not.
        """
        try:
            self._reset.bind(**dict.fromkeys(columns))
        except TypeError as error:
            raise ValueError(
                f"{self._where}: {self.name}.reset() is called with the columns {sorted(columns)} of the {name} "
                f"dataset, which do not fit its arguments {self._reset} ({error}); add **row to them"
            ) from error

    def reserve(self, count: int) -> None:
        """Makes places for so many environments."""
        self.pool += [None] * (count - len(self.pool))

    def _thread(self, place: int) -> LastingThread | None:
        """Returns the thread of a place's environment; None: it has none of its own."""
        return self._threads.setdefault(place, LastingThread(f"environment {place}")) if self._in_threads else None

    def seat(self, place: int) -> Seat:
        """Returns the seat of this number, with its environment, which is made if there is none."""
        outcome, thread = Outcome(self.pool[place]), self._thread(place)
        if outcome.value is None:
            outcome = self._calls.call(f"{self.name}()", self.factory, thread)
        environment = self.pool[place] = outcome.value
        seat = Seat(self, place, environment, self.toolbox.bound({}), thread)
        seat.read(self.name, outcome)
        if environment is not None:
            seat.read(self.name, self._bind(seat))
        return seat

    def _bind(self, seat: Seat) -> Outcome:
        """Gives a seat its environment's methods, which a factory of several classes may have others of."""
        try:
            methods = {name: getattr(seat.environment, name) for name in self.methods}
        except AttributeError as error:
            return Outcome(error=error)
        seat.toolbox.functions = self._tools | methods
        seat.toolbox.threads = {} if seat.thread is None else dict.fromkeys(methods, seat.thread)
        return Outcome()

    def clear(self) -> list[tuple[Any, LastingThread | None]]:
        """Forgets the environments, and returns them with their threads."""
        found = [(each, self._threads.get(place)) for place, each in enumerate(self.pool)]
        self.pool, self._threads = [], {}
        return found

    def forget(self, place: int) -> None:
        """Makes room for another environment in a place, and another thread."""
        if place < len(self.pool):  # else all were closed meanwhile
            self.pool[place] = None
            self._threads.pop(place, None)


class Environments:
    """Holds the environments of a run: those of one factory, or of several that rows choose by a name.

    Args:
        given: a factory, or a dict of them.
        tools: functions that the policy may call in every environment.
        timeout: seconds that a factory, `reset`, `get_reward` or `close` may take; None is no limit.
        tool_timeout: seconds that any other method may take.
        workers: environments of which sync methods run at a time, in threads if there are several.
        in_threads: whether each environment has a thread of its own even so; with a time limit or several workers it
            has. All its sync methods are called there, since what it holds may be bound to the thread that made it.

    Attributes:
        by_name: whether rows choose.
        kinds: by the rows' name for them; None is that of a single factory.
        seats: one for each completion of the present generation, in order.

    Raises:
        TypeError, ValueError, RuntimeError: as in `EnvironmentKind`; or a dict has no factories, or a key that is no
            text.
    """

    def __init__(
        self,
        given: EnvironmentFactory | Mapping[str, EnvironmentFactory],
        tools: Sequence[Callable] = (),
        *,
        timeout: float | None = None,
        tool_timeout: float | None = None,
        workers: int = 1,
        in_threads: bool = False,
    ) -> None:
        self.by_name = isinstance(given, Mapping)
        factories: Mapping[Any, Any] = given if isinstance(given, Mapping) else {None: given}
        if not factories:
            raise ValueError("environment_factory: the dict has no factories; expected a name and a factory at least")
        for key in factories:
            if self.by_name and not isinstance(key, str):
                raise TypeError(f"environment_factory: expected texts as names of environments, got {key!r}")
        self._workers = workers
        self._calls = UserCalls("environment", "environment_timeout", timeout)
        in_threads = in_threads or workers > 1 or timeout is not None or tool_timeout is not None
        self.kinds: dict[str | None, EnvironmentKind] = {
            key: EnvironmentKind(key, factory, tools, tool_timeout, self._calls, in_threads)
            for key, factory in factories.items()
        }
        self.seats: list[Seat] = []
        self._told: set[tuple[str, str, type]] = set()

    @property
    def instances(self) -> list[Any]:
        """Returns the environment of each completion; None where the factory failed."""
        return [seat.environment for seat in self.seats]

    @property
    def errors(self) -> list[BaseException | None]:
        """Returns for each completion what its environment failed with; None where it did not."""
        return [seat.toolbox.lost for seat in self.seats]

    def kind(self, name: object) -> EnvironmentKind:
        """Returns the kind that a row names.

        Raises:
            ValueError: there is none of this name.
        """
        found = self.kinds.get(name) if name is None or isinstance(name, str) else None
        if found is None:
            raise ValueError(f"environment={name!r} is none of environment_factory's {list(self.kinds)}")
        return found

    def reward_sources(self) -> list[EnvironmentReward]:
        """Returns a reward source for each class of environments that tells its reward."""
        keys: dict[type, str | None] = {}
        for key, kind in self.kinds.items():
            if kind.tells_reward:
                keys.setdefault(kind.type, key)
        return [EnvironmentReward(self, each, key) for each, key in keys.items()]

    def reset(self, names: Sequence[str | None], rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Gives each row an environment and resets it.

        Args:
            names: the kinds that the rows choose.
            rows: what `reset` is called with.

        Returns:
            What each `reset` returned: a text, a list of parts of a message, or None; None also where it failed.
        """
        self._retire()
        places: Counter[str | None] = Counter()
        jobs = []
        for name in names:
            jobs.append(functools.partial(self.kind(name).seat, places[name]))
            places[name] += 1
        for name, count in places.items():
            self.kind(name).reserve(count)
        self.seats = side_by_side(jobs, self._workers)
        return self.ask(self.seats, _RESET, [copied(row) for row in rows], _observation)

    def ask(
        self,
        seats: Sequence[Seat],
        method: str,
        arguments: Sequence[dict[str, Any]] | None = None,
        read: Callable[[Any], Any] | None = None,
    ) -> list[Any]:
        """Calls a method of environments: sync ones in order, or several at a time, then async ones side by side.

        Args:
            seats: whose environments. One that was lost is left out, one that raises or takes too long is lost.
            method: its name.
            arguments: of each environment's; None: it takes none.
            read: makes of what was returned what counts, and may raise; None: all counts.

        Returns:
            What each gave; None where one was lost.
        """
        values: list[Any] = [None] * len(seats)
        waiting: list[tuple[int, str, Awaitable[Any]]] = []
        working = [index for index, seat in enumerate(seats) if seat.toolbox.lost is None]
        jobs = []
        for index in working:
            given = {} if arguments is None else arguments[index]
            call = functools.partial(_called, seats[index].environment, method, given, read)
            named = f"{seats[index].kind.name}.{method}"
            jobs.append(functools.partial(self._calls.call, named, call, seats[index].thread))
        for index, outcome in zip(working, side_by_side(jobs, self._workers), strict=True):
            if inspect.isawaitable(outcome.value):
                waiting.append((index, f"{seats[index].kind.name}.{method}", outcome.value))
            else:
                values[index] = seats[index].read(method, outcome)
        answers = self._calls.gather([(name, _called_later(value, read)) for _, name, value in waiting])
        for (index, *_), answer in zip(waiting, answers, strict=True):
            values[index] = seats[index].read(method, answer)
        return values

    def report(self) -> None:
        """Names what failed in the present generation, once for each class, method and type of error."""
        for seat in self.seats:
            error = seat.toolbox.lost
            what = (seat.kind.name, seat.failed_in, type(error))
            if error is not None and what not in self._told:
                self._told.add(what)
                logger.warning(
                    f"environment {seat.kind.name} failed in {seat.failed_in} ({described(error)}). Its completion is "
                    "not learned from. environments/failure_frequency counts such ones; this line is not repeated."
                )

    def close(self) -> None:
        """Closes all environments that can be closed. Others are made where any are needed again."""
        self._close([each for kind in self.kinds.values() for each in kind.clear() if each[0] is not None])

    def _retire(self) -> None:
        """Closes the environments that were lost; others will take their places."""
        lost = [seat for seat in self.seats if seat.toolbox.lost is not None]
        for seat in lost:
            seat.kind.forget(seat.place)
        self._close([(seat.environment, seat.thread) for seat in lost])
        self.seats = []

    def _close(self, environments: Sequence[tuple[Any, LastingThread | None]]) -> None:
        """Closes environments in their threads, which end then."""
        found = [(each, _closing_method(type(each)), thread) for each, thread in environments]
        closed = [
            (f"{type(each).__name__}.{name}", getattr(each, name), thread)
            for each, name, thread in found
            if name is not None
        ]
        outcomes = side_by_side([functools.partial(self._calls.call, *each) for each in closed], self._workers)
        for _, thread in environments:
            if thread is not None:
                thread.leave()
        named = [(name, outcome) for (name, *_), outcome in zip(closed, outcomes, strict=True)]
        waiting = [(name, outcome.value) for name, outcome in named if inspect.isawaitable(outcome.value)]
        later = zip([name for name, _ in waiting], self._calls.gather(waiting), strict=True)
        for name, outcome in [*named, *later]:
            if outcome.error is not None:
                logger.warning(f"environment {name}() raised {described(outcome.error)}; it may not be closed")


class EnvironmentReward:
    """Tells the rewards of completions whose environment is of one class, by its `get_reward`; TRL's reward source.

    Args:
        environments: those of the run.
        kind: the class; a subclass of it has a source of its own.
        key: what rows call the first factory of this class; None: there is a single factory.
    """

    def __init__(self, environments: Environments, kind: type, key: str | None) -> None:
        self.__name__ = kind.__name__
        self.longer_name = f"{'environment' if key is None else key}.{kind.__name__}"
        self._environments, self._type = environments, kind

    def __call__(self, environments: list[Any], **_: Any) -> list[Any]:
        """Returns a reward for each completion; None where its environment is of another class, or is lost."""
        seats = {id(seat.environment): seat for seat in self._environments.seats}
        own = [seats[id(each)] for each in environments if type(each) is self._type]
        found = iter(self._environments.ask(own, _GET_REWARD, read=checked_reward))
        return [next(found) if type(each) is self._type else None for each in environments]


def distinct_names(sources: Sequence[EnvironmentReward], others: Sequence[str]) -> list[str]:
    """Returns a name for each source: its class's, or the longer one where something else has that name too.

    others: the names of other reward sources.
    """
    counts = Counter([*others, *(source.__name__ for source in sources)])
    return [source.__name__ if counts[source.__name__] == 1 else source.longer_name for source in sources]


def _tool_methods(kind: type) -> list[str]:
    """Returns the names of the methods that are tools: all public ones without a meaning of their own.

    They are looked up in the class, since properties of an object would be computed.
    """
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]
    return [name for name in names if name not in (_RESET, _GET_REWARD, _closing_method(kind))]


def _closing_method(kind: type) -> str | None:
    """Returns the name of the method that ends an environment of a class; None: there is none.

    One that takes arguments or returns something is a tool, which closes a door.
    """
    for name in _CLOSING:
        method = getattr(kind, name, None)
        if inspect.isfunction(method):
            signature = inspect.signature(method)
            needed = [each for each in signature.parameters.values() if each.default is each.empty]
            if len(needed) <= 1 and signature.return_annotation in (signature.empty, None, "None"):
                return name
    return None


def _observation(value: Any) -> Any:
    """Returns what `reset` returned if it can be added to a prompt.

    Raises:
        TypeError: it cannot.
    """
    if isinstance(value, str):
        # Halves of characters come from games and pages, and no tokenizer takes them.
        return value.encode("utf-8", "replace").decode("utf-8")
    parts = value if isinstance(value, list) else [None]
    if value is not None and not all(isinstance(part, dict) and "type" in part for part in parts):
        raise TypeError(
            f"reset() returned {shown(value)} of type {type(value).__name__}; expected None, a text, or a list of "
            "parts such as {'type': 'text', 'text': 'You are in a maze.'}"
        )
    return copied(value)


def _called(environment: Any, method: str, arguments: dict[str, Any], read: Callable[[Any], Any] | None) -> Any:
    """Returns what a method gives, as it counts; of an async one what is to be awaited."""
    value = getattr(environment, method)(**arguments)
    return value if read is None or inspect.isawaitable(value) else read(value)


async def _called_later(value: Awaitable[Any], read: Callable[[Any], Any] | None) -> Any:
    return await value if read is None else read(await value)
