"""GOLD on two ranks, by each engine: what one process computes, also with a teacher of another tokenizer."""

import os

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.given_answers import conversations
from support.ranks import run_on_ranks
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

ULD = {"use_uld_loss": True, "uld_token_merge_strategy": "bayesian"}
SETTINGS = {"max_completion_length": 8, "max_length": 96, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
CASES = {
    "one tokenizer": {"lmbda": 0.0, "gradient_accumulation_steps": 2},
    "hybrid": {"lmbda": 0.0, "uld_use_hybrid_loss": True, "uld_crossentropy_weight": 0.3, **ULD},
    "sampled": {"lmbda": 1.0, "gradient_accumulation_steps": 2, **ULD},
    "lora": {"lmbda": 0.0, "peft": True, **ULD},
}
QUICK = ("hybrid",)
ENGINES = ("ddp", "zero2", "zero3", "fsdp1")
COMPLETIONS = 8


class ByPrompt:
    """An engine whose completions depend on their prompts only."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[6 + (7 * token) % 200 for token in ids[-9:-4]] for ids in prompt_ids])


def processes():
    return int(os.environ.get("WORLD_SIZE", "1"))


def train(case, paths, folder):
    settings = {"gradient_accumulation_steps": 1, **SETTINGS, **CASES[case]}
    model, teacher, other = paths
    arguments = {
        "model": model,
        "teacher_model": other if settings.get("use_uld_loss") else teacher,
        "train_dataset": conversations(),
        "rollout_engine": ByPrompt(),
    }
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    size = COMPLETIONS // (processes() * settings["gradient_accumulation_steps"])
    trainer = make_trainer(
        trl_fast, folder, method="GOLD", arguments=arguments, per_device_train_batch_size=size, **settings
    )
    assert trainer.args.world_size == processes()
    trainer.train()
    logs = [
        # The entropy is a mean over micro-batches, which hold other completions.
        {name: value for name, value in log.items() if name not in ("step_time", "entropy")}
        for log in trainer.state.log_history
    ]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs[:-1], "weights": weights}


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES)])
def test_two_ranks_compute_what_one_process_does(engine, model_path, teacher_path, other_teacher_path, tmp_path):
    paths, cases = (model_path, teacher_path, other_teacher_path), QUICK if engine == "fsdp2" else tuple(CASES)
    ranks = run_on_ranks(
        lambda: {case: train(case, paths, tmp_path / case) for case in cases}, engine=engine, patience=240
    )
    for case in cases:
        alone = train(case, paths, tmp_path / "alone" / case)
        for rank in ranks:
            torch.testing.assert_close(rank[case]["weights"], alone["weights"], rtol=0, atol=1e-5)
        assert_same_logs(ranks[0][case]["logs"], alone["logs"])
        assert alone["logs"][0]["grad_norm"] > 0.01
