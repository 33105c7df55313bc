"""Reward models that are given token ids: read where transformers reads them, EOS as the pad token or not."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from support.models import save_tiny_classifier
from support.tokenizer import build_tokenizer
from trl_fast.rollout.token_rewards import TokenRewardModel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_classifier(tmp_path_factory.mktemp("tiny"), build_tokenizer())


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("pads_with_eos", [False, True])
def test_rewards_are_those_of_the_models_own_forward(path, layout, pads_with_eos):
    eos, pad = 2, 2 if pads_with_eos else 0
    prompts = [[5, 6, 7, 8]] * 3 + [[9, 10]]
    completions = [[11, 12, eos], [13, eos], [14, 15, 16], [eos]]
    model = AutoModelForSequenceClassification.from_pretrained(path)
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    plain.config.pad_token_id = pad
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            expected.append(plain(torch.tensor([prompt + completion])).logits.item())
    rewards = TokenRewardModel(model, layout, pad, prompts[:2], 64)(prompts, completions)
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert len(set(rewards)) == 4
