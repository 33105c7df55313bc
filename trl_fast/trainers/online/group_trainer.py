"""Defines what GRPO and RLOO share: several completions a prompt, and an update in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.formats import is_conversational
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset
from trl_fast.data.repeat_sampler import RepeatSampler
from trl_fast.losses.loss_normalization import LossNormalizer
from trl_fast.losses.policy_gradient import PolicyLossConfig, sequence_weights
from trl_fast.losses.policy_metrics import PolicyMetrics
from trl_fast.modeling.lm_head import use_float32_head
from trl_fast.modeling.loading import base_model
from trl_fast.ops import TokenScores
from trl_fast.parallel.failures import failing_together
from trl_fast.rollout import GivenReward, RewardFunctions, RolloutEngine, end_token_ids
from trl_fast.rollout.environments import EnvironmentFactory
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from ..base.reference import ReferencePolicy
from ..base.tokenizers import older_tokenizer_name
from ..base.trl_attributes import answers_to
from .changeable_rewards import make_changeable_rewards
from .config import OnlineConfig
from .dealing import deal_completions, deal_of_groups
from .engines import make_engine
from .environments import rows_or_placeholder
from .generation_buffer import GenerationBuffer
from .group_config import RewardedGroupConfig
from .micro_batches import Slicer, Update, scoring_batches, trained_indices
from .policy_step import policy_step
from .prompt_order import PromptOrder
from .rollout_checks import check_sources
from .sampling import Sampling
from .tool_use import open_tools
from .trainer import OnlineTrainer
from .trl_attributes import GROUP_ATTRIBUTES, UNCALLED_HOOKS
from .trl_batch import MicroBatch, read_update, shuffled_parts
from .trl_hooks import TRLHook, TRLHooks


@answers_to(GROUP_ATTRIBUTES)
class GroupTrainer(OnlineTrainer):
    """Trains on completions of a prompt that are held against each other; a subclass brings their advantages.

    Args:
        model: a name, a causal language model, or a PeftModel.
        reward_funcs: one or several of: a function of prompts, completions, completion_ids and the dataset's columns
            to a list of rewards, sync or async; a reward model or its name.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages; reward functions see the other columns.
        processing_class: the tokenizer, or the processor for images; None: the model's. Its older name is `tokenizer`.
        reward_processing_classes: tokenizers of the reward models; None loads theirs.
        tools: functions that the policy may call, with type hints and a docstring. Prompts must be conversations.
        environment_factory: makes an environment for each completion, whose methods are tools; or a dict of such.
        rollout_func: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs, and maybe env_mask and
            further columns for the reward functions. It may ask `trainer.engine`, which has the step's weights.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.
        older: fields of the config, which older scripts give to the trainer.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
        NotImplementedError: tools or environments of a method that has none.
    """

    config_class = OnlineConfig
    free_deal = property(deal_of_groups)
    deal = deal_completions
    samples_class: type[Samples] = Samples
    # Whether micro-batches are drawn at random, as TRL's trainer of the method does, or taken in turn.
    shuffles_completions = True
    # Whether the policy may call tools, and completions are read as messages with tool calls and reasoning.
    has_tools = False
    uncalled_hooks = UNCALLED_HOOKS
    # TRL's keys of a batch's values a token that the loss reads.
    loss_keys: tuple[str, ...] = ()
    # Methods of TRL's that a subclass may override, and call by `super()`.
    _generate_and_score_completions = TRLHook("generate_and_score")
    _generate = TRLHook("generate")
    _tokenize_prompts = TRLHook("tokenize_prompts")
    _generate_single_turn = TRLHook("generate_single_turn")
    _calculate_rewards = TRLHook("calculate_rewards")
    _log_completion_extra = TRLHook("log_completion_extra")
    _log_metric = TRLHook("log_metric")
    _get_per_token_logps_and_entropies = TRLHook("logps_and_entropies")

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: GivenReward | list[GivenReward] | None = None,
        args: RewardedGroupConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, GroupTrainer], dict[str, Any]] | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        check_sources(tools, rollout_func, environment_factory, rollout_engine)
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        train_dataset = rows_or_placeholder(train_dataset, environment_factory, args)
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        open_tools(self, tools, environment_factory, processing_class, args)
        rewards = make_changeable_rewards(reward_funcs, reward_processing_classes, args, self.environment_rollouts)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        if is_conversational(next(iter(train_dataset))):
            rewards.check_conversations()
        model, layout = self._set_up_policy(model, args, peft_config, train_dataset)
        self.rollout_func, self.sampling = rollout_func, Sampling(self)
        self.trl_hooks = TRLHooks(self, returns_more=self.has_tools)
        self.generation, self.slicer = (
            GenerationBuffer(args, self.samples_class),
            Slicer(shuffles=self.shuffles_completions),
        )
        self.start(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_up_rollouts(base_model(model), layout, rollout_engine, rewards)
        self.set_up_method()

    def set_up_method(self) -> None:
        """Makes what only one method has, when all else is there."""

    def _set_up_policy(
        self,
        model: PreTrainedModel | PeftModel,
        args: OnlineConfig,
        peft_config: PeftConfig | None,
        train_dataset: AnyDataset,
    ) -> tuple[PreTrainedModel | PeftModel, str]:
        """Returns the policy as it is trained, and its batch layout; makes the reference where there is a KL term."""
        sequences, wanted = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)], args.beta != 0
        self.reference = ReferencePolicy(self)
        model, layout = self.reference.set_up(
            *(model, None, args, peft_config, sequences), wanted=wanted, adapter_wanted=wanted
        )
        if args.cast_lm_head_to_fp32:
            for policy in filter(None, (model, self.ref_model)):
                use_float32_head(base_model(policy))
        return model, layout

    def _set_up_rollouts(
        self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None, rewards: RewardFunctions
    ) -> None:
        self.add_callback(self.generation)
        self.seed_sampling(layout)
        self.end_ids = end_ids = end_token_ids(model, self.tokenizer)
        self.set_up_loop(
            make_engine(self, engine, end_ids),
            rewards,
            end_ids=end_ids,
            completions_kept=self.args.generation_batch_size,
            parses_messages=self.has_tools,
            excludes_cut_off=lambda: self.args.mask_truncated_completions,
            samples_class=self.samples_class,
        )
        self.loop.settings = self.sampling.settings
        self.trl_hooks.attach(self.loop)

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: OnlineConfig, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts, which tell the policy of its tools."""
        prepare = getattr(self.environment_rollouts, "prepare", prepare_prompt_dataset)
        return prepare(
            dataset,
            processing_class,
            image_reader=self.images and self.images.reader,
            chat_template_kwargs=self.prompt_template_kwargs(args),
            max_prompt_length=args.max_prompt_length,
            num_proc=args.dataset_num_proc,
            name=name,
        )

    def prompt_template_kwargs(self, args: OnlineConfig) -> dict[str, Any]:
        """Returns what the chat template is given beside a prompt's messages."""
        tools = {} if self.toolbox is None else {"tools": self.toolbox.schemas}
        return {**(args.chat_template_kwargs or {}), **tools}

    def prompt_order(self) -> PromptOrder:
        """Returns the order of training prompts: each as often as it gets completions, for all updates on them."""
        return PromptOrder.of_generations(self.args, self.args.generation_batch_size)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.args.generations("eval"), seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """Returns the loader of prompts, each as often as it gets completions in evaluation.

        A stream is read as a whole, so that its order is that of a dataset: prompts are small, and each costs a
        generation.

        Raises:
            ValueError: a batch would not hold all completions of its prompts.
        """
        self.args.check_eval_batch()
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(list(dataset) if isinstance(dataset, IterableDataset) else dataset)

    # ---- the rollout

    @property
    def group_size(self) -> int:
        """Returns the completions of a prompt."""
        return self.args.generations("train" if self.model.training else "eval")

    def make_samples(self, rows: list[dict[str, Any]]) -> Samples:
        """Samples completions of the rows' prompts, with rewards and advantages, and records their metrics.

        Raises:
            ValueError, RuntimeError: as in `RolloutLoop.run`.
        """
        return self.loop.run(rows, self, update=lambda samples: samples)

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> MicroBatch | dict[str, Any]:
        """Returns the micro-batch of the update; where it is time, of new completions of `rows`."""
        hooks = self.trl_hooks
        if not self.model.training or self.generation.is_used_up:
            hooks.attach(self.loop)
        if not self.model.training and not hooks.makes_batches:
            return self.loop.run(rows, self, update=self._micro_batch)
        if not self.model.training:
            return hooks.new_batch(rows)
        if self.generation.is_used_up and hooks.makes_batches:
            self.generation.slices = shuffled_parts(hooks.new_batch(rows), self.args.steps_per_generation)
        elif self.generation.is_used_up:
            slices = self.loop.run(rows, self, update=lambda samples: map(samples.select, self.slices(samples)))
            self.generation.slices = list(slices)
        current = self.generation.current
        return self._micro_batch(current) if isinstance(current, Samples) else current

    @property
    def _batch_size(self) -> int:
        return self.args.train_batch_size if self.model.training else self.args.eval_batch_size

    def slices(self, samples: Samples) -> list[list[int]]:
        """Returns the numbers of the completions of each micro-batch of the update.

        Where all of them are of one optimizer step and each counts the same wherever it stands, completions of a
        prompt stay together, so that it is computed once.
        """
        args = self.args
        together = args.is_on_policy and self.order_is_free and args.keep_groups_together
        together = together and BATCH_LAYOUTS[self.updates.layout].shares_prompts
        count = args.steps_per_generation if self.model.training and not self.trl_hooks.cuts_batches else None
        return self.slicer.slices_of(samples, self._batch_size, count, together=together)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes one micro-batch's step; step_time is that of all micro-batches of an optimizer step."""
        with self.generation.timed_step(self.current_gradient_accumulation_steps, self.recorder):
            return super().training_step(*args, **kwargs)

    def score_samples(
        self, samples: Samples, score: Callable[[TokenBatch], torch.Tensor], *, everyone: bool = True
    ) -> list[torch.Tensor]:
        """Computes what `score` says, (N,), by completion: of those that are trained, or of `everyone`; else zeros."""
        batches = scoring_batches(samples, self.slices(samples), self.trained, self._batch_size, everyone=everyone)
        return self.updates.score(samples, score, batches)

    def policy_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the policy's log-probabilities of the batch's tokens, (N,) float32."""
        hooks = self.trl_hooks
        return hooks.scoring.policy_logprobs(batch) if hooks.scores_itself else super().policy_logprobs(batch)

    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the reference's log-probabilities of the batch's tokens, (N,) float32."""
        hooks = self.trl_hooks
        return hooks.scoring.reference_logprobs(batch) if hooks.scores_itself else super().reference_logprobs(batch)

    # ---- the update

    @property
    def loss_config(self) -> PolicyLossConfig:
        """Returns the part of the arguments that the loss reads, as they are now."""
        return self.args.loss_config()

    @property
    def order_is_free(self) -> bool:
        """Says whether the gradient of a step does not depend on which micro-batch a completion is in."""
        return not self.trl_hooks.sees_batches

    @property
    def all_have_gradients(self) -> bool:
        """Says whether also completions without advantage are learned from."""
        return bool(self.router_aux_loss_coef) or self.trl_hooks.sees_batches

    def trained(self, samples: Samples) -> list[int]:
        """Returns the completions that have a gradient, at least one."""
        return trained_indices(samples, everyone=not self.args.skip_zero_advantages or self.all_have_gradients)

    @property
    def accumulation_steps(self) -> int:
        """Returns the micro-batches of the present optimizer step; in evaluation there is nothing to accumulate."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    @property
    def loss_divisor(self) -> int:
        """Returns the divisor of the loss, where nobody else divides it."""
        return self.accumulation_steps if self.loss_is_scaled_for_ga else 1

    def _micro_batch(self, samples: Samples) -> MicroBatch:
        micro_batch = self.trl_hooks.micro_batch(samples)
        weights = self._weights(samples.lengths, samples.generation_tokens)
        micro_batch.fused = self.updates.update(samples, self.trained(samples), weights)
        return micro_batch

    def _weights(self, lengths: torch.Tensor, generation_tokens: float) -> torch.Tensor:
        # A generation is not always one accumulation window.
        share = self.accumulation_steps / self.args.steps_per_generation if self.model.training else 1
        normalizer = LossNormalizer(generation_tokens * share, self.loss_divisor, self.args.max_completion_length)
        return sequence_weights(self.loss_config.loss_type, lengths, normalizer)

    def _read_batch(self, inputs: Mapping[str, Any]) -> Update:
        """Returns the update of a micro-batch, as it came or of what the subclass made of it."""
        if isinstance(inputs, MicroBatch) and not inputs.is_changed:
            return inputs.fused

        def weights_of(lengths: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
            tokens = lengths.sum() if tokens is None else tokens / self.accelerator.num_processes
            return self._weights(lengths, tokens.clamp(min=1).item())

        return read_update(inputs, self.loss_keys, weights_of)

    def _compute_loss(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Computes the loss of one micro-batch, with TRL's keys, and records its metrics."""
        inputs = self._read_batch(inputs)
        result, metrics = policy_step(
            model,
            inputs,
            self.loss_config,
            head=self.head_options,
            temperature=self.args.temperature,
            router_coef=self.router_aux_loss_coef,
            loss_divisor=self.loss_divisor,
            scorer=self.trl_hooks.scoring.score_for_loss if self.trl_hooks.scores_itself else None,
            **self.loss_options(inputs),
        )
        self.record_extra(result.scores, inputs)
        if result.metrics:
            self.record(result.metrics)
        self.record_policy(metrics)
        return result.loss

    def loss_options(self, inputs: Update) -> dict[str, Any]:
        """Returns further arguments of `policy_step` for a micro-batch."""
        return {}

    def record_extra(self, scores: TokenScores, inputs: Update) -> None:
        """Records further metrics from the scores, without gradient, of each micro-batch."""

    def record_policy(self, metrics: PolicyMetrics) -> None:
        """Records a micro-batch's metrics of the loss."""
        self.record(metrics.means)
        self.recorder.record_extremes(metrics.by_sequence)

    def prediction_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Computes the loss of completions that are made for the evaluation."""
        micro_batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, micro_batch).detach(), None, None
