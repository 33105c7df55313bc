"""Asks a vLLM server how likely a teacher finds the tokens of completions, and which tokens it finds likeliest.

A request is one prompt with its completion, as in TRL 1.16.0; vLLM answers with the log-probabilities of its tokens as
those of a prompt (`prompt_logprobs`). Requests run side by side, in threads of their own, while the student computes.
vLLM knows no temperature there: it tells the model's own distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from trl_fast.settings.server_url import ServerURL

from .reward_answers import shown
from .vllm_server import REQUESTS_AT_ONCE, VLLMServer

# Seconds after which a request counts as lost: no tokens are sampled, so it takes as long as it waits for others.
_REQUEST_SECONDS = 600.0
# The largest log-probability that rounding gives.
_MOST = 1e-2
_GO_ON = "start it again, and go on with train(resume_from_checkpoint=True)"


class TaughtTokens(NamedTuple):
    """Holds what a teacher says of the T tokens of a completion.

    - `likeliest`: (T, K) int64, the likeliest first; `logprobs`: (T, K) float32, −inf where there are fewer than K.
    - `own_logprobs`: (T,) float32, of the completion's own tokens.
    """

    likeliest: torch.Tensor
    logprobs: torch.Tensor
    own_logprobs: torch.Tensor


class TeacherServer:
    """Speaks to a `vllm serve` that runs a teacher.

    Args:
        url: its address.
        setting: the argument that names it, for messages.
        timeout: seconds to wait for it to be up, `teacher_server_timeout`.
        vocab_size: the tokens that the student knows.

    Raises:
        ConnectionError: it is not up within `timeout`.
        RuntimeError: something else than vLLM answers.
    """

    def __init__(self, url: ServerURL, *, setting: str, timeout: float, vocab_size: int) -> None:
        self._setting, self._vocab_size = setting, vocab_size
        self._server = VLLMServer(
            url, timeout=timeout, request_timeout=_REQUEST_SECONDS, timeout_setting="teacher_server_timeout"
        )
        self._threads = ThreadPoolExecutor(max_workers=REQUESTS_AT_ONCE, thread_name_prefix="teacher server")

    def ask(
        self, pairs: Iterable[tuple[list[int], list[int]]], count: int, temperature: float
    ) -> list[Future[TaughtTokens]]:
        """Asks about completions of prompts: their tokens, and the `count` likeliest ones there; returns at once.

        An answer's `result()` raises ConnectionError where the server does not answer, and RuntimeError where it
        refuses, or answers something else. What has not been asked by then is not asked any more, and fails alike.
        """
        failures: list[Exception] = []

        def answer(prompt: list[int], completion: list[int]) -> TaughtTokens:
            if failures:
                raise failures[0]
            try:
                return self._ask(prompt, completion, count, temperature)
            except Exception as error:
                failures.append(error)
                raise

        return [self._threads.submit(answer, *pair) for pair in pairs]

    def _ask(self, prompt: list[int], completion: list[int], count: int, temperature: float) -> TaughtTokens:
        tokens = [*prompt, *completion]
        body = {
            "model": self._server.model,
            "prompt": [tokens],
            "max_tokens": 1,
            "temperature": temperature,
            "prompt_logprobs": count,
        }
        asked = f"asked for the {count} likeliest tokens at {len(completion)} places after {len(prompt)} tokens"
        limits = f"--max-logprobs {count} and --max-model-len {len(tokens) + 1}"
        try:
            found = self._server.ask("POST", "/v1/completions", json=body).read(list, "choices", 0, "prompt_logprobs")
        except ConnectionError as error:
            raise ConnectionError(f"{self._setting}: {error}; {asked}; {_GO_ON}") from error
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._setting}: {error}; {asked}; a vLLM server for that is started with {limits} at least"
            ) from error
        places = found[len(prompt) :]
        if len(found) != len(tokens) or not all(isinstance(each, dict) for each in places):
            raise self._refused(f"{len(found)} places with {shown(places)}", f"{len(tokens)} with a map from tokens")
        return _joined([self._of_place(*each, count) for each in zip(places, completion, strict=True)])

    def _of_place(self, found: dict[str, Any], own: int, count: int) -> tuple[list[int], list[float], float]:
        """Returns the `count` likeliest tokens of a place, their log-probabilities, and that of its own token."""
        try:
            named = [(each["rank"], int(token), _logprob(each["logprob"])) for token, each in found.items()]
            listed = sorted(named, key=itemgetter(0))
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(shown(found), "a rank and a log-prob for each token") from error
        known = {token: logprob for _, token, logprob in listed}
        has_likeliest = not count or (listed and listed[0][0] == 1 and math.isfinite(listed[0][2]))
        if not math.isfinite(known.get(own, -math.inf)) or not has_likeliest:
            raise self._refused(shown(found), f"a log-prob of the completion's token {own}, and of the likeliest one")
        if max(known.values()) > _MOST:
            raise self._refused(shown(found), "log-probs, which are not above 0; serve without --logprobs-mode")
        outside = next((token for token in known if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise self._refused(
                f"token {outside}", f"one of the student's {self._vocab_size}: serve a teacher with its tokenizer"
            )
        missing, chosen = max(count - len(listed), 0), listed[:count]
        ids = [token for _, token, _ in chosen] + [own] * missing
        return ids, [logprob for _, _, logprob in chosen] + [-math.inf] * missing, known[own]

    def _refused(self, said: str, expected: str) -> RuntimeError:
        return RuntimeError(
            f"{self._setting}: the vLLM server at {self._server.base_url} answered {said}; expected {expected}"
        )


def _logprob(value: Any) -> float:
    """Returns a log-probability; −inf for what vLLM writes where it has none: null, or NaN."""
    return -math.inf if value is None or math.isnan(value) else float(value)


def _joined(places: list[tuple[list[int], list[float], float]]) -> TaughtTokens:
    ids, logprobs, own = zip(*places, strict=True)
    as_float = partial(torch.tensor, dtype=torch.float32)
    return TaughtTokens(torch.tensor(ids, dtype=torch.int64), as_float(logprobs), as_float(own))
