"""Defines SDPOTrainer, with TRL's interface and behaviour, on shared prompts and a head that is read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.data.teacher_prompts import PRIVILEGED_CONTEXT, check_last_messages
from trl_fast.losses.advantages import Advantages, group_advantages
from trl_fast.parallel.engines import engine_of
from trl_fast.rollout import GivenReward, RolloutEngine
from trl_fast.rollout.samples import Samples

from ..base.step import insert_after
from ..base.trl_attributes import answers_to
from ..distillation.teacher import check_sharded_head
from ..online.group_trainer import GroupTrainer
from .diagnostics import Diagnostics, reward_diagnostics
from .events import call_event, tell_of_batch, tell_of_contexts
from .model_checks import check_topk
from .reprompts import Reprompter
from .samples import TaughtSamples
from .sdpo_config import SDPOConfig
from .sdpo_update import SDPOUpdate, sdpo_step, sdpo_update
from .step import DISTILLATION_LOSS, SelfDistillationSettings
from .teacher_models import SelfTeacher
from .trl_attributes import SDPO_ATTRIBUTES, SDPO_UNCALLED_HOOKS


@answers_to(SDPO_ATTRIBUTES)
class SDPOTrainer(GroupTrainer):
    """Trains a policy to answer as it does itself when it has seen a rewarded answer or feedback (arXiv 2601.20802).

    Args:
        model: a name, a causal language model, or a PeftModel.
        reward_funcs: as in GRPOTrainer; their sum says which completions are successful.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages of which the last is a user's, and maybe
            `privileged_context`, a text of feedback; reward functions see the other columns.
        processing_class: the tokenizer; None: the model's. Its older name is `tokenizer`.
        reward_processing_classes: tokenizers of the reward models; None loads theirs.
        rollout_func: as in GRPOTrainer: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments or data, by name, before training starts.
    """

    method = "sdpo"
    config_class: Any = SDPOConfig
    signature_columns = (*GroupTrainer.signature_columns, PRIVILEGED_CONTEXT)
    loss_is_scaled_for_ga = True
    samples_class = TaughtSamples
    shuffles_completions = False
    uncalled_hooks = SDPO_UNCALLED_HOOKS
    args: Any
    model: Any  # there always is one
    reference: SelfTeacher

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: GivenReward | list[GivenReward] | None = None,
        args: SDPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: object | None = None,
        rollout_func: Any = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(
            *(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes),
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            rollout_func=rollout_func,
            rollout_engine=rollout_engine,
            tokenizer=tokenizer,
        )

    def _set_up_policy(
        self,
        model: PreTrainedModel | PeftModel,
        args: Any,
        peft_config: PeftConfig | None,
        train_dataset: AnyDataset,
    ) -> tuple[PreTrainedModel | PeftModel, str]:
        """Returns the policy as it is trained, and its batch layout; makes the teacher where it has a weight."""
        check_topk(model, args)
        self.reference = SelfTeacher(self)
        sequences, wanted = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)], args.distillation_weight > 0
        return self.reference.set_up_teacher(model, args, peft_config, sequences, wanted=wanted)

    def set_up_method(self) -> None:
        """Makes what tells the teacher of completions, when all else is there."""
        check_sharded_head(self.model, shards_weights=engine_of(self.accelerator).needs.shards_weights)
        self.diagnostics = Diagnostics(self.args, is_main_process=self.accelerator.is_main_process)
        self.reprompter = Reprompter(self, self.diagnostics)

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts.

        Raises:
            NotImplementedError: there are images.
            ValueError: as in `prepare_prompt_dataset`; or the teacher cannot be told more after a prompt.
        """
        if self.images is not None:
            raise NotImplementedError(f"the {name} dataset has images, which the teacher's prompts have no place for")
        dataset = super().prepare_dataset(dataset, processing_class, args, name)
        check_last_messages(dataset, name)
        return dataset

    # ---- the rollout

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes how each reward compares with its group's, and records how rewards differ; rewards: (N, R)."""
        args, weights = self.args, self.reward_functions.weights
        tolerance, names = args.diagnostics_flat_tolerance, self.reward_functions.names
        metrics = reward_diagnostics(rewards.cpu(), weights.cpu(), names, self.group_size, tolerance)
        self.recorder.record_values(metrics)
        self.diagnostics.warn_of_flat_rewards(metrics, self.mode)
        return group_advantages(rewards, weights.to(rewards.device), self.group_size, scale_rewards=args.scale_rewards)

    def add_contexts(self, samples: Any, rows: list[dict[str, Any]], rewards: torch.Tensor) -> None:
        """Adds the teacher's prompts, which tell it of successful completions and of feedback.

        rewards: (N,) float32, of all processes' completions.
        """
        self.reprompter.add_prompts(samples, rows, rewards)
        tell_of_contexts(self, samples)

    def add_logprobs(self, samples: Any) -> None:
        """Adds log-probabilities of the policy that sampled, where the update's is another and the loss reads them."""
        args = self.args
        reads = args.distillation_weight < 1 or args.distillation_is_clip is not None
        if reads and self.model.training and not args.is_on_policy:
            samples.old_logprobs = self.score_samples(samples, self.policy_logprobs, everyone=False)
        tell_of_batch(self, samples)

    def slices(self, samples: Samples) -> list[list[int]]:
        """Returns the numbers of the completions of each micro-batch of the update, in turn."""
        count = self.args.steps_per_generation if self.model.training else None
        return self.slicer.slices_of(samples, self._batch_size, count, together=False)

    def _prepare_inputs(self, rows: Any) -> Any:
        """Returns a micro-batch, `SDPOUpdate`; where it is time, of new completions of `rows`."""
        if not self.model.training:
            return self._run(rows, self._update)
        if self.generation.is_used_up:
            self.generation.slices = self._run(rows, lambda found: [*map(found.select, self.slices(found))])
            names = ("generate_every", "steps_per_generation")
            call_event(self, "on_generation_batch_built", lambda: {name: getattr(self.args, name) for name in names})
        return self._update(self.generation.current)

    def _run(self, rows: Any, update: Callable[[Any], Any]) -> Any:
        """Runs the loop on new completions of `rows`, and returns what `update` makes of them."""
        method: Any = self
        self.trl_hooks.attach(self.loop)
        told = {"generation_prompts": [row["prompt"] for row in rows], "generation_prompt_text": None}
        call_event(self, "on_generation_prompts_selected", lambda: told)
        return self.loop.run(rows, method, update=update)

    # ---- the update

    @property
    def order_is_free(self) -> bool:
        """Says whether completions may move to another micro-batch: not where the policy's loss is a mean over one."""
        by_batch = self.args.distillation_weight < 1 and self.args.loss_type == "bnpo"
        return super().order_is_free and not by_batch

    def trained(self, samples: Any) -> list[int]:
        """Returns the completions that have a gradient, at least one: those with a teacher, or with an advantage."""
        weight, everyone = self.args.distillation_weight, self.all_have_gradients
        kept = []
        for index, (taught, advantage) in enumerate(zip(samples.learned, samples.advantages, strict=True)):
            has_gradient = (weight > 0 and taught) or (weight < 1 and advantage != 0)
            if not samples.excluded[index] and (everyone or has_gradient):
                kept.append(index)
        return kept or [min(range(len(samples)), key=lambda index: len(samples.completion_ids[index]))]

    def _update(self, samples: Any) -> SDPOUpdate:
        return sdpo_update(
            *(self.updates, samples, self.trained(samples)),
            self._weights(samples.lengths, samples.generation_tokens),
            distillation_weight=self.args.distillation_weight,
            loss_divisor=self.loss_divisor,
        )

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        result = sdpo_step(
            *(model, self.reference, inputs, SelfDistillationSettings.of(self.args), self.loss_config),
            policy_share=1 - self.args.distillation_weight,
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
            loss_divisor=self.loss_divisor,
        )
        metrics = dict(result.metrics)
        if DISTILLATION_LOSS in metrics:
            metrics = insert_after(DISTILLATION_LOSS, metrics, {"sdpo/distillation_loss": metrics[DISTILLATION_LOSS]})
        self.record(metrics)
        return result.loss
