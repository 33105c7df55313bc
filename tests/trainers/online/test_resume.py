"""Runs of GRPO, RLOO and PPO that go on from a checkpoint: prompts, losses and weights of the unbroken run."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
from support.rollouts import color_prompts
from support.training import assert_same_logs, make_trainer

# Epochs of three steps.
SETTINGS = {
    "num_generations": 2,
    "max_completion_length": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
}


class Judge:
    """A reward function that remembers the prompts of each of its calls; one of them may fail."""

    __name__ = "judge"

    def __init__(self, failing_call=None):
        self.seen, self.failing_call = [], failing_call

    def __call__(self, prompts, completion_ids, **_):
        self.seen.append(list(prompts))
        if len(self.seen) == self.failing_call:
            raise KeyError("solution")
        return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def make(model_path, tmp_path):
    def make(method, *, judge=None, rows=None, **changes):
        judge = judge or Judge()
        arguments = {"model": model_path, "reward_funcs": judge, "train_dataset": rows or color_prompts(7)}
        settings = {**SETTINGS, **changes}
        return make_trainer(trl_fast, tmp_path, method=method, arguments=arguments, **settings), judge

    return make


def assert_goes_on(whole, prompts, resumed, again):
    """Everything from the checkpoint on, bit for bit; `prompts` are those of the unbroken run's generations."""
    assert again.seen == prompts[len(prompts) - len(again.seen) :]
    assert resumed.state.global_step == whole.state.global_step
    # Logs up to the checkpoint were read from it, with their names sorted.
    logs = [
        [dict(sorted(log.items())) for log in trainer.state.log_history if "grad_norm" in log]
        for trainer in (resumed, whole)
    ]
    for log in logs[0] + logs[1]:
        log.pop("step_time", None)
        log.pop("eps", None)
    assert_same_logs(*logs, rel=0, abs=0)
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize("method", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_a_run_resumed_after_the_first_epoch_reads_its_prompts(method, make, tmp_path):
    whole, judge = make(method)
    whole.train()
    assert judge.seen[:3] != judge.seen[3:6]
    # Within the second epoch, at its end, and in the third.
    for step in (4, 6, 7):
        resumed, again = make(method)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert len(again.seen) == 8 - step
        assert_goes_on(whole, judge.seen, resumed, again)


# Micro-batches of a generation that one optimizer step does not use up: passes over it, and slices of it.
WITHIN = {
    "passes": {"num_iterations": 2},
    "slices": {"steps_per_generation": 2, "beta": 0.1, "mask_truncated_completions": True},
    "uneven": {"steps_per_generation": 2, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("case", WITHIN)
@pytest.mark.parametrize("method", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_a_run_resumed_within_a_generation_goes_on_with_it(method, case, make, tmp_path, caplog):
    whole, judge = make(method, **WITHIN[case])
    whole.train()
    assert len(judge.seen) < whole.generation.step
    # Within a generation; the last one at least is not of the first epoch.
    for step in (5, 7):
        resumed, again = make(method, **WITHIN[case])
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert len(again.seen) < (8 - step) * resumed.args.gradient_accumulation_steps
        assert_goes_on(whole, judge.seen, resumed, again)
        assert resumed.generation.step == whole.generation.step
    assert "resume_from_checkpoint" not in caplog.text


def test_a_failure_within_a_generation_loses_none_of_it(make, tmp_path):
    settings = {**WITHIN["uneven"], "save_steps": 100}
    whole, judge = make("GRPO", **settings)
    whole.train()
    broken, _ = make("GRPO", judge=Judge(failing_call=6), **settings)
    with pytest.raises(RuntimeError, match="judge"):
        broken.train()
    # One more micro-batch than those of whole steps.
    assert (broken.state.global_step, broken.generation.step) == (3, 10)
    resumed, again = make("GRPO", **settings)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert_goes_on(whole, judge.seen, resumed, again)


def test_a_checkpoint_that_does_not_tell_where_it_is_within_a_generation(make, tmp_path, caplog):
    make("GRPO", **WITHIN["slices"], max_steps=3)[0].train()
    place = f"resume_from_checkpoint: {tmp_path}/checkpoint-3/generation_0.pt"
    resumed, again = make("GRPO", **WITHIN["slices"] | {"num_iterations": 2}, max_steps=4)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert (
        f"{place} is of a run with other numbers of processes or completions, so the run goes on with" in caplog.text
    )
    (tmp_path / "checkpoint-3/generation_0.pt").unlink()
    resumed, again = make("GRPO", **WITHIN["slices"], max_steps=4)
    with pytest.raises(ValueError, match=r"not a whole checkpoint: generation_0\.pt is missing"):
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    (tmp_path / "checkpoint-3/trl_fast_checkpoint.json").unlink()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert f"{place} is not there, so the run goes on with new completions" in caplog.text
    assert len(again.seen) == 1


def test_a_checkpoint_between_generations_needs_no_more(make, tmp_path, caplog):
    trainer, judge = make("GRPO", max_steps=2)
    trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/generation_?.pt"))
    # Training once more begins with the first generation.
    trainer, judge = make("GRPO", **WITHIN["passes"], max_steps=3)
    trainer.train()
    trainer.train()
    assert trainer.generation.step == 3 and judge.seen[0] == judge.seen[2]
    assert "resume_from_checkpoint" not in caplog.text


def test_a_stream_goes_on_within_its_first_pass_and_says_so_after_it(make, tmp_path, caplog):
    stream = color_prompts(7).to_iterable_dataset()
    whole, judge = make("GRPO", rows=stream, max_steps=5)
    whole.train()
    for step, says in ((2, False), (4, True)):
        resumed, again = make("GRPO", rows=stream, max_steps=5)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert ("the train dataset is a stream that ended before" in caplog.text) == says
        assert (again.seen == judge.seen[step:]) != says


def test_ppo_resumed_after_the_first_epoch(model_path, reward_model_path, tokenizer, tmp_path):
    def make():
        judge = Judge()
        arguments = {
            "model": AutoModelForCausalLM.from_pretrained(model_path),
            "processing_class": tokenizer,
            "reward_model": judge,
            "value_model": AutoModelForSequenceClassification.from_pretrained(reward_model_path),
            "train_dataset": color_prompts(7),
        }
        settings = {**SETTINGS, "per_device_train_batch_size": 2, "response_length": 4, "num_ppo_epochs": 2}
        for name in ("num_generations", "max_completion_length"):
            settings.pop(name)
        options = {"method": "PPO", "arguments": arguments, "num_sample_generations": 0, **settings}
        return make_trainer(trl_fast, tmp_path, **options), judge

    whole, judge = make()
    whole.train()
    assert judge.seen[:3] != judge.seen[3:6]
    for step in (4, 6):
        resumed, again = make()
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert len(again.seen) == 8 - step
        assert_goes_on(whole, judge.seen, resumed, again)


class BatchMaker(trl_fast.GRPOTrainer):
    """Makes TRL's batches itself, with a key of its own."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        return {**batch, "texts": [row["prompt"] for row in inputs], "bonus": batch["advantages"].abs()}

    def _compute_loss(self, model, inputs):
        assert len(inputs["texts"]) == len(inputs["bonus"])
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] + inputs["bonus"]})


def test_batches_of_a_subclass_are_kept_within_a_generation(model_path, tmp_path):
    class Module:
        GRPOTrainer, GRPOConfig = BatchMaker, trl_fast.GRPOConfig

    def make():
        arguments = {"model": model_path, "reward_funcs": Judge(), "train_dataset": color_prompts(9)}
        settings = {**SETTINGS, "steps_per_generation": 4, "max_steps": 4}
        return make_trainer(Module, tmp_path, method="GRPO", arguments=arguments, **settings)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
