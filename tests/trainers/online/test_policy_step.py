"""The update steps of GRPO, RLOO and PPO without a trainer: plain functions of models and a micro-batch."""

import pytest
import torch

from support.models import tiny_classifier, tiny_model
from trl_fast.losses.policy_gradient import PolicyLossConfig, grpo_loss
from trl_fast.losses.ppo import ppo_loss_inputs
from trl_fast.modeling.classifier_head import attach_classifier_head, read_head, state_batch
from trl_fast.modeling.policy_and_value import PolicyAndValue
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.ops import HeadOptions
from trl_fast.rollout.samples import Samples
from trl_fast.trainers.online.micro_batches import UpdateMaker, slice_indices, trained_indices
from trl_fast.trainers.online.policy_step import policy_step
from trl_fast.trainers.ppo.experience import PPOUpdate
from trl_fast.trainers.ppo.step import ppo_step

COMPLETIONS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
UPDATES = UpdateMaker("padded", 0, None, torch.device("cpu"))


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = tiny_model(vocab_size=40)
    attach_scoring(model)
    return model


@pytest.fixture
def samples():
    samples = Samples.of([[1, 2, 3]] * 2 + [[4, 3]] * 2, COMPLETIONS)
    samples.advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    samples.old_logprobs = [torch.full((len(ids),), -3.0) for ids in COMPLETIONS]
    return samples


def by_hand(model, samples):
    """Log-probabilities of the completions' tokens from the model's own logits."""
    found = []
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


# A head that is swept in many blocks must still see a whole completion at once where its tokens have one ratio.
@pytest.mark.parametrize("head", [HeadOptions(), HeadOptions(workspace_bytes=200)], ids=["one block", "many blocks"])
@pytest.mark.parametrize("level", ["token", "product"])
def test_policy_step_is_the_loss_of_the_models_own_logits(level, head, policy, samples):
    config = PolicyLossConfig("grpo", importance_sampling_level=level, epsilon=0.3)
    update = UPDATES.update(samples, [0, 1, 2, 3], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    result, metrics = policy_step(policy, update, config, head=head)
    result.loss.backward()
    gradient = policy.lm_head.weight.grad.clone()
    policy.zero_grad()
    logprobs = by_hand(policy, samples)
    expected = grpo_loss(type("Scores", (), {"logprobs": logprobs, "entropy": None}), update.loss_inputs, config)
    expected.backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, policy.lm_head.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.scores.logprobs, logprobs.detach(), rtol=1e-4, atol=1e-5)
    assert "entropy" in metrics.means and result.metrics == {}


def test_ppo_step_adds_the_value_models_loss(policy, samples):
    torch.manual_seed(1)
    value_model = tiny_classifier(vocab_size=40)
    value_model.config.pad_token_id = 0
    attach_classifier_head(value_model)
    states = state_batch(samples.batch("padded", 0), torch.zeros(4, dtype=torch.bool))
    values = read_head(value_model, states).detach()
    update = PPOUpdate(
        batch=UPDATES.token_batch(samples),
        loss_inputs=ppo_loss_inputs(samples.flat("old_logprobs"), torch.linspace(-1, 1, 10)),
        state_batch=states,
        values=values,
        returns=values + 2,
    )
    both = PolicyAndValue(policy, value_model)
    plain, weighted = (ppo_step(both, update, head=HeadOptions(), vf_coef=coef) for coef in (0.0, 0.5))
    # ½ · the mean of 2².
    torch.testing.assert_close(weighted.loss - plain.loss, torch.tensor(0.5 * 0.5 * 4.0))
    weighted.loss.backward()
    assert value_model.score.weight.grad.abs().sum() > 0 and policy.lm_head.weight.grad.abs().sum() > 0
    assert list(plain.metrics)[:2] == ["policy/approxkl_avg", "policy/clipfrac_avg"]


def test_trained_are_those_with_an_advantage_that_were_not_cut_off(samples):
    assert trained_indices(samples, everyone=False) == [0, 1, 2]
    assert trained_indices(samples, everyone=True) == [0, 1, 2, 3]
    samples.excluded = torch.tensor([True, False, True, False])
    assert trained_indices(samples, everyone=False) == [1]
    # The shortest, so that there is a loss.
    samples.excluded = torch.tensor([True] * 4)
    assert trained_indices(samples, everyone=True) == [3]


def test_slices_are_a_shuffle_that_keeps_groups_where_asked(samples):
    for _ in range(20):
        assert sorted(map(sorted, slice_indices(samples, 2, together=True))) == [[0, 1], [2, 3]]
    apart = [slice_indices(samples, 2, together=False) for _ in range(20)]
    assert any(sorted(map(sorted, parts)) != [[0, 1], [2, 3]] for parts in apart)
    assert all(sorted(index for part in parts for index in part) == [0, 1, 2, 3] for parts in apart)
