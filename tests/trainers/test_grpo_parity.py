"""GRPOTrainer against TRL 1.16.0's for the same completions: loss, gradient norm and every logged metric."""

from types import SimpleNamespace

import pytest
import trl
from peft import LoraConfig

import trl_fast
import trl_fast.data.packing as packing
import trl_fast.rollout.vllm_engine as vllm_engine
import trl_fast.trainers.online.policy_step as policy_step
from support.entropies import no_ties
from support.rollouts import FixedEngine, FixedRollout, brevity, color_prompts, vowels
from support.training import assert_same_logs, make_trainer
from trl_fast.losses.policy_gradient import LOSSES

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

# The metrics are TRL's to the last digit only if no completion is left out or moved to another micro-batch.
BASE = {
    "num_generations": 4,
    "max_completion_length": 8,
    "temperature": 0.8,
    "skip_zero_advantages": False,
    "keep_groups_together": False,
}
OURS = {"skip_zero_advantages", "keep_groups_together", "batch_layout"}


def logs_of(module, output_dir, model_path, tokenizer, evaluates, rollout, peft, settings):
    arguments = {
        "model": model_path,
        "reward_funcs": [vowels, brevity],
        "train_dataset": color_prompts(),
        "eval_dataset": color_prompts(4),
        "peft_config": LoraConfig(**peft) if peft else None,
        "rollout_func": FixedRollout(tokenizer, **rollout),
    }
    trainer = make_trainer(module, output_dir, method="GRPO", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    return [{name: value for name, value in logs.items() if name != "step_time"} for logs in trainer.state.log_history]


def compare(tmp_path, model_path, tokenizer, *, evaluates=False, with_mask=False, ends=0.7, peft=None, **settings):
    settings = {**BASE, "max_steps": 2, **settings}
    how = (model_path, tokenizer, evaluates, {"with_mask": with_mask, "ends": ends}, peft)
    theirs = {name: value for name, value in settings.items() if name not in OURS}
    expected = logs_of(trl, tmp_path / "trl", *how, theirs)
    with no_ties(settings):
        logs = logs_of(trl_fast, tmp_path / "ours", *how, settings)
    assert_same_logs(logs, expected)


# TRL has the others in a trainer of their own.
OF_GRPO = [name for name in LOSSES if name != "gmpo"]
CASES = [
    *((name, "token") for name in OF_GRPO),
    ("grpo", "sequence"),
    *(pytest.param(name, "sequence", marks=pytest.mark.slow) for name in OF_GRPO if name != "grpo"),
]


@pytest.mark.parametrize(("name", "level"), CASES)
def test_every_loss_type(name, level, model_path, tokenizer, tmp_path):
    # Two updates of the same completions, so that the ratio leaves 1; a large rate, so that it is clipped.
    settings = {"loss_type": name, "importance_sampling_level": level, "num_iterations": 2, "learning_rate": 5e-3}
    compare(tmp_path, model_path, tokenizer, max_steps=3, **settings)


SETTINGS = {
    "kl": {"beta": 0.2, "num_iterations": 2, "learning_rate": 5e-3},
    "kl, biased": {"beta": 0.2, "use_bias_correction_kl": False},
    "kl of sequences": {"beta": 0.2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    "two bounds": {"epsilon": 0.05, "epsilon_high": 0.3, "delta": 1.2, "num_iterations": 2, "learning_rate": 5e-3},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": "none"},
    "normalize then sum": {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.5, 2.0]},
    "truncated are masked": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "high entropy": {"top_entropy_quantile": 0.47},
    "highest entropy": {"top_entropy_quantile": 0.0},
    "entropy bonus": {"entropy_coef": 0.3, "loss_type": "bnpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1},
    "entropy bonus of high entropy": {"entropy_coef": 0.3, "top_entropy_quantile": 0.44},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "learning_rate": 5e-3},
    "more steps a generation": {"steps_per_generation": 4},
    "fewer steps a generation": {"steps_per_generation": 1},
    "synced reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "float32 head": {"cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, model_path, tokenizer, tmp_path):
    compare(tmp_path, model_path, tokenizer, **settings)


def test_layouts(layout, model_path, tokenizer, tmp_path):
    compare(tmp_path, model_path, tokenizer, beta=0.1, batch_layout=layout, num_iterations=2, learning_rate=5e-3)


def test_tokens_of_an_environment_do_not_count(main_layout, model_path, tokenizer, tmp_path):
    compare(tmp_path, model_path, tokenizer, with_mask=True, batch_layout=main_layout, loss_type="grpo")


def test_tokens_of_an_environment_have_no_say_in_what_high_entropy_is(model_path, tokenizer, tmp_path):
    settings = {"top_entropy_quantile": 0.48, "entropy_coef": 0.3}
    compare(tmp_path, model_path, tokenizer, with_mask=True, **settings)


def test_micro_batches_without_a_token_that_counts(model_path, tokenizer, tmp_path):
    settings = {"top_entropy_quantile": 0.4, "mask_truncated_completions": True, "entropy_coef": 0.3}
    compare(tmp_path, model_path, tokenizer, ends=0.1, max_steps=3, **settings)


def test_lora(main_layout, model_path, tokenizer, tmp_path):
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    compare(tmp_path, model_path, tokenizer, peft=peft, beta=0.1, batch_layout=main_layout, learning_rate=1e-2)


def test_evaluation(main_layout, model_path, tokenizer, tmp_path):
    compare(tmp_path, model_path, tokenizer, evaluates=True, batch_layout=main_layout, per_device_eval_batch_size=8)


def letters(completions, **_):
    """The same for every completion of most prompts, so that most have no advantage."""
    return [float(text.count("e") > 1) for text in completions]


ALONE = [pytest.param(name, marks=pytest.mark.slow) for name in ("dr_grpo", "cispo", "sapo", "luspo")]


@pytest.mark.parametrize("name", ["dapo", "grpo", *ALONE])
def test_what_is_left_out_and_moved_changes_nothing(name, model_path, tokenizer, tmp_path, monkeypatch):
    """Loss, gradient norm and all metrics of generations are TRL's with completions grouped and left out."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    scored, logs, score = [], {}, policy_step.score
    monkeypatch.setattr(
        policy_step,
        "score",
        lambda model, batch, **options: scored.append(len(batch)) or score(model, batch, **options),
    )
    for module in (trl, trl_fast):
        arguments = {
            "model": model_path,
            "reward_funcs": letters,
            "train_dataset": color_prompts(),
            "rollout_func": FixedRollout(tokenizer),
        }
        settings = {"num_generations": 4, "max_completion_length": 8, "loss_type": name}
        trainer = make_trainer(module, tmp_path / module.__name__, method="GRPO", arguments=arguments, **settings)
        trainer.train()
        logs[module] = trainer.state.log_history
    assert sum(scored) < 3 * 8 and min(scored) >= 1
    for ours, theirs in zip(logs[trl_fast], logs[trl], strict=True):
        for metric in {"loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std"} & theirs.keys():
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric


CORRECTIONS = {
    "sequence mask": {},
    "sequence truncate": {"vllm_importance_sampling_mode": "sequence_truncate"},
    "token mask": {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.01},
    "token truncate": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 0.02},
    "vespo": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
}


@pytest.mark.parametrize("settings", CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_correction_for_the_engine_that_sampled(settings, model_path, tokenizer, tmp_path, monkeypatch):
    """TRL is told that vLLM sampled; its trainer cannot be built with vLLM where that is not installed."""
    monkeypatch.setattr(vllm_engine, "make_vllm_engine", lambda *_: FixedEngine(tokenizer))
    logs = []
    for module in (trl, trl_fast):
        arguments = {
            "model": model_path,
            "reward_funcs": [vowels, brevity],
            "train_dataset": color_prompts(),
            "rollout_func": FixedRollout(tokenizer, with_mask=True),
        }
        ours = {"use_vllm": True} if module is trl_fast else {}
        given = {name: value for name, value in BASE.items() if module is trl_fast or name not in OURS}
        trainer = make_trainer(
            module, tmp_path / module.__name__, method="GRPO", arguments=arguments, **given, **settings, **ours
        )
        if module is trl:
            trainer.use_vllm, trainer._last_loaded_step = True, -1
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer.train()
        logs.append(
            [{name: value for name, value in log.items() if name != "step_time"} for log in trainer.state.log_history]
        )
    assert_same_logs(logs[1], logs[0])
