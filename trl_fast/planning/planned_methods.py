"""Runs each method's step on fake models: the trainers' own step functions, after the passes that come before them.

A method is planned by two functions in PLANNED. `inputs` makes real micro-batches of sequences that are all as long as
they may be. `loss` runs the passes without gradient that a step of the method needs, names the stage of each, and then
calls the method's step function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trl_fast.data import TokenBatch
from trl_fast.data.aligned_tokens import SpanRows
from trl_fast.data.unpaired_preference import BOTH
from trl_fast.lazy_imports import import_place
from trl_fast.losses.bco import BCOLossConfig
from trl_fast.losses.dpo import DPOLossConfig
from trl_fast.losses.iw_opd import IWOPDLossConfig
from trl_fast.losses.kto import KTOLossConfig
from trl_fast.losses.policy_gradient import PolicyLossConfig
from trl_fast.losses.reference_free import CPOLossConfig, ORPOLossConfig, TPOLossConfig
from trl_fast.losses.sft import nll_loss
from trl_fast.losses.uld import SortedDistance
from trl_fast.modeling.classifier_head import read_head
from trl_fast.modeling.distillation import DivergenceSettings, TeacherStates, teacher_states
from trl_fast.modeling.policy_and_value import PolicyAndValue
from trl_fast.modeling.reference_policy import reference_scope
from trl_fast.modeling.scoring import score
from trl_fast.modeling.span_distance import SpanComparison
from trl_fast.ops import TokenScores
from trl_fast.trainers.base.reference import reference_scores
from trl_fast.trainers.base.running_mean import Mean
from trl_fast.trainers.distillation.cross_tokenizer import SpanUpdate
from trl_fast.trainers.distillation.iw_opd_step import IWOPDUpdate
from trl_fast.trainers.distillation.server_step import ServerUpdate
from trl_fast.trainers.distillation.step import DistillationUpdate
from trl_fast.trainers.dpo import preference_loss_inputs
from trl_fast.trainers.kto import sequence_logprobs
from trl_fast.trainers.methods import METHODS
from trl_fast.trainers.self_distillation.arguments import SAMPLED_TOKEN
from trl_fast.trainers.self_distillation.sdpo_update import SDPOUpdate
from trl_fast.trainers.self_distillation.step import SelfDistillationSettings, SelfDistillationUpdate

from .device_batches import on_device
from .example_batches import (
    PlannedLayout,
    good_and_bad_batch,
    labelled_batch,
    pair_micro_batch,
    policy_micro_batch,
    ppo_micro_batch,
    preference_batch,
    reward_pairs,
    unpaired_batch,
    value_micro_batch,
)
from .generation import simulate_generation
from .memory_timeline import OLD_STAGE, REFERENCE_STAGE, TEACHER_STAGE, VALUES_STAGE
from .training_setup import TrainingSetup

Enter = Callable[[str], None]
_REFERENCE_FREE = {"orpo": ORPOLossConfig, "cpo": CPOLossConfig, "tpo": TPOLossConfig}


@dataclass(frozen=True)
class PlannedModels:
    """Holds the models of a step: the policy (of reward: the classifier), its reference and its value model, if any.

    layout: of the batches of all of them.
    """

    policy: PreTrainedModel | PeftModel
    layout: PlannedLayout
    reference: PreTrainedModel | None = None
    value: PreTrainedModel | None = None

    @property
    def trained(self) -> list[torch.nn.Module]:
        """Lists the models that train."""
        return [self.policy] if self.value is None else [self.policy, self.value]


@dataclass(frozen=True)
class PlannedMethod:
    """Describes how a method is planned.

    inputs: from setup, max_length and layout to the micro-batch's real tensors. loss: from setup, models, those inputs
    and what names a stage to the loss (0-d). unit: what a micro-batch counts. reads_images: whether its prompts may
    have images.
    """

    inputs: Callable[[TrainingSetup, int, PlannedLayout], Any]
    loss: Callable[[TrainingSetup, PlannedModels, Any, Enter], torch.Tensor]
    unit: str
    reads_images: bool = False


def _step(setup: TrainingSetup) -> Callable[..., Any]:
    """Returns the step function of the method, which its trainer calls too."""
    return import_place(METHODS[setup.method].step)


def _under_autocast(setup: TrainingSetup, model: torch.nn.Module) -> Callable[..., Any]:
    """Wraps a model's forward in autocast, as accelerate does."""

    def forward(**inputs: object) -> Any:
        with setup.autocast():
            return model(**inputs)

    return forward


@torch.no_grad()
def _token_logprobs(setup: TrainingSetup, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Returns the log-probs (N,) float32 of a batch's scored tokens, from a pass without gradient."""
    return score(_under_autocast(setup, model), batch, head=setup.head_options).tokens.logprobs


def _reference_logprobs(setup: TrainingSetup, models: PlannedModels, batch: Any) -> torch.Tensor:
    """Returns the same under the reference policy, which with an adapter is the policy without it."""
    model, policy = (models.policy, models.policy) if models.reference is None else (models.reference, None)
    return reference_scores(_under_autocast(setup, model), batch, policy=policy, head=setup.head_options).logprobs


def _sft_loss(setup: TrainingSetup, models: PlannedModels, batch: Any, enter: Enter) -> torch.Tensor:
    return _step(setup)(_under_autocast(setup, models.policy), batch, nll_loss, head=setup.head_options).loss


def _reward_loss(setup: TrainingSetup, models: PlannedModels, batch: Any, enter: Enter) -> torch.Tensor:
    found, _ = _step(setup)(_under_autocast(setup, models.policy), batch)
    return found.loss


def _dpo_loss(setup: TrainingSetup, models: PlannedModels, batch: Any, enter: Enter) -> torch.Tensor:
    enter(REFERENCE_STAGE)
    if setup.precompute_ref_log_probs:
        reference = torch.zeros(len(batch))
    else:
        reference = preference_loss_inputs(batch).sequence_logprobs(_reference_logprobs(setup, models, batch))
    policy = _under_autocast(setup, models.policy)
    return _step(setup)(policy, batch, reference, DPOLossConfig(), head=setup.head_options).loss


def _reference_free_loss(setup: TrainingSetup, models: PlannedModels, batch: Any, enter: Enter) -> torch.Tensor:
    policy = _under_autocast(setup, models.policy)
    return _step(setup)(policy, batch, _REFERENCE_FREE[setup.method](), head=setup.head_options).loss


def _kto_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    enter(REFERENCE_STAGE)
    batch, both = inputs.batch, inputs.batch[BOTH]
    if setup.precompute_ref_log_probs:
        reference = torch.zeros(len(batch), 2)
    else:
        reference = sequence_logprobs(both, _reference_logprobs(setup, models, both)).view(-1, 2)
    return _step(setup)(
        _under_autocast(setup, models.policy),
        batch,
        reference,
        KTOLossConfig(),
        together=inputs.together,
        head=setup.head_options,
    ).loss


def _bco_loss(setup: TrainingSetup, models: PlannedModels, batch: Any, enter: Enter) -> torch.Tensor:
    enter(REFERENCE_STAGE)
    if setup.precompute_ref_log_probs:
        reference = torch.zeros(len(batch))
    else:
        reference = sequence_logprobs(batch, _reference_logprobs(setup, models, batch))
    seen = Mean(torch.zeros(()), torch.zeros(()))
    policy = _under_autocast(setup, models.policy)
    found, _ = _step(setup)(policy, batch, reference, seen, BCOLossConfig(), learns=True, head=setup.head_options)
    return found.loss


def _policy_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of GRPO, GMPO or RLOO: generation, the scores that its loss or its rewards read, and the update."""
    if setup.generates:
        simulate_generation(setup, models.policy, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    if setup.scores_old_policy:
        enter(OLD_STAGE)
        _token_logprobs(setup, models.policy, update.batch)
    if setup.needs_reference:
        enter(REFERENCE_STAGE)
        _reference_logprobs(setup, models, update.batch)
    policy = _under_autocast(setup, models.policy)
    found, _ = _step(setup)(policy, update, policy_loss_config(setup), head=setup.head_options)
    return found.loss


def _sampled_loss(
    setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter, loss: DPOLossConfig | float
) -> torch.Tensor:
    """Runs a step of Online DPO or A*-PO: generation, the reference's scores, and the update.

    loss: what the step function reads of the arguments.
    """
    if setup.generates:
        simulate_generation(setup, models.policy, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    enter(REFERENCE_STAGE)
    _reference_logprobs(setup, models, update.batch)
    policy = _under_autocast(setup, models.policy)
    return _step(setup)(policy, update, loss, head=setup.head_options).loss


def _ppo_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of PPO: generation, the scores of the rollout by all three models, and the update of two."""
    simulate_generation(setup, models.policy, inputs.generation, enter)
    enter(OLD_STAGE)
    _token_logprobs(setup, models.policy, inputs.rollout)
    enter(REFERENCE_STAGE)
    _reference_logprobs(setup, models, inputs.rollout)
    assert models.value is not None, "PPO has one"
    enter(VALUES_STAGE)
    with torch.no_grad():
        read_head(_under_autocast(setup, models.value), inputs.rollout_states)
    both = _under_autocast(setup, PolicyAndValue(models.policy, models.value))
    return _step(setup)(both, inputs.update, head=setup.head_options).loss


def _distillation_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of distillation: generation, the teacher's pass, and the update on both heads.

    Where the teacher samples too, its generation alone is run, which is taken to be the dearer one.
    """
    assert models.reference is not None, "a teacher is a model of its own"
    if setup.generates:
        sampling = models.reference if setup.seq_kd else models.policy
        simulate_generation(setup, sampling, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    student, teacher = (_under_autocast(setup, model) for model in (models.policy, models.reference))
    weighted: Any = DistillationUpdate(update.batch, torch.ones(len(update.batch.targets)))
    if setup.use_uld_loss:
        weighted = _span_update(update.batch)
    # The student's forward begins the next stage.
    enter(TEACHER_STAGE)
    sizes = {model.config.get_text_config().vocab_size for model in (models.policy, models.reference)}
    settings = DivergenceSettings(vocab_size=min(sizes) if len(sizes) > 1 else None)
    return _step(setup)(student, teacher, weighted, settings, head=setup.head_options).loss


def _span_update(batch: TokenBatch) -> SpanUpdate:
    """Returns a micro-batch of two tokenizers that have a token each for every word."""
    places = torch.arange(len(batch.targets))
    rows = SpanRows(places, *(places[:0] for _ in range(3)))
    ones = torch.ones(len(places))
    return SpanUpdate(batch, batch, SpanComparison(rows, rows, ones, SortedDistance()), ones, 1)


def _judged_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of IW-OPD: generation, the teacher's scores unless a server has them, and the update."""
    if setup.generates:
        simulate_generation(setup, models.policy, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    batch = update.batch
    told = torch.full((len(batch.targets),), -1.0)
    if models.reference is not None:
        enter(TEACHER_STAGE)
        told = _token_logprobs(setup, models.reference, batch)
    judged = IWOPDUpdate(batch, torch.ones(len(batch.targets)), update.lengths)
    policy = _under_autocast(setup, models.policy)
    return _step(setup)(policy, judged, told, IWOPDLossConfig(), head=setup.head_options).loss


def _told_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of distillation from a server: generation, and the update on log-probabilities that are given."""
    if setup.generates:
        simulate_generation(setup, models.policy, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    weights = torch.ones(len(update.batch.targets))
    known = models.policy.config.get_text_config().vocab_size
    ids = torch.zeros(len(weights), max(min(setup.loss_top_k, known), 1))
    told = ServerUpdate(update.batch, weights, ids.long(), torch.full_like(ids, -1.0))
    policy = _under_autocast(setup, models.policy)
    return _step(setup)(policy, told, DivergenceSettings(), head=setup.head_options).loss


class _SelfTeacher:
    """Tells what a model says as its own teacher: a copy of it, or itself without its adapter, or as it is."""

    def __init__(self, setup: TrainingSetup, models: PlannedModels) -> None:
        self._setup, switches = setup, models.reference is None and setup.teacher_model_kind != "live"
        self._model = _under_autocast(setup, models.policy if models.reference is None else models.reference)
        self._scope = partial(reference_scope, models.policy if switches else None)

    def states(self, batch: TokenBatch) -> TeacherStates:
        """Returns its states at a batch's scored positions."""
        with self._scope():
            return teacher_states(self._model, batch)._replace(scope=self._scope)

    @torch.no_grad()
    def score(self, batch: TokenBatch, *, temperature: float) -> TokenScores:
        """Returns the scores of a batch's tokens."""
        with self._scope():
            return score(self._model, batch, temperature=temperature, head=self._setup.head_options).tokens


def _self_taught_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, enter: Enter) -> torch.Tensor:
    """Runs a step of self-distillation; the teacher's prompts are taken to be as long as the student's."""
    if setup.generates:
        simulate_generation(setup, models.policy, inputs.generation, enter)
    inputs.update = update = on_device(inputs.update)
    if setup.scores_old_policy:
        enter(OLD_STAGE)
        _token_logprobs(setup, models.policy, update.batch)
    ones = torch.ones(len(update.batch.targets))
    known = models.policy.config.get_text_config().vocab_size
    topk = None if setup.distillation_topk is None else min(setup.distillation_topk, known)
    alpha = 1.0 if setup.distillation_mode == SAMPLED_TOKEN else 0.5
    settings = SelfDistillationSettings(setup.distillation_mode, alpha, topk, is_clip=2.0)
    taught = SelfDistillationUpdate(update.batch, update.batch, ones, ones, update.loss_inputs.old_logprobs)
    enter(TEACHER_STAGE)
    policy, teacher = _under_autocast(setup, models.policy), _SelfTeacher(setup, models)
    if setup.method == "sdpo":
        # With the default weight, without the policy's loss.
        given = (policy, teacher, SDPOUpdate(taught, None), settings, PolicyLossConfig())
        return _step(setup)(*given, policy_share=0.0, head=setup.head_options).loss
    return _step(setup)(policy, teacher, taught, settings, head=setup.head_options).loss


def policy_loss_config(setup: TrainingSetup) -> PolicyLossConfig:
    """Returns the loss of GRPO, GMPO or RLOO with the defaults of its config."""
    if setup.method == "rloo":
        return PolicyLossConfig(loss_type="grpo", importance_sampling_level="product")
    if setup.method == "gmpo":
        return PolicyLossConfig(loss_type="gmpo", beta=setup.kl_weight)
    return PolicyLossConfig(beta=setup.kl_weight)


PLANNED: dict[str, PlannedMethod] = {
    "sft": PlannedMethod(labelled_batch, _sft_loss, "sequence", reads_images=True),
    "dpo": PlannedMethod(preference_batch, _dpo_loss, "pair", reads_images=True),
    "reward": PlannedMethod(reward_pairs, _reward_loss, "pair", reads_images=True),
    "kto": PlannedMethod(unpaired_batch, _kto_loss, "completion", reads_images=True),
    "bco": PlannedMethod(good_and_bad_batch, _bco_loss, "completion", reads_images=True),
    "orpo": PlannedMethod(preference_batch, _reference_free_loss, "pair"),
    "cpo": PlannedMethod(preference_batch, _reference_free_loss, "pair", reads_images=True),
    "tpo": PlannedMethod(preference_batch, _reference_free_loss, "pair"),
    "grpo": PlannedMethod(policy_micro_batch, _policy_loss, "completion", reads_images=True),
    "rloo": PlannedMethod(policy_micro_batch, _policy_loss, "completion", reads_images=True),
    "gmpo": PlannedMethod(policy_micro_batch, _policy_loss, "completion", reads_images=True),
    "online_dpo": PlannedMethod(
        pair_micro_batch, partial(_sampled_loss, loss=DPOLossConfig()), "prompt", reads_images=True
    ),
    "a2po": PlannedMethod(value_micro_batch, partial(_sampled_loss, loss=1e-3), "prompt"),
    "ppo": PlannedMethod(ppo_micro_batch, _ppo_loss, "completion"),
    "distillation": PlannedMethod(policy_micro_batch, _distillation_loss, "completion", reads_images=True),
    "gkd": PlannedMethod(policy_micro_batch, _distillation_loss, "completion", reads_images=True),
    "gold": PlannedMethod(policy_micro_batch, _distillation_loss, "completion", reads_images=True),
    "iw_opd": PlannedMethod(policy_micro_batch, _judged_loss, "completion"),
    "server_distillation": PlannedMethod(policy_micro_batch, _told_loss, "completion"),
    "sdft": PlannedMethod(policy_micro_batch, _self_taught_loss, "completion"),
    "sdpo": PlannedMethod(policy_micro_batch, _self_taught_loss, "completion"),
}
