"""Defines A2POTrainer, with TRL's interface and behaviour, on shared prompts and the fused head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.losses.a2po import a2po_loss, a2po_metrics, optimal_values
from trl_fast.losses.advantages import Advantages, summed_rewards
from trl_fast.losses.loss_inputs import sums_by_sequence
from trl_fast.modeling.scoring import evaluating, score
from trl_fast.ops import HeadOptions
from trl_fast.parallel.engines import prepared_for_evaluation
from trl_fast.parallel.failures import failing_together
from trl_fast.rollout import GivenReward, RolloutEngine
from trl_fast.rollout.samples import Samples

from .a2po_config import A2POConfig
from .base.step import StepResult, router_keywords, with_router_loss
from .base.tokenizers import older_tokenizer_name
from .checkpoints.folders import newest_checkpoint
from .online.batch_trainer import BatchTrainer
from .online.optimal_values import OptimalValues


@dataclass
class ValuedSamples(Samples):
    """Holds S completions with `values` (S,) float32, those of their prompts."""

    values: torch.Tensor | None = None


@dataclass
class ValueUpdate:
    """Holds a micro-batch of S completions.

    - `batch`: the tokens to score, N of them; `group_sizes`: those of each completion.
    - `reference`, `rewards`, `values` (S,) float32: log-probabilities under the reference, rewards, prompts' values.
    """

    batch: TokenBatch
    group_sizes: tuple[int, ...]
    reference: torch.Tensor
    rewards: torch.Tensor
    values: torch.Tensor


def a2po_step(
    model: torch.nn.Module, update: ValueUpdate, beta: float, *, head: HeadOptions, router_coef: float = 0.0
) -> StepResult:
    """Computes the loss of one micro-batch and its metrics.

    Args:
        model: the policy, with `modeling.scoring.attach_scoring`, on the device of the update.
        update: the completions.
        beta: the loss's temperature.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
    """
    branch, advantages = update.batch.branch, update.rewards - update.values
    scored = score(
        model,
        update.batch,
        token_loss=lambda scores, rows: a2po_loss(
            scores.logprobs, branch, update.reference, advantages, beta, slice(None) if rows is None else rows
        ),
        group_sizes=update.group_sizes,
        head=head,
        **router_keywords(router_coef),
    )
    assert scored.loss is not None, "a token loss was asked for"
    loss, metrics = with_router_loss(scored.loss, scored, router_coef)
    vectors = (update.reference, update.rewards, update.values)
    found = a2po_metrics(scored.tokens.logprobs, branch, *vectors, beta)
    return StepResult(loss, {**metrics, **found}, scored.tokens)


class A2POTrainer(BatchTrainer):
    """Trains by A*-PO (arXiv 2505.20686): values of all prompts first, then one completion of each a step.

    Args:
        model: a name, a causal language model, or a PeftModel; as it is now it is the reference too.
        reward_funcs: one or several of: a function of prompts, completions, completion_ids and the dataset's columns
            to a list of rewards, which should be 0 or 1; a reward model or its name.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages; reward functions see the other columns.
        processing_class: the tokenizer; None: the model's. Its older name is `tokenizer`.
        rollout_func: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs; while values are
            estimated, each prompt comes `num_value_samples` times, one after the other.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
    """

    method = "a2po"
    config_class = A2POConfig
    args: A2POConfig
    samples_class = ValuedSamples
    uncalled_hooks = {
        "_estimate_optimal_values": "give a rollout_func or a rollout_engine",
        "_calculate_rewards": "give reward_funcs",
        "_get_sequence_logps": "override compute_loss(model, inputs)",
    }

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: GivenReward | list[GivenReward] | None = None,
        args: A2POConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        *,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: object | None = None,
        rollout_func: Callable[[list, Any], dict[str, Any]] | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        given: Any = model
        config: Any = self.resolve_config(args, given).with_older_arguments(type(self), older)
        self.optimal_values = OptimalValues()
        self.set_up(
            *(model, config, train_dataset, eval_dataset, processing_class),
            ref_model=None,
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            peft_config=peft_config,
            quantization_config=quantization_config,
            rollout_func=rollout_func,
            rollout_engine=rollout_engine,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.checkpoints.parts.append(self.optimal_values)

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts.

        Raises:
            ValueError: the dataset is a stream, or has images.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"the {name} dataset is a stream, but A2POTrainer samples completions of all prompts before training; "
                "give a datasets.Dataset"
            )
        if self.images is not None:
            raise ValueError(
                f"The {name} dataset has images, which A2POTrainer does not read; use GRPOTrainer, or remove the "
                "images to train on the text alone"
            )
        return super().prepare_dataset(dataset, processing_class, args, name)

    # ---- the values

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Estimates the prompts' values, unless a checkpoint has them, and trains, as the base does.

        Raises:
            ValueError: as in the base; or no completion of any prompt earned a reward.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = newest_checkpoint(str(self.args.output_dir))
        if checkpoint:
            self.optimal_values.load_from_checkpoint(Path(checkpoint))
        else:
            self.estimate_values()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def estimate_values(self) -> None:
        """Estimates the values of the prompts that have none, from completions of the policy as it is now."""
        eval_sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        with failing_together(), prepared_for_evaluation(cast(Any, self)):
            for dataset in (self.train_dataset, *eval_sets.values()):
                if dataset is not None:
                    self._estimate(dataset)

    def get_train_dataloader(self) -> Any:
        """Returns the loader of the prompts that are trained on: with filter_all_incorrect those of some reward.

        Raises:
            ValueError: there are none.
        """
        every: Any = self.train_dataset
        hopeless = self.optimal_values.hopeless if self.args.filter_all_incorrect else set()
        kept = [row for row, ids in enumerate(every[PROMPT_IDS]) if tuple(ids) not in hopeless]
        if not kept:
            raise ValueError(
                f"filter_all_incorrect=True leaves no prompt: none of {self.args.num_value_samples} completions of "
                "any prompt earned a reward; raise num_value_samples, or give easier prompts"
            )
        self.train_dataset = every.select(kept)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = every

    def _estimate(self, dataset: Any) -> None:
        """Estimates the values of a dataset's prompts; each process has a share of them."""
        new = {tuple(ids): row for row, ids in enumerate(dataset[PROMPT_IDS]) if ids not in self.optimal_values}
        rows = list(new.values())
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            # All processes ask together, so that each has as many prompts as the others.
            chunk += chunk[-1:] * (-len(chunk) % self.accelerator.num_processes)
            own = chunk[self.accelerator.process_index :: self.accelerator.num_processes]
            self.optimal_values.add(dict(gather_object(list(self._values_of(dataset.select(own)).items()))))

    def _values_of(self, rows: Any) -> dict[tuple[int, ...], tuple[float, bool]]:
        count = self.args.num_value_samples
        method: Any = self
        with evaluating(method.model):
            judged = self.loop.judged_rollout([row for row in rows for _ in range(count)], method)
        # What reward functions logged is of no step.
        self.loop.metrics.columns.clear()
        self.loop.metrics.numbers.clear()
        rewards = self._scores(judged.rewards).view(-1, count)
        values = optimal_values(rewards, self.args.beta1).tolist()
        has_reward = (rewards.sum(1) != 0).tolist()
        prompts = [tuple(ids) for ids in rows[PROMPT_IDS]]
        return dict(zip(prompts, zip(values, has_reward, strict=True), strict=True))

    def _scores(self, rewards: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sums (N,) of rewards (N, R); 0 where no source gave one."""
        return summed_rewards(rewards, self.reward_functions.weights.to(rewards.device)).nan_to_num(nan=0.0)

    # ---- a micro-batch

    def compute_advantages(self, samples: Any, rewards: torch.Tensor) -> Advantages:
        """Computes each completion's reward less the value of its prompt; rewards: (N, R), as in the base."""
        scores = self._scores(rewards)
        samples.values = self.optimal_values.of(samples.prompt_ids)
        values = self.accelerator.gather(samples.values.to(scores.device))
        return Advantages(scores - values, scores, torch.zeros(0))

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Returns the update of new completions of the rows' prompts; estimates values where that was not done."""
        if not len(self.optimal_values):
            self.estimate_values()
        return super()._prepare_inputs(inputs)

    def update_of(self, samples: Any) -> ValueUpdate:
        """Returns what the loss reads of completions whose rewards are known."""
        samples = samples.select(samples.by_beginning(range(len(samples))))
        batch = self.updates.token_batch(samples)
        device = batch.targets.device
        values = samples.values.to(device)
        reference = sums_by_sequence(self.reference_logprobs(batch), batch.branch, len(samples))
        sizes = tuple(len(ids) for ids in samples.completion_ids)
        return ValueUpdate(batch, sizes, reference, samples.advantages.to(device) + values, values)

    def _compute_loss(self, model: torch.nn.Module, inputs: ValueUpdate) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        result = a2po_step(
            model, inputs, self.args.beta2, head=self.head_options, router_coef=self.router_aux_loss_coef
        )
        self.record(result.metrics)
        return result.loss
