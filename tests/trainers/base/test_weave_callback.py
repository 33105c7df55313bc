"""WeaveCallback against TRL 1.16.0's, on a stand-in of weave with the documented interface."""

import logging
import sys
from types import SimpleNamespace

import pytest
import trl.trainer.callbacks
from datasets import Dataset
from transformers import GenerationConfig

import trl_fast
from support.training import color_pairs, make_trainer
from support.weave import EvaluationLogger, install_weave
from trl_fast.trainers import WeaveCallback

GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False)
TRL_CALLBACKS = trl.trainer.callbacks


def length(prompt, completion):
    return len(completion)


def fails_on_some(prompt, completion):
    if prompt.endswith("1?"):
        raise RuntimeError("no idea")
    return 1.0


def failing(prompt, completion):
    raise RuntimeError("no idea")


def trainer_of(model_path, folder, **settings):
    arguments = {"model": model_path, "train_dataset": color_pairs(), "eval_dataset": color_pairs(3)}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "max_steps": 2, **settings}
    return make_trainer(trl_fast, folder, arguments=arguments, **settings)


def trls(monkeypatch, weave):
    """TRL's callback, which looks for weave when it is imported."""
    monkeypatch.setattr(TRL_CALLBACKS, "is_weave_available", lambda: True)
    context = sys.modules["weave.trace.context"].weave_client_context
    for name, value in {"weave": weave, "EvaluationLogger": EvaluationLogger, "weave_client_context": context}.items():
        monkeypatch.setattr(TRL_CALLBACKS, name, value, raising=False)
    return trl.trainer.callbacks.WeaveCallback


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_prompts": 2, "dataset_name": "colors", "model_name": "tiny"},
        {"scorers": {"length": length, "sure": fails_on_some}},
        {"scorers": {"none": failing}},
    ],
    ids=["predictions", "names", "scores", "no scores"],
)
def test_what_is_logged_is_trls(options, model_path, tmp_path, monkeypatch, caplog):
    weave = install_weave(monkeypatch)
    trainer = trainer_of(model_path, tmp_path)
    for make in (WeaveCallback, trls(monkeypatch, weave)):
        trainer.add_callback(make(trainer, "team/colors", generation_config=GREEDY, **options))
    with caplog.at_level(logging.WARNING, "trl_fast"):
        trainer.train()
    # One client serves both, and both log at each of two evaluations.
    assert weave.projects == ["team/colors"]
    ours, theirs = EvaluationLogger.made[::2], EvaluationLogger.made[1::2]
    assert [each.eval_attributes["training_step"] for each in ours] == [1, 2]
    assert [each.written() for each in ours] == [each.written() for each in theirs]
    assert all(each.is_finished for each in ours) and len(ours[0].predictions) == options.get("num_prompts", 3)
    failed = options.get("scorers", {}).keys() - {"length"}
    assert ("failed: no idea" in caplog.text) == bool(failed)
    if "length" in options.get("scorers", {}):
        assert ours[0].summary.keys() >= {"total_predictions", "successful_predictions", "avg_length", "avg_sure"}
        assert "sure" not in ours[0].predictions[1].scores


def evaluate(callback, step):
    args, state = SimpleNamespace(per_device_eval_batch_size=2), SimpleNamespace(global_step=step)
    callback.on_evaluate(args, state, None, processing_class=callback.trainer.processing_class)


def test_an_evaluation_is_logged_once_a_step_and_a_client_is_kept(model_path, tmp_path, monkeypatch):
    weave = install_weave(monkeypatch, client=object())
    callback = WeaveCallback(trainer_of(model_path, tmp_path), generation_config=GREEDY)
    for step in (3, 3, 4):
        evaluate(callback, step)
    assert weave.projects == [] and len(EvaluationLogger.made) == 2
    assert callback.model_name == model_path and not callback.is_evaluation_mode
    monkeypatch.setattr(callback.trainer.accelerator.state, "_shared_state", {})
    monkeypatch.setattr(type(callback.trainer.accelerator), "is_main_process", False)
    evaluate(callback, 5)
    assert len(EvaluationLogger.made) == 2


def test_a_prediction_that_cannot_be_logged_leaves_the_others(model_path, tmp_path, monkeypatch, caplog):
    install_weave(monkeypatch, client=object())
    callback = WeaveCallback(trainer_of(model_path, tmp_path), scorers={"length": length}, generation_config=GREEDY)
    log = EvaluationLogger.log_prediction

    def broken(self, inputs, output):
        if inputs["prompt"].endswith("1?"):
            raise ConnectionError("lost")
        return log(self, inputs, output)

    monkeypatch.setattr(EvaluationLogger, "log_prediction", broken)
    evaluate(callback, 1)
    (made,) = EvaluationLogger.made
    assert made.summary["successful_predictions"] == 2 and made.summary["total_predictions"] == 3
    assert "a prediction was not logged: lost" in caplog.text


def test_the_project_is_that_of_the_wandb_run(model_path, tmp_path, monkeypatch):
    weave = install_weave(monkeypatch)
    wandb = SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("trl_fast.trainers.base.weave_callback.is_wandb_available", lambda: True)
    trainer = trainer_of(model_path, tmp_path)
    callback = WeaveCallback(trainer)
    with pytest.raises(ValueError, match=r"nothing names the project; give project_name, call weave.init"):
        callback.on_train_begin(None, None, None)
    wandb.run = SimpleNamespace(entity="team", project="colors")
    WeaveCallback(trainer).on_train_begin(None, None, None)
    assert weave.projects == ["team/colors"]


def test_without_weave_nothing_is_logged_and_it_is_said_once(model_path, tmp_path, caplog):
    callback = WeaveCallback(trainer_of(model_path, tmp_path))
    with caplog.at_level(logging.WARNING, "trl_fast"):
        callback.on_train_begin(None, None, None)
        evaluate(callback, 1)
    assert caplog.text.count("weave is not installed: `pip install weave`") == 1


def test_it_needs_prompts():
    trainer = SimpleNamespace(eval_dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="WeaveCallback needs a trainer whose eval_dataset .*'prompt'"):
        WeaveCallback(trainer)
