"""Scripts for TRL's last PPO read, override and change the same here."""

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

import trl_fast
from support.rollouts import FixedEngine, color_prompts
from support.training import make_trainer


@pytest.fixture
def make(model_path, reward_model_path, tokenizer, tmp_path):
    def make(trainer_class=trl_fast.PPOTrainer, **settings):
        arguments = {
            "model": AutoModelForCausalLM.from_pretrained(model_path),
            "processing_class": tokenizer,
            "reward_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
            "train_dataset": color_prompts(8),
            "rollout_engine": FixedEngine(tokenizer, longest=4),
        }

        class Module:
            PPOTrainer, PPOConfig = trainer_class, trl_fast.PPOConfig
            __name__ = "stand_in"

        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_mini_batches": 1}
        given = {**sizes, "num_ppo_epochs": 1, "response_length": 6, "stop_token": "eos", "num_sample_generations": 0}
        return make_trainer(Module, tmp_path, method="PPO", arguments=arguments, **given, **settings)

    return make


def test_attributes(make, tokenizer):
    trainer = make(max_steps=4)
    assert trainer.policy_model is trainer.model and not trainer.is_peft_model
    assert trainer.stop_token_id == tokenizer.eos_token_id
    assert (trainer.train_dataset_len, trainer.local_dataloader_batch_size, trainer.local_seed) == (8, 2, 42)
    assert trainer.ref_adapter_name is None and trainer.sample_generations_freq == 4
    assert len(next(iter(trainer.dataloader))) == 2
    with pytest.raises(AttributeError, match="PPOTrainer.stop_token_id cannot be changed: what it says was done when"):
        trainer.stop_token_id = 5


class Shown(trl_fast.PPOTrainer):
    steps = ()

    def generate_completions(self, sampling=False):
        self.steps = [*self.steps, (self.state.global_step, sampling)]


def test_a_subclass_shows_completions(make):
    trainer = make(Shown, max_steps=4)
    trainer.args.num_sample_generations = 2
    trainer.train()
    assert trainer.steps == [(0, True), (2, True)]


class Raise(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        args.kl_coef = 10.0**state.global_step


def test_the_weight_of_the_divergence_may_be_changed(make):
    trainer = make(max_steps=2)
    trainer.add_callback(Raise())
    trainer.train()
    second = trainer.state.log_history[1]
    penalty = second["objective/rlhf_reward"] - second["objective/scores"]
    assert penalty == pytest.approx(-10 * second["objective/kl"], rel=1e-4) and second["objective/kl"] != 0


def test_what_ppo_never_calls_is_refused(make):
    mine = type("Mine", (trl_fast.PPOTrainer,), {"__module__": "script", "null_ref_context": lambda self: None})
    with pytest.raises(ValueError, match=r"Mine defines null_ref_context\(\)"):
        make(mine)
