"""SDPOTrainer against TRL 1.16.0's: loss, gradient norm and every logged metric."""

import pytest
import trl.experimental.sdpo as trl_sdpo
from peft import LoraConfig

import trl_fast
from support.rewarded_prompts import chats_with_feedback, prompts_with_feedback, short, third
from support.rollouts import FixedEngine, FixedRollout
from support.training import assert_same_logs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

BASE = {
    "max_completion_length": 8,
    "max_steps": 3,
    "num_generations": 4,
    "learning_rate": 1e-2,
    "teacher_update_rate": 0.3,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logs_of(module, folder, arguments, settings, evaluates):
    trainer = make_trainer(module, folder, method="SDPO", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    return trainer.state.log_history


def named_by_trl(got, expected):
    """Our logs without what TRL does not log, in TRL's order."""
    return [{name: ours[name] for name in theirs} for ours, theirs in zip(got, expected, strict=True)]


@pytest.fixture
def compare(tmp_path, model_path, tokenizer, monkeypatch):
    def run(*, peft=None, evaluates=False, ours=None, rows=prompts_with_feedback, rewards=(short,), **settings):
        settings = {**BASE, **settings}
        rollout = FixedRollout(tokenizer)
        fixed = lambda trainer, ids: (ids, rollout.completions(ids))  # noqa: E731
        monkeypatch.setattr(trl_sdpo.SDPOTrainer, "_generate_transformers", fixed)

        def arguments():
            adapter = {"peft_config": LoraConfig(**peft)} if peft else {}
            data = {"train_dataset": rows(), "eval_dataset": rows(4)}
            return {"model": model_path, "reward_funcs": list(rewards), **data, **adapter}

        expected = logs_of(trl_sdpo, tmp_path / "trl", arguments(), settings, evaluates)
        given = {**arguments(), "rollout_engine": FixedEngine(tokenizer)}
        got = logs_of(trl_fast, tmp_path / "ours", given, {**settings, **(ours or {})}, evaluates)
        assert_same_logs(named_by_trl(got, expected), expected)
        assert max(abs(log["grad_norm"]) for log in got if "grad_norm" in log) > 1e-3
        return got

    return run


def some(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


TOPK = {"distillation_mode": "topk_logits", "distillation_topk": 7}
MODES = {
    "sampled": {},
    "all": {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
    "all, forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0, "temperature": 0.7},
    "all, reverse": {"distillation_mode": "full_logits"},
    "likeliest": {**TOPK, "distillation_alpha": 0.3},
    "likeliest and a tail": {**TOPK, "distillation_add_tail": True},
}


@pytest.mark.parametrize("name", some(MODES, ("sampled", "likeliest")))
def test_what_is_compared(name, compare):
    logs = compare(**MODES[name], evaluates=name == "sampled", per_device_eval_batch_size=8)
    shares = [log["self_distillation/reprompt_sample_fraction"] for log in logs if "loss" in log]
    assert any(0 < share < 1 for share in shares)


KINDS = {
    "live": {"teacher_model_kind": "live", **MODES["likeliest"]},
    "base": {"teacher_model_kind": "base"},
    "ema, every other step": {"teacher_sync_steps": 2, **MODES["all"]},
    "lora": {"peft": LORA},
    "lora, live": {"peft": LORA, "teacher_model_kind": "live"},
    "lora, base": {"peft": LORA, "teacher_model_kind": "base", **MODES["all"]},
    "lora, ema, likeliest": {"peft": LORA, **MODES["likeliest"]},
}


@pytest.mark.parametrize("name", some(KINDS, ("live", "base", "lora", "lora, base")))
def test_teachers(name, compare):
    compare(**KINDS[name])


CONTEXTS = {
    "feedback": {"include_environment_feedback": True},
    "feedback without a solution": {
        "include_environment_feedback": True,
        "environment_feedback_only_without_solution": True,
    },
    "feedback only": {"include_environment_feedback": True, "use_successful_as_teacher": False},
    "its own success": {"dont_reprompt_on_self_success": False},
    "low threshold": {"success_reward_threshold": 0.3, "rewards": (third, short), "reward_weights": [0.5, 0.4]},
    # Small steps, so that rounding does not add up.
    "cut prompts": {"max_reprompt_len": 20, "max_prompt_length": 6, "learning_rate": 1e-3},
    "templates": {
        "rows": chats_with_feedback,
        "include_environment_feedback": True,
        "reprompt_template": "{feedback} {prompt} {{so}} {solution}",
        "solution_template": "Like {successful_previous_attempt}",
        "feedback_template": "Not {feedback_raw}",
    },
    "conversations": {"rows": chats_with_feedback},
}


@pytest.mark.parametrize("name", some(CONTEXTS, ("feedback without a solution", "templates")))
def test_what_the_teacher_is_told(name, compare):
    logs = compare(**CONTEXTS[name])
    used = max(log.get("self_distillation/feedback_used_fraction", 0) for log in logs)
    assert (used > 0) == CONTEXTS[name].get("include_environment_feedback", False)


# dapo is TRL's where a step is one micro-batch.
ONE = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
POLICY = {
    "both": {"distillation_weight": 0.4, "loss_type": "grpo"},
    "both, likeliest": {"distillation_weight": 0.4, "loss_type": "bnpo", **MODES["likeliest"]},
    "both, all, dapo": {"distillation_weight": 0.4, **ONE, **MODES["all"]},
    "policy": {"distillation_weight": 0.0, "loss_type": "dr_grpo"},
    "policy, sequences": {
        **{"distillation_weight": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence"},
        **{"num_iterations": 2, "max_steps": 4, "epsilon": 0.05, "epsilon_high": 0.1},
    },
    "both, two updates": {
        **{"distillation_weight": 0.6, "loss_type": "grpo", "scale_rewards": "batch"},
        **{"num_iterations": 2, "max_steps": 4, "epsilon": 0.05},
    },
}


@pytest.mark.parametrize("name", some(POLICY, ("both", "both, likeliest", "both, two updates")))
def test_the_policys_loss(name, compare):
    logs = compare(**{"rewards": (third, short), "success_reward_threshold": 0.5, **POLICY[name]})
    assert any(log.get("self_distillation/policy_loss") for log in logs)


SETTINGS = {
    "two updates": {"num_iterations": 2, "max_steps": 4, "distillation_is_clip": 1.05},
    "two updates, likeliest": {"num_iterations": 2, "max_steps": 4, **MODES["likeliest"]},
    "two updates, no ratio": {"num_iterations": 2, "distillation_is_clip": None},
    "two updates of one generation": {"steps_per_generation": 4, "max_steps": 4},
    "truncated are masked": {"mask_truncated_completions": True},
    "truncated are masked for both": {
        **{"mask_truncated_completions": True, "distillation_weight": 0.5, "loss_type": "grpo"},
    },
    "nothing to learn": {"success_reward_threshold": 9.0, "distillation_weight": 0.5, "loss_type": "grpo"},
}


@pytest.mark.parametrize("name", some(SETTINGS, ("two updates", "truncated are masked for both", "nothing to learn")))
def test_settings(name, compare):
    compare(**SETTINGS[name])


def test_layouts(main_layout, compare):
    compare(ours={"batch_layout": main_layout}, include_environment_feedback=True)
