"""Computes preference losses that read the policy alone: ORPO, CPO with SimPO and AlphaPO, and TPO.

Notation of the docstrings: P prompts with k completions each, S = k·P of them: the chosen one of prompt i is number
k·i, the rejected one k·i + 1, a third one is learned; N scored tokens. l is the log-likelihood of a completion: the
sum of its tokens' log-probabilities, or their mean where the loss says so; subscripts c and r stand for chosen and
rejected; δ = R(l_c) − R(l_r) is the margin, with R(l) = l but for AlphaPO; β is `beta`, ε `label_smoothing`, γ the
target margin; σ is the logistic function.

The loss of a batch is the mean over prompts of the pair's loss, plus a weight times the mean negative log-likelihood
of the batch's learned tokens. That mean is one over the tokens of a micro-batch, as TRL's is.

To add a loss of margins: write its formula as a function of δ and `MarginNumbers`, and enter it in `MARGIN_LOSSES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from trl_fast.ops import TokenScores
from trl_fast.ops.stable_functions import expm1, with_derivative
from trl_fast.ops.token_scores import required
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.ranges import check_ranges

from .loss_inputs import ALL, CompletionLossInputs, Rows
from .mean_metric import Metric

# Rewards of AlphaPO then stay finite in float32: the difference of two infinite ones is NaN.
_LARGEST_EXPONENT = 80


class MarginNumbers(Protocol):
    """Holds the numbers that a loss of margins may read."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def target_margin(self) -> float: ...


# The losses of margins: each takes δ (P,) float32 and gives (P,), one value a pair.


def sigmoid_loss(margins: torch.Tensor, numbers: MarginNumbers) -> torch.Tensor:
    """Returns −(1−ε)·log σ(β·δ) − ε·log σ(−β·δ), (P,). CPO, arXiv 2401.08417, Eq. 3, with smoothed labels."""
    return _smoothed_logistic(numbers.beta * margins, numbers.label_smoothing)


def hinge_loss(margins: torch.Tensor, numbers: MarginNumbers) -> torch.Tensor:
    """Returns max(0, 1 − β·δ), (P,). SLiC-HF, arXiv 2305.10425."""
    return torch.relu(1 - numbers.beta * margins)


def ipo_loss(margins: torch.Tensor, numbers: MarginNumbers) -> torch.Tensor:
    """Returns (δ − 1 / (2β))², (P,). IPO, arXiv 2310.12036, Eq. 17 (τ there is β), without a reference."""
    return (margins - 1 / (2 * numbers.beta)) ** 2


def target_margin_loss(margins: torch.Tensor, numbers: MarginNumbers) -> torch.Tensor:
    """Returns −(1−ε)·log σ(β·δ − γ) − ε·log σ(γ − β·δ), (P,).

    SimPO, arXiv 2405.14734, Eq. 6, and TPO-L, arXiv 2405.16681, with smoothed labels.
    """
    return _smoothed_logistic(numbers.beta * margins - numbers.target_margin, numbers.label_smoothing)


def _smoothed_logistic(x: torch.Tensor, eps: float) -> torch.Tensor:
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


MARGIN_LOSSES: dict[str, Callable[[torch.Tensor, MarginNumbers], torch.Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "simpo": target_margin_loss,
    "tpo-l": target_margin_loss,
}
# Those whose log-likelihoods are means over tokens, and those that take no smoothed labels.
PER_TOKEN = frozenset({"ipo", "simpo", "tpo-l"})
WITHOUT_SMOOTHING = frozenset({"hinge", "ipo"})
CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")
TPO_LOSSES = ("sigmoid", "hinge", "ipo", "tpo-l")


def log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    """Returns log(p / (1 − p)) (P,) of probabilities p whose logarithms x (P,) are at most 0, with all digits.

    That is x − log(1 − e^x), and its derivative 1 / (1 − e^x). Where p is 1 it is the largest finite one, without
    gradient.
    """
    below_zero = logprobs.clamp(max=-torch.finfo(logprobs.dtype).tiny)
    return with_derivative(lambda x: x - torch.log(-torch.expm1(x)), lambda x: -1 / torch.expm1(x), below_zero)


@dataclass(frozen=True)
class ReferenceFreeLossConfig:
    """Holds what the losses have in common; a subclass has the fields of its method's config, and the pair's loss.

    Raises:
        ValueError: a number is out of range.
    """

    beta: float = 0.1

    # Whether the learned tokens are those of prompts too, and whose completions' they are.
    learns_prompts: ClassVar[bool] = False
    learned: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def is_per_token(self) -> bool:
        """Says whether a completion's log-likelihood is the mean over its tokens, instead of their sum."""
        return True

    @property
    def likelihood_weight(self) -> float:
        """Returns the weight of the learned tokens' mean negative log-likelihood."""
        return 1.0

    @property
    def num_completions(self) -> int:
        """Returns how many completions of a prompt the loss reads."""
        return 2

    @property
    def outputs(self) -> tuple[str, ...]:
        """Returns the per-token values that the metrics read, by the names that `linear_logprob` knows them under."""
        return ("logprobs", "mean_logits")

    def shaped(self, likelihoods: torch.Tensor) -> torch.Tensor:
        """Returns R(l) of log-likelihoods l, any shape."""
        return likelihoods

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Computes the losses (P,) of pairs from their log-likelihoods l_c and l_r (P,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ORPOLossConfig(ReferenceFreeLossConfig):
    """Holds the settings of ORPO, arXiv 2403.07691, Eqs. 6 and 7; `beta` is λ there.

    The learned tokens are those of prompts and chosen completions.
    """

    learns_prompts: ClassVar[bool] = True

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Returns −β·log σ(log odds(l_c) − log odds(l_r)), (P,), with odds(l) = e^l / (1 − e^l)."""
        return -self.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@dataclass(frozen=True)
class CPOLossConfig(ReferenceFreeLossConfig):
    """Holds the settings of CPO. The fields have the names, meanings and defaults of `CPOConfig`.

    The learned tokens are those of chosen completions. With `alpha`, a completion's reward is that of AlphaPO.

    Raises:
        ValueError: loss_type is unknown, or a number out of range.
    """

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_margin_loss(self, CPO_LOSSES)

    @property
    def target_margin(self) -> float:
        """Returns γ."""
        return self.simpo_gamma

    @property
    def is_per_token(self) -> bool:
        """Says whether a completion's log-likelihood is the mean over its tokens."""
        return self.loss_type in PER_TOKEN

    @property
    def likelihood_weight(self) -> float:
        """Returns the weight of the learned tokens."""
        return self.cpo_alpha

    def shaped(self, likelihoods: torch.Tensor) -> torch.Tensor:
        """Returns (1 − e^(−α·l)) / α of log-likelihoods l, any shape; l where α is 0. AlphaPO, arXiv 2501.03884.

        The exponent is capped at 80.
        """
        if self.alpha == 0:
            return likelihoods
        return -expm1((-self.alpha * likelihoods).clamp(max=_LARGEST_EXPONENT)) / self.alpha

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Computes the losses (P,) of margins (P,)."""
        return MARGIN_LOSSES[self.loss_type](self.shaped(chosen) - self.shaped(rejected), self)


@dataclass(frozen=True)
class TPOLossConfig(ReferenceFreeLossConfig):
    """Holds the settings of TPO, arXiv 2405.16681. The fields have the names, meanings and defaults of `TPOConfig`.

    The learned tokens are those of the third, the gold completion; with `tpo_alpha` 0 there are two only.

    Raises:
        ValueError: loss_type is unknown, or a number out of range.
    """

    beta: float = 0.01
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    tpo_alpha: float = 1.0
    tpo_l_gamma: float = 0.5

    learned: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_margin_loss(self, TPO_LOSSES)

    @property
    def target_margin(self) -> float:
        """Returns γ."""
        return self.tpo_l_gamma

    @property
    def is_per_token(self) -> bool:
        """Says whether a completion's log-likelihood is the mean over its tokens."""
        return self.loss_type in PER_TOKEN

    @property
    def likelihood_weight(self) -> float:
        """Returns the weight of the learned tokens."""
        return self.tpo_alpha

    @property
    def num_completions(self) -> int:
        """Returns how many completions of a prompt the loss reads."""
        return 3 if self.tpo_alpha else 2

    @property
    def outputs(self) -> tuple[str, ...]:
        """Returns the per-token values that the metrics read."""
        return ("logprobs", "entropy", "mean_logits", "is_top1")

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Computes the losses (P,) of margins (P,)."""
        return MARGIN_LOSSES[self.loss_type](chosen - rejected, self)


def _check_margin_loss(config: CPOLossConfig | TPOLossConfig, known: tuple[str, ...]) -> None:
    """Checks the name of a loss of margins and its numbers; warns, as TRL does, of smoothing that it does not take."""
    name = config.loss_type
    if name not in known:
        hint = did_you_mean(str(name), known) or "."
        raise ValueError(f"loss_type={name!r} is unknown; expected one of {', '.join(known)}{hint}")
    if name == "ipo" and config.beta == 0:
        raise ValueError("beta=0: loss_type='ipo' divides by it; expected a number > 0")
    if name in WITHOUT_SMOOTHING and config.label_smoothing:
        warnings.warn(
            f"label_smoothing={config.label_smoothing} has no effect on loss_type={name!r}; set it to 0.", stacklevel=4
        )


def reference_free_loss(
    scores: TokenScores,
    inputs: CompletionLossInputs,
    config: ReferenceFreeLossConfig,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the loss of a batch, 0-d, in the dtype of `scores.logprobs` (N,). Nothing here waits for the device.

    With `rows` (R,), the numbers of consecutive tokens that are all those of some prompts' completions, `scores` holds
    only theirs, and the answer is those prompts' share: the shares of all prompts sum to the loss.
    """
    part = ALL if rows is None else rows
    losses = config.pair_losses(*_likelihoods(scores.logprobs, inputs, config, part))
    if rows is not None:
        losses = torch.where(inputs.has_rows(rows), losses, 0)
    loss = losses.mean()
    if config.likelihood_weight:
        loss = loss + config.likelihood_weight * _learned(scores.logprobs, inputs, config, part).mean()
    return loss


def _likelihoods(
    logprobs: torch.Tensor, inputs: CompletionLossInputs, config: ReferenceFreeLossConfig, rows: Rows = ALL
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns l_c and l_r (P,) from the log-probabilities (R,) of the tokens `rows`."""
    found = (inputs.means if config.is_per_token else inputs.sums)(logprobs, rows).view(-1, inputs.width)
    return found[:, 0], found[:, 1]


def _learned(
    logprobs: torch.Tensor, inputs: CompletionLossInputs, config: ReferenceFreeLossConfig, rows: Rows = ALL
) -> Metric:
    """Returns the negative log-likelihood of the learned ones among the tokens `rows`, over the count of all."""
    learned = inputs.of(config.learned, with_prompts=config.learns_prompts)
    return Metric(-torch.where(learned[rows], logprobs, 0).sum(), learned.sum(dtype=logprobs.dtype))


@torch.no_grad()
def reference_free_metrics(
    scores: TokenScores, inputs: CompletionLossInputs, config: ReferenceFreeLossConfig
) -> dict[str, Metric]:
    """Computes the metrics of ORPO and CPO of a batch in TRL's order under TRL's names, left on the device.

    scores: values (N,) float32.
    """
    chosen, rejected = _likelihoods(scores.logprobs, inputs, config)
    logits = _logit_metrics(scores, inputs)
    found = {
        **_reward_metrics(chosen, rejected, config),
        "logps/rejected": _mean(rejected),
        "logps/chosen": _mean(chosen),
        "logits/rejected": logits["logits/rejected"],
        "logits/chosen": logits["logits/chosen"],
        "nll_loss": _learned(scores.logprobs, inputs, config),
    }
    if not config.likelihood_weight:
        found["nll_loss"] = Metric.over(torch.zeros_like(found["nll_loss"].total), 1)
    if isinstance(config, ORPOLossConfig):
        difference = log_odds(chosen) - log_odds(rejected)
        found |= {"log_odds_ratio": _mean(F.logsigmoid(difference)), "log_odds_chosen": _mean(difference)}
    return found


@torch.no_grad()
def tpo_metrics(scores: TokenScores, inputs: CompletionLossInputs, config: TPOLossConfig) -> dict[str, Metric]:
    """Computes the metrics of TPO of a batch in TRL's order under TRL's names, left on the device.

    scores: values (N,) float32.
    """
    chosen, rejected = _likelihoods(scores.logprobs, inputs, config)
    return {
        "entropy": _mean(required(scores.entropy)),
        **_logit_metrics(scores, inputs),
        "mean_token_accuracy": _masked(required(scores.is_top1).float(), inputs.of(0)),
        **_reward_metrics(chosen, rejected, config),
        "logps/chosen": _mean(chosen),
        "logps/rejected": _mean(rejected),
    }


def _reward_metrics(
    chosen: torch.Tensor, rejected: torch.Tensor, config: ReferenceFreeLossConfig
) -> dict[str, Metric]:
    chosen_rewards, rejected_rewards = (config.beta * config.shaped(each) for each in (chosen, rejected))
    return {
        "rewards/chosen": _mean(chosen_rewards),
        "rewards/rejected": _mean(rejected_rewards),
        "rewards/accuracies": _mean((chosen_rewards > rejected_rewards).float()),
        "rewards/margins": _mean(chosen_rewards - rejected_rewards),
    }


def _logit_metrics(scores: TokenScores, inputs: CompletionLossInputs) -> dict[str, Metric]:
    logits = required(scores.mean_logits)
    return {f"logits/{side}": _masked(logits, inputs.of(number)) for number, side in enumerate(("chosen", "rejected"))}


def _mean(values: torch.Tensor) -> Metric:
    return Metric.over(values.sum(), len(values))


def _masked(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).sum(), mask.sum(dtype=values.dtype))
