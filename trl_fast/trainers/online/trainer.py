"""Defines what GRPO, RLOO and PPO share: prompts, the rollout loop, scoring, the table of completions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import AnyDataset, TokenBatch, longest_sequence
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.losses.advantages import Advantages
from trl_fast.modeling.loading import base_model
from trl_fast.parallel.engines import engine_of, prepare_frozen
from trl_fast.parallel.partitions import whole_shape
from trl_fast.rollout import RewardFunctions, RolloutEngine, RolloutImages, Toolbox
from trl_fast.rollout.samples import Samples

from ..base.metric_buffer import MetricBuffer
from ..base.parallelism import check_online
from ..base.prepared_datasets import shows_tokens
from ..base.reference import REFERENCE_ATTRIBUTES, ReferencePolicy
from ..base.tokenizers import tokenizer_of
from ..base.trainer import BaseTrainer
from ..base.trl_attributes import answers_to
from .completion_reader import CompletionReader
from .completions_log import CompletionsLog, report_completions
from .config import OnlineConfig
from .environments import EnvironmentRollouts
from .generation_metrics import GenerationMetrics
from .generation_warnings import GenerationWarnings
from .metric_recorder import MetricRecorder
from .micro_batches import UpdateMaker
from .prompt_order import PromptOrder
from .rescue import Rescue
from .rollout_loop import RolloutLoop


@answers_to(REFERENCE_ATTRIBUTES)
class OnlineTrainer(BaseTrainer):
    """Trains on completions of the policy itself.

    A subclass makes its engine, calls `set_up_loop` at the end of its constructor, and brings `compute_advantages`.

    Attributes:
        loop: rollout → rewards → advantages → update.
        recorder: takes metrics that all processes share.
        rollout_images: reads the images of a generation; None: there are none.
        updates: lays samples out as batches.
    """

    shares_prompts = True
    token_columns: tuple[str, ...] = (PROMPT_IDS,)
    signature_columns: ClassVar[tuple[str, ...]] = ("prompt", PROMPT_IDS, "image")
    # The argument that limits a completion's tokens.
    length_setting: ClassVar[str] = "max_completion_length"
    loop: RolloutLoop
    reference: ReferencePolicy
    ref_model: Any
    # The tools that the policy may call.
    toolbox: Toolbox | None = None
    # The environments that completions are made in.
    environment_rollouts: EnvironmentRollouts | None = None
    # Tokens that are never sampled, beside those of images.
    unsampled_tokens: Sequence[int] = ()
    # As in `OnlineMethod`.
    rollout_func: Callable[[list, Any], dict[str, Any]] | None = None

    def start(self, **kwargs: Any) -> None:
        """Initialises transformers.Trainer and the metrics, as the base does, and the rescue from failing rollouts."""
        super().start(**kwargs)
        check_online(self)
        self._buffers = {mode: MetricBuffer(skip_nan=True) for mode in ("train", "eval")}
        self.recorder = MetricRecorder(self.accelerator, self.model, self._buffers)
        self.rescue = Rescue(
            self.log_window, self._divergence.check, lambda: self._save_checkpoint(self.model, trial=None)
        )
        self.add_callback(self.rescue)

    def seed_sampling(self, layout: str) -> None:
        """Chooses how samples become batches and images are read, and gives each process random numbers of its own."""
        self.rollout_images = self.images and RolloutImages(self.images.reader)
        args, images = self.args, self.images and self.images.layout
        given = (layout, self.tokenizer.pad_token_id, args.pad_to_multiple_of)
        self.updates = UpdateMaker(*given, self.accelerator.device, images)
        # Processes that generate for the same prompt must not sample the same completions.
        set_seed(args.seed, device_specific=True)

    def set_up_loop(
        self,
        engine: RolloutEngine,
        rewards: RewardFunctions,
        *,
        end_ids: Collection[int],
        completions_kept: int,
        parses_messages: bool = False,
        warns_of_cut_off: bool = True,
        logs_rewards: bool = True,
        **options: Any,
    ) -> None:
        """Puts the rollout loop together.

        Args:
            engine: generates completions.
            rewards: the reward sources.
            end_ids: tokens that end a completion.
            completions_kept: completions of the table.
            parses_messages: as in `CompletionReader`.
            warns_of_cut_off: whether completions are expected to end.
            logs_rewards: as in `GenerationMetrics`.
            options: further fields of `RolloutLoop`.
        """
        args, tokenizer = self.args, self.tokenizer
        if engine_of(self.accelerator).needs.wraps_frozen:
            rewards.prepare_models(partial(prepare_frozen, self.accelerator))
        if self.environment_rollouts is not None:
            self.environment_rollouts.attach(self)
        self.completions_log = CompletionsLog(completions_kept)
        if args.log_completions:
            self.checkpoints.parts.append(self.completions_log)
        warnings = self._warnings(
            end_ids if warns_of_cut_off else (), "excludes_cut_off" in options and options["excludes_cut_off"]()
        )
        metrics = GenerationMetrics(
            self.accelerator,
            self.recorder,
            self._tokens,
            self.completions_log,
            warnings,
            reward_names=lambda: self.loop.rewards.names,
            end_ids={*end_ids, tokenizer.pad_token_id},
            logs_rewards=logs_rewards,
            logs_images=self.images is not None and args.log_completions and args.log_multimodal,
        )
        self.loop = RolloutLoop(
            engine=engine,
            rewards=rewards,
            reader=CompletionReader(tokenizer, parses_messages=parses_messages),
            metrics=metrics,
            rescue=self.rescue,
            accelerator=self.accelerator,
            settings=args.sampling_settings,
            images=self.rollout_images,
            environments=self.environment_rollouts,
            vocab_size=whole_shape(base_model(self.model).get_output_embeddings().weight)[0],
            **options,
        )

    def _warnings(self, end_ids: Collection[int], excludes_cut_off: bool) -> GenerationWarnings:
        return GenerationWarnings(
            self.tokenizer,
            end_ids,
            (self.length_setting, getattr(self.args, self.length_setting)),
            excludes_cut_off=excludes_cut_off,
            reward_names=lambda: self.loop.rewards.names,
            is_main_process=self.accelerator.is_main_process,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, which is the processor's where there are images."""
        return tokenizer_of(self.processing_class)

    @property
    def prepared_model(self) -> torch.nn.Module:
        """Returns what the engine has made of the policy: sharded or in a wrapper, when training has begun."""
        return self.model if self.is_fsdp_enabled else self.model_wrapped

    @property
    def engine(self) -> RolloutEngine:
        """Returns the engine that generates, which has the step's weights while a rollout is made."""
        return self.loop.engine

    @engine.setter
    def engine(self, engine: RolloutEngine) -> None:
        self.loop.engine = engine

    @property
    def reward_functions(self) -> RewardFunctions:
        """Returns the reward sources; others that are set count from the next rollout on."""
        return self.loop.rewards

    @reward_functions.setter
    def reward_functions(self, rewards: RewardFunctions) -> None:
        self.loop.rewards = rewards

    @property
    def shows_completions(self) -> bool:
        """Says whether completions are shown with the next log."""
        return True

    # ---- data

    def check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: OnlineConfig, name: str) -> None:
        maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = longest_sequence(dataset, self.token_columns) if shows_tokens(dataset, self.token_columns) else 0
        completion = getattr(args, self.length_setting)
        if maximum and longest + completion > maximum:
            raise ValueError(
                f"the longest prompt of the {name} dataset has {longest} tokens, which with {self.length_setting}="
                f"{completion} are more than the {maximum} positions of {type(model).__name__}; shorten one of them"
            )

    def get_train_dataloader(self) -> DataLoader:
        """Returns the loader of a whole generation's rows at a time; a rest that does not fill one is left out."""
        order, dataset = self.prompt_order(), self.train_dataset
        if isinstance(dataset, IterableDataset):
            dataset = order.stream(dataset)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * order.batches,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return self.prompt_order().sampler(self.train_dataset if dataset is None else dataset)

    # ---- what a method brings

    def prompt_order(self) -> PromptOrder:
        """Returns the order in which training prompts are read."""
        raise NotImplementedError

    @property
    def group_size(self) -> int | None:
        """Returns how many consecutive completions are held against each other; None: all."""
        return None

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes the advantages of all processes' completions.

        samples: this process's completions. rewards: (N, R) float32, of all processes' completions by reward source.
        """
        raise NotImplementedError

    def add_contexts(self, samples: Samples, rows: list[dict[str, Any]], rewards: torch.Tensor) -> None:
        """Adds what the loss reads of the rows, and of how other completions fared, as in `OnlineMethod`.

        rewards: (N,) float32, of all processes' completions.
        """

    def deal(self, samples: Samples) -> Samples:
        """Returns the completions that this process trains on, of those that it has sampled."""
        return samples

    def add_logprobs(self, samples: Samples) -> None:
        """Adds what the loss reads about tokens to samples whose advantages are known."""

    # ---- scoring

    def policy_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the policy's log-probabilities of the batch's tokens, (N,) float32."""
        with self.compute_loss_context_manager():
            return self.score(self.called_policy, batch, temperature=self.args.temperature).tokens.logprobs

    def reference_logprobs(self, batch: TokenBatch) -> torch.Tensor:
        """Computes the reference's log-probabilities of the batch's tokens, (N,) float32."""
        return self.reference.score(batch, temperature=self.args.temperature).logprobs

    # ---- the update

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Computes the loss, a scalar, of one micro-batch of the update; its metrics wait for the next log.

        Raises:
            ValueError: return_outputs, since there are no outputs to return.
        """
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns no outputs")
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Computes the loss of one micro-batch, and records its metrics."""
        raise NotImplementedError

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, as the base does, and reports the last generation's completions where log_completions asks for it."""
        super().log(logs, start_time)
        args = self.args
        if args.log_completions and self.shows_completions and self.accelerator.is_main_process:
            report_completions(
                self.completions_log,
                self.state.global_step,
                folder=Path(args.output_dir) / "completions",
                count=args.num_completions_to_print,
                unique_prompts=args.log_unique_prompts,
                loggers=args.report_to,
            )
