"""The vLLM engines against stand-ins for vLLM: requests as TRL's client makes them, weights, groups, errors."""

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from trl.generation import vllm_client

from support.models import tiny_model
from support.tokenizer import build_tokenizer
from support.vllm import END, fake_server, install_fake_vllm, made_up
from trl_fast.rollout import SamplingSettings, vllm_server, vllm_weights
from trl_fast.rollout.vllm_engine import VLLMColocatedEngine, VLLMServerEngine, make_vllm_engine
from trl_fast.rollout.vllm_server import VLLMServer
from trl_fast.rollout.vllm_weights import open_weights
from trl_fast.rollout.weights import merged_weights, weight_metadata
from trl_fast.settings.server_url import ServerURL, read_server_url

PROMPTS = [[5, 6], [5, 6], [7], [8, 9], [8, 9]]
# What the stand-ins make of them: the place within a run of equal prompts counts.
EXPECTED = [made_up(prompt, index, 16) for prompt, index in zip(PROMPTS, [0, 1, 0, 0, 1], strict=True)]
SETTINGS = SamplingSettings(16, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, generation_kwargs={"seed": 3, "n": 9})
CUDA = torch.device("cuda")


@pytest.fixture
def sent(monkeypatch):
    return install_fake_vllm(monkeypatch)


def server_engine(server, **arguments):
    PartialState()
    return VLLMServerEngine(ServerURL(server.url), device=CUDA, end_ids={END}, timeout=5, **arguments)


def assert_rollout(rollout):
    assert rollout.prompt_ids == PROMPTS
    assert rollout.completion_ids == [tokens for tokens, _ in EXPECTED]
    assert rollout.logprobs == [logprobs for _, logprobs in EXPECTED]


def test_server_completes_groups_in_order(sent):
    with fake_server() as server:
        assert_rollout(server_engine(server).generate(PROMPTS, SETTINGS))
        asked = [body for _, path, body in server.requests if path == "/v1/completions"]
    assert [(body["prompt"], body["n"]) for body in asked] == [([[7]], 1), ([[5, 6], [8, 9]], 2)]


def test_requests_equal_trl(sent, monkeypatch):
    """TRL's client, with the same stand-in for its NCCL group, against the same server."""
    model = tiny_model()
    for name, value in {
        "is_vllm_available": lambda *args, **kwargs: True,
        "get_ip": lambda: "127.0.0.1",
        "_HAS_STATEFUL_TRAINER_ENGINE": True,
        "open_trainer_endpoint": sys.modules["vllm.distributed.weight_transfer.nccl_common"].trainer_init,
        "packed_nccl_broadcast_producer": sys.modules[
            "vllm.distributed.weight_transfer.packed_tensor"
        ].packed_nccl_broadcast_producer,
    }.items():
        monkeypatch.setattr(vllm_client, name, value, raising=False)
    with fake_server() as server:
        client = vllm_client.VLLMClient(server.url)
        client.init_communicator(CUDA)
        client.update_model_params(model)
        client.reset_prefix_cache()
        answer = client.generate(
            PROMPTS[::2],
            n=2,
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            max_tokens=16,
            generation_kwargs={"seed": 3},
        )
        theirs, their_weights = server.requests.copy(), sent.copy()
        server.requests.clear()
        sent.clear()
        engine = server_engine(server)
        engine.sync_weights(model, 0)
        rollout = engine.generate([prompt for prompt in PROMPTS[::2] for _ in range(2)], SETTINGS)
        ours = server.requests.copy()
    assert rollout.completion_ids == answer["completion_ids"]
    assert rollout.logprobs == [[position[0] for position in row] for row in answer["logprobs"]]
    # Ours looks at the server's log-probs mode too, as TRL's trainer does, and names the end tokens.
    assert ours.pop(5)[1] == "/server_info"
    assert ours[-1][2].pop("stop_token_ids") == [END]
    assert ours == theirs
    assert sent[0] == their_weights[0]
    assert list(sent[1]) == list(their_weights[1]) == [name for name, _ in model.named_parameters()]


def test_weights_are_sent_once_a_step(sent):
    model = tiny_model()
    with fake_server() as server:
        engine = server_engine(server)
        for step in (0, 0, 1):
            engine.sync_weights(model, step)
        paths = [path for _, path, _ in server.requests]
    assert len(sent) == 3
    assert paths.count("/update_weights") == paths.count("/finish_weight_update") == 2
    torch.testing.assert_close(sent[1]["lm_head.weight"], model.lm_head.weight)


def test_failed_update_is_sent_again(sent):
    with fake_server({"/finish_weight_update": (500, "out of memory")}) as server:
        engine = server_engine(server)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match="POST .*/finish_weight_update: the server answered 500: .*out of memory"
            ):
                engine.sync_weights(tiny_model(), 0)
    assert len(sent) == 3


def test_server_that_is_not_there():
    with fake_server() as server:
        url = server.url
    with pytest.raises(ConnectionError, match=rf"{url} cannot be reached \(ConnectionError\) after 0.1 seconds"):
        VLLMServer(ServerURL(url), timeout=0.1)


def test_server_that_is_not_healthy():
    with (
        fake_server({"/health": (503, "starting")}) as server,
        pytest.raises(ConnectionError, match="says 503 after 0.1"),
    ):
        VLLMServer(ServerURL(server.url), timeout=0.1)


def test_a_server_that_is_waited_for_is_named_with_the_setting(monkeypatch, caplog):
    monkeypatch.setattr(vllm_server, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(vllm_server, "_LINE_SECONDS", 0.1)
    starting = iter([503] * 10 + [200] * 10)
    with fake_server({"/health": lambda: (next(starting), {})}) as server, caplog.at_level(logging.WARNING):
        VLLMServer(ServerURL(server.url), timeout=20)
    assert 2 <= len(caplog.messages) <= 4
    assert caplog.messages[0].startswith(f"waiting for the vLLM server at {server.url}, which says 503, 0 s (vllm_ser")


HTML = "<html>\n<body>Welcome to nginx</body>\n</html>"
SERVED = {
    "no health": (
        {"/health": (404, "nginx")},
        "GET .*/health: the server answered 404: .*nginx.*`trl-fast vllm-serve",
    ),
    "login": ({"/health": (401, "login")}, "GET .*/health: the server answered 401: .*login"),
    "page": ({"/v1/models": HTML.encode()}, "/v1/models: expected an answer of vLLM's, .* got '<html>.*nginx"),
    "nothing": ({"/v1/models": b""}, "/v1/models: expected an answer .* got ''; is it vLLM's"),
    "other keys": ({"/v1/models": {"models": []}}, r"JSON with \['data'\]\[0\]\['id'\], got '{\"models\": \[\]}'"),
    "no models": ({"/v1/models": {"data": []}}, r"JSON with \['data'\]\[0\]\['id'\], got"),
    "a list": ({"/v1/models": [1]}, r"JSON with \['data'\]\[0\]\['id'\], got '\[1\]'"),
    "a number": ({"/v1/models": {"data": [{"id": 7}]}}, r"JSON with \['data'\]\[0\]\['id'\], got"),
    "no config": ({"/server_info": {"config": 1}}, r"/server_info: .* JSON with \['vllm_config'\]"),
    "no size": ({"/get_world_size": {}}, r"/get_world_size: .* JSON with \['world_size'\]"),
    "broken JSON": (
        {"/v1/completions": b'{"choices": [{"tok'},
        r"JSON with \['choices'\], got '{\"choices\": \[{\"tok'",
    ),
    "error": ({"/v1/completions": (500, HTML)}, r"/v1/completions: the server answered 500: .*nginx"),
    "no tokens": ({"/v1/completions": {"choices": [{"text": "a"}]}}, r"JSON with \['choices'\]\[0\]\['token_ids'\]"),
    "no logprobs": (
        {"/v1/completions": {"choices": [{"token_ids": [1], "logprobs": None}]}},
        r"JSON with \['choices'\]\[0\]\['logprobs'\]\['token_logprobs'\]",
    ),
    "few logprobs": (
        {"/v1/completions": {"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}}]}},
        r"a completion 0 of tokens \[1, 2\] with log-probs \[-1.0\]; expected an integer",
    ),
    "infinite": (
        {"/v1/completions": {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [-float("inf")]}}]}},
        r"a completion 0 of tokens \[1\] with log-probs \[-inf\]; expected an integer for each token, and a number",
    ),
}


@pytest.mark.parametrize(("answers", "message"), SERVED.values(), ids=SERVED.keys())
def test_another_server_is_named_by_what_it_answered(answers, message, sent):
    start = time.monotonic()
    with fake_server(answers) as server, pytest.raises(RuntimeError, match=message) as caught:
        server_engine(server).generate([[5]], SETTINGS)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 2


def test_a_token_without_logprob(sent):
    choice = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [None, -1.0]}}
    with fake_server({"/v1/completions": {"choices": [choice]}}) as server:
        assert server_engine(server).generate([[5]], SETTINGS).logprobs == [[None, -1.0]]


def test_an_answer_that_breaks_off(sent):
    message = "did not answer /get_world_size .*7 bytes read, 93 more expected"
    answers = {"/get_world_size": lambda: (200, b'{"world', 100)}
    with fake_server(answers) as server, pytest.raises(ConnectionError, match=message):
        server_engine(server)


def test_passwords_are_given_and_not_shown(monkeypatch, caplog):
    seen = []
    get = requests.Session.get

    def watched(self, url, **kwargs):
        seen.append((url, self.auth))
        return get(self, url, **kwargs)

    monkeypatch.setattr(requests.Session, "get", watched)
    url = read_server_url("http://me:se%40cret@127.0.0.1:9/", "vllm_server_base_url")
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectionError) as caught:
        VLLMServer(url, timeout=0)
    assert seen == [("http://127.0.0.1:9/health", ("me", "se@cret"))]
    chain, shown = caught.value, [repr(url), *caplog.messages]
    while chain is not None:
        shown.append(str(chain))
        chain = chain.__cause__ or chain.__context__
    assert not any("cret" in text for text in shown)


def test_server_that_stops_answering():
    with fake_server() as server:
        client = VLLMServer(ServerURL(server.url), timeout=5)
    with pytest.raises(ConnectionError, match=f"{client.base_url} did not answer /server_info"):
        client.config()


def test_server_that_never_answers():
    with fake_server({"/server_info": lambda: time.sleep(1)}) as server:
        client = VLLMServer(ServerURL(server.url), timeout=5, request_timeout=0.1)
        with pytest.raises(ConnectionError, match=r"did not answer /server_info \(waiting up to 0.1 seconds\)"):
            client.config()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"/v1/completions": (400, {"error": "too long"})},
            "POST .*/v1/completions: the server answered 400: .*too long",
        ),
        ({"/v1/completions": {"choices": []}}, "returned 0 completions; 1 were asked for"),
        ({"/server_info": (404, "")}, "/server_info: the server answered 404: .*trl-fast vllm-serve --model"),
        ({"/server_info": {"vllm_config": {"weight_transfer_config": None}}}, "takes no weights; start it with"),
    ],
)
def test_server_that_refuses(answers, message, sent):
    with fake_server(answers) as server, pytest.raises(RuntimeError, match=message):
        server_engine(server).generate([[5]], SETTINGS)


def test_raw_logprobs_are_warned_of(sent, caplog):
    info = {"weight_transfer_config": {}, "model_config": {"logprobs_mode": "raw_logprobs"}}
    with fake_server({"/server_info": {"vllm_config": info}}) as server, caplog.at_level(logging.WARNING):
        server_engine(server)
    assert "--logprobs-mode raw_logprobs" in caplog.text


def test_colocated_engine_completes_groups(sent):
    engine = VLLMColocatedEngine("folder", device=CUDA, end_ids={END}, max_model_len=64, regex="[ab]+")
    model = tiny_model()
    engine.sync_weights(model, 0)
    assert_rollout(engine.generate(PROMPTS, SETTINGS))
    assert list(engine.llm.weights) == [name for name, _ in model.named_parameters()]
    assert engine.llm.arguments["logprobs_mode"] == "processed_logprobs"
    assert engine.llm.arguments["max_model_len"] == 64
    (reset, (_, prompts, parameters)) = engine.llm.log
    assert reset == ("reset_prefix_cache",)
    assert prompts == [{"prompt_token_ids": ids} for ids in ([5, 6], [7], [8, 9])]
    assert [settings.n for settings in parameters] == [2, 1, 2]
    shared = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0, "max_tokens": 16}
    shared |= {"seed": 3, "logprobs": 0, "stop_token_ids": [END], "structured_outputs": SimpleNamespace(regex="[ab]+")}
    assert parameters[0] == SimpleNamespace(**shared, n=2)


def test_sleeping_engine_gets_its_weights_before_each_generation(sent):
    engine, model = VLLMColocatedEngine("folder", device=CUDA, end_ids={END}, sleeps=True), tiny_model()
    with pytest.raises(RuntimeError, match="call sync_weights before generate"):
        engine.generate(PROMPTS, SETTINGS)
    for _ in range(2):
        engine.sync_weights(model, 0)
        engine.generate(PROMPTS, SETTINGS)
    names = [call[0] if call[0] != "wake_up" else call[1][0] for call in engine.llm.log]
    assert names == ["sleep"] + ["weights", "reset_prefix_cache", "kv_cache", "generate", "sleep"] * 2


def arguments(**changes):
    values = {
        "vllm_mode": "colocate",
        "vllm_max_model_length": None,
        "vllm_structured_outputs_regex": None,
        "vllm_server_base_url": None,
        "vllm_server_host": "127.0.0.1",
        "vllm_server_port": 8000,
        "vllm_server_timeout": 5.0,
        "vllm_group_port": 51217,
        "vllm_tensor_parallel_size": 1,
        "vllm_enable_sleep_mode": False,
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_model_impl": "vllm",
        "trust_remote_code": False,
        "completions_at_a_time": 8,
        "bf16": True,
        "fp16": False,
    }
    return SimpleNamespace(**{**values, **changes})


def make(**changes):
    model = tiny_model()
    model.name_or_path = "folder"
    return make_vllm_engine(model, SimpleNamespace(device=CUDA), build_tokenizer(), arguments(**changes))


def test_engine_of_a_config(sent):
    PartialState()
    engine = make()
    assert engine.llm.arguments["model"] == "folder"
    assert engine.llm.arguments["max_num_seqs"] == 8
    assert engine.llm.arguments["dtype"] == "auto" and make(bf16=False).llm.arguments["dtype"] == "float32"
    assert engine.end_ids == [END] and engine.max_positions == 256
    with pytest.raises(ValueError, match="prompt 0 has 250 tokens, .* the 256 positions"):
        engine.generate([[3] * 250], SETTINGS)
    with fake_server() as server:
        engine = make(vllm_mode="server", vllm_server_port=int(server.url.rpartition(":")[2]))
        assert engine.server.base_url == server.url
    assert sent[-1]["master_port"] == 51217
    with pytest.raises(NotImplementedError, match="vllm_tensor_parallel_size=2"):
        make(vllm_tensor_parallel_size=2)


def test_without_vllm():
    with pytest.raises(ImportError, match=r"`pip install 'trl-fast\[vllm\]'`"):
        make()


def recorded() -> dict[tuple[str, int], dict]:
    """Answers of vLLM 0.31 by path and status; test_real_vllm.py holds that it still gives them."""
    text = (Path(__file__).parent / "recorded_vllm.json").read_text(encoding="utf-8")
    return {(entry["path"], entry["status"]): entry for entry in json.loads(text)}


def test_answers_of_vllm_itself_are_read():
    entries = recorded()
    answers = {path: entry["answer"] for (path, status), entry in entries.items() if status == 200}
    completed = entries["/v1/completions", 200]
    with fake_server(answers) as own:
        server = VLLMServer(ServerURL(own.url), timeout=5)
        found = server.complete(completed["body"]["prompt"], 2, {})
        generated = server.complete_with_images([[5, 6, 7]], [None], 2, {})
    assert server.model == "MODEL"
    assert [len(ids) for ids in found[0]] == [len(logprobs) for logprobs in found[1]] == [4, 4, 4, 4]
    # The same seed and prompt, asked for in both ways.
    assert generated[0][0] == found[0][0] and generated[1][0] == found[1][0]


@pytest.mark.parametrize(("path", "status"), [key for key in recorded() if key[1] != 200])
def test_refusals_of_vllm_itself_are_shown(path, status):
    entry = recorded()[path, status]
    with fake_server({path: (status, entry["answer"])}) as own:
        server = VLLMServer(ServerURL(own.url), timeout=5)
        with pytest.raises(RuntimeError) as error:
            server.ask("POST", path, json=entry["body"])
    # A quote is escaped on the way.
    said = str(error.value).replace("\\", "")
    assert f"answered {status}" in said and entry["answer"]["error"]["message"][:60] in said


def test_weights_go_through_files_from_other_devices():
    model, found = tiny_model(), {}

    def reload() -> dict:
        body = next(body for _, path, body in reversed(server.requests) if path == "/collective_rpc")
        found["folder"] = Path(body["kwargs"]["weights_path"])
        found["weights"] = {}
        for file in sorted(found["folder"].glob("*.safetensors")):
            found["weights"] |= load_file(file)
        return {"results": [None]}

    with fake_server({"/collective_rpc": reload}) as server:
        weights = open_weights(VLLMServer(ServerURL(server.url), timeout=5), torch.device("cpu"), 0)
        weights.send(weight_metadata(model), merged_weights(model))
        paths = [path for _, path, _ in server.requests]
    assert paths[-2:] == ["/collective_rpc", "/reset_prefix_cache"]
    assert list(found["weights"]) != [] and not found["folder"].exists()
    for name, weight in merged_weights(model):
        assert torch.equal(found["weights"][name], weight)


def test_files_that_the_server_does_not_see():
    entry = recorded()["/collective_rpc", 500]
    with fake_server({"/collective_rpc": (500, entry["answer"])}) as server:
        weights = open_weights(VLLMServer(ServerURL(server.url), timeout=5), torch.device("cpu"), 0)
        with pytest.raises(RuntimeError, match="the server has to run on a machine that sees .*TMPDIR"):
            weights.send([], merged_weights(tiny_model()))


def test_large_weights_are_written_to_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_weights, "_FILE_BYTES", 1000)
    model = tiny_model()
    vllm_weights._write(tmp_path, merged_weights(model))
    files = [load_file(file) for file in sorted(tmp_path.iterdir())]
    assert len(files) > 3 and sum(map(len, files)) == len(dict(merged_weights(model)))


def test_a_colocated_engine_on_a_cpu_loads_weights_as_a_whole(sent):
    engine, model = VLLMColocatedEngine("folder", device=torch.device("cpu"), end_ids={END}), tiny_model()
    engine.sync_weights(model, 0)
    assert list(engine.llm.weights) == [name for name, _ in model.named_parameters()]
    assert engine.llm.log == [("collective_rpc", "reload_weights"), ("reset_prefix_cache",)]
