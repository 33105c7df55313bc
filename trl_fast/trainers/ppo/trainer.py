"""Defines PPOTrainer, with the interface and behaviour of TRL's last PPO, on packed rows and the fused head."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset, prompts_of_tokens
from trl_fast.losses.advantages import Advantages
from trl_fast.losses.ppo import KLController, kl_penalties, rollout_metrics
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import evaluating
from trl_fast.modeling.value_model import check_vocabulary
from trl_fast.parallel.failures import failing_together
from trl_fast.parallel.partitions import whole_shape
from trl_fast.rollout import GivenReward, RewardFunctions, RolloutEngine

from ..base.overrides import overridden
from ..base.prepared_datasets import check_dataset_type
from ..base.reference import ReferencePolicy
from ..base.tokenizers import older_tokenizer_name
from ..base.trl_attributes import answers_to
from ..checkpoints.parts import NumbersPart
from ..online.completions_log import CompletionsLog
from ..online.engines import sampling_from_policy
from ..online.micro_batches import batches_in_turn
from ..online.prompt_order import PromptOrder
from .actor_critic import ActorCriticTrainer
from .argument_checks import check_distinct, count_rollouts
from .config import PPOConfig
from .critic import Critic, value_model_like
from .experience import Experience, PPOUpdate, make_update
from .rewards import load_reward_by_name, make_rewards
from .rollout_scores import ScoredRollout, add_targets, completion_scores
from .step import ppo_step
from .stopping_engine import StoppingEngine, end_tokens
from .trl_attributes import PPO_ATTRIBUTES

logger = logging.getLogger(__name__)

KL_STATE_FILE = "kl_control_state.json"


@answers_to(PPO_ATTRIBUTES)
class PPOTrainer(ActorCriticTrainer):
    """Trains by Proximal Policy Optimization with a value model (arXiv 1707.06347, 1909.08593).

    Both models are prepared as one, `models`, whichever engine shards them; `model` is the policy.

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
        NotImplementedError: FSDP1 shards the weights.
    """

    method = "ppo"
    config_class = PPOConfig
    length_setting = "response_length"
    uncalled_hooks = dict.fromkeys(("null_ref_context",), "give a ref_model")

    @failing_together()
    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | None = None,
        reward_model: GivenReward | list[GivenReward] | None = None,
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
        check_distinct(model=model, ref_model=ref_model, reward_model=reward_model, value_model=value_model)
        args = copy.copy(self.resolve_config(args, model))
        check_dataset_type(train_dataset, "train_dataset")
        if data_collator is not None:
            logger.warning("data_collator is not used: PPOTrainer does not pad prompts.")
        model = self.resolve_model(model, args, quantization_config)
        processing_class = self.resolve_tokenizer(processing_class, model, args)
        vocab_size = whole_shape(base_model(model).get_output_embeddings().weight)[0]
        self.end_ids, self.stop_ids = end_tokens(args, processing_class, vocab_size)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, processing_class, args, model)
        args.max_steps = count_rollouts(args, train_dataset)
        sequences = [list(row[PROMPT_IDS]) for row in train_dataset.take(2)]
        if isinstance(reward_model, str):
            reward_model = load_reward_by_name(reward_model, args)
        self.reward_model = reward_model
        rewards = make_rewards(reward_model, processing_class, args, sequences, vocab_size)
        value_model = value_model_like(reward_model, model) if value_model is None else value_model
        self.critic = Critic(value_model, args, processing_class, sequences, vocab_size)
        self.reference = ReferencePolicy(self)
        model, layout = self.reference.set_up(model, ref_model, args, peft_config, sequences)
        if self.ref_model is not None:
            check_vocabulary(base_model(self.ref_model), "ref_model", vocab_size)
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
        self._set_up_rollouts(layout, rollout_engine, rewards)

    def _set_up_rollouts(self, layout: str, engine: RolloutEngine | None, rewards: RewardFunctions) -> None:
        args = self.args
        self.critic.check_optimizer(self.optimizer)
        self.join_models()
        self._divergence.more_models.append(self.value_model)
        self.kl_control = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        kl_state = NumbersPart(KL_STATE_FILE, self.kl_control, {"kl_coef": "coefficient"})
        self.checkpoints.parts.append(kl_state)
        self.checkpoints.collective_parts.append(self.critic)
        self._rows: list[dict[str, Any]] = []
        self._latest: dict[str, float] = {}
        self.seed_sampling(layout)
        engine = engine or sampling_from_policy(self, self.end_ids)
        self.set_up_loop(
            StoppingEngine(engine, self.stop_ids, args.local_rollout_forward_batch_size),
            rewards,
            end_ids=self.end_ids,
            completions_kept=args.batch_size,
            warns_of_cut_off=bool(self.stop_ids),
            logs_rewards=False,
            prompt_ids_for_rewards=True,
            samples_class=Experience,
        )

    @property
    def engine(self) -> RolloutEngine:
        """Returns the engine that generates; completions are cut after it."""
        return self.loop.engine.engine

    @engine.setter
    def engine(self, engine: RolloutEngine) -> None:
        self.loop.engine.engine = engine

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: PPOConfig, name: str
    ) -> AnyDataset:
        """Tokenizes the prompts of a dataset that has no token ids.

        Raises:
            ValueError: the datasets have images.
        """
        if self.images is not None:
            raise ValueError(
                f"The {name} dataset has images, which PPOTrainer does not read; use GRPOTrainer or RLOOTrainer, or "
                "remove the images to train on the text alone"
            )
        how = {"num_proc": args.dataset_num_proc, "name": name}
        dataset = prompts_of_tokens(dataset, processing_class, **how)
        return prepare_prompt_dataset(dataset, processing_class, chat_template_kwargs=args.chat_template_kwargs, **how)

    def prompt_order(self) -> PromptOrder:
        """Returns the order of training prompts: shuffled, each step's the ones of a rollout."""
        args = self.args
        return PromptOrder(repeats=1, prompts=args.batch_size, batches=args.num_mini_batches, seed=args.seed)

    # ---- the rollout

    @torch.no_grad()
    def roll_out(self, rows: list[dict[str, Any]]) -> ScoredRollout:
        """Samples completions of the rows' prompts, with their rewards and their divergence from the reference.

        Raises:
            ValueError: the rollout or a reward source returned something else than was expected.
            RuntimeError: a reward source raised.
        """
        judged = self.loop.judged_rollout(rows, self)
        samples = Experience.of(judged.rollout.prompt_ids, judged.rollout.completion_ids)
        scores, kl = self._score(samples, judged.rewards)
        return ScoredRollout(judged.prompts, judged.completions, samples, judged.rewards, scores, kl)

    @torch.no_grad()
    def _score(self, samples: Experience, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes scores (S,) from rewards (S, R), and the divergence (N,) of each token; adds the log-probabilities.

        A score is the sum of a completion's rewards, less the penalty where there is no EOS token.
        """
        args = self.args
        weights, eos = self.reward_functions.weights.cpu(), self.tokenizer.eos_token_id
        scores = completion_scores(rewards, weights, samples.completion_ids, eos, args.missing_eos_penalty)
        batches = batches_in_turn(samples, range(len(samples)), args.local_rollout_forward_batch_size)
        samples.old_logprobs = self.updates.score(samples, self.policy_logprobs, batches)
        reference = self.updates.score(samples, self.reference_logprobs, batches)
        return scores, kl_penalties(samples.flat("old_logprobs"), torch.cat(reference), args.kl_estimator)

    @torch.no_grad()
    def compute_advantages(self, samples: Experience, rewards: torch.Tensor) -> Advantages:
        """Computes the advantages of completions, adds what the update aims at, and records the rollout's metrics.

        In evaluation there are no values, and advantages are NaN.

        Args:
            samples: this process's completions, to which log-probabilities, advantages, values and returns are added.
            rewards: (N, R) float32 of all processes' completions, by reward source.

        Returns:
            Of all processes' completions, the mean advantage of each one's tokens, and the scores.
        """
        device, count = self.accelerator.device, len(samples)
        if self.args.kl_target is None:
            # It may have been changed since.
            self.kl_control.coefficient = self.args.kl_coef
        first = self.accelerator.process_index * count
        scores, kl = self._score(samples, rewards[first : first + count].cpu())
        advantages = torch.full_like(scores, torch.nan)
        if self.mode == "train":
            add_targets(samples, scores, kl, self.critic, self.args, self.kl_control.coefficient)
            advantages = torch.stack([part.mean() for part in samples.token_advantages])
        self._record_rollout(samples, scores, kl)
        advantages, scores = (self.accelerator.gather(values.to(device)) for values in (advantages, scores))
        return Advantages(advantages, scores, torch.zeros(0))

    def _record_rollout(self, samples: Experience, scores: torch.Tensor, kl: torch.Tensor) -> None:
        """Records a rollout's metrics; in training the weight of the divergence moves."""
        accelerator = self.accelerator
        vectors = (samples.flat("old_logprobs"), kl, scores)
        metrics = rollout_metrics(*(v.to(accelerator.device) for v in vectors), self.kl_control.coefficient)
        self.record(metrics)
        eos = self.tokenizer.eos_token_id
        ended = torch.tensor(sum(ids.count(eos) for ids in samples.completion_ids), device=accelerator.device)
        self.recorder.record_values({"val/num_eos_tokens": accelerator.gather(ended).sum().item()})
        if self.mode == "train" and self.args.kl_target is not None:
            self.recorder.record_values({"objective/kl_coef": self.kl_control.coefficient})
            total, count = accelerator.reduce(torch.stack(metrics["objective/kl"]), "sum").tolist()
            self.kl_control.update(total / count, self.args.batch_size)

    # ---- evaluation

    def prediction_step(self, model: torch.nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> tuple:
        """Records the metrics of completions that are made for the evaluation; there is no loss."""
        self.loop.run(inputs, self, update=lambda samples: samples)
        return None, None, None

    def generate_completions(self, sampling: bool = False) -> None:
        """Shows completions of the evaluation prompts, or of training ones, with their rewards.

        sampling: only of the first batch.
        """
        loader = self.get_train_dataloader() if self.eval_dataset is None else self.get_eval_dataloader()
        log = CompletionsLog(None)
        with evaluating(self.model):
            for rows in loader:
                found = self.loop.judged_rollout(rows, self)
                by_source = dict(zip(self.reward_functions.names, found.rewards.t().tolist(), strict=True))
                nothing = [math.nan] * len(rows)
                log.add(by_source, prompt=found.prompts, completion=found.completions, advantage=nothing)
                if sampling:
                    break
        if self.accelerator.is_main_process:
            log.show(self.state.global_step, self.args.num_completions_to_print)

    # ---- the update

    def train(self, *args: Any, **kwargs: Any):
        """Trains, as the base does, and starts the clock for episodes a second."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Collects a rollout's prompts; at the last ones of a step makes the rollout and its updates.

        The last update's gradients are left for transformers.Trainer to apply. Returns the mean loss, a scalar.
        """
        self._rows += inputs
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        rows, self._rows = self._rows, []
        model.train()
        loss = self.loop.run(rows, self, update=partial(self._update, model))
        args, step = self.args, self.state.global_step
        episodes = (step + 1 - self.rescue.steps_before) * args.batch_size
        self._latest = {
            "eps": int(episodes / (time.perf_counter() - self._started)),
            "lr": self._get_learning_rate(),
            "episode": (step + 1) * args.batch_size,
        }
        shows = args.num_sample_generations and step % self.sample_generations_freq == 0
        if shows and overridden(type(self), "generate_completions"):
            self.generate_completions(sampling=True)
        elif shows and not args.log_completions and self.accelerator.is_main_process:
            self.completions_log.show(step + 1, args.num_completions_to_print, unique_prompts=args.log_unique_prompts)
        return loss

    def _update(self, model: torch.nn.Module, experience: Experience) -> torch.Tensor:
        """Makes all updates of a rollout; the last one's gradients stay. Returns their mean loss (0-d)."""
        args = self.args
        loss = torch.zeros((), device=self.accelerator.device)
        self._ratios: list[torch.Tensor] = []
        count = args.num_ppo_epochs * args.num_mini_batches
        for number, chosen in enumerate(self._mini_batches(len(experience))):
            self.optimizer.zero_grad()
            micro_batches = chosen.split(args.per_device_train_batch_size)
            for index, micro in enumerate(micro_batches):
                update = make_update(experience, micro.tolist(), self.updates, self.critic)
                with self.unsynced(model) if index + 1 < len(micro_batches) else nullcontext():
                    loss += super().training_step(model, update) / count
            if number + 1 < count:
                if args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
        ratios = torch.stack(self._ratios)
        self.recorder.record_values({"val/ratio_var": ratios.var().item() if len(ratios) > 1 else 0.0})
        return loss

    def _mini_batches(self, completions: int) -> Iterator[torch.Tensor]:
        """Yields the numbers of each mini-batch's completions, in a new order each epoch."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(completions).split(self.args.local_mini_batch_size)

    def _prepare_inputs(self, inputs: PPOUpdate) -> PPOUpdate:
        return inputs

    def _compute_loss(self, model: torch.nn.Module, inputs: PPOUpdate) -> torch.Tensor:
        """Computes the loss of one micro-batch, of both models, and records its metrics."""
        args = self.args
        settings = {name: getattr(args, name) for name in ("cliprange", "vf_coef", "cliprange_value", "temperature")}
        result = ppo_step(model, inputs, head=self.head_options, router_coef=self.router_aux_loss_coef, **settings)
        self._ratios.append(result.metrics["val/ratio"].mean())
        self.record(result.metrics)
        return result.loss

    def get_total_train_batch_size(self, args: PPOConfig) -> int:
        """Returns the completions of a step, of all processes."""
        return args.batch_size

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with episodes, their rate and the learning rate as they are now."""
        if self.mode == "train":
            logs.update(self._latest)
            self._latest = {}
        super().log(logs, start_time)
