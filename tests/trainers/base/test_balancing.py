"""Rows are dealt by cost only where the loss stays the same; one that was asked for and cannot be is said."""

from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import IterableDataset
from torch.utils.data import DataLoader

import trl_fast
from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.training import color_labels, color_pairs, make_trainer
from trl_fast.data.balanced_batches import BalancedBatches
from trl_fast.trainers.base.balancing import balanced, chosen_balance

ROWS = {"DPO": color_pairs, "KTO": color_labels, "Reward": color_pairs, "SFT": lambda: sft_rows("text", 16)}


@pytest.fixture
def make(model_path, reward_model_path, tmp_path):
    def make(method="SFT", rows=None, arguments=None, **settings):
        path = reward_model_path if method == "Reward" else model_path
        rows = ROWS[method]() if rows is None else rows
        given = {"model": path, "train_dataset": rows, **(arguments or {})}
        return make_trainer(trl_fast, tmp_path, method=method, arguments=given, **settings)

    return make


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("DPO", {"loss_type": ["sigmoid", "sft"]}, r"loss_type=\['sigmoid', 'sft'\] reads the pairs of a micro-batch"),
        ("DPO", {"loss_type": "aot"}, r"set balance_batches='never'"),
        ("KTO", {}, "loss_type='kto' estimates the KL of a micro-batch; set balance_batches='micro_batch'"),
        ("SFT", {"average_tokens_across_devices": False}, "each process divides by its own tokens"),
    ],
)
def test_a_deal_that_changes_the_loss_is_refused(make, method, settings, message):
    with pytest.raises(ValueError, match=f"balance_batches='step' would change the loss: .*{message}"):
        make(method, **settings, balance_batches="step")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("GRPO", {"num_iterations": 2}, "an optimizer step is made of some of a generation's completions"),
        ("GRPO", {"loss_type": "bnpo"}, "a term of the loss reads the completions of a micro-batch together"),
        ("GRPO", {"entropy_coef": 0.1}, "a term of the loss reads the completions of a micro-batch together"),
        ("RLOO", {"beta": 0.1}, "the KL penalty is scored in micro-batches before advantages are known"),
    ],
)
def test_completions_stay_where_the_loss_would_change(make, method, settings, message):
    given = {"rows": color_prompts(), "arguments": {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}}
    sizes = {"num_generations": 2, "max_completion_length": 8, **settings}
    with pytest.raises(ValueError, match=f"balance_batches='step' would change the loss: {message}"):
        make(method, **given, **sizes, balance_batches="step")


def test_an_own_loss_may_read_rows_together(make):
    with pytest.raises(ValueError, match="compute_loss_func may read rows together"):
        make(arguments={"compute_loss_func": lambda *_, **__: None}, balance_batches="micro_batch")


def test_a_routers_loss_is_that_of_the_tokens_together(make):
    trainer = make()
    assert chosen_balance(trainer) == "micro_batch"
    trainer.router_aux_loss_coef = 0.1
    assert chosen_balance(trainer) == "never"


def dealt(trainer):
    """The sampler of batches of two processes, of a trainer that is told to be one of two."""
    loader = DataLoader(trainer.train_dataset, batch_size=2, collate_fn=trainer.data_collator)
    if loader.batch_sampler is not None and not isinstance(trainer.train_dataset, IterableDataset):
        batches = BatchSamplerShard(loader.batch_sampler, 2, 0)
        loader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    trainer.accelerator = SimpleNamespace(num_processes=2, unwrap_model=lambda model: model)
    return getattr(balanced(loader, trainer, trainer.train_dataset).batch_sampler, "batch_sampler", None)


@pytest.mark.parametrize("method", [*ROWS])
def test_rows_are_dealt_by_cost_unless_it_is_declined(make, method):
    assert isinstance(dealt(make(method)), BalancedBatches)
    assert not isinstance(dealt(make(method, balance_batches="never")), BalancedBatches)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_layout": "padded"}, "rows are padded"),
        ({"rows": sft_rows("text", 16).to_iterable_dataset()}, "the training data are a stream"),
        ({"arguments": {"data_collator": lambda rows: rows}}, "rows are padded"),
    ],
)
def test_what_cannot_be_dealt_is_said_where_it_was_asked_for(make, change, reason, caplog):
    for asked, said in ((None, 0), ("micro_batch", 1)):
        assert not isinstance(dealt(make(**change, balance_batches=asked)), BalancedBatches)
        assert len([text for text in caplog.messages if f"has no effect: {reason}" in text]) == said
