"""Stand-ins for vLLM and its server: they remember what they are asked and told, and answer with made-up tokens."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

END = 1


def made_up(prompt: list[int], index: int, max_tokens: int) -> tuple[list[int], list[float]]:
    """A completion that tells its prompt and its place in the group, and log-probabilities that tell its tokens."""
    tokens = [3 + (sum(prompt) + index) % 300, 3 + index][: max_tokens - 1] + [END]
    return tokens, [-token / 100 for token in tokens]


@contextmanager
def fake_server(answers: dict | None = None, complete: Callable[[dict], list[dict]] | None = None):
    """Serves on a free port; it has `.url`, and `.requests` [(method, path, body)].

    complete: from a body to the choices of completions, in the place of `choices`.

    answers: for some paths others than usual: JSON, or bytes; a pair of status and one of these, and maybe the length
        that is promised; or a function that gives one of all these.
    """
    fixed = {
        "/health": {},
        "/v1/models": {"data": [{"id": "policy"}]},
        "/server_info": {
            "vllm_config": {
                "weight_transfer_config": {"backend": "nccl"},
                "model_config": {"logprobs_mode": "processed_logprobs"},
            }
        },
        "/get_world_size": {"world_size": 2},
        **dict.fromkeys(("/init_weight_transfer_engine", "/start_weight_update", "/update_weights"), {}),
        **dict.fromkeys(("/finish_weight_update", "/reset_prefix_cache"), {"success": True}),
        **(answers or {}),
    }
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            requests.append((self.command, path, body))
            if path in fixed:
                answer = fixed[path]
            else:
                answer = features(body) if path.endswith("/render") else {"choices": (complete or choices)(body)}
            answer = answer() if callable(answer) else answer
            status, answer, *promised = answer if isinstance(answer, tuple) else (200, answer)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(*promised or [len(data)]))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=requests)
    finally:
        server.shutdown()
        server.server_close()


def features(body: dict) -> dict:
    """Returns the server's answer to /v1/chat/completions/render: hashes of images, and places that nobody needs."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"]]
    places = [{"offset": 3 + index, "length": 1} for index in range(len(urls))]
    hashes = [str(hash(url)) for url in urls]
    return {"features": {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": places}}}


def choices_with_images(body: dict) -> list[dict]:
    """Returns the server's answer to /inference/v1/generate."""
    sampling, answers = body["sampling_params"], []
    for index in range(sampling["n"]):
        tokens, logprobs = made_up(body["token_ids"], index, sampling["max_tokens"])
        listed = [
            {"token": f"token_id:{token}", "logprob": logprob, "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        answers.append({"token_ids": tokens, "logprobs": {"content": listed}})
    return answers


def choices(body: dict) -> list[dict]:
    """Returns the server's answer to /v1/completions."""
    if "token_ids" in body:
        return choices_with_images(body)
    answers = []
    for prompt in body["prompt"]:
        for index in range(body["n"]):
            tokens, logprobs = made_up(prompt, index, body["max_tokens"])
            names = [f"token_id:{token}" for token in tokens]
            listed = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": [None] * len(tokens)}
            answers.append({"token_ids": tokens, "prompt_token_ids": prompt, "logprobs": listed})
    return answers


class FakeLLM:
    """`vllm.LLM` as far as it is used; `.log` has the calls, `.weights` what was loaded last."""

    def __init__(self, **arguments):
        self.arguments, self.log, self.weights = arguments, [], {}
        model = SimpleNamespace(load_weights=lambda pairs: self.weights.update(pairs))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def generate(self, prompts, sampling_params, use_tqdm):
        self.log.append(("generate", prompts, sampling_params))
        outputs = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            completions = []
            for index in range(parameters.n):
                tokens, logprobs = made_up(prompt["prompt_token_ids"], index, parameters.max_tokens)
                # A likelier token stands first, as vLLM may have it.
                steps = [
                    {999: SimpleNamespace(logprob=0.0, rank=1), token: SimpleNamespace(logprob=logprob, rank=2)}
                    for token, logprob in zip(tokens, logprobs, strict=True)
                ]
                completions.append(SimpleNamespace(token_ids=tuple(tokens), logprobs=steps))
            outputs.append(SimpleNamespace(outputs=completions))
        return outputs

    def sleep(self, level):
        self.weights.clear()
        self.log.append(("sleep", level))

    def wake_up(self, tags):
        self.log.append(("wake_up", tags))

    def collective_rpc(self, method, kwargs):
        self.log.append(("collective_rpc", method))
        self.weights.update(kwargs["weights_iterator"])

    def reset_prefix_cache(self):
        self.log.append(("reset_prefix_cache",))


def install_fake_vllm(monkeypatch) -> list:
    """Puts modules of vLLM's names into sys.modules; returns the list of what is sent through the NCCL group.

    What the colocated engine sets in the environment is gone afterwards: the next trainer of the process would start a
    process group.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    sent: list = []

    def trainer_init(info):
        sent.append(info)
        return SimpleNamespace(group=SimpleNamespace(store="store", socket="socket"))

    def producer(*, iterator, group, src, post_iter_func):
        # As the real one: tensors are collected before the first is sent.
        collected = [(name, post_iter_func((name, tensor))) for name, tensor in iterator]
        sent.append({name: tensor.clone() for name, tensor in collected})

    contents = {
        "vllm": {"LLM": FakeLLM, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"StructuredOutputsParams": SimpleNamespace},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
        "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": producer},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return sent
