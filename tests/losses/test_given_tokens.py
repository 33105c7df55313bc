"""The tokens that are compared with a teacher who tells of a few, by divergence."""

import torch

from trl_fast.losses.given_tokens import compared_tokens

LIKELIEST = torch.tensor([[5, 6], [7, 8]])
LOGPROBS = torch.tensor([[-0.1, -3.0], [-0.2, float("-inf")]])
OWN, OWN_LOGPROBS = torch.tensor([9, 7]), torch.tensor([-8.0, -0.2])


def compared(beta):
    ids, logprobs = compared_tokens(LIKELIEST, LOGPROBS, OWN, OWN_LOGPROBS, beta)
    return [
        dict(zip(*row, strict=True))
        for row in zip(ids.tolist(), logprobs.double().round(decimals=4).tolist(), strict=True)
    ]


def test_forward_kl_is_of_the_likeliest():
    assert compared(0.0) == [{5: -0.1, 6: -3.0}, {7: -0.2, 8: float("-inf")}]


def test_reverse_kl_is_of_the_own_token():
    assert compared(1.0) == [{9: -8.0}, {7: -0.2}]


def test_a_mixture_takes_both_and_no_token_twice():
    ids, logprobs = compared_tokens(LIKELIEST, LOGPROBS, OWN, OWN_LOGPROBS, 0.4)
    assert ids.tolist() == [[5, 9], [7, 7]]
    torch.testing.assert_close(logprobs, torch.tensor([[-0.1, -8.0], [-0.2, float("-inf")]]))
