"""ServerDistillationTrainer against TRL 1.16.0's: loss, gradient norm and every logged metric, of one server."""

import pytest
import trl
import trl.experimental.server_distillation as trl_server
import trl.generation.vllm_client
from peft import LoraConfig

import trl_fast
from support.rollouts import FixedRollout, color_prompts
from support.teacher_server import teacher_server
from support.training import assert_same_logs, make_trainer

pytestmark = pytest.mark.usefixtures("unnamed_datasets")

# Adam's first steps go as far for a gradient of rounding as for any.
BASE = {"max_completion_length": 8, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "logging_steps": 1}


@pytest.fixture(scope="module")
def server(teacher_path):
    with teacher_server(teacher_path) as served:
        yield served


def logs_of(module, folder, arguments, settings, evaluates):
    trainer = make_trainer(module, folder, method="ServerDistillation", arguments=arguments, **settings)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    own = ("step_time", "entropy", "eval_entropy")
    return [{name: value for name, value in logs.items() if name not in own} for logs in trainer.state.log_history]


@pytest.fixture
def compare(tmp_path, model_path, server, tokenizer, monkeypatch):
    def run(*, peft=None, evaluates=False, ours=None, **settings):
        settings = {**BASE, "teacher_model_server_url": server.url, **settings}
        rollout = FixedRollout(tokenizer)
        fixed = lambda trainer, ids, *_, **__: rollout.completions(ids)  # noqa: E731
        monkeypatch.setattr(trl.DistillationTrainer, "_generate_single_turn", fixed)
        monkeypatch.setattr(trl.generation.vllm_client, "is_vllm_available", lambda: True)

        def arguments():
            adapter = {"peft_config": LoraConfig(**peft)} if peft else {}
            return {"model": model_path, "train_dataset": color_prompts(), "eval_dataset": color_prompts(4), **adapter}

        expected = logs_of(trl_server, tmp_path / "trl", arguments(), settings, evaluates)
        given = {**arguments(), "rollout_func": FixedRollout(tokenizer)}
        got = logs_of(trl_fast, tmp_path / "ours", given, {**settings, **(ours or {})}, evaluates)
        assert_same_logs(got, expected)
        assert got[0]["loss"] > 1e-4 and got[0]["grad_norm"] > 1e-3

    return run


DIVERGENCES = {
    "forward": {"beta": 0.0},
    "forward, several": {"beta": 0.0, "loss_top_k": 7},
    "forward, several without others": {"beta": 0.0, "loss_top_k": 7, "loss_add_tail": False},
    "mixed": {"beta": 0.3},
    "mixed without others": {"beta": 0.5, "loss_add_tail": False},
    "reverse": {"beta": 1.0},
}
QUICK = ("forward, several without others", "mixed", "reverse")


def some(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(DIVERGENCES, QUICK))
def test_every_divergence(name, compare):
    compare(**DIVERGENCES[name], evaluates=name == "mixed")


SETTINGS = {
    "one micro-batch": {"gradient_accumulation_steps": 1, "max_steps": 3},
    "four of them": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.5},
    "warm": {"temperature": 1.7, "beta": 0.3},
    "in order": {"shuffle_dataset": False, "beta": 0.0, "loss_top_k": 3},
}


@pytest.mark.parametrize("name", some(SETTINGS, ("four of them",)))
def test_settings(name, compare):
    compare(**SETTINGS[name])


@pytest.mark.slow
def test_layouts(main_layout, compare):
    compare(ours={"batch_layout": main_layout}, beta=0.5)


@pytest.mark.slow
def test_lora(compare):
    compare(peft={"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}, evaluates=True)
