"""Subclasses of TRL 1.16.0's trainers, as users write them, do the same here, number for number."""

import logging

import pytest
import torch
import transformers
import trl
from torch.utils.data import RandomSampler
from trl.trainer import dpo_trainer, kto_trainer

import trl_fast
from support.supervised import sft_rows
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer

ROWS = {
    "SFT": lambda: sft_rows("prompt and completion", 12),
    "DPO": lambda: color_pairs(12),
    "KTO": lambda: color_labels(12),
    "Reward": lambda: color_pairs(12),
}


def popped_labels(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            output = model(**inputs)
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            return (loss, output) if return_outputs else loss

    return Mine


def models_own_loss(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
            return (output.loss, output) if return_outputs else output.loss

    return Mine


def masked_labels(base):
    class Mine(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["labels"][:, 9:11] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Mine


def regularized(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = 0.5 * loss + 1e-3 * outputs.logits.square().mean()
            self._metrics["train" if model.training else "eval"]["width"].append(float(outputs.logits.shape[1]))
            return (loss, outputs) if return_outputs else loss

    return Mine


def hinge_by_hand(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            logps = (logps.gather(-1, ids[:, 1:, None])[..., 0] * inputs["completion_mask"][:, 1:]).sum(1)
            chosen, rejected = logps.chunk(2)
            return torch.relu(1 - self.beta * (chosen - rejected)).mean()

    return Mine


def masked_completions(base):
    class Mine(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["completion_mask"] = inputs["completion_mask"] * (inputs["input_ids"] % 3 > 0)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Mine


def flipped_labels(base):
    class Mine(base):
        def _compute_loss(self, model, inputs, return_outputs):
            return super()._compute_loss(model, {**inputs, "label": ~inputs["label"]}, return_outputs)

    return Mine


def scaled(base):
    class Mine(base):
        def _compute_loss(self, model, inputs, return_outputs):
            return 0.5 * super()._compute_loss(model, inputs, return_outputs)

    return Mine


def fewer_rows(base):
    class Mine(base):
        def _prepare_dataset(self, dataset, processing_class, args, *rest):
            assert rest[-1] == "train"
            return super()._prepare_dataset(dataset, processing_class, args, *rest).select(range(4, 12))

    return Mine


def own_reference(base):
    class Mine(base):
        def compute_ref_log_probs(self, model, inputs):
            return tuple(None if part is None else part - 1.5 for part in super().compute_ref_log_probs(model, inputs))

        def _precompute_ref_logps(self, dataset, name, batch_size):
            assert (name, batch_size) == ("train", 4)
            return super()._precompute_ref_logps(dataset, name, batch_size)

    return Mine


def rewards_by_hand(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
            return -(chosen - rejected).tanh().mean()

    return Mine


def trainers_hooks(base):
    """Everything around the loss, called and handed on."""

    class Mine(base):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            assert {"input_ids", "attention_mask"} <= set(next(iter(loader)))
            return loader

        def _get_train_sampler(self, *args):
            assert isinstance(super()._get_train_sampler(*args), RandomSampler)
            return RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(5))

        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
            return self.optimizer

        def get_batch_samples(self, *args):
            samples, count = super().get_batch_samples(*args)
            self.seen = sum(batch["attention_mask"].sum().item() for batch in samples)
            return samples, count

        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "seen": self.seen}, *args, **kwargs)

    return Mine


CASES = [
    ("SFT", popped_labels, {}),
    ("SFT", models_own_loss, {"completion_only_loss": False}),
    ("SFT", masked_labels, {}),
    ("SFT", masked_labels, {"padding_free": True, "max_length": None}),
    ("SFT", regularized, {}),
    ("SFT", fewer_rows, {}),
    ("SFT", trainers_hooks, {}),
    ("DPO", hinge_by_hand, {}),
    ("DPO", masked_completions, {}),
    ("DPO", scaled, {}),
    ("DPO", fewer_rows, {}),
    ("DPO", own_reference, {"precompute_ref_log_probs": True}),
    ("DPO", trainers_hooks, {}),
    ("KTO", flipped_labels, {}),
    ("KTO", masked_completions, {}),
    ("KTO", own_reference, {"precompute_ref_log_probs": True}),
    ("Reward", rewards_by_hand, {}),
    ("Reward", fewer_rows, {}),
]
SLOW = pytest.mark.slow
# Much the same has been seen in other methods.
LONG = [("DPO", fewer_rows, {}), ("Reward", fewer_rows, {}), ("KTO", masked_completions, {}), ("DPO", scaled, {})]


@pytest.fixture
def run(model_path, reward_model_path, tmp_path):
    def run(module, method, subclass=None, arguments=None, **settings):
        model = reward_model_path if method == "Reward" else model_path
        given = {"model": model, "train_dataset": ROWS[method](), **(arguments or {})}
        trainer = make_trainer(
            _Library(module, method, subclass),
            tmp_path / module.__name__,
            method=method,
            arguments=given,
            **{"max_steps": 2, "gradient_accumulation_steps": 1, **settings},
        )
        trainer.train()
        return trainer

    return run


class _Library:
    """A library whose trainer of a method is a subclass."""

    def __init__(self, module, method, subclass):
        base = getattr(module, f"{method}Trainer")
        setattr(self, f"{method}Trainer", base if subclass is None else subclass(base))
        setattr(self, f"{method}Config", getattr(module, f"{method}Config"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "method, subclass, settings",
    [
        pytest.param(*case, id=f"{case[0]}-{case[1].__name__}-{len(case[2])}", marks=SLOW if case in LONG else ())
        for case in CASES
    ],
)
def test_a_subclass_trains_as_it_does_in_trl(method, subclass, settings, run):
    theirs, ours = (run(module, method, subclass, **settings).state.log_history for module in (trl, trl_fast))
    assert_same_logs(ours, theirs)


@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_hooks_that_change_nothing_leave_the_layout_and_the_numbers(method, run, caplog):
    def scaled_outside(base):
        class Mine(base):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return super().compute_loss(model, inputs, *args, **kwargs) * 1.0

            def training_step(self, *args, **kwargs):
                return super().training_step(*args, **kwargs)

        return Mine

    logs = []
    with caplog.at_level(logging.WARNING, logger="trl_fast"):
        for subclass in (None, scaled_outside):
            trainer = run(trl_fast, method, subclass)
            logs.append(trainer.state.log_history)
            assert trainer.data_collator.layout == ("packed" if method == "SFT" else "shared_prefix")
    assert_same_logs(*logs, rel=0, abs=0)
    assert not [record for record in caplog.records if "batch_layout" in record.message]


@pytest.mark.parametrize("method, subclass", [("SFT", models_own_loss), ("DPO", masked_completions)])
def test_padded_rows_are_said_once(method, subclass, run, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_fast"):
        run(trl_fast, method, subclass)
    said = [record.message for record in caplog.records if "rows of batches are padded" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize(
    "method, collator",
    [
        ("DPO", dpo_trainer.DataCollatorForPreference),
        ("KTO", kto_trainer.DataCollatorForUnpairedPreference),
        pytest.param("DPO", trl_fast.data.DataCollatorForPreference, marks=SLOW),
    ],
)
def test_a_collator_of_ones_own_trains_trls_loss(method, collator, run):
    arguments = {"data_collator": collator(pad_token_id=2, pad_to_multiple_of=8)}
    theirs, ours = (run(module, method, arguments=arguments).state.log_history for module in (trl, trl_fast))
    assert_same_logs(ours, theirs)


def test_a_collators_own_entries_reach_the_subclass(run):
    def weighted(base):
        class Mine(base):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return inputs.pop("weights").mean() * super().compute_loss(model, inputs, *args, **kwargs)

        return Mine

    class Weighing(dpo_trainer.DataCollatorForPreference):
        def torch_call(self, examples):
            return {**super().torch_call(examples), "weights": torch.tensor([row["weight"] for row in examples])}

    rows = color_pairs(12).add_column("weight", [0.5 + i for i in range(12)])
    arguments = {"data_collator": Weighing(pad_token_id=2), "train_dataset": rows}
    settings = {"remove_unused_columns": False}
    theirs, ours = (
        run(module, "DPO", weighted, arguments, **settings).state.log_history for module in (trl, trl_fast)
    )
    assert_same_logs(ours, theirs)
    with pytest.raises(ValueError, match="'weights', which the loss does not read; take them out in compute_loss"):
        run(trl_fast, "DPO", arguments=arguments, **settings)


def test_a_loop_of_ones_own(run):
    trainer = run(trl_fast, "DPO")
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].shape == batch["completion_mask"].shape
        logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        entries = dict(batch.items())
        assert trainer.compute_loss(trainer.model, entries) == trainer.compute_loss(trainer.model, batch)


def test_the_reference_is_scored_on_demand_as_in_trl(run):
    theirs, ours = (run(module, "DPO", max_steps=1) for module in (trl, trl_fast))
    got, expected = (
        trainer.compute_ref_log_probs(
            trainer.ref_model, next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        )
        for trainer in (ours, theirs)
    )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="compute_ref_log_probs: model is not the trainer's reference"):
        ours.compute_ref_log_probs(ours.model, next(iter(ours.get_train_dataloader())))


def test_transformers_own_loss_runs_on_a_batch(run):
    def plain(base):
        class Mine(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

        return Mine

    theirs, ours = (run(module, "SFT", plain).state.log_history for module in (trl, trl_fast))
    assert_same_logs(ours, theirs)


def test_a_model_card_has_the_dataset_and_the_tags(run, tmp_path):
    trainer = run(trl_fast, "SFT", max_steps=1)
    trainer.create_model_card("mine", "people/colors", tags=["blue", "trl"])
    text = (tmp_path / "trl_fast" / "README.md").read_text()
    assert "model_name: mine" in text and "datasets: people/colors" in text
    assert text.count("- trl\n") == 1 and "- blue\n" in text


def test_a_method_that_was_put_into_a_trainer_counts_or_is_refused(model_path, tmp_path):
    def make():
        return make_trainer(
            trl_fast, tmp_path, arguments={"model": model_path, "train_dataset": color_pairs(8)}, max_steps=1
        )

    trainer, plain = make(), make()
    own = trainer._compute_loss
    trainer._compute_loss = lambda *args: 0.5 * own(*args)
    plain.train()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5 * plain.state.log_history[0]["loss"])
    trainer.concatenated_forward = own
    with pytest.raises(ValueError, match=r"DPOTrainer defines concatenated_forward\(\)"):
        trainer.train()
