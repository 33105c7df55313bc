"""Distillation from a server, and IW-OPD, on two ranks, by each engine: the loss and the gradients of one process."""

import os

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import color_prompts
from support.teacher_server import teacher_server
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

# A micro-batch's loss is a mean of its own: completions are of one length, so that ranks may share them in any way.
CASES = {
    "mixed": {"beta": 0.5, "gradient_accumulation_steps": 2},
    "several": {"beta": 0.0, "loss_top_k": 5},
    "lora": {"beta": 1.0, "peft": True},
    "policy gradient": {"method": "IWOPD", "max_length": 64, "gradient_accumulation_steps": 2},
    "served policy gradient": {"method": "IWOPD", "max_length": 64, "use_teacher_server": True},
}
QUICK = ("mixed", "lora", "policy gradient")
ENGINES = ("ddp", "zero2", "zero3", "fsdp1")
COMPLETIONS = 8


class OfOneLength:
    """An engine whose completions depend on their prompts only."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[6 + (7 * token) % 200 for token in ids[-5:]] for ids in prompt_ids])


def processes():
    return int(os.environ.get("WORLD_SIZE", "1"))


def train(case, paths, url, folder):
    settings = {"gradient_accumulation_steps": 1, "max_completion_length": 8, "max_steps": 2, **CASES[case]}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "teacher_model_server_url": url}
    method, (model, teacher) = settings.pop("method", "ServerDistillation"), paths
    arguments = {"model": model, "train_dataset": color_prompts(16), "rollout_engine": OfOneLength()}
    if method == "IWOPD" and not settings.get("use_teacher_server"):
        del settings["teacher_model_server_url"]
        arguments["teacher_model"] = teacher
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings["per_device_train_batch_size"] = COMPLETIONS // (processes() * settings["gradient_accumulation_steps"])
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    assert trainer.args.world_size == processes()
    trainer.train()
    # These are means over micro-batches, which hold other completions.
    own = ("step_time", "entropy", "iw_opd/", "_policy_")
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in own)}
        for log in trainer.state.log_history
    ]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs[:-1], "weights": weights}


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES)])
def test_two_ranks_compute_what_one_process_does(engine, model_path, teacher_path, tmp_path):
    paths, cases = (model_path, teacher_path), QUICK if engine == "fsdp2" else tuple(CASES)
    with teacher_server(teacher_path) as server:
        ranks = run_on_ranks(
            lambda: {case: train(case, paths, server.url, tmp_path / case) for case in cases},
            engine=engine,
            patience=240,
        )
        for case in cases:
            alone = train(case, paths, server.url, tmp_path / "alone" / case)
            for rank in ranks:
                torch.testing.assert_close(rank[case]["weights"], alone["weights"], rtol=0, atol=1e-6)
            assert_same_logs(ranks[0][case]["logs"], alone["logs"])
            assert alone["logs"][0]["grad_norm"] > 1e-3
