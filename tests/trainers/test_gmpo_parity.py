"""GMPOTrainer against TRL 1.16.0's for the same completions: loss, gradient norm and every logged metric."""

import pytest
import trl.experimental.gmpo as trl_gmpo
from peft import LoraConfig

import trl_fast
from support.entropies import no_ties
from support.rollouts import FixedRollout, brevity, color_prompts, vowels
from support.training import assert_same_logs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

# Two updates of the same completions, so that the ratio leaves 1; a large rate, so that it is clipped.
BASE = {
    "num_generations": 4,
    "max_completion_length": 8,
    "temperature": 0.8,
    "max_steps": 3,
    "num_iterations": 2,
    "learning_rate": 5e-3,
}
# The metrics are TRL's to the last digit only if no completion is left out or moved to another micro-batch.
OURS = {"skip_zero_advantages": False, "keep_groups_together": False}


def logs_of(module, output_dir, model_path, tokenizer, peft, with_mask, evaluates, settings):
    arguments = {
        "model": model_path,
        "reward_funcs": [vowels, brevity],
        "train_dataset": color_prompts(),
        "eval_dataset": color_prompts(4),
        "peft_config": LoraConfig(**peft) if peft else None,
        "rollout_func": FixedRollout(tokenizer, with_mask=with_mask),
    }
    trainer = make_trainer(module, output_dir, method="GMPO", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    return [{name: value for name, value in logs.items() if name != "step_time"} for logs in trainer.state.log_history]


@pytest.fixture
def compare(tmp_path, model_path, tokenizer):
    def run(*, peft=None, with_mask=False, evaluates=False, ours=None, **settings):
        settings, how = {**BASE, **settings}, (model_path, tokenizer, peft, with_mask, evaluates)
        expected = logs_of(trl_gmpo, tmp_path / "trl", *how, settings)
        with no_ties(settings):
            got = logs_of(trl_fast, tmp_path / "ours", *how, {**settings, **OURS, **(ours or {})})
        assert_same_logs(got, expected)
        return got

    return run


def test_clipped_means(compare):
    logs = compare(epsilon=0.02, epsilon_high=0.05, evaluates=True, per_device_eval_batch_size=8)
    assert 0 < max(log.get("clip_ratio/region_mean", 0) for log in logs) < 1


def test_what_is_cut_off_and_masked_differs_in_a_constant_of_the_loss(model_path, tokenizer, tmp_path):
    settings, how = (
        {**BASE, "mask_truncated_completions": True, "beta": 0.1},
        (model_path, tokenizer, None, False, False),
    )
    expected = logs_of(trl_gmpo, tmp_path / "trl", *how, settings)
    got = logs_of(trl_fast, tmp_path / "ours", *how, {**settings, **OURS})
    without_losses = [[{k: v for k, v in log.items() if "loss" not in k} for log in logs] for logs in (got, expected)]
    assert expected[0]["completions/clipped_ratio"] > 0 and expected[1]["loss"] != pytest.approx(
        got[1]["loss"], rel=0.1
    )
    assert_same_logs(*without_losses)


SETTINGS = {
    "defaults": {},
    "kl": {"beta": 0.2},
    "high entropy": {"top_entropy_quantile": 0.47, "beta": 0.1},
    "more steps a generation": {"steps_per_generation": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(settings, compare):
    compare(**settings)


@pytest.mark.slow
def test_layouts(layout, compare):
    compare(beta=0.1, with_mask=True, ours={"batch_layout": layout})


@pytest.mark.slow
def test_lora(compare):
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    compare(peft=peft, beta=0.1, learning_rate=1e-2)


def test_config_of_trl_is_taken(tmp_path):
    theirs = trl_gmpo.GMPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", epsilon=0.3)
    ours = trl_fast.GMPOConfig.from_any(theirs)
    assert (ours.loss_type, ours.epsilon, ours.use_bias_correction_kl) == ("gmpo", 0.3, False)
    assert ours.loss_config().loss_type == "gmpo"


def test_settings_of_other_losses_have_no_effect(tmp_path, caplog):
    config = trl_fast.GMPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, loss_type="dapo", importance_sampling_level="sequence", delta=2.0
    )
    assert config.loss_type == "gmpo" and not config.loss_config().has_one_ratio
    for name in ("loss_type='dapo'", "importance_sampling_level='sequence'", "delta=2.0"):
        assert f"{name} has no effect" in caplog.text
