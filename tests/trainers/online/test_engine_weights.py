"""Engines with weights of their own: each step of training samples with the present ones, or says why it cannot.

vLLM and its server are stand-ins.
"""

from contextlib import ExitStack

import pytest
import torch
from transformers import TrainerCallback

import trl_fast
from support.rollouts import FixedEngine, color_prompts
from support.training import make_trainer
from support.vllm import FakeLLM, fake_server, install_fake_vllm
from trl_fast.rollout import vllm_engine
from trl_fast.rollout.vllm_weights import open_weights

SETTINGS = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2}
METHODS = {
    # Two generations a step.
    "GRPO": {"num_generations": 4, "max_completion_length": 4, "steps_per_generation": 1},
    # Two requests a rollout.
    "PPO": {"response_length": 4, "stop_token": "eos", "num_ppo_epochs": 1, "local_rollout_forward_batch_size": 4},
}
VLLM = {"use_vllm": True, "vllm_server_timeout": 5, "vllm_importance_sampling_mode": "token_truncate"}


def spread(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make(model_path, folder, method="GRPO", callback=None, **settings):
    arguments = {"model": model_path, "train_dataset": color_prompts(8)}
    arguments["reward_model" if method == "PPO" else "reward_funcs"] = spread
    if "rollout_engine" in settings:
        arguments["rollout_engine"] = settings.pop("rollout_engine")
    settings = {**SETTINGS, **METHODS[method], **settings}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def copied(named):
    return {name: weight.detach().clone() for name, weight in named}


class Weights(TrainerCallback):
    """The policy's weights before each step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before.append(copied(model.named_parameters()))


def assert_sent(sent, before):
    """An engine got the weights before each step, all of them, and they moved."""
    assert len(sent) == len(before) == 3
    for got, expected in zip(sent, before, strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert not torch.equal(sent[1]["lm_head.weight"], sent[2]["lm_head.weight"])


class RecordingEngine(FixedEngine):
    """Keeps what it is given, once a step, and samples with nothing older."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, longest=3)
        self.sent, self.calls, self.step = [], [], None

    def sync_weights(self, model, step):
        self.calls.append("sync")
        if step != self.step:
            self.step = step
            self.sent.append(copied(model.named_parameters()))

    def generate(self, prompt_ids, settings):
        self.calls.append("generate")
        return super().generate(prompt_ids, settings)


@pytest.mark.parametrize(("method", "calls"), [("GRPO", ["sync", "generate"]), ("PPO", ["sync", *["generate"] * 2])])
def test_an_engine_gets_the_weights_of_each_step(method, calls, model_path, tokenizer, tmp_path):
    engine, weights = RecordingEngine(tokenizer), Weights()
    make(model_path, tmp_path, method, weights, rollout_engine=engine).train()
    assert_sent(engine.sent, weights.before)
    assert engine.calls == calls * (len(engine.calls) // len(calls))


@pytest.fixture
def sent(monkeypatch):
    """vLLM's stand-in, and what goes to its server; weights leave from the CPU as if it were a GPU."""
    monkeypatch.setattr(
        vllm_engine, "open_weights", lambda server, _, port: open_weights(server, torch.device("cuda"), port)
    )
    return install_fake_vllm(monkeypatch)


def test_a_server_gets_the_weights_of_each_step(model_path, tmp_path, sent):
    weights = Weights()
    with fake_server() as server:
        trainer = make(
            model_path, tmp_path, callback=weights, vllm_mode="server", vllm_server_base_url=server.url, **VLLM
        )
        trainer.train()
        paths = [path for _, path, _ in server.requests if path in ("/finish_weight_update", "/v1/completions")]
        asked = [body for _, path, body in server.requests if path == "/v1/completions"]
    assert_sent(sent[1:], weights.before)
    assert paths == ["/finish_weight_update", "/v1/completions", "/v1/completions"] * 3
    assert all(body["n"] == 4 and body["max_tokens"] == 4 for body in asked)


def test_a_colocated_engine_gets_the_weights_of_each_step(model_path, tmp_path, sent, monkeypatch):
    weights, loaded = Weights(), []
    reset = FakeLLM.reset_prefix_cache
    monkeypatch.setattr(
        FakeLLM, "reset_prefix_cache", lambda llm: loaded.append(copied(llm.weights.items())) or reset(llm)
    )
    trainer = make(model_path, tmp_path, callback=weights, **VLLM)
    trainer.train()
    assert_sent(loaded, weights.before)
    llm = trainer.engine.llm
    assert llm.arguments["model"] == model_path and llm.arguments["max_num_seqs"] == 4
    assert [name for name, *_ in llm.log] == ["collective_rpc", "reset_prefix_cache", "generate", "generate"] * 3


def test_a_server_that_is_gone_is_named_and_training_goes_on_later(model_path, tmp_path, sent):
    settings = {"vllm_mode": "server", "save_strategy": "steps", "save_steps": 100, **VLLM}

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                stack.close()

    with ExitStack() as stack:
        url = stack.enter_context(fake_server()).url
        trainer = make(model_path, tmp_path, callback=Gone(), vllm_server_base_url=url, **settings)
        with pytest.raises(ConnectionError, match=f"the vLLM server at {url} did not answer") as failure:
            trainer.train()
    assert "Step 2 is saved" in failure.value.__notes__[0]
    with fake_server() as server:
        resumed = make(model_path, tmp_path, vllm_server_base_url=server.url, **settings)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert all(torch.equal(sent[-1][name], weight) for name, weight in trainer.model.named_parameters())
