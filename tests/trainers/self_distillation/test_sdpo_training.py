"""SDPOTrainer as a person uses it: it learns, shares prompts, resumes; callbacks hear of it, and warnings come."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_fast
import trl_fast.data.packing as packing
from support.resuming import assert_resumes
from support.rewarded_prompts import prompts_with_feedback, short
from support.rollouts import FixedEngine
from support.training import make_trainer
from trl_fast.data.segments import segments_of
from trl_fast.rollout import Rollout

SETTINGS = {"max_completion_length": 8, "num_generations": 4, "max_steps": 2}


@pytest.fixture
def make(model_path, tokenizer, tmp_path):
    def trainer(folder=None, **given):
        names = (
            "model",
            "reward_funcs",
            "train_dataset",
            "eval_dataset",
            "peft_config",
            "rollout_engine",
            "callbacks",
        )
        arguments = {"model": model_path, "reward_funcs": short, "train_dataset": prompts_with_feedback()}
        arguments |= {"rollout_engine": FixedEngine(tokenizer)}
        arguments |= {name: given.pop(name) for name in names if name in given}
        return make_trainer(trl_fast, folder or tmp_path, method="SDPO", arguments=arguments, **{**SETTINGS, **given})

    return trainer


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


class Alike:
    """An engine whose completions depend on their prompts and on their place among its own."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(
            prompt_ids, [[6 + (7 * token + i) % 200 for token in ids[-5:]] for i, ids in enumerate(prompt_ids)]
        )


def first_is_right(completion_ids, **_):
    return [float(index % 4 == 0) for index in range(len(completion_ids))]


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_the_policy_comes_to_its_told_self(weight, make):
    settings = {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "teacher_model_kind": "base"}
    settings |= {"distillation_mode": "full_logits", "distillation_weight": weight, "per_device_eval_batch_size": 4}
    trainer = make(
        rollout_engine=Alike(), reward_funcs=first_is_right, eval_dataset=prompts_with_feedback(4), **settings
    )
    loss = "eval_self_distillation/distillation_loss"
    before = trainer.evaluate()[loss]
    trainer.train()
    assert trainer.evaluate()[loss] < 0.6 * before


def update_of(trainer, count=8):
    trainer.model.eval()
    rows = [trainer.train_dataset[index // 4] for index in range(count)]
    return trainer._prepare_inputs(rows)


def prompts_of(batch):
    return len([segment for segment in segments_of(batch.tree_lengths) if segment.parent is None])


def test_prompts_are_computed_once_and_only_what_is_learned(make, monkeypatch):
    """One completion of each prompt is right: the other three see it, and it sees nothing."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer = make(rollout_engine=Alike(), reward_funcs=first_is_right, per_device_train_batch_size=8)
    update = update_of(trainer)
    assert update.policy is None
    for batch in (update.taught.batch, update.taught.teacher_batch):
        assert batch.branch.unique().numel() == 6
        assert prompts_of(batch) <= 2
    assert torch.equal(update.taught.batch.targets, update.taught.teacher_batch.targets)
    assert update.taught.weights.sum().item() == pytest.approx(6 / 8)


@pytest.mark.parametrize("right", [True, False])
def test_the_teacher_reads_only_what_it_teaches(right, make):
    """The policy's own loss reads all completions."""
    rewards = (
        first_is_right if right else lambda completion_ids, **_: [float(i % 2) for i in range(len(completion_ids))]
    )
    threshold = 1.0 if right else 2.0
    trainer = make(
        rollout_engine=Alike(), reward_funcs=rewards, distillation_weight=0.5, success_reward_threshold=threshold
    )
    update = update_of(trainer)
    taught = update.taught
    assert taught.batch.branch.unique().numel() == 8
    assert taught.teacher_batch.branch.unique().numel() == (6 if right else 1)
    assert torch.equal(taught.batch.targets[taught.taught], taught.teacher_batch.targets)
    assert bool(taught.weights.any()) == right and not taught.weights[taught.of_all(taught.taught + 1) == 0].any()


def test_the_policys_loss_needs_no_teacher(make):
    trainer = make(distillation_weight=0.0, teacher_model_kind="base")
    assert trainer.reference.model is None and update_of(trainer).taught is None
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    assert "self_distillation/policy_loss" in logged and "sdpo/distillation_loss" not in logged


def test_teachers_of_an_adapter_that_came_along(make, model_path):
    """It is part of the initial model, so that both kinds of teacher begin with it."""
    torch.manual_seed(0)
    for kind in ("base", "ema"):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora())
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        trainer = make(model=adapted, teacher_model_kind=kind, teacher_update_rate=0.25, learning_rate=0.1)
        batch = update_of(trainer).taught.batch
        with torch.no_grad():
            before = trainer.policy_logprobs(batch)
            torch.testing.assert_close(trainer.reference.score(batch).logprobs, before)
        trainer.train()
        with torch.no_grad():
            after, taught = trainer.policy_logprobs(batch), trainer.reference.score(batch).logprobs
        assert (after - before).abs().max() > 1e-2
        assert torch.allclose(taught, before, atol=1e-6) == (kind == "base")


def test_an_averaged_adapter_follows(make):
    trainer = make(peft_config=lora(), teacher_update_rate=0.25, teacher_sync_steps=2, max_steps=3, learning_rate=0.1)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            found = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_B" in name}
            seen.append(found)

    trainer.add_callback(Watch())
    trainer.train()
    for name, weight in seen[1].items():
        if ".default." in name:
            twin = name.replace(".default.", ".teacher.")
            assert not seen[0][twin].any() and weight.any()
            torch.testing.assert_close(seen[1][twin], 0.25 * weight)
            assert torch.equal(seen[2][twin], seen[1][twin])
            assert not trainer.model.get_parameter(twin).requires_grad


def test_a_live_teacher_leaves_gradients_under_autocast(make, monkeypatch):
    """Autocast keeps copies of weights, those that the teacher's pass without gradient has made too."""
    trainer = make(teacher_model_kind="live", distillation_mode="full_logits")
    monkeypatch.setattr(
        trainer, "compute_loss_context_manager", lambda: torch.autocast("cpu", torch.bfloat16), raising=False
    )
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, update_of(trainer))
    loss.backward()
    assert all(weight.grad is not None for weight in trainer.model.parameters())


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resuming(peft, make, tmp_path):
    def trainer(folder, **changes):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "distillation_weight": 0.5}
        settings |= {"num_iterations": 2, **({"peft_config": lora()} if peft else {}), **changes}
        return make(folder, rollout_engine=None, **settings)

    assert_resumes(trainer, tmp_path / "run", (1, 2))


class Listener(TrainerCallback):
    """Keeps what it is told, by the event's name."""

    def __init__(self):
        self.heard = {}

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda **told: self.heard.setdefault(name, []).append(told)


def test_callbacks_hear_what_trls_do(make):
    listener = Listener()
    make(callbacks=[listener], reward_funcs=first_is_right, max_steps=1, gradient_accumulation_steps=1).train()
    (selected,), (told,), (prepared,), (built,) = (
        listener.heard[f"on_{name}"]
        for name in (
            *("generation_prompts_selected", "teacher_context_built"),
            *("self_distillation_batch_prepared", "generation_batch_built"),
        )
    )
    assert len(selected["generation_prompts"]) == 4 and built["generate_every"] == 1
    assert told["self_distillation_mask"].tolist() == [0, 1, 1, 1]
    assert told["teacher_input_ids"].shape == told["teacher_attention_mask"].shape
    assert told["completion_mask"].shape == prepared["completion_ids"].shape
    assert prepared["self_distillation_mask"].tolist() == [0, 1, 1, 1]


def test_rewards_may_be_computed_by_a_subclass(model_path, tokenizer, tmp_path):
    class Subclass(trl_fast.SDPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list) + 1

    config = trl_fast.SDPOConfig(
        *(str(tmp_path),),
        **{**SETTINGS, "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True},
        bf16=False,
    )
    engine = FixedEngine(tokenizer)
    trainer = Subclass(model_path, short, config, prompts_with_feedback(), rollout_engine=engine)
    trainer.train()
    assert trainer.state.log_history[0]["self_distillation/reward_min"] >= 1


def test_runs_that_teach_nothing_are_warned_of(make, caplog):
    def nothing(completion_ids, **_):
        return [0.0] * len(completion_ids)

    make(reward_funcs=nothing, max_steps=3, diagnostics_warning_interval=3, save_strategy="no").train()
    for what in ("All completions have the same reward", "No completion has a teacher", "No completion is successful"):
        lines = [record.message for record in caplog.records if record.message.startswith(what)]
        assert [line.rsplit(" ", 1)[1] for line in lines] == ["1.", "3."]
    ignored = [record.message for record in caplog.records if "which the teacher is not shown" in record.message]
    assert len(ignored) == 1 and "include_environment_feedback=True" in ignored[0]


@pytest.mark.parametrize(
    "feedback, message",
    [
        ({}, "the dataset has no column 'privileged_context', so that the teacher is shown no feedback"),
        (
            {"privileged_context": ["No."]},
            "values that the teacher is not shown, such as a list; make texts of",
        ),
        ({"privileged_context": None}, None),
    ],
)
def test_feedback_that_cannot_be_shown_is_named(feedback, message, make, caplog):
    rows = Dataset.from_list([{"prompt": "What?", "shade": 0, **feedback}] * 4)
    make(train_dataset=rows, include_environment_feedback=True).train()
    found = [record.message for record in caplog.records if "privileged_context" in record.message]
    assert len(found) == (message is not None) and (message or "") in "".join(found)


def test_prompts_of_the_teacher_fit_the_positions(make, caplog):
    """Feedback that would not fit loses its beginning, as with a max_reprompt_len that is as long."""
    rows = Dataset.from_list([{"prompt": "What?", "privileged_context": "No. " * 999, "shade": 0}] * 4)
    trainer = make(train_dataset=rows, include_environment_feedback=True, max_steps=1)
    batch = update_of(trainer, 4).taught.teacher_batch
    limit = trainer.model.config.max_position_embeddings
    assert batch.position_ids.max().item() < limit
    assert f"longer than the model's {limit} positions" in caplog.text
