"""What GRPO and RLOO do alike: prompts in, completions and rewards, and the batches of the update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset, TokenBatch, longest_sequence
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset
from trl_fast.losses.advantages import Advantages
from trl_fast.losses.policy_gradient import Window, sequence_weights
from trl_fast.modeling.lm_head import use_float32_head
from trl_fast.modeling.loading import base_model
from trl_fast.ops import TokenScores
from trl_fast.rollout import RewardFunctions, Rollout, RolloutEngine, TransformersEngine, end_token_ids
from trl_fast.rollout.samples import Samples
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

from ..base.metric_buffer import MetricBuffer
from ..base.reference import ReferenceTrainer
from ..base.tokenizers import older_tokenizer_name
from .completions_log import CompletionsLog
from .config import OnlineConfig
from .generation_buffer import GenerationBuffer
from .generation_metrics import GenerationMetrics
from .micro_batches import Update, UpdateMaker
from .policy_step import policy_step
from .prompt_loaders import PromptLoaders
from .rollouts import Rollouts, token_vectors

RewardSource = Callable[..., list] | str | PreTrainedModel


class OnlineTrainer(Rollouts, PromptLoaders, GenerationMetrics, ReferenceTrainer):
    """A trainer whose completions are its policy's own; a subclass brings the advantages and the loss.

    Args:
        model: a name, a causal language model, or a PeftModel.
        reward_funcs: one or several of: a function of prompts, completions, completion_ids and the dataset's columns
            to a list of rewards, sync or async; a reward model or its name.
        args: the config; TRL's own is accepted too.
        train_dataset, eval_dataset: rows with `prompt`, text or messages; reward functions see the other columns.
        processing_class: the tokenizer; None loads the model's. `tokenizer` is its older name.
        reward_processing_classes: tokenizers of the reward models; None loads theirs.
        tools: functions that the policy may call, sync or async, with type hints and a docstring. Prompts must be
            conversations.
        rollout_func: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs, and maybe env_mask and
            further columns for the reward functions. It may ask `trainer.engine`, which has the step's weights.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
        NotImplementedError: an environment_factory, which is experimental in TRL; tools of a method that has none.
    """

    config_class = OnlineConfig
    shares_prompts = True
    token_columns: ClassVar[tuple[str, ...]] = (PROMPT_IDS,)
    signature_columns: ClassVar[tuple[str, ...]] = ("prompt", PROMPT_IDS)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        args: OnlineConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, OnlineTrainer], dict[str, Any]] | None = None,
        environment_factory: object | None = None,
        *,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        if environment_factory:
            raise NotImplementedError(
                "environment_factory is experimental in TRL and not supported; use tools or rollout_func"
            )
        if tools and rollout_func is not None:
            raise ValueError("tools and rollout_func: a rollout_func makes whole completions; give one of them")
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        args = self.resolve_config(args, model).with_older_arguments(type(self), older)
        self.check_dataset_type(train_dataset, "train_dataset")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        self._open_toolbox(tools, processing_class)
        self.reward_functions = RewardFunctions(
            reward_funcs,
            reward_processing_classes=reward_processing_classes,
            weights=args.reward_weights,
            model_init_kwargs={"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})},
            device=args.device,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        self.loss_config = args.loss_config()
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        sequences = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)]
        has_reference = args.beta != 0
        model, layout = self.set_up_models(
            *(model, None, args, peft_config, sequences), wanted=has_reference, adapter_wanted=has_reference
        )
        if args.cast_lm_head_to_fp32:
            for policy in filter(None, (model, self.ref_model)):
                use_float32_head(base_model(policy))
        self.rollout_func = rollout_func
        self.generation = GenerationBuffer(args)
        self._step_time = 0.0
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
        self._start_rollouts(base_model(model), layout, rollout_engine)

    def _start_rollouts(self, model: PreTrainedModel, layout: str, engine: RolloutEngine | None) -> None:
        args, tokenizer = self.args, self.processing_class
        self.add_callback(self.generation)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(f"{type(self).__name__} with sharded weights (DeepSpeed, FSDP) is not supported")
        pad, multiple = tokenizer.pad_token_id, args.pad_to_multiple_of
        self.updates = UpdateMaker(layout, pad, multiple, self.accelerator.device)
        self._buffers = {mode: MetricBuffer(skip_nan=True) for mode in ("train", "eval")}
        self._completions = CompletionsLog(args.generation_batch_size)
        # Processes that generate for the same prompt must not sample the same completions.
        set_seed(args.seed, device_specific=True)
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        self.end_ids = end_token_ids(model, tokenizer)
        self.engine = self._with_tools(engine or self._make_engine(), model)

    def _make_engine(self) -> RolloutEngine:
        if self.args.use_vllm:
            from trl_fast.rollout.vllm_engine import make_vllm_engine

            return make_vllm_engine(self.model, self.accelerator, self.processing_class, self.args)
        policy = lambda: self.accelerator.unwrap_model(self.model)  # noqa: E731
        return TransformersEngine(policy, self.end_ids, self.processing_class.pad_token_id)

    def _open_toolbox(self, tools: list[Callable] | None, tokenizer: PreTrainedTokenizerBase) -> None:
        if tools:
            raise NotImplementedError(f"tools: {type(self).__name__} has none; use GRPOTrainer")

    def _with_tools(self, engine: RolloutEngine, model: PreTrainedModel) -> RolloutEngine:
        return engine

    # ---- data

    def template_kwargs(self, args: OnlineConfig) -> dict[str, Any]:
        """Arguments of the chat template for the prompts."""
        return args.chat_template_kwargs or {}

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: OnlineConfig, name: str
    ) -> AnyDataset:
        return prepare_prompt_dataset(
            dataset,
            processing_class,
            chat_template_kwargs=self.template_kwargs(args),
            max_prompt_length=args.max_prompt_length,
            num_proc=args.dataset_num_proc,
            name=name,
        )

    def _check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: OnlineConfig, name: str) -> None:
        maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = longest_sequence(dataset, self.token_columns) if self._shows_tokens(dataset) else 0
        if maximum and longest + args.max_completion_length > maximum:
            raise ValueError(
                f"the longest prompt of the {name} dataset has {longest} tokens, which with max_completion_length="
                f"{args.max_completion_length} are more than the {maximum} positions of {type(model).__name__}; "
                "shorten one of them"
            )

    # ---- the rollout

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; step_time is that of all micro-batches of an optimizer step."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.generation.step += 1
        self._step_time += time.perf_counter() - start
        if self.generation.step % self.current_gradient_accumulation_steps == 0:
            self.record_value("step_time", self._step_time)
            self._step_time = 0.0
        return loss

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> Update:
        """The micro-batch of the update; new completions of `rows` where it is time for them."""
        if self.mode == "eval":
            return self._make_update(self.make_samples(rows))
        if self.generation.is_used_up:
            self.generation.slices = self._slices(self.make_samples(rows))
        return self._make_update(self.generation.current)

    def _slices(self, samples: Samples) -> list[Samples]:
        """The completions of one generation, shuffled, cut into the micro-batches of the update.

        Where all of them are of one optimizer step and each counts the same wherever it stands, completions of a
        prompt stay together, so that it is computed once.
        """
        order = torch.randperm(len(samples)).tolist()
        free = self.args.is_on_policy and self.order_is_free
        if free and self.args.keep_groups_together and BATCH_LAYOUTS[self.updates.layout].shares_prompts:
            order = samples.grouped(order)
        size = len(samples) // self.args.steps_per_generation
        return [samples.select(order[start : start + size]) for start in range(0, len(samples), size)]

    @property
    def order_is_free(self) -> bool:
        """Whether the gradient of a step does not depend on which micro-batch a completion is in."""
        return True

    def make_samples(self, rows: list[dict[str, Any]]) -> Samples:
        """Completions of the rows' prompts, with their advantages; metrics of the generation are recorded.

        Raises:
            ValueError: the rollout or a reward function returned something else than was expected.
            RuntimeError: a reward function raised.
        """
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", PROMPT_IDS)}
        with self._rescue():
            rollout, extras = self._roll_out(rows)
            completions = self._read_completions(prompts, rollout)
            rewards = self.reward_functions(
                prompts,
                completions,
                rollout.completion_ids,
                {**columns, **extras},
                trainer_state=self.state,
                log_extra=self.log_column,
                log_metric=self.log_metric,
            )
        mask = token_vectors(rollout.mask)
        cut_off = self._record_lengths(rollout, mask)
        samples = Samples(
            prompt_ids=rollout.prompt_ids,
            completion_ids=rollout.completion_ids,
            advantages=torch.zeros(len(prompts)),
            excluded=cut_off if self.args.mask_truncated_completions else torch.zeros_like(cut_off),
            mask=mask,
            sampling_logprobs=token_vectors(rollout.logprobs),
        )
        counted = self.accelerator.gather(samples.lengths.sum().to(self.accelerator.device)).sum()
        samples.generation_tokens = counted.clamp(min=1).item() / self.accelerator.num_processes
        rewards = self.accelerator.gather(rewards.to(self.accelerator.device))
        found = self.compute_advantages(samples, rewards)
        first = self.accelerator.process_index * len(prompts)
        samples.advantages = found.advantages[first : first + len(prompts)].cpu()
        self._record_rewards(rewards, found)
        self._warn_of_equal_rewards(found.rewards, self.args.generations(self.mode), prompts)
        self._keep_completions(prompts, completions, rewards, found)
        self.complete(samples)
        return samples

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes the advantages of all processes' completions.

        samples: this process's completions. rewards: (N, R) float32, of all processes' completions by reward function.
        """
        raise NotImplementedError

    def complete(self, samples: Samples) -> None:
        """Adds what the loss reads about tokens to samples whose advantages are known."""

    def _read_completions(self, prompts: list, rollout: Rollout) -> list:
        """Completions as reward functions see them."""
        return self._decode(prompts, rollout.completion_ids)

    def _roll_out(self, rows: list[dict[str, Any]]) -> tuple[Rollout, dict[str, list]]:
        """Completions, and further columns for the reward functions."""
        self.engine.sync_weights(self.model, self.state.global_step)
        if self.rollout_func is None:
            # Around all of it, so that autocast casts the weights once and not for each token.
            with self.accelerator.autocast():
                rollout = self.engine.generate([list(row[PROMPT_IDS]) for row in rows], self.args.sampling_settings())
            return self._checked(rollout, rows), {}
        output = dict(self.rollout_func([row["prompt"] for row in rows], self))
        needed = ("prompt_ids", "completion_ids", "logprobs")
        missing = [name for name in needed if name not in output]
        if missing:
            raise ValueError(f"rollout_func returned {sorted(output)}; expected {', '.join(missing)} too")
        rollout = Rollout(*(output.pop(name) for name in needed), mask=output.pop("env_mask", None))
        extras = {name: value if isinstance(value, list) else [value] * len(rows) for name, value in output.items()}
        return self._checked(rollout, rows), extras

    # ---- scoring, and the batches of the update

    def score_samples(
        self, samples: Samples, score: Callable[[TokenBatch], torch.Tensor], indices: list[int]
    ) -> list[torch.Tensor]:
        """What `score` says (N,) about the tokens of some completions, by completion; zeros for the others."""
        size = self.args.train_batch_size if self.mode == "train" else self.args.eval_batch_size
        return self.updates.score(samples, score, indices, size)

    def trained(self, samples: Samples) -> list[int]:
        """The completions that have a gradient; at least one, so that there always is a loss to differentiate."""
        everyone = not self.args.skip_zero_advantages or self.all_have_gradients
        kept = [
            index
            for index in range(len(samples))
            if not samples.excluded[index] and (everyone or samples.advantages[index] != 0)
        ]
        return kept or [min(range(len(samples)), key=lambda index: len(samples.completion_ids[index]))]

    @property
    def all_have_gradients(self) -> bool:
        """Whether also completions without advantage are learned from."""
        return bool(self.router_aux_loss_coef)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the present optimizer step; in evaluation there is nothing to accumulate."""
        return self.current_gradient_accumulation_steps if self.mode == "train" else 1

    @property
    def loss_divisor(self) -> int:
        """What the loss divides by, where nobody else does."""
        return self.accumulation_steps if self.loss_is_scaled_for_ga else 1

    def _make_update(self, samples: Samples) -> Update:
        # A generation is not always one accumulation window.
        share = self.accumulation_steps / self.args.steps_per_generation if self.mode == "train" else 1
        window = Window(samples.generation_tokens * share, self.loss_divisor, self.args.max_completion_length)
        weights = sequence_weights(self.loss_config.loss_type, samples.lengths, window)
        return self.updates.update(samples, self.trained(samples), weights)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Update,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss (0-d) of one micro-batch; its metrics wait for the next log.

        Raises:
            ValueError: return_outputs, since there are no outputs to return.
        """
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns no outputs")
        result, metrics = policy_step(
            model,
            inputs,
            self.loss_config,
            head=self.head_keywords,
            temperature=self.args.temperature,
            router_coef=self.router_aux_loss_coef,
            loss_divisor=self.loss_divisor,
            **self.loss_options(inputs),
        )
        self.record_extra(result.scores, inputs)
        self.record(result.metrics)
        self.record_policy(metrics)
        return result.loss

    def loss_options(self, inputs: Update) -> dict[str, Any]:
        """Further arguments of `grpo_loss` for a micro-batch."""
        return {}

    def record_extra(self, scores: TokenScores, inputs: Update) -> None:
        """Records further metrics from the scores, without gradient, of each micro-batch."""

    def prediction_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of completions that are made for the evaluation."""
        update = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, update).detach(), None, None

    # ---- saving and resuming

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        # Before the trainer's state, which marks a checkpoint as complete.
        self.generation.save(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.generation.load(checkpoint)
