"""SDFTTrainer against TRL 1.16.0's: loss, gradient norm and every logged metric."""

import pytest
import trl.experimental.sdft as trl_sdft
from peft import LoraConfig

import trl_fast
from support.rollouts import FixedEngine, FixedRollout
from support.told_prompts import told_chats, told_prompts
from support.training import assert_same_logs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

# Adam's first steps go as far for a gradient of rounding as for any.
BASE = {"max_completion_length": 8, "max_steps": 3, "num_generations": 2, "distillation_topk": 7}
BASE |= {"optim": "sgd", "learning_rate": 0.5}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logs_of(module, folder, arguments, settings, evaluates):
    trainer = make_trainer(module, folder, method="SDFT", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    return trainer.state.log_history


@pytest.fixture
def compare(tmp_path, model_path, tokenizer, monkeypatch):
    def run(*, peft=None, evaluates=False, ours=None, rows=told_prompts, **settings):
        settings = {**BASE, **settings}
        rollout = FixedRollout(tokenizer)
        fixed = lambda trainer, ids: (ids, rollout.completions(ids))  # noqa: E731
        monkeypatch.setattr(trl_sdft.SDFTTrainer, "_generate_transformers", fixed)

        def arguments():
            adapter = {"peft_config": LoraConfig(**peft)} if peft else {}
            return {"model": model_path, "train_dataset": rows(), "eval_dataset": rows(4), **adapter}

        expected = logs_of(trl_sdft, tmp_path / "trl", arguments(), settings, evaluates)
        given = {**arguments(), "rollout_engine": FixedEngine(tokenizer)}
        got = logs_of(trl_fast, tmp_path / "ours", given, {**settings, **(ours or {})}, evaluates)
        own = {"num_tokens", "eval_num_tokens", "step_time"}
        assert_same_logs([{name: value for name, value in logs.items() if name not in own} for logs in got], expected)
        assert abs(got[0]["loss"]) > 1e-4 and got[0]["grad_norm"] > 1e-4
        return got

    return run


MODES = {
    "likeliest": {},
    "likeliest and a tail": {"distillation_add_tail": True, "distillation_alpha": 0.3},
    "likeliest, forward": {"distillation_alpha": 0.0, "distillation_add_tail": True},
    "likeliest, reverse": {"distillation_alpha": 1.0},
    "all": {"distillation_mode": "full_logits"},
    "all, forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "all, reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "temperature": 0.7},
    "sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
}
QUICK = ("likeliest", "likeliest and a tail", "all", "sampled")


def some(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(MODES, QUICK))
def test_what_is_compared(name, compare):
    compare(**MODES[name], evaluates=name == "likeliest")


KINDS = {
    "live": {"teacher_model_kind": "live"},
    "ema": {"teacher_model_kind": "ema", "teacher_update_rate": 0.3},
    "ema, sampled": {"teacher_model_kind": "ema", "teacher_sync_steps": 2, **MODES["sampled"]},
    "lora": {"peft": LORA},
    "lora, live": {"peft": LORA, "teacher_model_kind": "live", **MODES["sampled"]},
    "lora, ema": {"peft": LORA, "teacher_model_kind": "ema", "teacher_update_rate": 0.5},
    "lora, ema, all": {"peft": LORA, "teacher_model_kind": "ema", "distillation_mode": "full_logits"},
}


@pytest.mark.parametrize("name", some(KINDS, ("ema", "lora", "lora, ema")))
def test_teachers(name, compare):
    compare(**KINDS[name])


SETTINGS = {
    "two updates": {"num_iterations": 2, "max_steps": 4, "distillation_is_clip": 1.1},
    "two updates, sampled": {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.1, **MODES["sampled"]},
    "two updates, all": {"num_iterations": 2, "max_steps": 4, **MODES["all"]},
    "two updates, no ratio": {"num_iterations": 2, "distillation_is_clip": None},
    "two updates of one generation": {"steps_per_generation": 4, "max_steps": 4},
    "one micro-batch": {"gradient_accumulation_steps": 1, "num_generations": 4},
    "first tokens left out": {"num_loss_tokens_to_skip": 3},
    "sampled after the teacher's prompts": {"generate_from_teacher": True, "num_iterations": 2},
    "cut prompts": {"max_prompt_length": 9},
    "conversations": {"rows": told_chats, "evaluates": True, "num_generations_eval": 4},
    "template": {
        "rows": told_chats,
        "teacher_prompt_template": "Know {privileged_context}. {prompt}",
        "temperature": 1.6,
    },
}


@pytest.mark.parametrize("name", some(SETTINGS, ("two updates", "first tokens left out", "conversations")))
def test_settings(name, compare):
    compare(**SETTINGS[name])


def test_layouts(main_layout, compare):
    compare(ours={"batch_layout": main_layout}, num_generations=4)
