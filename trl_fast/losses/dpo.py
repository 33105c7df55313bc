"""Computes the losses and metrics of direct preference optimisation and its relatives.

Notation of the docstrings: P pairs, S = 2P sequences (the chosen completion of pair i is sequence 2i, the rejected
one 2i + 1), N scored tokens. For a completion y of a prompt, log π(y) is the sum of its tokens' log-probabilities
under the policy, log π_ref(y) under the reference; r = log π(y) − log π_ref(y) is its log-ratio; s(r) its score under
the f-divergence (r itself for the reverse KL); subscripts c and r stand for chosen and rejected; δ = s_c − s_r is
`score_margins`; x = β·δ; σ is the logistic function; ε is `label_smoothing`.

To add a loss: write its formula as a function of `PreferencePairs` and `DPOLossConfig`, and enter it in `PAIR_LOSSES`;
in `F_DIVERGENCE_LOSSES` too, if it reads scores through δ only.
The losses that also have kernels have their formulas in `trl_fast.ops.pair_formulas`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trl_fast.ops import TokenScores, pair_loss
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
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.ranges import check_ranges

from .f_divergences import F_DIVERGENCES
from .loss_inputs import ALL, PreferenceLossInputs
from .mean_metric import Metric


@dataclass(frozen=True)
class DPOLossConfig:
    """Holds the settings of the loss. The fields have the names, meanings and defaults of `DPOConfig`.

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
            hint = did_you_mean(str(unknown[0]), PAIR_LOSSES) if unknown else ""
            raise ValueError(
                f"loss_type={list(self.loss_type)!r}: expected one or more of {', '.join(PAIR_LOSSES)}{hint or '.'}"
            )
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
        """Says whether the loss can be taken pair by pair.

        The aot losses sort the batch, and the batch's likelihood does not know which pair's weight it has.
        """
        names = set(self.loss_type)
        return not names & {"aot", "aot_unpaired"} and not (self.use_weighting and "sft" in names)

    @property
    def is_mean_over_pairs(self) -> bool:
        """Says whether a pair counts the same whichever pairs are beside it.

        The aot losses sort the batch, and the mean over chosen tokens of sft is one of the batch's tokens.
        """
        return not {"aot", "aot_unpaired", "sft"} & set(self.loss_type)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Returns the per-token values that `dpo_loss` reads, by the names that `linear_logprob` knows them under."""
        outputs = ("logprobs", "entropy", "mean_logits", "is_top1")
        return (*outputs, "log_sum_sq_probs") if self.use_weighting else outputs


@dataclass(frozen=True)
class PreferencePairs(PairValues):
    """Holds what a pair loss may read: `PairValues`, and a number of the whole batch.

    The lengths count completion tokens after truncation, also a first token that nothing predicts.
    `mean_chosen_token_logprob` (0-d) is the mean log-probability over all scored chosen tokens of the batch.
    """

    mean_chosen_token_logprob: torch.Tensor


# The losses: each takes the pairs and gives (P,) float32, one value a pair.


def aot_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """Computes AOT, paired, arXiv 2406.05882: sorted policy margins against sorted reference margins of the batch.

    d = sort(log π(y_c) − log π(y_r)) − sort(log π_ref(y_c) − log π_ref(y_r)).
    """
    margins = pairs.chosen_logprobs - pairs.rejected_logprobs
    ref_margins = pairs.ref_chosen_logprobs - pairs.ref_rejected_logprobs
    return _smoothed_logistic(margins.sort().values - ref_margins.sort().values, config)


def aot_unpaired_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """Computes AOT, unpaired, arXiv 2406.05882: d = sort(r_c) − sort(r_r) over the batch."""
    return _smoothed_logistic(pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values, config)


def _smoothed_logistic(difference: torch.Tensor, config: DPOLossConfig) -> torch.Tensor:
    x, eps = config.beta * difference, config.label_smoothing
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def sft_loss(pairs: PreferencePairs, config: DPOLossConfig) -> torch.Tensor:
    """Computes the mean negative log-likelihood of all chosen tokens of the batch, the same for every pair.

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


def dpo_loss(
    scores: TokenScores,
    inputs: PreferenceLossInputs,
    ref_sequence_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums the configured losses, weighted, each averaged over the pairs: 0-d, the dtype of `scores.logprobs`.

    `scores` holds the values (N,) that `config.outputs` names; `ref_sequence_logprobs` (S,) comes from
    `PreferenceLossInputs.sequence_logprobs` with the same `ld_alpha`. Nothing here waits for the device.

    With `rows` (R,), the numbers of consecutive tokens that are all tokens of some pairs, `scores` holds only theirs,
    and the answer is those pairs' share: the shares of all pairs sum to the loss. Losses for which that is not so are
    those of which `config.is_sum_over_pairs` is False.
    """
    part = ALL if rows is None else rows
    ref_logprobs = ref_sequence_logprobs.detach()
    present = None if rows is None else inputs.has_rows(rows)
    if config.use_weighting:
        weights = _pair_weights(scores, inputs, part)
    loss = scores.logprobs.new_zeros(())
    fused = _kernel_losses(scores.logprobs, inputs, ref_logprobs, config, part)
    pairs = None if fused else _pairs(scores.logprobs, inputs, ref_logprobs, config, part)
    for name, loss_weight in zip(config.loss_type, config.loss_weights or (), strict=True):
        losses = fused[name] if fused else PAIR_LOSSES[name](pairs, config)
        if config.use_weighting:
            losses = losses * weights
        if inputs.pair_weights is not None:
            losses = losses * inputs.pair_weights
        # The likelihood of a batch is in every pair; its share is made up of the tokens that are there.
        if present is not None and name != "sft":
            losses = torch.where(present, losses, 0)
        loss = loss + loss_weight * losses.mean()
    return loss


def dpo_metrics(
    scores: TokenScores, inputs: PreferenceLossInputs, ref_sequence_logprobs: torch.Tensor, config: DPOLossConfig
) -> dict[str, Metric]:
    """Computes the metrics of a batch in TRL's order under TRL's names, detached and left on the device.

    scores: of N tokens; ref_sequence_logprobs: (S,) float32.
    """
    with torch.no_grad():
        pairs = _pairs(scores.logprobs, inputs, ref_sequence_logprobs, config, ALL)
        return {**_token_metrics(scores, inputs), **_reward_metrics(pairs, config.beta)}


def _kernel_losses(
    logprobs: torch.Tensor,
    inputs: PreferenceLossInputs,
    ref_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | slice,
) -> dict[str, torch.Tensor]:
    """Computes the losses (P,) by name with the fused kernels; returns nothing where one has no kernel.

    On a CPU the few operations on [N] vectors cost nothing; on a GPU each is a launch.
    """
    plain = config.f_divergence_type == "reverse_kl" and config.ld_alpha is None
    if not (plain and kernels_serve(logprobs) and set(config.loss_type) <= PAIR_FORMULAS.keys()):
        return {}
    cu_seqlens = F.pad(inputs.scored_lengths.cumsum(0), (1, 0))
    if isinstance(rows, torch.Tensor):
        # The sequences outside lose their tokens: their ends fall together.
        cu_seqlens = (cu_seqlens - rows[0]).clamp(0, len(rows))
    vectors = (logprobs, cu_seqlens, ref_logprobs, inputs.branch_lengths)
    numbers = {name: getattr(config, name) for name in ("beta", "label_smoothing", "discopop_tau")}
    return {name: pair_loss(*vectors, loss_type=name, **numbers).losses for name in config.loss_type}


def kernels_serve(logprobs: torch.Tensor) -> bool:
    """Says whether the fused pair losses take these log-probabilities: (N,) float32 on a GPU."""
    return logprobs.is_cuda and logprobs.dtype == torch.float32


def _pairs(
    token_logprobs: torch.Tensor,
    inputs: PreferenceLossInputs,
    ref_logprobs: torch.Tensor,
    config: DPOLossConfig,
    rows: torch.Tensor | slice,
) -> PreferencePairs:
    logprobs = inputs.sequence_logprobs(token_logprobs, config.ld_alpha, rows)
    scores = F_DIVERGENCES[config.f_divergence_type](logprobs - ref_logprobs, config.f_alpha_divergence_coef)
    chosen = torch.where(inputs.is_chosen[rows], token_logprobs, 0).sum()
    mean_chosen = chosen / inputs.is_chosen.sum().clamp(min=1)
    return PreferencePairs.from_sequences(
        logprobs, ref_logprobs, scores, inputs.branch_lengths, mean_chosen_token_logprob=mean_chosen
    )


def _pair_weights(scores: TokenScores, inputs: PreferenceLossInputs, rows: torch.Tensor | slice) -> torch.Tensor:
    """Computes w_c·w_r (P,) without gradient, w = exp(mean over tokens of log p − log Σp²).

    WPO, arXiv 2406.11827, Eq. 2.
    """
    aligned = scores.logprobs.detach() - required(scores.log_sum_sq_probs).detach()
    weights = torch.exp(inputs.sums(aligned, rows) / inputs.scored_lengths.clamp(min=1))
    return weights[0::2] * weights[1::2]


def _token_metrics(scores: TokenScores, inputs: PreferenceLossInputs) -> dict[str, Metric]:
    chosen = inputs.is_chosen
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
