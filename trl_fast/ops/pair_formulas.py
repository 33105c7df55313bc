"""Computes the losses of preference pairs in closed form; they specify the kernels behind `pair_loss`.

Notation: r is a sequence's log-probability under the policy minus that under the reference; s its score (r itself for
the reverse KL); subscripts c and r stand for chosen and rejected; δ = s_c − s_r; x = β·δ; σ is the logistic function;
ε is `label_smoothing`; τ is `discopop_tau`. Every formula takes the pairs and gives (P,), one value a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F

from .stable_functions import logistic, with_derivative


class PairParameters(Protocol):
    """Holds the numbers that a formula may read."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def discopop_tau(self) -> float: ...


AnyPairValues = TypeVar("AnyPairValues", bound="PairValues")


@dataclass(frozen=True)
class PairValues:
    """Holds the values of P pairs; every tensor is (P,), float32 and differentiable, unless said otherwise.

    The reference log-probabilities and the lengths (integers, in tokens) carry no gradient.
    """

    chosen_logprobs: torch.Tensor
    rejected_logprobs: torch.Tensor
    ref_chosen_logprobs: torch.Tensor
    ref_rejected_logprobs: torch.Tensor
    chosen_scores: torch.Tensor
    rejected_scores: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor

    @classmethod
    def from_sequences(
        cls: type[AnyPairValues],
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        **others: torch.Tensor,
    ) -> AnyPairValues:
        """Splits values (S,) of S = 2P sequences: the chosen one of pair i is sequence 2i, the rejected one 2i + 1.

        `others` are the fields that a subclass adds.
        """
        return cls(
            chosen_logprobs=logprobs[0::2],
            rejected_logprobs=logprobs[1::2],
            ref_chosen_logprobs=ref_logprobs[0::2],
            ref_rejected_logprobs=ref_logprobs[1::2],
            chosen_scores=scores[0::2],
            rejected_scores=scores[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            **others,
        )

    @cached_property
    def chosen_logratios(self) -> torch.Tensor:
        """Returns r_c (P,)."""
        return self.chosen_logprobs - self.ref_chosen_logprobs

    @cached_property
    def rejected_logratios(self) -> torch.Tensor:
        """Returns r_r (P,)."""
        return self.rejected_logprobs - self.ref_rejected_logprobs

    @property
    def score_margins(self) -> torch.Tensor:
        """Returns δ = s_c − s_r (P,)."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_score_margins(self) -> torch.Tensor:
        """Returns s_c / |y_c| − s_r / |y_r| (P,)."""
        chosen = self.chosen_scores / self.chosen_lengths.clamp(min=1)
        return chosen - self.rejected_scores / self.rejected_lengths.clamp(min=1)


def check_pair_parameters(loss_types: Collection[str], parameters: PairParameters) -> None:
    """Checks that the named formulas can take these numbers.

    Raises:
        ValueError: naming the parameter, its value and what is expected.
    """
    beta, eps, tau = parameters.beta, parameters.label_smoothing, parameters.discopop_tau
    if not 0 <= beta < math.inf or (beta == 0 and {"ipo", "sppo_hard"} & set(loss_types)):
        raise ValueError(f"beta={beta}: expected a positive number.")
    if not 0 <= eps <= 1:
        raise ValueError(f"label_smoothing={eps}: expected a number in [0, 1].")
    if "exo_pair" in loss_types and eps in (0, 1):
        raise ValueError(
            f"label_smoothing={eps}: expected a number in (0, 1) for loss_type='exo_pair', whose target distribution "
            "takes its logarithm; its paper recommends 1e-3."
        )
    if "robust" in loss_types and eps == 0.5:
        raise ValueError("label_smoothing=0.5 divides by zero in loss_type='robust'; expected a number in [0, 0.5).")
    if "discopop" in loss_types and not tau > 0:
        raise ValueError(f"discopop_tau={tau}: expected a positive number.")


def sigmoid_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns −log σ(x). DPO, arXiv 2305.18290, Eq. 7. Like TRL's since 0.29 it does not read `label_smoothing`."""
    return -F.logsigmoid(config.beta * pairs.score_margins)


def sigmoid_norm_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns −log σ(β·(s_c / |y_c| − s_r / |y_r|)): Eq. 7 of arXiv 2305.18290 on length-normalised scores."""
    return -F.logsigmoid(config.beta * pairs.mean_score_margins)


def robust_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns (−(1−ε)·log σ(x) + ε·log σ(−x)) / (1 − 2ε). Robust DPO, arXiv 2403.00409."""
    x, eps = config.beta * pairs.score_margins, config.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


def hinge_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns max(0, 1 − x). SLiC-HF, arXiv 2305.10425, with the form that arXiv 2309.06657 (RSO) gives it."""
    return torch.relu(1 - config.beta * pairs.score_margins)


def ipo_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns (s_c / |y_c| − s_r / |y_r| − 1 / (2β))². IPO, arXiv 2310.12036, Eq. 17 (τ there is β), per token."""
    return (pairs.mean_score_margins - 1 / (2 * config.beta)) ** 2


def exo_pair_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns σ(x)·(log σ(x) − log(1−ε)) + σ(−x)·(log σ(−x) − log ε).

    EXO, arXiv 2402.00856, Eq. 16 for two completions.
    """
    x, eps = config.beta * pairs.score_margins, config.label_smoothing
    chosen_term = logistic(x) * (F.logsigmoid(x) - math.log1p(-eps))
    return chosen_term + logistic(-x) * (F.logsigmoid(-x) - math.log(eps))


def nca_pair_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns −log σ(β·r_c) − ½·log σ(−β·r_c) − ½·log σ(−β·r_r). NCA, arXiv 2402.05369, for a pair."""
    chosen, rejected = config.beta * pairs.chosen_logratios, config.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns −log σ(β·r_c) − log σ(−β·r_r). BCO, arXiv 2404.04656, without its reward shift."""
    return -F.logsigmoid(config.beta * pairs.chosen_logratios) - F.logsigmoid(-config.beta * pairs.rejected_logratios)


def sppo_hard_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns (r_c − 1/(2β))² + (r_r + 1/(2β))². SPPO, arXiv 2405.00675, Eq. 4.7, win probabilities 1 and 0."""
    target = 0.5 / config.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def apo_zero_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns 1 − σ(β·r_c) + σ(β·r_r). APO-zero, arXiv 2408.06266, Eq. 7: pushes chosen up and rejected down.

    1 − σ(x) is taken as σ(−x), which has all its digits.
    """
    chosen, rejected = config.beta * pairs.chosen_logratios, config.beta * pairs.rejected_logratios
    return logistic(-chosen) + logistic(rejected)


def apo_down_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns σ(β·r_c) + 1 − σ(β·(r_c − r_r)).

    APO-down, arXiv 2408.06266, Eq. 8: pushes both down, rejected further.
    """
    margins = pairs.chosen_logratios - pairs.rejected_logratios
    return logistic(config.beta * pairs.chosen_logratios) + logistic(-config.beta * margins)


def discopop_loss(pairs: PairValues, config: PairParameters) -> torch.Tensor:
    """Returns −(1−m)·log σ(x) + m·e^(−x) with m = σ(x/τ). DiscoPOP, arXiv 2406.08414, Eq. 5."""
    x, tau = config.beta * pairs.score_margins, config.discopop_tau
    sharp = x / tau

    # m·e^(−x) in one exponential: with τ < 1 it vanishes for x → −∞, where the product would be 0·∞. With τ > 1 it may
    # be infinite, and autograd's derivative the difference of two infinities.
    def mixed(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(F.logsigmoid(x / tau) - x)

    def derivative(x: torch.Tensor) -> torch.Tensor:
        return with_derivative(mixed, derivative, x) * (logistic(-x / tau) / tau - 1)

    return with_derivative(mixed, derivative, x) - logistic(-sharp) * F.logsigmoid(x)


# The losses that `pair_loss` computes. Kernels know each by its name.
PAIR_FORMULAS: dict[str, Callable[[PairValues, PairParameters], torch.Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
}
