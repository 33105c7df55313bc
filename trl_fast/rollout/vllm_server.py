"""Asks `vllm serve` over HTTP for completions, and gives it new weights over NCCL.

Endpoints and their order are those that TRL 1.16.0 uses. They were tried against a stand-in for the server only: no
vLLM has run with this code.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

# Seconds between two looks at a server that is starting, and for which it may think about its health.
_POLL_SECONDS = 2.0
_HEALTH_SECONDS = 5.0
_START = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)


class VLLMServer:
    """Speaks to a running `vllm serve`.

    Args:
        base_url: such as http://localhost:8000.
        timeout: seconds to wait for it to be up.
        request_timeout: seconds after which a request counts as lost.

    Raises:
        ConnectionError: it is not up within `timeout`; later, from every method, it does not answer.
        RuntimeError: from every method, it refuses a request; the message is the server's.
    """

    def __init__(self, base_url: str, *, timeout: float = 240.0, request_timeout: float = 1800.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.request_timeout = request_timeout
        self.session = requests.Session()
        # Sampling again does no harm; weights must not be sent twice.
        again = Retry(total=5, connect=5, read=1, status=3, status_forcelist=[502, 503], backoff_factor=1)
        again.allowed_methods = None
        again.raise_on_status = False
        self.session.mount(f"{self.base_url}/v1/", HTTPAdapter(max_retries=again))
        self.group: Any = None
        self._wait(timeout)
        self.model = self._request("GET", "/v1/models").json()["data"][0]["id"]

    def _wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            try:
                response = self.session.get(f"{self.base_url}/health", timeout=_HEALTH_SECONDS)
                if response.status_code == 200:
                    return
                state = f"says {response.status_code}"
            except requests.RequestException as error:
                state = f"cannot be reached ({type(error).__name__})"
            if time.monotonic() + _POLL_SECONDS > end:
                raise ConnectionError(
                    f"the vLLM server at {self.base_url} {state} after {timeout:g} seconds; start it with `{_START}`, "
                    "or wait longer with vllm_server_timeout"
                )
            time.sleep(_POLL_SECONDS)

    def _request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        try:
            response = self.session.request(
                method, f"{self.base_url}{path}", timeout=(_HEALTH_SECONDS, self.request_timeout), **kwargs
            )
        except requests.RequestException as error:
            raise ConnectionError(
                f"the vLLM server at {self.base_url} did not answer {path} (waiting up to {self.request_timeout:g} "
                f"seconds): {error}"
            ) from error
        if response.status_code != 200:
            hint = f"; start the server with `{_START}`" if response.status_code == 404 else ""
            raise RuntimeError(
                f"the vLLM server at {self.base_url} answered {path} with {response.status_code}: "
                f"{response.text[:500]}{hint}"
            )
        return response

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
        choices = self._request("POST", "/v1/completions", json=body).json()["choices"]
        asked = n * len(prompts)
        if len(choices) != asked:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} returned {len(choices)} completions; {asked} were asked for"
            )
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return [choice["token_ids"] for choice in choices], logprobs

    def config(self) -> dict[str, Any]:
        """Returns the server's own configuration."""
        return self._request("GET", "/server_info", params={"config_format": "json"}).json()["vllm_config"]

    def join(self, device: torch.device, port: int) -> None:
        """Opens the NCCL group that weights are sent through: the trainer is rank 0, the server's workers follow.

        Raises:
            NotImplementedError: the device is no CUDA device.
        """
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.utils.network_utils import get_ip

        if device.type != "cuda":
            raise NotImplementedError(
                f"weights are sent to a vLLM server over NCCL, from a CUDA device; training runs on {device}"
            )
        if self.config()["weight_transfer_config"] is None:
            raise RuntimeError(f"the vLLM server at {self.base_url} takes no weights; start it with `{_START}`")
        workers = self._request("GET", "/get_world_size").json()["world_size"]
        info = {
            "master_address": get_ip(),
            "master_port": port,
            "rank_offset": 1,
            "world_size": workers + 1,
            "packed": True,
        }
        if device.index is not None:
            torch.cuda.set_device(device)
        self.group = self._beside("/init_weight_transfer_engine", {"init_info": info}, lambda: trainer_init(info))
        atexit.register(self.leave)

    def load(self, metadata: list[tuple[str, str, list[int]]], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Sends weights through the group, and has the server forget what it computed with the ones before.

        metadata: name, dtype such as bfloat16, and shape of each, in the order of `weights`.
        """
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        names, dtypes, shapes = (list(column) for column in zip(*metadata, strict=True))
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        self._request("POST", "/start_weight_update", json={})
        self._beside(
            "/update_weights",
            {"update_info": info},
            lambda: packed_nccl_broadcast_producer(
                iterator=weights, group=self.group, src=0, post_iter_func=lambda item: item[1]
            ),
        )
        self._request("POST", "/finish_weight_update", json={})
        self._request("POST", "/reset_prefix_cache")

    def _beside(self, path: str, body: dict[str, Any], act: Any) -> Any:
        """Does something while the server, in the request, waits for just that."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            request = executor.submit(self._request, "POST", path, json=body)
            done = act()
            request.result()
        return done

    def leave(self) -> None:
        """Closes the group; its socket would keep the server waiting."""
        if self.group is not None:
            self.group.group.store = None
            self.group.group.socket = None
            self.group = None
