"""Runs vLLM itself, on a CPU: log-probabilities, weights, and whole runs of GRPO beside it. `make test-vllm`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from support.models import save_tiny_model
from support.rollouts import color_prompts
from support.tokenizer import build_tokenizer
from trl_fast import GRPOConfig, GRPOTrainer
from trl_fast.rollout import SamplingSettings
from trl_fast.rollout.vllm_engine import VLLMColocatedEngine, VLLMServerEngine
from trl_fast.settings.server_url import ServerURL

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [20, 30, 40]]
SETTINGS = SamplingSettings(8, temperature=0.7)
# vLLM's CPU attention takes heads of 32 numbers and more.
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LONGEST = 256
# What vLLM and PyTorch may differ by in float32, in nats.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), build_tokenizer(), "llama", **SHAPE)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A server that `trl-fast vllm-serve` has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"model": folder, "host": "127.0.0.1", "port": port, "dtype": "float32", "max_model_len": LONGEST}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "trl_fast.cli.main", "vllm-serve", *words, "--enforce_eager"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=Path.cwd())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        print(log.read_text(encoding="utf-8")[-3000:])


@pytest.fixture(scope="module")
def engines(folder, url):
    """Both engines on the same model."""
    PartialState(cpu=True)
    common = {"device": CPU, "end_ids": {1}, "max_positions": LONGEST}
    colocated = {"dtype": "float32", "max_model_len": LONGEST, "enforce_eager": True, "max_num_seqs": 8}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return {
        "server": VLLMServerEngine(ServerURL(url), **common, timeout=300),
        "colocate": VLLMColocatedEngine(folder, **common, **colocated),
    }


def largest_difference(model, rollout) -> float:
    """Between the log-probabilities that vLLM tells and those of the model, in nats."""
    differences = []
    for prompt, ids, logprobs in zip(rollout.prompt_ids, rollout.completion_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / SETTINGS.temperature
        ours = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        differences.append((ours - torch.tensor(logprobs)).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("way", ["server", "colocate"])
def test_logprobs_are_those_of_the_weights_that_were_given(way, engines, folder):
    engine, model = engines[way], AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    for step in range(3):
        engine.sync_weights(model, step)
        rollout = engine.generate(PROMPTS, SETTINGS)
        assert rollout.prompt_ids == PROMPTS and all(rollout.completion_ids)
        assert largest_difference(model, rollout) < ROUNDING
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        # The check above would see weights that did not arrive.
        assert largest_difference(model, rollout) > 100 * ROUNDING


def test_structured_outputs(engines):
    engine = engines["server"]
    engine.regex = "[ab]{3}"
    texts = [build_tokenizer().decode(ids) for ids in engine.generate(PROMPTS, SETTINGS).completion_ids]
    engine.regex = None
    assert all(re.fullmatch(r"[ab]{3}(<\|im_end\|>)?", text) for text in texts)


def test_the_answers_that_other_tests_read_are_of_this_kind(engines, folder):
    """recorded_vllm.json, which the tests without vLLM take for a server's answers."""
    text = (Path(__file__).parent / "recorded_vllm.json").read_text(encoding="utf-8")
    for entry in json.loads(text.replace('"MODEL"', json.dumps(folder))):
        address = f"{engines['server'].server.base_url}{entry['path']}"
        response = requests.request(entry["method"], address, json=entry["body"], timeout=60)
        assert response.status_code == entry["status"], entry["path"]
        assert kind_of(response.json()) == kind_of(entry["answer"]), entry["path"]


def kind_of(value: object) -> object:
    """The keys and types of JSON; of a list those of its first entry. Token ids are no keys of their own."""
    if isinstance(value, dict):
        return {key.partition("token_id:")[0]: kind_of(one) for key, one in value.items()}
    return [kind_of(one) for one in value[:1]] if isinstance(value, list) else type(value).__name__


def first_token(completion_ids, **_):
    """A reward that tells completions apart."""
    return [float(ids[0] % 7) for ids in completion_ids]


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)])
@pytest.mark.parametrize("way", ["server", "colocate"])
def test_grpo_trains_on_what_vllm_samples(way, peft, folder, url, tmp_path):
    """The log-probabilities that vLLM samples by stay those of the policy, although each step changes it much."""
    where = {"vllm_server_base_url": url} if way == "server" else {"vllm_max_model_length": LONGEST}
    args = GRPOConfig(
        str(tmp_path),
        **{"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no"},
        **{"use_vllm": True, "vllm_mode": way, "max_completion_length": 8, "num_generations": 4},
        **{"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "seed": 3},
        vllm_gpu_memory_utilization=0.1,
        **where,
    )
    trainer = GRPOTrainer(folder, first_token, args, color_prompts(), peft_config=peft)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    moved = [
        (before[name] - weight).abs().max().item()
        for name, weight in trainer.model.named_parameters()
        if name in before
    ]
    assert max(moved) > 0.01
    # Weights of the step before would be 7 nats off.
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs) < ROUNDING
