"""PPO on two ranks, each with completions of its own: both models are the same whichever engine has them."""

import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import color_prompts
from support.training import assert_same_logs, make_trainer
from trl_fast.parallel.gathering import gathered
from trl_fast.rollout import Rollout

pytestmark = pytest.mark.processes

SETTINGS = {
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "max_steps": 2},
    **{"response_length": 5, "num_sample_generations": 0, "per_device_eval_batch_size": 2, "num_ppo_epochs": 2},
    # Of the two models' norms, which DeepSpeed knows as one only.
    **{"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 1000.0, "ddp_backend": "gloo"},
}
VARYING = ("eps", "runtime", "per_second")


class Scripted:
    """An engine of which a completion depends on its prompt and the step only."""

    def sync_weights(self, model, step):
        self.step = step

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [self._complete(prompt) for prompt in prompt_ids])

    def _complete(self, prompt):
        rng = random.Random(f"{prompt} {self.step}")
        return [rng.randrange(6, 300) for _ in range(rng.randint(1, 4))] + [1] * (rng.random() < 0.8)


def make(model_path, reward_model_path, folder, generates=False, peft=False, **changes):
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(model_path),
        "processing_class": AutoTokenizer.from_pretrained(model_path),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
        "value_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
        "train_dataset": color_prompts(16),
        "eval_dataset": color_prompts(4),
    }
    if not generates:
        arguments["rollout_engine"] = Scripted()
    if peft:
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(trl_fast, folder, method="PPO", arguments=arguments, **{**SETTINGS, **changes})
    if generates:
        greedy = replace(trainer.loop.settings(), generation_kwargs={"do_sample": False})
        trainer.loop.settings = lambda: greedy
    return trainer


def found(trainer):
    """The logs but for times, and the weights of both models as one vector each."""
    logs = [
        {name: value for name, value in log.items() if not any(part in name for part in VARYING)}
        for log in trainer.state.log_history
    ]
    with gathered(trainer.model_wrapped):
        models = (trainer.model, trainer.value_model)
        policy, value = (torch.cat([w.detach().flatten() for w in model.parameters()]) for model in models)
    return {"logs": logs, "policy": policy, "value": value}


def train(model_path, reward_model_path, folder, **changes):
    """A short run and an evaluation after it."""
    trainer = make(model_path, reward_model_path, folder, **changes)
    seen, judge = [], trainer.loop.judge
    trainer.loop.judge = lambda *given: seen.append(judge(*given)) or seen[-1]
    trainer.train()
    rollouts = seen[:2]
    trainer.evaluate()
    return found(trainer) | {"prompts": rollouts[0].prompts, "completions": rollouts[0].completions}


def assert_same(ours, theirs, varying=()):
    """varying: names of numbers that are others."""
    logs = [
        [{name: value for name, value in log.items() if name not in varying} for log in each["logs"]]
        for each in (ours, theirs)
    ]
    assert_same_logs(*logs)
    for own, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            if name in other:
                # The last of several updates of a step: what was rounded before counts.
                assert own[name] == pytest.approx(other[name], rel=2e-6, abs=1e-7)
    for name in ("policy", "value"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def replicated(model_path, reward_model_path, tmp_path_factory):
    """The findings of two ranks that hold all weights each: full, with an adapter."""
    folder = tmp_path_factory.mktemp("replicated")
    return run_on_ranks(lambda: train_both(model_path, reward_model_path, folder), engine="ddp")


def train_both(model_path, reward_model_path, folder):
    return {
        name: train(model_path, reward_model_path, folder / name, peft=name == "lora") for name in ("full", "lora")
    }


@pytest.mark.slow
def test_ranks_have_prompts_of_their_own_and_the_same_models(replicated):
    for first, second in zip(*(rank.values() for rank in replicated), strict=True):
        assert_same(first, second)
        assert first["prompts"] and not set(first["prompts"]) & set(second["prompts"])
        assert first["completions"] != second["completions"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_engines_train_as_ranks_do_that_hold_all_weights(engine, replicated, model_path, reward_model_path, tmp_path):
    ranks = run_on_ranks(lambda: train_both(model_path, reward_model_path, tmp_path), engine=engine)
    for name, expected in replicated[0].items():
        for rank in ranks:
            # DeepSpeed's is the norm of both models' gradients.
            assert_same(rank[name], expected, varying=("grad_norm",) if engine != "fsdp2" else ())


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_sharded_policy_generates_what_a_whole_one_does(by_layer, model_path, reward_model_path, tmp_path):
    def two(name, **changes):
        return train(model_path, reward_model_path, tmp_path / name, generates=True, **changes)

    whole = run_on_ranks(lambda: two("whole"), engine="ddp")
    sharded = run_on_ranks(lambda: two("sharded", ds3_gather_for_generation=not by_layer), engine="fsdp2")
    for ours, theirs in zip(sharded, whole, strict=True):
        assert ours["completions"] == theirs["completions"]
        assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_resumed_run_ends_as_the_unbroken_one(engine, model_path, reward_model_path, tmp_path):
    def two():
        saves = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        whole = make(model_path, reward_model_path, tmp_path / "run", **saves)
        whole.train()
        whole.save_model(str(tmp_path / "saved"))
        again = make(model_path, reward_model_path, tmp_path / "run", **saves)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        return found(whole), found(again)

    for whole, again in run_on_ranks(two, engine=engine):
        for name in ("policy", "value"):
            torch.testing.assert_close(again[name], whole[name], rtol=0, atol=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").parameters()
    torch.testing.assert_close(torch.cat([w.detach().flatten() for w in saved]), whole["policy"], rtol=0, atol=0)


def test_fsdp1_is_refused_by_name(model_path, reward_model_path, tmp_path):
    def refused():
        with pytest.raises(NotImplementedError) as error:
            make(model_path, reward_model_path, tmp_path)
        return str(error.value)

    assert "use FSDP2" in run_on_ranks(refused, engine="fsdp1")[0]
