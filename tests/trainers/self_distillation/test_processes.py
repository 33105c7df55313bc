"""SDFT on two ranks, by each engine: what one process computes, with the teacher held as the student is."""

import os

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.ranks import run_on_ranks
from support.told_prompts import told_prompts
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

SETTINGS = {"max_completion_length": 8, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "num_generations": 2}
CASES = {
    "likeliest": {"distillation_topk": 7, "gradient_accumulation_steps": 2},
    "all, ema": {"distillation_mode": "full_logits", "teacher_model_kind": "ema", "teacher_update_rate": 0.3},
    "live, twice": {
        **{"distillation_mode": "full_logits", "teacher_model_kind": "live", "num_iterations": 2},
        "distillation_alpha": 0.0,
    },
    "sampled, lora": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "peft": True},
    "likeliest, lora, ema": {"distillation_topk": 7, "peft": True, "teacher_model_kind": "ema"},
}
# FSDP1 holds both adapters' weights in one part, and says so.
REFUSED = {"fsdp1": ("likeliest, lora, ema",)}
QUICK = ("likeliest", "live, twice", "sampled, lora")
ENGINES = ("ddp", "zero2", "zero3", "fsdp1")
COMPLETIONS = 8


class ByPrompt:
    """An engine whose completions depend on their prompts only."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [[6 + (7 * token) % 200 for token in ids[-5:]] for ids in prompt_ids])


def processes():
    return int(os.environ.get("WORLD_SIZE", "1"))


def train(case, model, folder):
    settings = {"gradient_accumulation_steps": 1, **SETTINGS, **CASES[case]}
    arguments = {"model": model, "train_dataset": told_prompts(16), "rollout_engine": ByPrompt()}
    if settings.pop("peft", False):
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    size = COMPLETIONS // (processes() * settings["gradient_accumulation_steps"])
    settings["per_device_train_batch_size"] = size
    trainer = make_trainer(trl_fast, folder, method="SDFT", arguments=arguments, **settings)
    assert trainer.args.world_size == processes()
    trainer.train()
    own = ("step_time", "self_distillation/distillation_loss", "sdft/distillation_loss")
    # Those are means over micro-batches, which hold other completions.
    logs = [{name: value for name, value in log.items() if name not in own} for log in trainer.state.log_history]
    with gathered(trainer.model if trainer.is_fsdp_enabled else trainer.model_wrapped):
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return {"logs": logs[:-1], "weights": weights}


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES)])
def test_two_ranks_compute_what_one_process_does(engine, model_path, tmp_path):
    cases = [case for case in CASES if case not in REFUSED.get(engine, ()) and (engine != "fsdp2" or case in QUICK)]
    ranks = run_on_ranks(
        lambda: {case: train(case, model_path, tmp_path / case) for case in cases}, engine=engine, patience=240
    )
    for case in cases:
        alone = train(case, model_path, tmp_path / "alone" / case)
        for rank in ranks:
            torch.testing.assert_close(rank[case]["weights"], alone["weights"], rtol=0, atol=1e-5)
        assert_same_logs(ranks[0][case]["logs"], alone["logs"])
        assert alone["logs"][0]["grad_norm"] > 0.01
