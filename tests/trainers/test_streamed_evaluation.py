"""Evaluation sets that are streams, beside train sets that are not: the metrics of a dataset of the same rows."""

import random

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import brevity, color_prompts
from support.supervised import sft_rows
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer
from trl_fast.rollout import Rollout


class Scripted:
    """An engine whose completions depend on the prompt, and where in its batch it stands, alone."""

    def sync_weights(self, model, step):
        pass

    def generate(self, prompt_ids, settings):
        return Rollout(prompt_ids, [self._complete(prompt, place) for place, prompt in enumerate(prompt_ids)])

    def _complete(self, prompt, place):
        rng = random.Random(f"{prompt} {place}")
        return [rng.randrange(6, 300) for _ in range(rng.randint(1, 7))] + [1]


ONLINE = {"num_generations": 2, "max_completion_length": 8}
# Rows, settings.
CASES = {
    "SFT": (lambda count: sft_rows("prompt and completion", count), {}),
    "DPO": (color_pairs, {}),
    "KTO": (color_labels, {}),
    "Reward": (color_pairs, {}),
    "GRPO": (color_prompts, {**ONLINE, "beta": 0.1}),
    "RLOO": (color_prompts, ONLINE),
    "PPO": (color_prompts, {"response_length": 8, "num_sample_generations": 0}),
}


def make(method, paths, folder, *, count=5, arguments=None, **settings):
    """A trainer with `count` rows to evaluate, as a dataset and as a stream of two files."""
    make_rows, options = CASES[method]
    rows = make_rows(count)
    streamed = rows.to_iterable_dataset(num_shards=2)
    given = {
        "model": paths["reward" if method == "Reward" else "model"],
        "train_dataset": make_rows(8),
        "eval_dataset": {"rows": rows, "stream": streamed},
        **(arguments or {}),
    }
    if make_rows is color_prompts:
        given["rollout_engine"] = Scripted()
        given |= {"reward_funcs": brevity} if method != "PPO" else {}
    if method == "PPO":
        given["model"] = AutoModelForCausalLM.from_pretrained(paths["model"])
        given["processing_class"] = AutoTokenizer.from_pretrained(paths["model"])
        for name in ("reward_model", "value_model"):
            given[name] = AutoModelForSequenceClassification.from_pretrained(paths["reward"])
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 1}
    return make_trainer(
        trl_fast, folder, method=method, arguments=given, **{**sizes, "max_steps": 1, **options, **settings}
    )


def metrics(trainer):
    """Returns the results of an evaluation of the dataset and of the stream."""
    parts, found = trainer.eval_dataset, []
    for trainer.eval_dataset in parts.values():
        found.append(trainer.evaluate())
        assert found[-1]["eval_samples_per_second"] > 0
    trainer.eval_dataset = parts
    return found


@pytest.fixture(scope="module")
def paths(model_path, reward_model_path):
    return {"model": model_path, "reward": reward_model_path}


@pytest.mark.parametrize("method", CASES)
def test_metrics_are_those_of_a_dataset(method, paths, tmp_path):
    trainer = make(method, paths, tmp_path, learning_rate=1e-2)
    trainer.train()
    rows, streamed = metrics(trainer)
    assert len(rows) > 7
    assert_same_logs([streamed], [rows], rel=0, abs=0)


def test_other_ways_of_giving_it(paths, tmp_path):
    def largest(prediction):
        return {"largest": float(prediction.predictions.max()), "count": len(prediction.predictions)}

    settings = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = make(
        "SFT", paths, tmp_path, arguments={"compute_metrics": largest}, dataloader_num_workers=2, **settings
    )
    trainer.train()
    rows, streamed = metrics(trainer)
    assert rows["eval_count"] == 5
    assert_same_logs([streamed], [rows], rel=0, abs=0)
    again = trainer.evaluate(sft_rows("prompt and completion", 5).to_iterable_dataset())
    assert again["eval_loss"] == rows["eval_loss"]
    predicted = [trainer.predict(dataset).metrics["test_loss"] for dataset in trainer.eval_dataset.values()]
    assert predicted == [rows["eval_loss"]] * 2
    # In the course of training, too.
    during = [log for log in trainer.state.log_history if "eval_rows_loss" in log or "eval_stream_loss" in log]
    assert [log.get("eval_rows_loss", log.get("eval_stream_loss")) for log in during] == [rows["eval_loss"]] * 2


def test_completions_of_a_stream_are_shown(paths, tmp_path, capsys):
    trainer = make("PPO", paths, tmp_path)
    trainer.eval_dataset = trainer.eval_dataset["stream"]
    trainer.generate_completions()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(prompt.split()[-1] in shown for prompt in color_prompts(5)["prompt"])


def test_dispatching_is_not_done_and_said(paths, tmp_path, caplog):
    trainer = make("SFT", paths, tmp_path, accelerator_config={"dispatch_batches": True})
    assert "accelerator_config: dispatch_batches=True has no effect" in caplog.text
    trainer.train()


@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_with_precomputed_references_it_is_named(method, paths, tmp_path):
    rows = CASES[method][0](4)
    remedy = (
        r" is a stream \(IterableDataset\), but precompute_ref_log_probs=True keeps the reference's log-probs beside "
        r"the rows; give a datasets.Dataset, or set precompute_ref_log_probs=False"
    )
    with pytest.raises(ValueError, match=r"eval_dataset\['stream'\]" + remedy):
        make(method, paths, tmp_path, precompute_ref_log_probs=True)
    for name in ("train_dataset", "eval_dataset"):
        given = {"eval_dataset": rows, name: rows.to_iterable_dataset()}
        with pytest.raises(ValueError, match=name + remedy):
            make(method, paths, tmp_path, arguments=given, precompute_ref_log_probs=True)
    trainer = make(method, paths, tmp_path, arguments={"eval_dataset": rows}, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="eval_dataset" + remedy):
        trainer.evaluate(rows.to_iterable_dataset())


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_two_processes(method, paths, tmp_path):
    """Of seven rows the last process gets none in the end, and repeats."""

    def two():
        return metrics(make(method, paths, tmp_path, per_device_train_batch_size=2, count=7, ddp_backend="gloo"))

    for rows, streamed in run_on_ranks(two):
        assert_same_logs([streamed], [rows], rel=0, abs=0)
