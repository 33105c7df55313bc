"""The DPO losses and metrics against TRL's own arithmetic, fed the same per-token numbers."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer import dpo_trainer as trl_dpo
from trl.trainer.utils import FusedCausalLMOutput

from support.preferences import random_pairs, random_scores
from trl_fast.data import PreferenceCollator
from trl_fast.losses.dpo import F_DIVERGENCE_LOSSES, PAIR_LOSSES, DPOLossConfig, dpo_loss, dpo_metrics
from trl_fast.losses.f_divergences import F_DIVERGENCES
from trl_fast.losses.loss_inputs import PreferenceLossInputs

MAX_LENGTH = 10


def to_rows(values, batch, completion_mask):
    """Scatter (N,) values of our batch to TRL's (2P, T − 1): all chosen rows, then all rejected, 0 elsewhere."""
    rows = torch.zeros(completion_mask[:, 1:].shape, dtype=values.dtype)
    pairs = len(batch) // 2
    for sequence in range(len(batch)):
        row = sequence // 2 + pairs * (sequence % 2)
        rows[row, completion_mask[row, 1:].bool()] = values[batch.branch == sequence]
    return rows


class FakeModel(torch.nn.Module):
    """Answers every forward with the per-token outputs that it was given."""

    is_gradient_checkpointing = False

    def __init__(self, **per_token):
        super().__init__()
        self.outputs = FusedCausalLMOutput(**per_token)

    def forward(self, **inputs):
        assert inputs["labels"].shape == inputs["input_ids"].shape
        return self.outputs


def trl_loss(rows, batch, scores, references, config):
    inputs = trl_dpo.DataCollatorForPreference(pad_token_id=0, max_length=MAX_LENGTH)(rows)
    mask = inputs["completion_mask"]
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    per_token = {name: to_rows(getattr(scores, name), batch, mask) for name in names}
    logprobs = to_rows(scores.logprobs.detach(), batch, mask).requires_grad_()
    model = FakeModel(log_probs=logprobs, **per_token)
    trainer = SimpleNamespace(
        model=model,
        ref_model=FakeModel(log_probs=to_rows(references, batch, mask)),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        args=SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=list(config.loss_type),
        loss_weights=list(config.loss_weights),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = trl_dpo.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss, metrics, logprobs, mask


def cases():
    for name, divergence, ld_alpha, use_weighting in itertools.product(
        PAIR_LOSSES, F_DIVERGENCES, (None, 0.0, 0.4), (False, True)
    ):
        refused = (divergence != "reverse_kl" and name not in F_DIVERGENCE_LOSSES) or (
            use_weighting and name.startswith("aot")
        )
        # TRL multiplies an expanded tensor in place there, which torch refuses
        if not refused and not (use_weighting and name == "sft"):
            yield name, divergence, ld_alpha, use_weighting


@pytest.mark.parametrize("name, divergence, ld_alpha, use_weighting", list(cases()))
def test_loss_metrics_and_gradient_equal_trl(name, divergence, ld_alpha, use_weighting):
    rows = random_pairs(6, seed=11, empty_prompts=True)
    batch = PreferenceCollator(0, MAX_LENGTH, layout="packed").collate(rows)
    scores = random_scores(len(batch.targets), seed=5)
    references = random_scores(len(batch.targets), seed=6).logprobs.detach()
    config = DPOLossConfig(
        name,
        beta=0.2,
        label_smoothing=0.1,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.3,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
    )
    expected, expected_metrics, trl_logprobs, mask = trl_loss(rows, batch, scores, references, config)
    table = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
    ref_logprobs = table.sequence_logprobs(references, ld_alpha)
    loss, metrics = dpo_loss(scores, table, ref_logprobs, config), dpo_metrics(scores, table, ref_logprobs, config)

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert expected_metrics.pop("num_tokens") == batch.num_tokens
    assert list(metrics) == list(expected_metrics)
    for key, metric in metrics.items():
        assert metric.mean().item() == pytest.approx(expected_metrics[key], rel=1e-5, abs=1e-6), key
        assert not metric.total.requires_grad
    if not (use_weighting and name == "hinge"):  # TRL changes relu's output in place: its backward raises
        expected_gradient = torch.autograd.grad(expected, trl_logprobs)[0] * mask[:, 1:]
        gradient = torch.autograd.grad(loss, scores.logprobs)[0]
        torch.testing.assert_close(to_rows(gradient, batch, mask), expected_gradient, rtol=1e-4, atol=1e-6)


def test_weighted_combination_equals_trl():
    rows = random_pairs(4, seed=2)
    batch = PreferenceCollator(0, MAX_LENGTH).collate(rows)
    scores = random_scores(len(batch.targets), seed=5)
    references = random_scores(len(batch.targets), seed=6).logprobs.detach()
    config = DPOLossConfig(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], ld_alpha=0.5)
    expected, expected_metrics, _, _ = trl_loss(rows, batch, scores, references, config)
    table = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
    loss = dpo_loss(scores, table, table.sequence_logprobs(references, 0.5), config)
    torch.testing.assert_close(loss, expected)
    assert expected_metrics["num_tokens"] == batch.num_tokens


def test_defaults_are_trls():
    trl_fields = trl_dpo.DPOConfig.__dataclass_fields__
    for name, value in vars(DPOLossConfig()).items():
        if name not in ("loss_type", "loss_weights"):
            assert trl_fields[name].default == value, name
    assert DPOLossConfig().loss_type == tuple(trl_fields["loss_type"].default_factory())
