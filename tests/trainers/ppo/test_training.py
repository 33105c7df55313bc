"""PPO end to end on a tiny model: what is logged, saved and resumed, and every kind of model, reward and data."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
import trl_fast.trainers.ppo.rewards as rewards
from support.rollouts import FixedEngine, color_prompts
from support.training import make_trainer
from trl_fast.modeling.fused_layers import FUSED_LAYERS
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.model_changes import has_change

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 2,
    "num_ppo_epochs": 1,
    "response_length": 5,
    "stop_token": "eos",
    "max_steps": 1,
    "num_sample_generations": 0,
}
# TRL's names.
METRICS = {
    "eps",
    *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *(f"policy/{name}_avg" for name in ("approxkl", "clipfrac", "entropy")),
    *(f"loss/{name}_avg" for name in ("policy", "value")),
    *(f"val/{name}" for name in ("clipfrac_avg", "ratio", "ratio_var", "num_eos_tokens")),
    "lr",
    "episode",
}


def classifier(path):
    return AutoModelForSequenceClassification.from_pretrained(path)


@pytest.fixture
def make(model_path, reward_model_path, tokenizer, tmp_path):
    def make(*, folder="run", **changes):
        fields = set(trl_fast.PPOConfig.__dataclass_fields__)
        settings = {**SETTINGS, **{name: value for name, value in changes.items() if name in fields}}
        arguments = {
            "model": AutoModelForCausalLM.from_pretrained(model_path),
            "processing_class": tokenizer,
            "reward_model": classifier(reward_model_path),
            "value_model": classifier(reward_model_path),
            "train_dataset": color_prompts(8),
            **{name: value for name, value in changes.items() if name not in fields},
        }
        return make_trainer(trl_fast, tmp_path / folder, method="PPO", arguments=arguments, **settings)

    return make


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_models_that_are_fused_have_their_own_layers_after_training(make):
    """Policy, reference and value model, by whatever the trainer holds them."""
    trainer = make()
    models = [base_model(model) for model in (trainer.model, trainer.ref_model, trainer.critic.plain)]
    assert all(has_change(model, FUSED_LAYERS) for model in models)
    trainer.train()
    assert not any(has_change(model, FUSED_LAYERS) for model in models)
    assert not any(hasattr(module, "fused_class") for model in models for module in model.modules())


def test_metrics_evaluation_and_completions(make, capsys):
    trainer = make(eval_dataset=color_prompts(4), num_sample_generations=1, num_completions_to_print=1, max_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert len(logs) == 2 and all(set(log) >= METRICS for log in logs)
    assert [log["episode"] for log in logs] == [4, 8]
    assert logs[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    found = trainer.evaluate()
    assert {name.removeprefix("eval_") for name in found} >= {name for name in METRICS if "objective" in name}
    trainer.generate_completions(sampling=True)
    assert capsys.readouterr().out.count("completions at step") == 2


def test_both_models_learn_and_the_others_do_not(make):
    trainer = make(max_steps=2)
    models = (trainer.model, trainer.value_model, trainer.ref_model, trainer.reward_model)
    before = [weights(model) for model in models]
    trainer.train()
    changed = [moved(model, held) for model, held in zip(models, before, strict=True)]
    assert changed[0] == set(before[0]) and changed[1] == set(before[1])
    assert changed[2] == changed[3] == set()


def test_gradients_are_clipped_model_by_model(make):
    trainer = make(max_grad_norm=0.5)
    for model in (trainer.model, trainer.value_model):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
    trainer._clip_grad_norm(trainer.model)
    for model in (trainer.model, trainer.value_model):
        assert torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm() == pytest.approx(
            0.5, rel=1e-3
        )


def test_resuming_goes_on_exactly(make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    settings |= {"kl_target": 0.5, "kl_horizon": 100.0, "kl_coef": 0.2}
    whole = make(folder="whole", **settings)
    whole.train()
    # Two rollouts an epoch, so the checkpoint is in the middle of one.
    again = make(folder="again", **settings)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for ours, theirs in ((again.model, whole.model), (again.value_model, whole.value_model)):
        assert not moved(ours, weights(theirs))
    assert again.kl_control.coefficient == whole.kl_control.coefficient != 0.2
    assert again.state.log_history[-2]["objective/kl"] == whole.state.log_history[-2]["objective/kl"]


def test_the_policy_alone_is_saved_and_a_checkpoint_has_the_value_model_too(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not moved(policy, weights(trainer.model))
    assert not (tmp_path / "saved" / "value_model").exists()
    value = classifier(tmp_path / "run" / "checkpoint-1" / "value_model")
    assert not moved(value, weights(trainer.value_model))


def test_a_checkpoint_without_value_model_is_refused(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "run" / "checkpoint-1" / "value_model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir"):
        make(max_steps=2).train(resume_from_checkpoint=True)


def test_lora_is_held_against_the_policy_without_it(make):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = make(peft_config=config, max_steps=3, learning_rate=3e-2, save_strategy="steps", save_steps=3)
    assert trainer.ref_model is None
    base = weights(trainer.model)
    trainer.train()
    assert moved(trainer.model, base) == {name for name in base if "lora_" in name}
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] != pytest.approx(0, abs=1e-3)
    make(peft_config=config, max_steps=4).train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")


def test_without_stop_token_all_have_one_length(make):
    trainer = make(stop_token=None, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/min_length"] == log["completions/max_length"] == 5


def test_completions_end_at_the_stop_token(make, tokenizer):
    ids = FixedEngine(tokenizer).generate([[5, 6]], None).completion_ids[0]
    engine, other = FixedEngine(tokenizer), FixedEngine(tokenizer)
    trainer = make(stop_token=None, stop_token_id=ids[0], rollout_engine=engine)
    assert trainer.engine is engine
    found = trainer.roll_out([{"prompt": "x", "prompt_ids": [5, 6]}])
    assert found.samples.completion_ids == [ids[:1]]
    trainer.engine = other
    found = trainer.roll_out([{"prompt": "x", "prompt_ids": [5, 6]}])
    assert found.samples.completion_ids == [ids[:1]] and trainer.engine is other


def test_missing_eos_costs(make, tokenizer):
    rows = [{"prompt": str(i), "prompt_ids": [5, 6 + i]} for i in range(8)]
    free = make(rollout_engine=FixedEngine(tokenizer)).roll_out(rows)
    found = make(rollout_engine=FixedEngine(tokenizer), missing_eos_penalty=2.0).roll_out(rows)
    ended = torch.tensor([tokenizer.eos_token_id in ids for ids in found.samples.completion_ids])
    assert 0 < ended.sum() < 8
    torch.testing.assert_close(found.scores, free.scores - 2.0 * ~ended)


def test_rewards_are_those_of_the_model_itself(make, tokenizer, reward_model_path):
    rows = [{"prompt": str(i), "prompt_ids": [5] * 20 + [6 + i % 2]} for i in range(6)]
    for layout in ("auto", "packed", "padded"):
        found = make(rollout_engine=FixedEngine(tokenizer), batch_layout=layout).roll_out(rows)
        model = classifier(reward_model_path).eval()
        samples = found.samples
        for prompt, completion, score in zip(samples.prompt_ids, samples.completion_ids, found.scores, strict=True):
            own = model(input_ids=torch.tensor([prompt + completion])).logits[0, 0]
            torch.testing.assert_close(score, own.detach(), rtol=1e-4, atol=1e-5)


def tokens(tokenizer):
    pad = tokenizer.pad_token_id
    rows = [tokenizer(text=row["prompt"])["input_ids"] for row in color_prompts(8)]
    return Dataset.from_list([{"input_ids": [pad] * (index % 3) + ids} for index, ids in enumerate(rows)])


def messages(_):
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in color_prompts(8)])


@pytest.mark.parametrize("data", [tokens, messages])
def test_data(data, make, tokenizer):
    seen = []

    def reward(prompts, completions, **_):
        seen.append((prompts, completions))
        return [0.5] * len(completions)

    trainer = make(train_dataset=data(tokenizer), reward_model=[reward, length])
    trainer.train()
    prompts, completions = seen[0]
    conversational = data is messages
    assert all(isinstance(prompt, list) == conversational for prompt in prompts)
    assert conversational == (not isinstance(completions[0], str))
    row = trainer.train_dataset[1]
    assert row["prompt_ids"] and tokenizer.pad_token_id not in row["prompt_ids"]
    if not conversational:
        assert row["prompt"] == color_prompts(8)[1]["prompt"]
    log = trainer.state.log_history[0]
    assert log["objective/scores"] == pytest.approx(0.5 + log["completions/mean_length"], rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_a_reward_model_by_name_is_loaded_as_the_policy_is(several, make, reward_model_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rewards, "load_reward_model", lambda path, **given: seen.append(given) or classifier(path))
    source = [reward_model_path, length] if several else reward_model_path
    make(reward_model=source, trust_remote_code=True, model_init_kwargs={"revision": "v2"})
    assert seen == [{"dtype": "auto", "device_map": None, "trust_remote_code": True, "revision": "v2"}]


def test_a_value_model_is_made_of_the_reward_model(make):
    trainer = make(value_model=None)
    same = weights(trainer.reward_model)
    assert trainer.value_model is not trainer.reward_model and not moved(trainer.value_model, same)
    trainer.train()
    assert moved(trainer.value_model, same) == set(same)


def test_or_of_the_policy_where_functions_reward(make):
    trainer = make(value_model=None, reward_model=length)
    policy = trainer.model.model.state_dict()
    assert all(torch.equal(weight, policy[name]) for name, weight in trainer.value_model.model.state_dict().items())
    trainer.train()
    assert trainer.state.log_history[0]["loss/value_avg"] > 0


def test_a_failing_reward_leaves_a_checkpoint(make):
    calls = []

    def breaks(completions, **_):
        calls.append(len(completions))
        if len(calls) == 3:
            raise KeyError("no answer")
        return [0.0] * len(completions)

    trainer = make(reward_model=breaks, max_steps=4, save_strategy="steps", save_steps=100)
    with pytest.raises(RuntimeError, match="reward function 'breaks' raised KeyError") as error:
        trainer.train()
    assert "Step 2 is saved" in error.value.__notes__[0]
    trainer = make(reward_model=length, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_an_optimizer_of_ones_own(make, model_path, reward_model_path):
    model, value = AutoModelForCausalLM.from_pretrained(model_path), classifier(reward_model_path)
    given = {"model": model, "value_model": value}
    with pytest.raises(ValueError, match="optimizers: the optimizer lacks weights of value_model"):
        make(**given, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    given = copy.deepcopy(given)
    both = [*given["model"].parameters(), *given["value_model"].parameters()]
    before = weights(given["value_model"])
    trainer = make(**given, optimizers=(torch.optim.SGD(both, lr=0.1), None))
    trainer.train()
    assert moved(trainer.value_model, before) == set(before)
