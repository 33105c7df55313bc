"""Defines what Online DPO and A*-PO share: each micro-batch of prompts gets its own completions, used once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.formats import is_conversational
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset
from trl_fast.modeling.loading import base_model
from trl_fast.rollout import GivenReward, RewardFunctions, RolloutEngine, end_token_ids
from trl_fast.rollout.samples import Samples

from ..base.prepared_datasets import check_dataset_type
from ..base.reference import ReferencePolicy
from ..base.trainer import BaseTrainer
from .changeable_rewards import make_changeable_rewards
from .engines import make_engine
from .rollout_checks import check_sources
from .sampling import Sampling
from .trainer import OnlineTrainer


class BatchTrainer(OnlineTrainer):
    """Samples completions for each micro-batch of prompts, and learns from them once.

    A subclass calls `set_up` in its constructor, and brings `compute_advantages`, `update_of` and `_compute_loss`.
    """

    args: Any
    samples_class: ClassVar[type[Samples]] = Samples
    # Prompts come in the order of other trainers' rows: a batch is what is sampled at a time.
    get_train_dataloader = BaseTrainer.get_train_dataloader

    def set_up(
        self,
        model: str | PreTrainedModel | PeftModel,
        config: Any,
        train_dataset: Any,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
        processing_class: PreTrainedTokenizerBase | None,
        *,
        ref_model: str | PreTrainedModel | None,
        reward_funcs: GivenReward | list[GivenReward] | None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None,
        peft_config: PeftConfig | None,
        quantization_config: object | None,
        rollout_func: Callable[[list, Any], dict[str, Any]] | None,
        rollout_engine: RolloutEngine | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[torch.optim.Optimizer | None, Any],
    ) -> None:
        """Makes models, datasets, rewards and the rollout loop; the arguments are those of the constructors.

        Raises:
            ValueError, TypeError: bad arguments or data, by name.
        """
        check_sources(None, rollout_func, None, rollout_engine)
        check_dataset_type(train_dataset, "train_dataset")
        if isinstance(model, torch.nn.Module) and ref_model is model:
            raise ValueError("ref_model is the very object of model; leave it out to use a copy of the policy")
        model = self.resolve_model(model, config, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, config)
        rewards = make_changeable_rewards(reward_funcs, reward_processing_classes, config)
        data = (train_dataset, eval_dataset, processing_class, config, model)
        train_dataset, eval_dataset = self.prepare_datasets(*data)
        if is_conversational(next(iter(train_dataset))):
            rewards.check_conversations()
        sequences = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)]
        self.reference = ReferencePolicy(self)
        model, layout = self.reference.set_up(model, ref_model, config, peft_config, sequences)
        self.rollout_func, self.sampling = rollout_func, Sampling(self)
        self.start(
            model=model,
            args=config,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_up_rollouts(base_model(model), layout, rollout_engine, rewards)

    def _set_up_rollouts(
        self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None, rewards: RewardFunctions
    ) -> None:
        self.seed_sampling(layout)
        self.end_ids = end_token_ids(model, self.tokenizer)
        self.set_up_loop(
            make_engine(self, engine, self.end_ids),
            rewards,
            end_ids=self.end_ids,
            completions_kept=self.args.completions_at_a_time * self.args.world_size,
            samples_class=self.samples_class,
        )
        self.loop.settings = self.sampling.settings

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts."""
        return prepare_prompt_dataset(
            dataset,
            processing_class,
            image_reader=None if self.images is None else self.images.reader,
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=getattr(args, "max_prompt_length", None),
            num_proc=args.dataset_num_proc,
            name=name,
        )

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if dataset is None else dataset
        if not self.args.shuffle_dataset:
            return SequentialSampler(rows)
        return BaseTrainer._get_train_sampler(self, dataset)

    # ---- a micro-batch

    @property
    def group_size(self) -> int:
        """Returns the completions of a prompt."""
        return 1

    def update_of(self, samples: Any) -> Any:
        """Returns what the loss reads of completions whose advantages are known."""
        raise NotImplementedError

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Returns the update of new completions of the rows' prompts."""
        method: Any = self
        return self.loop.run([row for row in inputs for _ in range(self.group_size)], method, update=self._update_of)

    def _update_of(self, samples: Samples) -> Any:
        if samples.mask is not None:
            raise ValueError(
                f"rollout_func: env_mask cannot be used with {type(self).__name__}, which learns from whole ones; "
                "leave it out"
            )
        return self.update_of(samples)

    def reference_logprobs(self, batch: Any) -> torch.Tensor:
        """Computes the reference's log-probabilities of the batch's tokens, (N,) float32, at temperature 1."""
        return self.reference.score(batch).logprobs

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Computes the loss of completions that are made for the evaluation."""
        update = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, update).detach(), None, None
