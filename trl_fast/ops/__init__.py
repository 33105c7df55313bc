"""Exports the project's ops: a module each, with its reference, its autograd function and its choice of backend."""

from .backends import BACKENDS, BackendRow, Support, backend_table, supports
from .head.plan import HeadOptions
from .linear_cross_entropy import linear_cross_entropy
from .linear_divergence import DivergenceLoss, DivergenceScores, linear_divergence, linear_divergence_to_given
from .linear_logprob import linear_logprob
from .linear_token_loss import ScoredLoss, linear_token_loss
from .pair_loss import PairLoss, pair_loss
from .policy_loss import PolicyLoss, policy_loss
from .selective_log_softmax import selective_log_softmax, selective_log_softmax_and_entropy
from .token_scores import TokenScores

__all__ = [
    "BACKENDS",
    "BackendRow",
    "DivergenceLoss",
    "DivergenceScores",
    "HeadOptions",
    "PairLoss",
    "PolicyLoss",
    "ScoredLoss",
    "Support",
    "TokenScores",
    "backend_table",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_divergence_to_given",
    "linear_logprob",
    "linear_token_loss",
    "pair_loss",
    "policy_loss",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "supports",
]
