"""PPOTrainer: the interface and behaviour of TRL's last PPO, on packed rows and the fused head."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.losses.ppo import (
    KLController,
    States,
    ppo_targets,
)
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.value_model import make_value_model
from trl_fast.rollout import RolloutEngine, TransformersEngine

from ..base.metric_buffer import MetricBuffer
from ..base.reference import ReferenceTrainer
from ..base.tokenizers import older_tokenizer_name
from ..online.completions_log import CompletionsLog
from ..online.micro_batches import UpdateMaker
from .config import PPOConfig
from .critic import Critic, RewardSource, load_reward_source, make_reward_functions
from .experience import Experience, PPOUpdate, make_update
from .rollouts import PPORollouts, end_tokens
from .step import ppo_step

logger = logging.getLogger(__name__)

VALUE_FOLDER = "value_model"
KL_STATE_FILE = "kl_control_state.json"


class PPOTrainer(PPORollouts, ReferenceTrainer):
    """Proximal Policy Optimization with a value model (arXiv 1707.06347, 1909.08593).

    Args:
        args: the config.
        processing_class: the tokenizer, of all models; None loads the policy's. `tokenizer` is its older name.
        model: the policy: a name, a causal language model, or a PeftModel.
        ref_model: None: a copy of the policy as it is now, or with an adapter the policy without it.
        reward_model: a sequence classifier with one label, which is given the policy's tokens, or its name; or one or
            several functions of prompts, completions, completion_ids and the dataset's columns, as GRPO takes them.
        train_dataset, eval_dataset: rows of token ids, `input_ids`, or of `prompt`, text or messages.
        value_model: a sequence classifier with one label, which is trained too; None: a copy of the reward model, or,
            if that is no single model, of the policy's layers with a new head.
        quantization_config: of a policy given by name.
        data_collator: accepted and not used, since prompts are not padded.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: transformers.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
        NotImplementedError: weights are sharded (DeepSpeed, FSDP).
    """

    method = "ppo"
    config_class = PPOConfig
    shares_prompts = True
    token_columns: ClassVar[tuple[str, ...]] = (PROMPT_IDS,)
    signature_columns: ClassVar[tuple[str, ...]] = ("prompt", PROMPT_IDS)

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        reward_model: RewardSource | list[RewardSource] | None = None,
        train_dataset: AnyDataset | None = None,
        value_model: PreTrainedModel | PeftModel | None = None,
        data_collator: Callable | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: object | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        processing_class = older_tokenizer_name(type(self).__name__, processing_class, tokenizer)
        if model is None:
            raise ValueError("model is missing; give the policy's name, or a causal language model")
        _check_distinct(model=model, ref_model=ref_model, reward_model=reward_model, value_model=value_model)
        args = copy.copy(self.resolve_config(args, model))
        self.check_dataset_type(train_dataset, "train_dataset")
        if data_collator is not None:
            logger.warning("data_collator is not used: PPOTrainer does not pad prompts.")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        self.end_ids, self.stop_ids = end_tokens(args, processing_class)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        args.max_steps = _rollouts(args, train_dataset)
        sequences = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)]
        if isinstance(reward_model, str):
            reward_model = load_reward_source(reward_model, args)
        self.reward_functions = make_reward_functions(reward_model, processing_class, args, sequences)
        self.reward_model = reward_model
        if value_model is None:
            known = reward_model if isinstance(reward_model, PreTrainedModel) else None
            value_model = make_value_model(base_model(model), known)
        self.critic = Critic(value_model, args, processing_class, sequences)
        model, layout = self.set_up_models(model, ref_model, args, peft_config, sequences)
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
        self._start_rollouts(layout, rollout_engine)

    def _start_rollouts(self, layout: str, engine: RolloutEngine | None) -> None:
        args, pad = self.args, self.processing_class.pad_token_id
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError("PPOTrainer with sharded weights (DeepSpeed, FSDP) is not supported")
        self._check_optimizer()
        self.critic.prepare(self.accelerator)
        self._divergence.more_models.append(self.value_model)
        self.updates = UpdateMaker(layout, pad, args.pad_to_multiple_of, self.accelerator.device)
        self._buffers = {mode: MetricBuffer(skip_nan=True) for mode in ("train", "eval")}
        self._completions = CompletionsLog(args.batch_size)
        self.kl_control = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self._rows: list[dict[str, Any]] = []
        self._latest: dict[str, float] = {}
        # Processes must not sample the same completions.
        set_seed(args.seed, device_specific=True)
        self._vocab_size = base_model(self.model).get_output_embeddings().weight.shape[0]
        policy = lambda: self.accelerator.unwrap_model(self.model)  # noqa: E731
        self.engine = engine or TransformersEngine(policy, self.end_ids, pad)

    @property
    def value_model(self) -> PreTrainedModel | PeftModel:
        """The value model, without what was wrapped around it."""
        return self.critic.plain

    # ---- the update

    def make_experience(self, rows: list[dict[str, Any]]) -> Experience:
        """A rollout with its advantages and returns; its metrics are recorded, and the KL's weight moves.

        Raises:
            ValueError, RuntimeError: as in `roll_out`.
        """
        args, found = self.args, self.roll_out(rows)
        samples = found.samples
        lengths = torch.tensor([len(ids) for ids in samples.completion_ids])
        # TRL's padded matrix has no place behind its longest completions.
        states = States(lengths, lengths < lengths.max())
        values = self.critic.score(samples, states.has_end, args.local_rollout_forward_batch_size)
        advantages, returns = ppo_targets(
            *(found.kl, found.scores, torch.cat(values), states),
            kl_coef=self.kl_control.coefficient,
            gamma=args.gamma,
            lam=args.lam,
            whiten_rewards=args.whiten_rewards,
        )
        by_completion = samples.split(advantages)
        kl = self._record_rollout(found, torch.stack([part.mean() for part in by_completion]))
        if args.kl_target is not None:
            self.record_value("objective/kl_coef", self.kl_control.coefficient)
            self.kl_control.update(kl, args.batch_size)
        return Experience(samples, states.has_end, by_completion, values, list(returns.split(states.counts.tolist())))

    def train(self, *args: Any, **kwargs: Any):
        """As in the base."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Collects a rollout's prompts; at the last ones of a step the rollout and its updates, but for the last one.

        That one's gradients are left for transformers.Trainer to apply. Returns the mean loss (0-d).
        """
        self._rows += inputs
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        rows, self._rows = self._rows, []
        model.train()
        experience = self.make_experience(rows)
        loss = self._update(model, experience)
        args, step = self.args, self.state.global_step
        episodes = (step + 1 - self._whole_step.steps_before) * args.batch_size
        self._latest = {
            "eps": int(episodes / (time.perf_counter() - self._started)),
            "lr": self._get_learning_rate(),
            "episode": (step + 1) * args.batch_size,
        }
        shows = args.num_sample_generations and step % max(1, args.max_steps // args.num_sample_generations) == 0
        if shows and not args.log_completions and self.accelerator.is_main_process:
            self._completions.show(step + 1, args.num_completions_to_print, unique_prompts=args.log_unique_prompts)
        return loss

    def _update(self, model: torch.nn.Module, experience: Experience) -> torch.Tensor:
        """All updates of a rollout; the last one's gradients stay. Returns their mean loss."""
        args = self.args
        loss = torch.zeros((), device=self.accelerator.device)
        self._ratios: list[torch.Tensor] = []
        count = args.num_ppo_epochs * args.num_mini_batches
        for number, chosen in enumerate(self._mini_batches(len(experience.samples))):
            self.optimizer.zero_grad()
            micro_batches = chosen.split(args.per_device_train_batch_size)
            for index, micro in enumerate(micro_batches):
                update = make_update(experience, micro.tolist(), self.updates, self.critic)
                with self._unsynced(model) if index + 1 < len(micro_batches) else nullcontext():
                    loss += super().training_step(model, update) / count
            if number + 1 < count:
                if args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
        ratios = torch.stack(self._ratios)
        self.record_value("val/ratio_var", ratios.var().item() if len(ratios) > 1 else 0.0)
        return loss

    def _mini_batches(self, completions: int) -> Iterator[torch.Tensor]:
        """Numbers of completions, in a new order each epoch."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(completions).split(self.args.local_mini_batch_size)

    @contextmanager
    def _unsynced(self, model: torch.nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for each in (model, self.critic.model):
                stack.enter_context(self.accelerator.no_sync(each))
            yield

    def _prepare_inputs(self, inputs: PPOUpdate) -> PPOUpdate:
        return inputs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: PPOUpdate,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss (0-d) of one micro-batch, of both models; its metrics wait for the next log.

        Raises:
            ValueError: return_outputs, since there are no outputs to return.
        """
        if return_outputs:
            raise ValueError("return_outputs=True: PPOTrainer returns no outputs")
        args = self.args
        result = ppo_step(
            model,
            self.critic.model,
            inputs,
            head=self.head_keywords,
            cliprange=args.cliprange,
            vf_coef=args.vf_coef,
            cliprange_value=args.cliprange_value,
            temperature=args.temperature,
            router_coef=self.router_aux_loss_coef,
        )
        self._ratios.append(result.metrics["val/ratio"].mean())
        self.record(result.metrics)
        return result.loss

    def get_total_train_batch_size(self, args: PPOConfig) -> int:
        """Completions of a step, of all processes."""
        return args.batch_size

    # ---- both models' weights

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in the base, with the value model's weights beside the policy's."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        decays = set(self.get_decay_parameter_names(self.value_model))
        named = [(name in decays, weight) for name, weight in self._value_weights()]
        for decay, rate in ((True, self.args.weight_decay), (False, 0.0)):
            weights = [weight for decayed, weight in named if decayed == decay]
            if weights:
                optimizer.add_param_group({"params": weights, "weight_decay": rate})
        return optimizer

    def _value_weights(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, weight) for name, weight in self.value_model.named_parameters() if weight.requires_grad]

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            return
        known = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
        if not all(id(weight) in known for _, weight in self._value_weights()):
            raise ValueError("optimizers: the optimizer lacks weights of value_model; give it those of both models")

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clips each model's gradients by their own norm; the policy's norm."""
        norm = super()._clip_grad_norm(model)
        torch.nn.utils.clip_grad_norm_(self.value_model.parameters(), self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        norm = super()._get_grad_norm(*args, **kwargs)
        gradients = [weight.grad for _, weight in self._value_weights() if weight.grad is not None]
        self._divergence.see_norm(norm + torch.nn.utils.get_total_norm(gradients))
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        if self.args.should_save and not self.args.save_only_model:
            # Before the trainer's state, which marks a checkpoint as complete.
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            self.critic.save(folder / VALUE_FOLDER)
            (folder / KL_STATE_FILE).write_text(json.dumps({"kl_coef": self.kl_control.coefficient}))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self.critic.load(folder / VALUE_FOLDER)
        self.kl_control.coefficient = json.loads((folder / KL_STATE_FILE).read_text())["kl_coef"]

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base, with what is counted up, as it is now."""
        if self.mode == "train":
            logs.update(self._latest)
            self._latest = {}
        super().log(logs, start_time)


def _check_distinct(**models: object) -> None:
    """Raises ValueError if one model was given for two purposes."""
    given = [(name, model) for name, model in models.items() if isinstance(model, torch.nn.Module)]
    for index, (name, model) in enumerate(given):
        for other, again in given[:index]:
            if model is again:
                raise ValueError(
                    f"{other} and {name} are the same object, but only one of them is to be trained; leave {name} "
                    "None to have a copy made, or load it once more"
                )


def _rollouts(args: PPOConfig, dataset: AnyDataset) -> int:
    """How many rollouts there are to be.

    Raises:
        ValueError: a stream's length is needed, or a dataset has too few rows for one rollout.
    """
    if isinstance(dataset, Dataset) and len(dataset) < args.batch_size:
        raise ValueError(
            f"the train dataset has {len(dataset)} rows, but one rollout takes {args.batch_size} prompts "
            f"(per_device_train_batch_size={args.per_device_train_batch_size} * gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} * num_mini_batches={args.num_mini_batches} * {args.world_size} "
            "processes); use a larger dataset or a smaller batch"
        )
    if args.max_steps > 0:
        return args.max_steps
    if args.total_episodes is None and not isinstance(dataset, Dataset):
        raise ValueError("total_episodes=None: the train dataset is a stream of unknown length; set it, or max_steps")
    episodes = args.total_episodes or int(args.num_train_epochs * len(dataset))
    return max(math.ceil(episodes / args.batch_size), 1)
