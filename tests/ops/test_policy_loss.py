"""Tests policy_loss in PyTorch, the kernels' specification: against TRL's own loss and numerical derivatives."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from support.losses import PolicyProblem, policy_problem
from trl_fast.ops import policy_loss, supports

SHORT = (5, 3, 1, 2, 4)
MAX_LENGTH = 6
TRL_LOSSES = {"grpo": "clip", "bnpo": "clip", "dr_grpo": "clip", "dapo": "clip", "cispo": "cispo", "sapo": "sapo"}


def to_rows(values, lengths):
    """(N,) to TRL's (S, longest), 0 elsewhere."""
    return torch.nn.utils.rnn.pad_sequence(values.split(list(lengths)), batch_first=True)


def trl_loss(problem, logprobs, lengths, loss_type, *, beta, epsilon, epsilon_high, delta, bias_correct_kl):
    """Loss and metrics of TRL 1.16's GRPO trainer, fed these log-probabilities."""
    mask = to_rows(torch.ones_like(logprobs, dtype=torch.int64), lengths)
    rows = to_rows(logprobs, lengths)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (rows, torch.zeros_like(rows), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,
        args=SimpleNamespace(
            use_bias_correction_kl=bias_correct_kl,
            delta=delta,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": problem.advantages.to(logprobs.dtype),
        "num_items_in_batch": mask.sum(),
    }
    if problem.old_logprobs is not None:
        inputs["old_per_token_logps"] = to_rows(problem.old_logprobs.to(logprobs.dtype), lengths)
    if problem.ref_logprobs is not None:
        inputs["ref_per_token_logps"] = to_rows(problem.ref_logprobs.to(logprobs.dtype), lengths)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def aggregation_weights(loss_type, lengths):
    counts = torch.tensor(lengths, dtype=torch.float32)
    if loss_type in ("grpo", "sapo"):
        return 1 / (counts * len(lengths))
    if loss_type == "dr_grpo":
        return torch.full_like(counts, 1 / (len(lengths) * MAX_LENGTH))
    return torch.full_like(counts, 1 / sum(lengths))


@pytest.mark.parametrize("bias_correct_kl", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("delta", [None, 1.1, 1.5])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_loss_gradient_and_metrics_equal_trl(loss_type, on_policy, delta, beta, bias_correct_kl):
    problem = policy_problem(SHORT, on_policy=on_policy, reference=beta > 0)
    problem.weights = aggregation_weights(loss_type, SHORT)
    numbers = {"beta": beta, "delta": delta, "bias_correct_kl": bias_correct_kl}
    # cispo caps the ratio itself: not so low that it always does.
    numbers["epsilon_high"] = 1.2 if loss_type == "cispo" else 0.28
    positional, keywords = problem.arguments(torch.float64)
    result = policy_loss(*positional, **keywords, loss_type=TRL_LOSSES[loss_type], epsilon_low=0.2, **numbers)
    logprobs = positional[0].detach().clone().requires_grad_()
    expected, metrics = trl_loss(problem, logprobs, SHORT, loss_type, epsilon=0.2, **numbers)

    # The weights are rounded to float32; TRL divides in float64.
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(result.loss, positional[0])
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    if beta:
        assert result.kl.mean().item() == pytest.approx(metrics["kl"])
    if TRL_LOSSES[loss_type] == "clip":
        assert (result.clipped < 0).double().mean().item() == pytest.approx(metrics["clip_ratio/low_mean"])
        assert (result.clipped > 0).double().mean().item() == pytest.approx(metrics["clip_ratio/high_mean"])
    elif loss_type == "cispo":
        assert (result.clipped > 0).double().mean().item() == pytest.approx(metrics["cispo_clip_ratio"])
        assert (result.clipped >= 0).all()
    else:
        assert (result.clipped == 0).all()


def test_the_problem_reaches_every_branch():
    problem = policy_problem(SHORT)
    positional, keywords = problem.arguments()
    assert policy_loss(*positional, **keywords).clipped.unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("bias_correct_kl", [True, False])
@pytest.mark.parametrize("loss_type", ["clip", "sapo"])
def test_gradient(loss_type, bias_correct_kl):
    """Not cispo: its ratio is a constant to the gradient, which a numerical derivative cannot know."""
    (logprobs, *rest), keywords = policy_problem(SHORT).arguments(torch.float64)

    def loss_of(x):
        numbers = {"loss_type": loss_type, "beta": 0.3, "delta": 1.3, "bias_correct_kl": bias_correct_kl}
        return policy_loss(x, *rest, **keywords, **numbers).loss

    assert torch.autograd.gradcheck(loss_of, logprobs)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("loss_type", ["clip", "cispo", "sapo"])
def test_log_ratios_of_ten_thousand_stay_finite(loss_type, advantage):
    logprobs = torch.zeros(2, requires_grad=True)
    old_logprobs = torch.tensor([1e4, -1e4])
    arguments = (old_logprobs, torch.tensor([advantage]), torch.zeros(2, dtype=torch.int64), torch.ones(1))
    for ref_logprobs in (old_logprobs, -old_logprobs):
        result = policy_loss(logprobs, *arguments, ref_logprobs=ref_logprobs, beta=0.1, loss_type=loss_type)
        (gradient,) = torch.autograd.grad(result.loss, logprobs)
        assert result.loss.isfinite() and result.kl.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 3), (1,)], ids=str)
def test_sizes(lengths):
    positional, keywords = policy_problem(lengths).arguments()
    loss, kl, clipped = policy_loss(*positional, **keywords, beta=0.1)
    assert loss.shape == () and kl.shape == clipped.shape == (sum(lengths),) and clipped.dtype == torch.int8
    loss.backward()
    assert positional[0].grad.isfinite().all() and loss.isfinite()


def test_only_the_logprobs_get_a_gradient():
    positional, keywords = policy_problem(SHORT).arguments()
    others = [x for x in (*positional[1:], *keywords.values()) if x.is_floating_point()]
    for other in others:
        other.requires_grad_()
    result = policy_loss(*positional, **keywords, beta=0.1)
    result.loss.backward()
    assert all(other.grad is None for other in others) and not result.kl.requires_grad
    with torch.no_grad():
        assert not policy_loss(*positional, **keywords).loss.requires_grad


def test_without_a_reference_there_is_no_kl():
    positional, keywords = policy_problem(SHORT, reference=False).arguments()
    assert policy_loss(*positional, **keywords).kl is None


def test_backends():
    assert supports("policy_loss", "triton", "cuda", torch.float32).ok
    positional, keywords = policy_problem(SHORT).arguments()
    with pytest.raises(RuntimeError, match="'cpp' was forced for policy_loss.*no C\\+\\+ kernel"):
        policy_loss(*positional, **keywords, backend="cpp")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("logprobs", torch.zeros(()), r"logprobs: expected shape \(N,\), got shape \(\)"),
        ("logprobs", torch.zeros(15).half(), "logprobs: expected torch.float32, got torch.float16"),
        ("old_logprobs", torch.zeros(14), r"old_logprobs: expected shape \(15,\), got shape \(14,\)"),
        ("ref_logprobs", torch.zeros(15).half(), "ref_logprobs: expected torch.float32, got torch.float16"),
        ("advantages", torch.zeros(5, 1), r"advantages: expected shape \(5,\), got shape \(5, 1\)"),
        ("weights", torch.zeros(15), r"weights: expected shape \(5,\), got shape \(15,\)"),
        ("weights", torch.zeros(5, device="meta"), "weights: expected device cpu as logprobs has, got meta"),
        ("branch", torch.zeros(15), "branch: expected torch.int64, got torch.float32"),
        ("branch", torch.arange(15), r"branch: expected sequences in \[0, 5\).* from 0 to 14"),
    ],
)
def test_bad_tensors(field, value, message):
    problem = PolicyProblem(**{**vars(policy_problem(SHORT)), field: value})
    *positional, ref_logprobs = vars(problem).values()
    with pytest.raises(ValueError, match=message):
        policy_loss(*positional, ref_logprobs=ref_logprobs)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"loss_type": "grpo"}, "loss_type: unknown name 'grpo'; expected one of clip, cispo, sapo"),
        ({"beta": -1.0}, "beta=-1.0: expected a finite number of at least 0"),
        ({"epsilon_low": -0.1}, "epsilon_low=-0.1: expected a finite number of at least 0"),
        ({"delta": 0.0}, "delta=0.0: expected a positive number"),
        ({"temperature_neg": float("nan")}, "temperature_neg=nan: expected a positive number"),
        ({"beta": 0.1}, "ref_logprobs: expected the reference's log-probabilities for beta=0.1, got None"),
    ],
)
def test_bad_parameters(keywords, message):
    positional, _ = policy_problem(SHORT, reference=False).arguments()
    with pytest.raises(ValueError, match=message):
        policy_loss(*positional, **keywords)
