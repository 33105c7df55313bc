"""The step of self-distillation without a trainer: against plain PyTorch on both models' own logits."""

from dataclasses import replace

import pytest
import torch

from support.divergences import row_divergences
from support.models import tiny_model
from trl_fast.modeling.distillation import teacher_states
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.ops import HeadOptions
from trl_fast.trainers.online.micro_batches import UpdateMaker
from trl_fast.trainers.self_distillation.samples import TaughtSamples, taught_update
from trl_fast.trainers.self_distillation.step import (
    DISTILLATION_LOSS,
    SelfDistillationSettings,
    TokenLossBeside,
    self_distillation_step,
)

COMPLETIONS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 3]]
PROMPTS, TAUGHT = [[1, 2, 3]] * 2 + [[4, 3]] * 2, [[1, 2, 9, 9, 3]] * 2 + [[7, 4, 3], [6, 4, 3]]
TEMPERATURE, CLIP = 0.8, 1.05


class AnotherModel:
    """A teacher that is a model of its own."""

    def __init__(self, model):
        self.model = model

    def states(self, batch):
        return teacher_states(self.model, batch)

    def score(self, batch, **how):
        with torch.no_grad():
            return score(self.model, batch, **how).tokens


def model_of(seed):
    torch.manual_seed(seed)
    model = tiny_model(vocab_size=40)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    attach_scoring(model)
    use_segment_attention(model)
    return model


@pytest.fixture
def models():
    return model_of(0), model_of(1)


@pytest.fixture
def samples():
    found = TaughtSamples.of(PROMPTS, COMPLETIONS)
    generator = torch.Generator().manual_seed(2)
    old = [-8 * torch.rand(len(ids), generator=generator) - 3 for ids in COMPLETIONS]
    return replace(
        found, teacher_prompt_ids=TAUGHT, untaught=torch.tensor([False, False, True, False]), old_logprobs=old
    )


def logps(model, prompts):
    """Log-probabilities of all tokens at the places of the completions', from the model's own logits."""
    found = []
    for prompt, completion in zip(prompts, COMPLETIONS, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append((logits / TEMPERATURE).log_softmax(-1))
    return torch.cat(found)


def narrowed(logp_s, logp_t, count, tail):
    ids = logp_s.topk(count, dim=-1).indices
    rest = torch.ones_like(logp_t, dtype=torch.bool).scatter(1, ids, False)
    tails = [x.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True) for x in (logp_s, logp_t)] * tail
    return [
        torch.cat([x.gather(1, ids), *tails[i : i + 1]], 1).log_softmax(-1) for i, x in enumerate((logp_s, logp_t))
    ]


def by_hand(models, samples, settings):
    """The loss, and the mean of the tokens that count; the first token of each completion does not."""
    student = logps(models[0], PROMPTS)
    teacher = logps(models[1], TAUGHT).detach()
    targets = torch.tensor(sum(COMPLETIONS, []))[:, None]
    own, known = (x.gather(1, targets)[:, 0] for x in (student, teacher))
    if settings.mode == "sampled_token":
        terms = (own - known).detach() * own
    else:
        both = (student, teacher)
        if settings.mode == "topk_logits":
            both = narrowed(*both, settings.topk, settings.add_tail)
        terms = row_divergences("jsd", settings.alpha, *both)
    terms = terms * (own.detach() - torch.cat(samples.old_logprobs)).exp().clamp(max=CLIP)
    parts = list(zip(terms.split([len(ids) for ids in COMPLETIONS]), (~samples.untaught).float(), strict=True))
    loss = sum(counts * part[1:].sum() / max(len(part) - 1, 1) for part, counts in parts) / len(parts)
    counted = torch.cat([part[1:] for part, counts in parts if counts])
    return loss / 2, counted.mean().detach(), own


SETTINGS = [
    SelfDistillationSettings("sampled_token", 1.0, is_clip=CLIP, temperature=TEMPERATURE),
    SelfDistillationSettings("full_logits", 0.5, is_clip=CLIP, temperature=TEMPERATURE),
    SelfDistillationSettings("topk_logits", 0.3, 6, is_clip=CLIP, temperature=TEMPERATURE),
    SelfDistillationSettings("topk_logits", 1.0, 6, add_tail=True, is_clip=CLIP, temperature=TEMPERATURE),
]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.mode)
def test_the_loss_is_that_of_the_models_own_logits(settings, fused, beside, layout, models, samples):
    maker = UpdateMaker(layout, 0, None, torch.device("cpu"))
    update = taught_update(maker, samples, range(4), loss_divisor=2, skipped_tokens=1)
    other = TokenLossBeside(lambda scores, rows: 0.3 * (scores.logprobs * (rows + 1)).sum()) if beside else None
    for model in models:
        model.trl_fast_fused_head = fused
    result = self_distillation_step(
        *(models[0], AnotherModel(models[1]), update, settings), head=HeadOptions(), beside=other
    )
    result.loss.backward()
    got = [weight.grad.clone() for weight in models[0].parameters()]
    models[0].zero_grad()
    loss, mean, own = by_hand(models, samples, settings)
    if beside:
        order = samples.by_beginning(range(4))
        own = torch.cat([own.split([len(ids) for ids in COMPLETIONS])[index] for index in order])
        loss = loss + 0.3 * (own * torch.arange(1, len(own) + 1)).sum()
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.metrics[DISTILLATION_LOSS].mean(), mean, rtol=1e-4, atol=1e-6)
    for ours, weight in zip(got, models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=1e-5)


def test_completions_that_are_not_learned_may_be_left_out(models, samples):
    maker = UpdateMaker("shared_prefix", 0, None, torch.device("cpu"))
    updates = [taught_update(maker, samples, kept, loss_divisor=1) for kept in (range(4), [0, 1, 3])]
    assert len(updates[1].batch.targets) == len(updates[0].batch.targets) - 4
    teacher = AnotherModel(models[1])
    whole, fewer = (
        self_distillation_step(models[0], teacher, update, SETTINGS[0], head=HeadOptions()) for update in updates
    )
    torch.testing.assert_close(whole.loss, fewer.loss)
