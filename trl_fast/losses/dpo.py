"""Direct preference optimisation and its relatives: from per-token log-probabilities to a loss and its metrics.

Notation of the docstrings: P pairs, S = 2P sequences (the chosen completion of pair i is sequence 2i, the rejected
one 2i + 1), N scored tokens. For a completion y of a prompt, log π(y) is the sum of its tokens' log-probabilities
under the policy, log π_ref(y) under the reference; r = log π(y) − log π_ref(y) is its log-ratio; s(r) its score under
the f-divergence (r itself for the reverse KL); subscripts c and r stand for chosen and rejected; δ = s_c − s_r;
x = β·δ; σ is the logistic function; ε is `label_smoothing`.

To add a loss: write its formula as a function of `PreferencePairs` and `DPOLossConfig`, and enter it in `PAIR_LOSSES`.
The losses that also have kernels have their formulas in `trl_fast.ops.pair_formulas`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F

from trl_fast.ops import pair_loss
from trl_fast.ops.pair_formulas import (
    PAIR_FORMULAS,
    PairValues,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    check_pair_parameters,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    sppo_hard_loss,
)
from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .mean_metric import Metric

# All tokens of a batch.
ALL = slice(None)


@dataclass(frozen=True)
class DPOLossConfig:
    """What to minimise. The fields have the names, meanings and defaults of `DPOConfig`.

    `loss_type` is one name of `PAIR_LOSSES` or several, summed with `loss_weights` (1 each if None). Raises ValueError
    for values that no loss can take; warns where TRL only warns.
    """

    loss_type: tuple[str, ...] | list[str] | str = ("sigmoid",)
    loss_weights: tuple[float, ...] | list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        names = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        object.__setattr__(self, "loss_type", names)
        weights = self.loss_weights
        weights = (1.0,) * len(names) if weights is None else tuple(weights)
        object.__setattr__(self, "loss_weights", weights)
        self._check_names(weights)
        self._check_numbers()

    def _check_names(self, weights: tuple[float, ...]) -> None:
        unknown = [name for name in self.loss_type if name not in PAIR_LOSSES]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={list(self.loss_type)!r}: expected one or more of {', '.join(PAIR_LOSSES)}.")
        if len(weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights={list(weights)!r} has {len(weights)} values for the "
                f"{len(self.loss_type)} losses of loss_type={list(self.loss_type)!r}; expected one weight a loss."
            )
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} is unknown; expected one of {', '.join(F_DIVERGENCES)}."
            )
        without_divergence = [name for name in self.loss_type if name not in F_DIVERGENCE_LOSSES]
        if self.f_divergence_type != "reverse_kl" and without_divergence:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} does not apply to loss_type={without_divergence!r}: "
                "those losses see chosen and rejected apart, so the divergence's normaliser does not cancel. Expected "
                f"'reverse_kl', or losses among {', '.join(sorted(F_DIVERGENCE_LOSSES))}."
            )
        sorting = [name for name in self.loss_type if name in ("aot", "aot_unpaired")]
        if self.use_weighting and sorting:
            raise ValueError(
                f"use_weighting=True does not apply to loss_type={sorting!r}, which sorts the batch and so loses "
                "track of the pairs that the weights belong to. Set use_weighting=False or choose another loss."
            )

    def _check_numbers(self) -> None:
        check_ranges(self)
        check_pair_parameters(self.loss_type, self)
        if "robust" in self.loss_type and self.label_smoothing > 0.5:
            warnings.warn(
                f"label_smoothing={self.label_smoothing} turns the preferences of loss_type='robust' around; its "
                "paper expects a number in [0, 0.5).",
                stacklevel=4,
            )

    @property
    def is_sum_over_pairs(self) -> bool:
        """Whether the loss can be taken pair by pair.

        The aot losses sort the batch, and the batch's likelihood does not know which pair's weight it has.
        """
        names = set(self.loss_type)
        return not names & {"aot", "aot_unpaired"} and not (self.use_weighting and "sft" in names)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The per-token values that `dpo_loss` reads, by the names that `linear_logprob` knows them under."""
        outputs = ("logprobs", "entropy", "mean_logits", "is_top1")
        return (*outputs, "log_sum_sq_probs") if self.use_weighting else outputs


class TokenScores(Protocol):
    """Per-token values (N,) of the policy: `is_top1` bool, the others float32; None for those not asked for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    log_sum_sq_probs: torch.Tensor | None
    mean_logits: torch.Tensor | None
    is_top1: torch.Tensor | None


@dataclass(frozen=True)
class PreferencePairs(PairValues):
    """What a pair loss may read: `PairValues`, and what only losses of the whole batch need.

    The lengths count completion tokens after truncation, also a first token that nothing predicts.
    `mean_chosen_token_logprob` (0-d) is the mean log-probability over all scored chosen tokens of the batch.
    """

    mean_chosen_token_logprob: torch.Tensor


# The f-divergences, arXiv 2309.16240: s(r) = f'(e^r) up to a constant, which cancels in δ. (P,) to (P,).


def reverse_kl_score(logratios: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    """r."""
    return logratios


def forward_kl_score(logratios: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    """1 − e^(−r)."""
    return 1 - torch.exp(-logratios)


def js_divergence_score(logratios: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    """log(2·e^r / (1 + e^r)) = log 2 + log σ(r)."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence_score(logratios: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    """(e^((α−1)·r) − 1) / (α − 1), the exponent capped at 80 so that it stays finite; r in the limit α = 1."""
    power = config.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return logratios
    return (torch.exp((power * logratios).clamp(max=80)) - 1) / power


F_DIVERGENCES: dict[str, Callable[[torch.Tensor, DPOLossConfig], torch.Tensor]] = {
    "reverse_kl": reverse_kl_score,
    "forward_kl": forward_kl_score,
    "js_divergence": js_divergence_score,
    "alpha_divergence": alpha_divergence_score,
}


# The losses: each takes the pairs and gives (P,), one value a pair.


def aot_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """AOT, paired, arXiv 2406.05882: sorted policy margins against sorted reference margins of the batch.

    d = sort(log π(y_c) − log π(y_r)) − sort(log π_ref(y_c) − log π_ref(y_r)).
    """
    margins = pairs.chosen_logprobs - pairs.rejected_logprobs
    ref_margins = pairs.ref_chosen_logprobs - pairs.ref_rejected_logprobs
    return _smoothed_logistic(margins.sort().values - ref_margins.sort().values, config)


def aot_unpaired_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """AOT, unpaired, arXiv 2406.05882: d = sort(r_c) − sort(r_r) over the batch."""
    return _smoothed_logistic(pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values, config)


def _smoothed_logistic(difference: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    x, eps = config.beta * difference, config.label_smoothing
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def sft_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """The mean negative log-likelihood of all chosen tokens of the batch, the same for every pair.

    The likelihood term of RPO, arXiv 2404.19733. A mean over the tokens of one micro-batch, so it depends on how
    gradient accumulation cuts the batch, as TRL's does.
    """
    return -pairs.mean_chosen_token_logprob.expand_as(pairs.chosen_logprobs)


PAIR_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "robust": robust_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
    "sigmoid_norm": sigmoid_norm_loss,
}

# Losses that read the scores only through their difference, or not at all.
F_DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})


@dataclass(frozen=True, eq=False)
class PreferenceTable:
    """Which of N scored tokens belongs to which of S = 2P sequences: the int64 tensors of a `TokenBatch`.

    branch, offset: (N,), tokens ordered by sequence; branch_lengths: (S,).
    """

    branch: torch.Tensor
    offset: torch.Tensor
    branch_lengths: torch.Tensor

    def __len__(self) -> int:
        """The number of pairs P."""
        return len(self.branch_lengths) // 2

    @cached_property
    def scored_lengths(self) -> torch.Tensor:
        """How many scored tokens each sequence has, (S,) int64."""
        return self.sums(torch.ones_like(self.branch))

    @cached_property
    def is_chosen(self) -> torch.Tensor:
        """Whether a token belongs to a chosen completion, (N,) bool."""
        return self.branch % 2 == 0

    def sums(self, values: torch.Tensor, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
        """Sums by sequence, (S,), of values (R,) of the tokens `rows`."""
        return values.new_zeros(len(self.branch_lengths)).index_add(0, self.branch[rows], values)

    def sequence_logprobs(
        self, token_logprobs: torch.Tensor, ld_alpha: float | None = None, rows: torch.Tensor | slice = ALL
    ) -> torch.Tensor:
        """Log-probabilities of the sequences, (S,), from those of the tokens `rows`, (R,).

        With `ld_alpha`, a pair's tokens beyond the length that its two completions share count α instead of 1
        (LD-DPO, arXiv 2409.06411); lengths are then those of the scored tokens.
        """
        if ld_alpha is not None:
            shared_lengths = self.scored_lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
            branch = self.branch[rows]
            rank = self.offset[rows] - (self.branch_lengths - self.scored_lengths)[branch]
            token_logprobs = torch.where(rank < shared_lengths[branch], token_logprobs, ld_alpha * token_logprobs)
        return self.sums(token_logprobs, rows)


def dpo_loss(
    scores: TokenScores,
    table: PreferenceTable,
    ref_sequence_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of the configured losses, each averaged over the pairs: 0-d, the dtype of `scores.logprobs`.

    `scores` holds the values (N,) that `config.outputs` names; `ref_sequence_logprobs` (S,) comes from
    `PreferenceTable.sequence_logprobs` with the same `ld_alpha`. Nothing here waits for the device.

    With `rows` (R,), the numbers of consecutive tokens that are all tokens of some pairs, `scores` holds only theirs,
    and the answer is those pairs' share: the shares of all pairs sum to the loss. Losses for which that is not so are
    those of which `config.is_sum_over_pairs` is False.
    """
    part = ALL if rows is None else rows
    ref_logprobs = ref_sequence_logprobs.detach()
    present = None if rows is None else _present_pairs(table, rows)
    if config.use_weighting:
        weights = _pair_weights(scores, table, part)
    loss = scores.logprobs.new_zeros(())
    fused = _kernel_losses(scores.logprobs, table, ref_logprobs, config, part)
    pairs = None if fused else _pairs(scores.logprobs, table, ref_logprobs, config, part)
    for name, loss_weight in zip(config.loss_type, config.loss_weights or (), strict=True):
        losses = fused[name] if fused else PAIR_LOSSES[name](pairs, config)
        if config.use_weighting:
            losses = losses * weights
        # The likelihood of a batch is in every pair; its share is made up of the tokens that are there.
        if present is not None and name != "sft":
            losses = torch.where(present, losses, 0)
        loss = loss + loss_weight * losses.mean()
    return loss


def _present_pairs(table: PreferenceTable, rows: torch.Tensor) -> torch.Tensor:
    """Which pairs (P,) bool have tokens among `rows`; those that have none anywhere go with the first token."""
    present = table.sums(torch.ones_like(rows), rows).view(-1, 2).sum(1) > 0
    without_tokens = table.scored_lengths.view(-1, 2).sum(1) == 0
    return present | (without_tokens & (rows[0] == 0))


def dpo_metrics(
    scores: TokenScores, table: PreferenceTable, ref_sequence_logprobs: torch.Tensor, config: DPOLossConfig
) -> dict[str, Metric]:
    """The metrics of a batch in TRL's order under TRL's names, detached and left on the device."""
    with torch.no_grad():
        pairs = _pairs(scores.logprobs, table, ref_sequence_logprobs, config, ALL)
        return {**_token_metrics(scores, table), **_reward_metrics(pairs, config.beta)}


def _kernel_losses(
    logprobs: torch.Tensor,
    table: PreferenceTable,
    ref_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | slice,
) -> dict[str, torch.Tensor]:
    """The losses (P,) by name from the fused kernels, where there are kernels for all of them; else nothing.

    On a CPU the few operations on [N] vectors cost nothing; on a GPU each is a launch.
    """
    plain = config.f_divergence_type == "reverse_kl" and config.ld_alpha is None
    if not (plain and kernels_serve(logprobs) and set(config.loss_type) <= PAIR_FORMULAS.keys()):
        return {}
    cu_seqlens = F.pad(table.scored_lengths.cumsum(0), (1, 0))
    if isinstance(rows, torch.Tensor):
        # The sequences outside lose their tokens: their ends fall together.
        cu_seqlens = (cu_seqlens - rows[0]).clamp(0, len(rows))
    vectors = (logprobs, cu_seqlens, ref_logprobs, table.branch_lengths)
    numbers = {name: getattr(config, name) for name in ("beta", "label_smoothing", "discopop_tau")}
    return {name: pair_loss(*vectors, loss_type=name, **numbers).losses for name in config.loss_type}


def kernels_serve(logprobs: torch.Tensor) -> bool:
    """Whether the fused pair losses are there for these log-probabilities."""
    return logprobs.is_cuda and logprobs.dtype == torch.float32


def _pairs(
    token_logprobs: torch.Tensor,
    table: PreferenceTable,
    ref_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | slice,
) -> PreferencePairs:
    logprobs = table.sequence_logprobs(token_logprobs, config.ld_alpha, rows)
    scores = F_DIVERGENCES[config.f_divergence_type](logprobs - ref_logprobs, config)
    chosen = torch.where(table.is_chosen[rows], token_logprobs, 0).sum()
    mean_chosen = chosen / table.is_chosen.sum().clamp(min=1)
    return PreferencePairs.from_sequences(
        logprobs, ref_logprobs, scores, table.branch_lengths, mean_chosen_token_logprob=mean_chosen
    )


def _pair_weights(scores: TokenScores, table: PreferenceTable, rows: torch.Tensor | slice) -> torch.Tensor:
    """w_c·w_r (P,) without gradient, w = exp(mean over tokens of log p − log Σp²). WPO, arXiv 2406.11827, Eq. 2."""
    aligned = scores.logprobs.detach() - required(scores.log_sum_sq_probs).detach()
    weights = torch.exp(table.sums(aligned, rows) / table.scored_lengths.clamp(min=1))
    return weights[0::2] * weights[1::2]


def _token_metrics(scores: TokenScores, table: PreferenceTable) -> dict[str, Metric]:
    chosen = table.is_chosen
    return {
        "entropy": _masked_sum(required(scores.entropy), torch.ones_like(chosen)),
        "logits/chosen": _masked_sum(required(scores.mean_logits), chosen),
        "logits/rejected": _masked_sum(required(scores.mean_logits), ~chosen),
        "mean_token_accuracy": _masked_sum(required(scores.is_top1).float(), chosen),
    }


def _masked_sum(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(torch.where(mask, values, 0).sum(), mask.sum(dtype=values.dtype))


def _reward_metrics(pairs: PreferencePairs, beta: float) -> dict[str, Metric]:
    chosen_rewards, rejected_rewards = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": pairs.chosen_logprobs,
        "logps/rejected": pairs.rejected_logprobs,
    }
    return {name: Metric(value.sum(), torch.ones_like(value).sum()) for name, value in values.items()}
