"""Subclasses that override TRL's methods: the same body under TRL 1.16.0 and here, with the same logs."""

import functools
from types import MethodType, SimpleNamespace

import pytest
import torch
import trl
from peft import LoraConfig

import trl_fast
from support.rollouts import FixedEngine, FixedRollout, brevity, color_prompts, vowels
from support.training import assert_same_logs, make_trainer

BASE = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.8, "max_steps": 2}
# Where a method of the subclass sees batches, both are off by themselves.
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


class ScaledRewards:
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        assert sorted(inputs[0]) == ["prompt", "shade"] and inputs[0]["prompt"] == prompts[0]
        self._log_metric("longest", float(max(map(len, completion_ids_list))))
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards * torch.tensor([1.0, 2.0]) + torch.arange(len(rewards))[:, None]


class OwnRewards:
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = torch.tensor(
            [[len(ids), row["shade"]] for ids, row in zip(completion_ids_list, inputs, strict=True)]
        )
        return rewards.float().masked_fill(rewards == 3, torch.nan)


class RenamedMetrics:
    def _log_metric(self, name, value):
        super()._log_metric(f"mine/{name}", 2 * value)

    def _log_completion_extra(self, column, values):
        self.columns = [*getattr(self, "columns", []), (column, values)]
        super()._log_completion_extra(column, values)


class HalfLoss:
    def _compute_loss(self, model, inputs):
        return 0.5 * super()._compute_loss(model, inputs)


class OtherAdvantages:
    """Exchanges a value of the batch, in every way that Python has."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["advantages"] = inputs["advantages"] + 0.3
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class AdvantagesInPlace:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["advantages"][::2] *= -1
        return super().compute_loss(model, inputs)


class AnotherDict:
    def _compute_loss(self, model, inputs):
        width = inputs["completion_ids"].shape[1] - 1
        keys = ("completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps")
        shorter = {name: inputs[name][:, :width] for name in keys if name in inputs}
        return super()._compute_loss(model, {**inputs, **shorter})


class OwnLoss:
    """A loss of its own, from the model's logits."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, ids[:, 1:, None])[..., 0][:, inputs["prompt_ids"].shape[1] - 1 :]
        per_sequence = (logps * inputs["completion_mask"]).sum(1)
        self._metrics["train"]["mine"].append(per_sequence.mean().item())
        return -(inputs["advantages"] * per_sequence).mean()


class ScoredLoss:
    """A loss of its own, from the trainer's log-probabilities."""

    def _compute_loss(self, model, inputs):
        width = inputs["completion_ids"].shape[1]
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        given = {"batch_size": 3, "compute_entropy": True}
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(model, ids, mask, width, **given)
        assert logps.shape == entropies.shape == inputs["completion_ids"].shape and aux_loss is None
        weights = inputs["completion_mask"] * inputs["advantages"][:, None]
        return -(weights * (logps + 0.1 * entropies)).sum() / inputs["completion_mask"].sum()


class MoreInTheBatch:
    """Adds to the batch what the loss reads; rows stay together."""

    def _generate_and_score_completions(self, inputs):
        assert sorted(inputs[0]) == ["prompt", "shade"]
        batch = super()._generate_and_score_completions(inputs)
        batch["bonus"] = batch["completion_mask"].sum(1).float()
        batch["texts"] = [row["prompt"] for row in inputs]
        return batch

    def _compute_loss(self, model, inputs):
        assert len(inputs["texts"]) == len(inputs["advantages"])
        very = torch.tensor([text.count("very") for text in inputs["texts"]])
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] + inputs["bonus"] - very})


class OtherAdvantagesInTheBatch:
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = batch["advantages"].sign()
        return batch


class MaskedInTheBatch:
    """Takes tokens out: a whole completion, a completion's end, and one from its middle."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        batch["completion_mask"][0] = 0
        batch["completion_mask"][1, 2:] = 0
        batch["completion_mask"][2:, 1] = 0
        return batch


class AdvantagesByToken:
    """Gives each token an advantage of its own, as TRL allows."""

    def _compute_loss(self, model, inputs):
        steps = torch.linspace(1, -1, inputs["completion_ids"].shape[1])
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"][:, None] * steps})


class OtherTexts:
    """Changes what reward functions see."""

    def _generate(self, prompts):
        prompt_ids, completion_ids, *others = super()._generate(prompts)
        place = 1 if len(others) > 1 else 0
        others[place] = [f"{prompt} {text}" for prompt, text in zip(prompts, others[place], strict=True)]
        return prompt_ids, completion_ids, *others


class FlatterLogps:
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        assert (entropies is not None) == kwargs.get("compute_entropy", False)
        return 0.9 * logps, entropies, aux_loss


class EvenTokens:
    def get_high_entropy_mask(self, entropies, mask, threshold):
        chosen = super().get_high_entropy_mask(entropies, mask, threshold)
        assert chosen.shape == mask.shape
        return chosen & (torch.arange(mask.shape[1]) % 2 == 0)


def long_ones(completion_ids, **_):
    """The same for most completions, so that many have no advantage."""
    return [float(len(ids) > 6) for ids in completion_ids]


def noting(completions, log_metric, log_extra, **_):
    log_metric("noted", float(len(completions)))
    log_extra("first", [text[:1] for text in completions])
    return [float(len(text)) for text in completions]


def logs_of(module, output_dir, body, method, arguments, evaluates, settings):
    mine = type("Mine", (body, getattr(module, f"{method}Trainer")), {})
    names = {f"{method}Trainer": mine, f"{method}Config": getattr(module, f"{method}Config")}
    stand_in = SimpleNamespace(**names)
    trainer = make_trainer(stand_in, output_dir, method=method, arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    logs = [{name: value for name, value in logs.items() if name != "step_time"} for logs in trainer.state.log_history]
    return logs, trainer


@pytest.fixture
def compare(tmp_path, model_path, tokenizer, monkeypatch):
    def run(body, method="GRPO", *, with_mask=False, rewards=(vowels, brevity), peft=False, ours=OURS, **more):
        evaluates = more.pop("evaluates", False)

        def arguments(rollout_func):
            return {
                "model": model_path,
                "reward_funcs": list(rewards),
                "train_dataset": color_prompts(),
                "eval_dataset": color_prompts(4),
                "peft_config": LoraConfig(**LORA) if peft else None,
                **rollout_func,
            }

        settings = {**BASE, **more}
        rollouts = [{"rollout_func": FixedRollout(tokenizer, with_mask=with_mask)} for _ in range(2)]
        theirs, given = rollouts
        if method == "RLOO":
            rollout, theirs, given = FixedRollout(tokenizer), {}, {"rollout_engine": FixedEngine(tokenizer)}
            monkeypatch.setattr(
                trl.RLOOTrainer, "_generate_single_turn", lambda trainer, ids, *_: rollout.completions(ids)
            )
        expected, their = logs_of(trl, tmp_path / "trl", body, method, arguments(theirs), evaluates, settings)
        got, our = logs_of(trl_fast, tmp_path / "ours", body, method, arguments(given), evaluates, ours | settings)
        assert_same_logs([dict(sorted(log.items())) for log in got], [dict(sorted(log.items())) for log in expected])
        return their, our

    return run


def bodies(*quick, slow):
    """Returns parameters, of which some are slow tests."""
    marked = [pytest.param(body, id=body.__name__, marks=pytest.mark.slow) for body in slow]
    return [*(pytest.param(body, id=body.__name__) for body in quick), *marked]


QUICK = (ScaledRewards, HalfLoss, ScoredLoss, MoreInTheBatch)
FURTHER = (OwnRewards, OtherAdvantages, OwnLoss, OtherTexts, AdvantagesInPlace, OtherAdvantagesInTheBatch)


@pytest.mark.parametrize(
    "body",
    bodies(
        *QUICK,
        OtherAdvantages,
        OtherTexts,
        MaskedInTheBatch,
        AdvantagesByToken,
        slow=(AnotherDict, OwnRewards, OwnLoss, *FURTHER[4:]),
    ),
)
def test_grpo(body, compare):
    compare(body, num_iterations=2, learning_rate=5e-3, beta=0.1, evaluates=body in (MoreInTheBatch, ScaledRewards))


@pytest.mark.parametrize("body", bodies(ScaledRewards, MoreInTheBatch, slow=(HalfLoss, ScoredLoss, *FURTHER)))
def test_rloo(body, compare):
    compare(body, "RLOO", num_iterations=2, learning_rate=5e-3, epsilon=0.05)


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_log_probabilities_of_the_subclass(method, peft, compare):
    compare(FlatterLogps, method, peft=peft, num_iterations=2, learning_rate=1e-2, beta=0.1)


@pytest.mark.parametrize("body", bodies(AnotherDict, slow=(OtherAdvantages, OtherAdvantagesInTheBatch)))
def test_other_losses_of_changed_batches(body, compare):
    compare(body, loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, learning_rate=5e-3)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_batches_that_a_subclass_sees_are_put_together_as_in_trl(method, compare):
    """With the defaults, which move completions and leave some out where nobody sees it."""
    compare(HalfLoss, method, rewards=(long_ones,), ours={})


def test_changed_batches_with_tokens_of_an_environment(compare):
    compare(OtherAdvantages, with_mask=True, loss_type="bnpo", steps_per_generation=4)


def test_changed_batches_of_cut_off_completions(compare):
    compare(OtherAdvantages, mask_truncated_completions=True, entropy_coef=0.2)


@pytest.mark.parametrize("with_mask", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_high_entropy_tokens_of_the_subclass(with_mask, compare):
    compare(EvenTokens, with_mask=with_mask, top_entropy_quantile=0.6)


def test_what_reward_functions_log(compare):
    for trainer in compare(RenamedMetrics, rewards=(noting,)):
        assert [name for name, _ in trainer.columns] == ["first"] * 2


GRAFTS = {
    "GRPO": ("_compute_loss", "_calculate_rewards", "_generate_and_score_completions", "_generate", "_prepare_inputs"),
    "RLOO": ("_compute_loss", "_calculate_rewards", "_generate_and_score_completions", "_generate"),
}


@pytest.mark.parametrize(
    "method, name",
    [
        pytest.param(
            method, name, marks=() if name in ("_compute_loss", "_generate", "_prepare_inputs") else pytest.mark.slow
        )
        for method, names in GRAFTS.items()
        for name in names
    ],
)
def test_bodies_copied_from_trl(method, name, compare):
    """A subclass that begins as a copy of TRL's method finds all that it reads."""
    body = type("Copied", (), {name: vars(getattr(trl, f"{method}Trainer"))[name]})
    more = {"top_entropy_quantile": 0.7, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.1}
    settings = {"beta": 0.1, "num_iterations": 2, **(more if method == "GRPO" else {})}
    compare(body, method, evaluates=name != "_prepare_inputs", **settings)


class OwnGeneration:
    """Samples by itself."""

    turns = ()

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return [ids[1:] for ids in prompt_ids], images, fields

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *num_generations):
        assert images is None and multimodal_fields == {}
        self.turns = [*self.turns, num_generations]
        completion_ids = self.fixed.completions(prompt_ids)
        return (completion_ids, None) if num_generations else completion_ids


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_generation_of_the_subclass(method, model_path, tokenizer, tmp_path):
    arguments = {"model": model_path, "reward_funcs": [vowels, brevity], "train_dataset": color_prompts()}
    logs = []
    for module in (trl, trl_fast):
        settings = BASE if module is trl else BASE | OURS
        body = type("Body", (OwnGeneration,), {"fixed": FixedRollout(tokenizer)})
        found, trainer = logs_of(module, tmp_path / module.__name__, body, method, dict(arguments), False, settings)
        assert trainer.turns == ([(4,)] * 2 if method == "GRPO" else [()] * 2)
        logs.append([dict(sorted(log.items())) for log in found])
    assert_same_logs(logs[1], logs[0])


@pytest.mark.parametrize("where", ["class", "trainer"])
def test_methods_that_are_put_in_later(where, model_path, tokenizer, tmp_path, monkeypatch):
    arguments = {"model": model_path, "reward_funcs": [vowels, brevity], "train_dataset": color_prompts()}
    fixed = FixedRollout(tokenizer)
    trainer = make_trainer(trl_fast, tmp_path, method="GRPO", arguments=arguments, **BASE)
    methods = {
        "_calculate_rewards": OwnRewards._calculate_rewards,
        "_compute_loss": functools.wraps(trl_fast.GRPOTrainer._compute_loss)(OwnLoss._compute_loss),
        "_generate_single_turn": lambda self, prompt_ids, *_: (fixed.completions(prompt_ids), None),
    }
    for name, method in methods.items():
        if where == "class":
            monkeypatch.setattr(trl_fast.GRPOTrainer, name, method)
        else:
            setattr(trainer, name, MethodType(method, trainer))
    trainer.train()
    log = trainer.state.log_history[0]
    # Lengths in the place of vowels, and the metric of the loss.
    assert log["rewards/vowels/mean"] == pytest.approx(log["completions/mean_length"], abs=1) and log["mine"] < 0
    assert trainer.trl_hooks.sees_batches


WRONG = {
    "_calculate_rewards": (
        torch.zeros(8, 1),
        r"returned \(8, 1\); expected a tensor of shape \(8, 2\).* vowels, brev",
    ),
    "_generate": (([], []), r"_generate\(\) returned 2 values; expected a tuple of 8, as TRL's does"),
    "_generate_and_score_completions": ({"prompt_ids": 0}, "prompt_mask, completion_ids, .* are missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_subclass_returns_is_checked(name, model_path, tokenizer, tmp_path):
    answer, message = WRONG[name]
    body = type("Body", (), {name: lambda self, *args: answer})
    arguments = {
        "model": model_path,
        "reward_funcs": [vowels, brevity],
        "train_dataset": color_prompts(),
        "rollout_func": FixedRollout(tokenizer),
    }
    with pytest.raises(ValueError, match=message):
        logs_of(trl_fast, tmp_path, body, "GRPO", arguments, False, BASE)
