"""Asks `vllm serve` over HTTP for completions.

Endpoints and their order are those that TRL 1.16.0 uses.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from trl_fast.settings.server_url import ServerURL

from .reward_answers import shown
from .vllm_images import image_messages

logger = logging.getLogger(__name__)

# Seconds between two looks at a server that is starting, and for which it may think about its health.
_POLL_SECONDS = 2.0
_HEALTH_SECONDS = 5.0
# Seconds after which it is said again that a server is waited for.
_LINE_SECONDS = 60.0
START_COMMAND = "trl-fast vllm-serve --model MODEL"
_IS_IT_VLLM = f"is it vLLM's? Start it with `{START_COMMAND}`"
# What prompts with images are read by, and what that needs.
_RENDER = "/v1/chat/completions/render"
_SCALE_OUT = "prompts with images need it: from vLLM 0.30 on, start the server with --enable-scale-out too"
# Requests that wait for a server side by side.
REQUESTS_AT_ONCE = 64
# vLLM's RequestOutputKind.
_FINAL_ONLY = 2


class VLLMServer:
    """Speaks to a running `vllm serve`.

    Args:
        url: its address.
        timeout: seconds to wait for it to be up.
        request_timeout: seconds after which a request counts as lost.
        timeout_setting: the argument that `timeout` comes from, for messages.

    Raises:
        ConnectionError: it is not up within `timeout`; later, from every method, it does not answer.
        RuntimeError: from every method, it refuses a request, or answers as vLLM does not; the message says what was
            asked and what was answered.
    """

    def __init__(
        self,
        url: ServerURL,
        *,
        timeout: float = 240.0,
        request_timeout: float = 1800.0,
        timeout_setting: str = "vllm_server_timeout",
    ) -> None:
        self.base_url = url.address
        self.request_timeout, self._timeout_setting = request_timeout, timeout_setting
        self.session = requests.Session()
        # Given apart, so that no error of a lower layer shows them.
        self.session.auth = url.credentials
        # Sampling again does no harm; weights must not be sent twice.
        again = Retry(total=5, connect=5, read=1, status=3, status_forcelist=[502, 503], backoff_factor=1)
        again.allowed_methods = None
        again.raise_on_status = False
        for part in ("/v1/", "/inference/v1/"):
            self.session.mount(f"{self.base_url}{part}", HTTPAdapter(pool_maxsize=REQUESTS_AT_ONCE, max_retries=again))
        self._wait(timeout)
        self.model = self.ask("GET", "/v1/models").read(str, "data", 0, "id")

    def _wait(self, timeout: float) -> None:
        """Waits until the server is up; says once a minute that it waits, and for what."""
        start = said = time.monotonic()
        end = start + timeout
        while True:
            state = self._state()
            if state is None:
                return
            now = time.monotonic()
            if now + _POLL_SECONDS > end:
                raise ConnectionError(
                    f"the vLLM server at {self.base_url} {state} after {timeout:g} seconds; start it with "
                    f"`{START_COMMAND}`, or wait longer with {self._timeout_setting}"
                )
            if said == start or now - said >= _LINE_SECONDS:
                said = now
                logger.warning(
                    f"waiting for the vLLM server at {self.base_url}, which {state}, {now - start:.0f} s "
                    f"({self._timeout_setting}={timeout:g})"
                )
            time.sleep(_POLL_SECONDS)

    def _state(self) -> str | None:
        """Returns why the server is not up yet; None when it is.

        Raises:
            RuntimeError: something else than vLLM answers.
        """
        try:
            response = self.session.get(f"{self.base_url}/health", timeout=_HEALTH_SECONDS)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise RuntimeError(f"the vLLM server's address {self.base_url} cannot be used: {error}") from error
        except requests.RequestException as error:
            return f"cannot be reached ({type(error).__name__})"
        if response.status_code >= 500:
            return f"says {response.status_code}"
        _Answer("GET", f"{self.base_url}/health", response).check()
        return None

    def ask(self, method: str, path: str, hint: str = _IS_IT_VLLM, **kwargs: Any) -> _Answer:
        """Returns the server's answer; hint: what is said where it does not know the path; kwargs: of `requests`."""
        try:
            response = self.session.request(
                method, f"{self.base_url}{path}", timeout=(_HEALTH_SECONDS, self.request_timeout), **kwargs
            )
        except requests.RequestException as error:
            raise ConnectionError(
                f"the vLLM server at {self.base_url} did not answer {path} (waiting up to {self.request_timeout:g} "
                f"seconds): {shown(error)}"
            ) from error
        answer = _Answer(method, f"{self.base_url}{path}", response)
        answer.check(hint)
        return answer

    def complete(
        self, prompts: list[list[int]], n: int, parameters: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Returns `n` completions of each prompt, those of one prompt together, and their tokens' log-probs."""
        body = {
            "model": self.model,
            "prompt": prompts,
            "n": n,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **parameters,
        }
        answer = self.ask("POST", "/v1/completions", json=body)
        return self._read([answer], n * len(prompts), "token_logprobs")

    def image_features(self, pictures: Sequence[Sequence[Image.Image]]) -> list[dict[str, Any] | None]:
        """Returns what the server makes of the pictures of each prompt; None for a prompt without pictures."""

        def features(own: Sequence[Image.Image]) -> dict[str, Any] | None:
            if not own:
                return None
            body = {"model": self.model, "messages": image_messages(own), "max_tokens": 1}
            answer = self.ask("POST", _RENDER, json=body, hint=_SCALE_OUT)
            answer.read(list, "features", "mm_placeholders", "image")
            found: dict[str, Any] = answer.read(dict, "features")
            return found

        with ThreadPoolExecutor(max_workers=REQUESTS_AT_ONCE) as executor:
            return list(executor.map(features, pictures))

    def complete_with_images(
        self, prompts: list[list[int]], features: list[dict[str, Any] | None], n: int, parameters: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Returns, as `complete`, completions of prompts whose image tokens stand for these features."""
        # With another kind of output vLLM returns only those of n completions that ended last.
        sampling = {**parameters, "n": n, "output_kind": _FINAL_ONLY}

        def answer(index: int) -> _Answer:
            body = {
                "request_id": f"trl-fast-{uuid.uuid4().hex}",
                "model": self.model,
                "token_ids": prompts[index],
                "features": features[index],
                "sampling_params": sampling,
            }
            return self.ask("POST", "/inference/v1/generate", json=body, hint=_SCALE_OUT)

        with ThreadPoolExecutor(max_workers=REQUESTS_AT_ONCE) as executor:
            answers = list(executor.map(answer, range(len(prompts))))
        return self._read(answers, n * len(prompts), "content")

    def _read(self, answers: list[_Answer], asked: int, key: str) -> tuple[list[list[int]], list[list[float]]]:
        """Returns token ids and log-probs of the completions of all answers; key: under which the log-probs stand."""
        choices = [(answer, place) for answer in answers for place in range(len(answer.read(list, "choices")))]
        if len(choices) != asked:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} returned {len(choices)} completions; {asked} were asked for"
            )
        ids = [answer.read(list, "choices", place, "token_ids") for answer, place in choices]
        logprobs = [answer.read(list, "choices", place, "logprobs", key) for answer, place in choices]
        # Of prompts with images an entry a token, as in a chat.
        logprobs = [[each.get("logprob") if isinstance(each, dict) else each for each in row] for row in logprobs]
        for index, (tokens, values) in enumerate(zip(ids, logprobs, strict=True)):
            known = all(isinstance(token, int) for token in tokens) and all(map(_is_logprob, values))
            if not known or len(tokens) != len(values):
                raise RuntimeError(
                    f"the vLLM server at {self.base_url} returned a completion {index} of tokens {shown(tokens)} with "
                    f"log-probs {shown(values)}; expected an integer for each token, and a number or null"
                )
        return ids, logprobs

    def config(self) -> dict[str, Any]:
        """Returns the server's own configuration."""
        return self.ask("GET", "/server_info", params={"config_format": "json"}).read(dict, "vllm_config")


class _Answer:
    """Reads what a server answered, and says what was asked and answered where that is not what vLLM answers."""

    def __init__(self, method: str, url: str, response: requests.Response) -> None:
        self._asked, self._response = f"{method} {url}", response

    def check(self, hint: str = _IS_IT_VLLM) -> None:
        """Raises RuntimeError if the server refuses; hint: what is said where it does not know the path."""
        status = self._response.status_code
        if status != 200:
            said = f"; {hint}" if status == 404 else ""
            raise RuntimeError(f"{self._asked}: the server answered {status}: {shown(self._response.text)}{said}")

    def read(self, kind: type, *path: str | int) -> Any:
        """Returns a value of the answer's JSON.

        Args:
            kind: what it has to be.
            path: keys and places that lead to it.

        Raises:
            RuntimeError: the answer is no JSON, or has no such value.
        """
        try:
            value = self._response.json()
            for key in path:
                value = value[key]
        except (ValueError, LookupError, TypeError):
            value = None
        if not isinstance(value, kind):
            place = "".join(f"[{key!r}]" for key in path)
            raise RuntimeError(
                f"{self._asked}: expected an answer of vLLM's, JSON with {place}, got {shown(self._response.text)}; "
                f"is it vLLM's server? Start it with `{START_COMMAND}`"
            )
        return value


def _is_logprob(value: Any) -> bool:
    # vLLM says null where it got NaN.
    return value is None or (isinstance(value, float | int) and not math.isinf(value))
