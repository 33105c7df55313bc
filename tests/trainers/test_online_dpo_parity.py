"""OnlineDPOTrainer against TRL 1.16.0's for the same completions: loss, gradient norm and every metric of TRL's."""

import pytest
import torch
import trl.experimental.online_dpo as trl_online_dpo
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import trl_fast
import trl_fast.data.packing as packing
from support.rollouts import FixedRollout, color_prompts, vowels
from support.training import NOT_COMPARED, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

BASE = {"max_new_tokens": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "beta": [0.3]}
BASE["gradient_accumulation_steps"] = 1
# TRL adds what the pad tokens of shorter completions have to these sums.
WITH_PADDING = {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def brief(completions, shade, **_):
    """Shorter texts are better; TRL's functions see completion_ids with pad tokens."""
    return [-len(text) * (1 + value % 2) / 8 for text, value in zip(completions, shade, strict=True)]


class EqualRollout(FixedRollout):
    """The same with completions of one length."""

    def _sample(self, prompt):
        ids, rng = super()._sample(prompt)
        return [*ids, *(rng.randrange(3, self.vocab_size) for _ in range(8))][:8], rng


def padded(lists, side, pad):
    rows = pad_sequence([torch.tensor(ids) for ids in lists], True, pad, padding_side=side)
    masks = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in lists], True, 0, padding_side=side)
    return rows, masks


def fixed_generation(rollout):
    """Stands in the place of TRL's `_generate`."""

    def generate(trainer, model, prompts, images=None):
        prompt_ids = 2 * [rollout.tokens_of(prompt) for prompt in prompts]
        pad = trainer._tokenizer.pad_token_id
        completions = padded(rollout.completions(prompt_ids), "right", pad)
        return (*padded(prompt_ids, "left", pad), *completions, None)

    return generate


@pytest.fixture
def compare(tmp_path, model_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)

    def run(
        *, rollout=FixedRollout, peft=None, given=None, ours=None, norms=None, rewards=(vowels, brief), **settings
    ):
        logs = []
        for module in (trl_online_dpo, trl_fast):
            made = rollout(tokenizer)
            arguments = {
                "model": AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
                "reward_funcs": list(rewards),
                "train_dataset": color_prompts(),
                "processing_class": tokenizer,
                "peft_config": LoraConfig(**peft) if peft else None,
                **({} if given is None else given()),
            }
            chosen = {**BASE, **settings}
            if module is trl_fast:
                arguments["rollout_func"], chosen = made, {**chosen, **(ours or {})}
            else:
                monkeypatch.setattr(trl_online_dpo.OnlineDPOTrainer, "_generate", fixed_generation(made))
            trainer = make_trainer(
                module, tmp_path / module.__name__, method="OnlineDPO", arguments=arguments, **chosen
            )
            trainer.train()
            logs.append(trainer.state.log_history)
        if norms is not None:
            for found, history in zip(norms, logs, strict=True):
                found += [log.pop("grad_norm") for log in history if "grad_norm" in log]
        left_out = WITH_PADDING if rollout is FixedRollout else set()
        assert_equal(logs[1], logs[0], left_out)
        return logs[1]

    return run


def assert_equal(ours, theirs, left_out):
    """All that TRL logs but `left_out`, in its order; it rounds the loss to four digits."""
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert [name for name in got if name in expected] == list(expected)
        for name, value in expected.items():
            if name not in left_out and not any(part in name for part in NOT_COMPARED):
                tolerance = {"abs": 6e-5, "rel": 1e-5} if "loss" in name else {"abs": 1e-5, "rel": 1e-4}
                assert got[name] == pytest.approx(value, **tolerance), f"{name} at step {expected.get('step')}"


def test_every_metric(compare):
    logs = compare(rollout=EqualRollout)
    assert [log["completions/mean_length"] for log in logs[:-1]] == [8] * 3
    assert all(log["objective/kl"] != 0 and log["objective/scores_margin"] > 0 for log in logs[1:-1])


def test_ipo_and_the_penalty_of_completions_of_different_lengths(compare):
    # Adam divides by gradients, so that roundings of fused layers show in the squares of the next steps.
    logs = compare(loss_type="ipo", missing_eos_penalty=1.5, reward_weights=[0.5, 2.0], optim="sgd")
    assert min(log["val/contain_eos_token"] for log in logs[:-1]) < 1


def test_lora(compare):
    compare(peft=LORA, learning_rate=1e-2, max_steps=2)


def test_a_given_reference(compare, model_path):
    def given():
        reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        with torch.no_grad():
            for weight in reference.parameters():
                weight.mul_(0.9)
        return {"ref_model": reference}

    compare(given=given, max_steps=2)


def test_gradients_of_micro_batches_are_averaged(compare):
    """TRL adds them, so that its gradient is as many times too large; with clipping the weights are the same."""
    theirs, ours = [], []
    compare(gradient_accumulation_steps=2, per_device_train_batch_size=3, max_steps=2, norms=(theirs, ours))
    assert ours == pytest.approx([norm / 2 for norm in theirs], rel=1e-4)
    assert min(theirs) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared_prefix", "packed", "padded"])
def test_layouts(name, compare):
    compare(ours={"batch_layout": name}, loss_type="ipo")


@pytest.mark.slow
def test_epochs_with_a_rest(compare):
    compare(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5)


@pytest.mark.slow
def test_a_reward_model(compare, reward_model_path):
    compare(rewards=[reward_model_path, vowels])
