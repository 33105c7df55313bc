"""BCOTrainer against its formulas on a plain forward; TRL 1.16 has it no more, TRL 1.13 gave the same logs by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_fast
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer
from trl_fast.data.unpaired_preference import PROMPT_WEIGHT
from trl_fast.trainers.base.running_mean import Mean, RunningMean

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def build(model_path, tmp_path):
    def build(arguments=None, *, folder="run", **settings):
        given = {"model": model_path, "train_dataset": color_labels(16), **(arguments or {})}
        return make_trainer(trl_fast, tmp_path / folder, method="BCO", arguments=given, **{"beta": 0.4, **settings})

    return build


def dense(model, entries):
    """Returns log π of each row's completion, and the mean logit of each scored position, from all logits."""
    logits = model(input_ids=entries["input_ids"], attention_mask=entries["attention_mask"]).logits[:, :-1]
    marked = entries["completion_mask"][:, 1:].bool()
    logprobs = logits.log_softmax(-1).gather(2, entries["input_ids"][:, 1:, None])[..., 0]
    return (logprobs * marked).sum(1), logits.mean(-1), marked


class Watched(trl_fast.BCOTrainer):
    """Computes every micro-batch's loss, gradient and numbers once more, from padded rows and all logits."""

    def _compute_loss(self, model, inputs, return_outputs):
        entries, before = inputs.copy(), (self.running.mean, self.running.count)
        logprobs, mean_logits, marked = dense(model, entries)
        with torch.no_grad():
            reference = dense(self.ref_model, entries)[0]
        rewards, good = 0.4 * (logprobs - reference), entries["label"]
        mean, count = before
        if model.training:
            mean, count = (mean * count + rewards.sum().item()) / (count + len(good)), count + len(good)
        losses = torch.where(good, -F.logsigmoid(rewards - mean), -F.logsigmoid(mean - rewards))
        expected = (losses * entries.get(PROMPT_WEIGHT, 1)).mean()
        loss = super()._compute_loss(model, inputs, return_outputs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert (self.running.mean, self.running.count) == pytest.approx((mean, count), rel=1e-4, abs=1e-6)
        if model.training:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            ours, theirs = (torch.autograd.grad(each, weights, retain_graph=True) for each in (loss, expected))
            one, other = (torch.cat([each.flatten() for each in grads]) for grads in (ours, theirs))
            assert (one - other).norm() < 1e-4 * other.norm()
            self.seen.append((rewards.detach(), logprobs.detach(), mean_logits.detach(), marked, good, mean))
        return loss


@pytest.mark.parametrize("settings", [{}, pytest.param({"max_length": 12}, marks=pytest.mark.slow)])
def test_every_number_is_that_of_all_logits(settings, main_layout, model_path, tmp_path):
    config = trl_fast.BCOConfig(
        str(tmp_path),
        **CPU,
        **settings,
        beta=0.4,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        batch_layout=main_layout,
        gradient_checkpointing=False,
    )
    ref_model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
    ref_model.model.norm.weight.data.mul_(1.6)
    rows = {"train_dataset": color_labels(16), "eval_dataset": color_labels(5)}
    trainer = Watched(model_path, ref_model, config, **rows)
    trainer.seen = []
    trainer.train()
    trainer.evaluate()
    for step, log in enumerate(trainer.state.log_history[:2]):
        parts = trainer.seen[2 * step : 2 * step + 2]
        rewards, logprobs, good = (torch.cat([part[number] for part in parts]) for number in (0, 1, 4))
        logits = torch.cat([part[2][part[4]][part[3][part[4]]] for part in parts])
        expected = {"delta": (parts[0][5] + parts[1][5]) / 2, "logits/chosen": logits.mean().item()}
        for side, rows_of in (("chosen", good), ("rejected", ~good)):
            if rows_of.any():
                expected[f"rewards/{side}"] = rewards[rows_of].mean().item()
                expected[f"logps/{side}"] = logprobs[rows_of].mean().item()
        expected["rewards/margins"] = expected["rewards/chosen"] - expected["rewards/rejected"]
        for name, value in expected.items():
            assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    order = [f"{name}/{side}" for side in ("chosen", "rejected") for name in ("rewards", "logps", "logits")]
    names = [name for name in trainer.state.log_history[0] if "/" in name or name == "delta"]
    assert names == [*order, "rewards/margins", "delta"]


def embed(input_ids, attention_mask):
    """Counts the odd tokens of each text, and all."""
    return torch.stack([(input_ids % 2 * attention_mask).sum(1), attention_mask.sum(1)], 1).float()


def test_weights_of_prompts(build, tokenizer):
    arguments = {"embedding_func": embed, "embedding_tokenizer": tokenizer, "eval_dataset": color_labels(6)}
    trainer = build(arguments, max_steps=1, min_density_ratio=0.9, max_density_ratio=1.1)
    weights, labels = trainer.train_dataset[PROMPT_WEIGHT], trainer.train_dataset["label"]
    assert {weight for weight, good in zip(weights, labels, strict=True) if good} == {1.0}
    bad = [weight for weight, good in zip(weights, labels, strict=True) if not good]
    assert all(0.9 <= weight <= 1.1 for weight in bad) and len(set(bad)) > 1
    assert trainer.match_underlying_distribution and PROMPT_WEIGHT in trainer.eval_dataset.column_names
    # Rows 4 to 7 are bad.
    batch = list(trainer.get_train_dataloader())[1]
    weighed = trainer.compute_loss(trainer.model, batch)
    batch[PROMPT_WEIGHT] = batch[PROMPT_WEIGHT] * 2
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), weighed * 2, rtol=1e-4, atol=1e-6)
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(color_labels(6))["eval_loss"] == before


def test_weights_of_prompts_that_are_messages(build, tokenizer):
    rows = color_labels(8).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
    arguments = {"embedding_func": embed, "embedding_tokenizer": tokenizer, "train_dataset": rows}
    assert len(set(build(arguments).train_dataset[PROMPT_WEIGHT])) > 1


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole model", "LoRA"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(peft, build, tmp_path):
    class PullThePlug(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def run(folder, *callbacks, **settings):
        arguments = {"peft_config": LoraConfig(**LORA)} if peft else {}
        shared = {"max_steps": 4, "gradient_accumulation_steps": 1}
        return build({**arguments, "callbacks": [*callbacks]}, folder=folder, **shared, **settings)

    whole = run("whole", precompute_ref_log_probs=True)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": True}
    with pytest.raises(KeyboardInterrupt):
        run("run", PullThePlug(), **saving).train()
    kept = json.loads((tmp_path / "run/checkpoint-2/running.json").read_text())
    assert kept["count"] == 8 and kept["mean"] != 0
    resumed = run("run", **saving)
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [dict(sorted(log.items())) for log in each.state.log_history if "loss" in log] for each in (resumed, whole)
    ]
    assert_same_logs(*logs, rel=1e-6, abs=1e-7)
    assert resumed.running.mean == whole.running.mean


def test_pairs_become_rows_and_evaluation_counts_nothing(build):
    trainer = build({"train_dataset": color_pairs(6), "eval_dataset": color_labels(5)}, max_steps=1)
    assert len(trainer.train_dataset) == 12
    trainer.evaluate()
    assert {"eval_delta", "eval_rewards/margins"} <= {name for log in trainer.state.log_history for name in log}
    assert trainer.running.count == 0
    trainer.train()
    assert trainer.running.count == 8


def test_the_mean_of_numbers_that_come_in_parts():
    values = torch.tensor([1.0, 5.0, torch.nan, -2.0, 8.0])
    mean = Mean(torch.zeros(()), torch.zeros(()))
    for part in values.split([2, 1, 2]):
        mean = mean.with_values(part)
    assert mean.mean.item() == pytest.approx(3.0) and mean.count.item() == 4


def test_a_checkpoint_without_the_mean_says_so(tmp_path, caplog):
    RunningMean().load_from_checkpoint(tmp_path)
    assert "the mean of rewards begins anew" in caplog.text
    (tmp_path / "running.json").write_text(json.dumps({"mean": 0.5, "std": 1.0, "var": 1.0, "count": 12}))
    running = RunningMean()
    running.load_from_checkpoint(tmp_path)
    assert (running.mean, running.count) == (0.5, 12)


def test_bad_arguments_are_named(build, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="embedding_tokenizer is missing"):
        build({"embedding_func": embed})
    with pytest.raises(ValueError, match="model_init: .*give model=model_init"):
        build({"model_init": lambda: None})
    both = {"embedding_func": embed, "embedding_tokenizer": tokenizer}
    with pytest.raises(ValueError, match="embedding_func: the train dataset is a stream"):
        build({**both, "train_dataset": color_labels(8).to_iterable_dataset()})
    with pytest.raises(ValueError, match="embedding_func: all 3 rows of the train dataset have the label True"):
        build({**both, "train_dataset": color_labels(3)})
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7], "label": good} for good in (True, False)]
    with pytest.raises(ValueError, match="embedding_func: the train dataset has no column 'prompt'"):
        build({**both, "train_dataset": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match="min_density_ratio=3.0 is above max_density_ratio=2.0"):
        trl_fast.BCOConfig(str(tmp_path), **CPU, min_density_ratio=3.0, max_density_ratio=2.0)
    with pytest.raises(ValueError, match="prompt_sample_size: .* got 0"):
        trl_fast.BCOConfig(str(tmp_path), **CPU, prompt_sample_size=0)
    with pytest.raises(ValueError, match="The train dataset has the columns.*but no 'label'"):
        build({"train_dataset": Dataset.from_list([{"prompt": "a", "completion": "b"}])})


def test_labels_that_are_all_the_same_are_a_warning_and_it_trains(build, caplog):
    rows = [{**row, "label": True} for row in color_labels(8)]
    trainer = build({"train_dataset": Dataset.from_list(rows)}, max_steps=1)
    assert "all 8 labels are True" in caplog.text
    trainer.train()
    log = trainer.state.log_history[0]
    assert "rewards/chosen" in log and "rewards/rejected" not in log and "rewards/margins" not in log
