"""Calls what a subclass overrides of TRL's online trainers, with TRL's arguments, and is what `super()` gives it.

TRL's trainer is a chain of methods: `_generate_and_score_completions` calls `_generate` (which calls
`_tokenize_prompts` and `_generate_single_turn`), `_get_per_token_logps_and_entropies` and `_calculate_rewards`, and
gives a dict of padded tensors to `_compute_loss`. Ours is the `RolloutLoop`, on lists of tokens. Where a subclass
overrides one of those methods, the loop asks it in the place of its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trl_fast.data.formats import is_conversational
from trl_fast.data.images.joining import join_images
from trl_fast.data.images.layout import ImageLayout
from trl_fast.data.images.messages import prepare_multimodal_messages
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.rollout import (
    EngineWrapper,
    Rollout,
    RolloutEngine,
    RolloutImages,
    SamplingSettings,
    ToolLoop,
    ToolRollout,
    generate,
)
from trl_fast.rollout.images import PromptImages
from trl_fast.rollout.reward_answers import copied
from trl_fast.rollout.samples import Samples

from ..base.overrides import overridden
from .prompt_tokens import prompt_tokens
from .rollout_loop import RolloutLoop, custom_rollout, token_vectors
from .trl_batch import BatchFormat, MicroBatch, check_batch
from .trl_scoring import TRLScoring

# Hooks that see micro-batches: where one is overridden, micro-batches are put together as in TRL.
BATCH_HOOKS = (
    "compute_loss",
    "_compute_loss",
    "_prepare_inputs",
    "_get_per_token_logps_and_entropies",
    "get_high_entropy_mask",
)
ROLLOUT_HOOKS = (
    "_generate_and_score_completions",
    "_generate",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_calculate_rewards",
    "_log_metric",
    "_log_completion_extra",
)


class TRLHook:
    """Gives a trainer class a method of TRL's, which is one of its `TRLHooks`; for the body of the class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type) -> Any:
        return getattr(TRLHooks if trainer is None else trainer.trl_hooks, self._name)


class TRLHooks:
    """Stands between the rollout loop and a trainer's TRL methods.

    Args:
        trainer: a `GroupTrainer`, whose subclass may override what `TRLHook` gives it.
        returns_more: whether TRL's trainer of the method returns log-probabilities, masks and further columns from
            its generating methods (GRPO), or tokens and texts only (RLOO).
    """

    def __init__(self, trainer: Any, *, returns_more: bool) -> None:
        self._trainer, self._returns_more = trainer, returns_more
        self._overridden: frozenset[str] = frozenset()
        self._settings: SamplingSettings | None = None
        self._loop_generates = self._hands_out_batch = False
        self.scoring = TRLScoring(trainer)
        self._seen: list[tuple[Samples, MicroBatch]] = []

    @property
    def sees_batches(self) -> bool:
        """Says whether a method of the subclass's sees micro-batches."""
        return bool(self._overridden.intersection((*BATCH_HOOKS, "_generate_and_score_completions")))

    @property
    def makes_batches(self) -> bool:
        """Says whether the subclass makes the batches of completions."""
        return self.has("_generate_and_score_completions")

    @property
    def cuts_batches(self) -> bool:
        """Says whether micro-batches are cut from a batch of TRL's, later than completions are scored."""
        return self.makes_batches or self._hands_out_batch

    def has(self, name: str) -> bool:
        """Says whether the subclass overrides a method."""
        return name in self._overridden

    @property
    def scores_itself(self) -> bool:
        """Says whether the subclass scores tokens."""
        return self.has("_get_per_token_logps_and_entropies")

    def attach(self, loop: RolloutLoop) -> None:
        """Lets the loop ask the subclass's methods in the place of its own parts.

        Methods that were put into the trainer or its class since count too, as do engines that were exchanged.
        """
        self._loop, names = loop, (*BATCH_HOOKS, *ROLLOUT_HOOKS)
        own = vars(self._trainer).keys() & set(names)
        self._overridden = frozenset((*own, *overridden(type(self._trainer), *names)))
        generates = self._overridden & {"_generate", "_tokenize_prompts"}
        loop.generate_instead = self._generated if generates else None
        rewards = self._overridden & {"_calculate_rewards", "_log_metric", "_log_completion_extra"}
        loop.reward_instead = self._rewarded if rewards else None
        holder: Any = loop.engine if isinstance(loop.engine, ToolLoop) else loop
        engine = holder.engine
        self._engine = engine.engine if isinstance(engine, _SingleTurnEngine) else engine
        if self.has("_generate_single_turn"):
            engine = _SingleTurnEngine(self._engine, self._single_turn)
        holder.engine = engine if self.has("_generate_single_turn") else self._engine

    @property
    def format(self) -> BatchFormat:
        """Returns how TRL's batch of this method looks."""
        trainer = self._trainer
        args, mode = trainer.args, getattr(trainer.args, "vllm_importance_sampling_mode", "")
        return BatchFormat(
            trainer.tokenizer.pad_token_id,
            args.pad_to_multiple_of,
            trainer.accelerator.device,
            trainer.accelerator.num_processes,
            frozenset({"importance_sampling_ratio"} if mode.startswith("sequence") else ()),
            sums_old=not self._returns_more,
            images=trainer.images and trainer.images.layout,
        )

    def micro_batch(self, samples: Samples) -> MicroBatch:
        """Returns the micro-batch of samples, without what the fused step takes.

        Where several updates are made on a generation, each finds what a method of the subclass's changed in the
        batch before, as in TRL.
        """
        known = next((batch for seen, batch in self._seen if seen is samples), None)
        if known is not None:
            return known
        batch = MicroBatch(lambda: self.format.batch(samples))
        args = self._trainer.args
        if self.sees_batches and args.num_iterations > 1 and self._trainer.model.training:
            self._seen = [*self._seen, (samples, batch)][-args.steps_per_generation :]
        return batch

    # ---- what the loop asks

    def _generated(self, rows: list[dict[str, Any]]) -> tuple[Rollout, dict[str, list]]:
        """Returns what the subclass generates for the rows' prompts, and further columns for the reward sources."""
        self._loop_generates = True
        try:
            found = self._trainer._generate([row["prompt"] for row in rows])
        finally:
            self._loop_generates = False
        expected = 8 if self._returns_more else 3
        if not isinstance(found, tuple) or len(found) != expected:
            what = f"{len(found)} values" if isinstance(found, tuple) else f"a {type(found).__name__}"
            raise ValueError(f"_generate() returned {what}; expected a tuple of {expected}, as TRL's does")
        if not self._returns_more:
            prompt_ids, completion_ids, completions = found
            return Rollout(prompt_ids, completion_ids, completions=completions), {}
        prompt_ids, completion_ids, mask, completions, logprobs, columns, images, tool_images = found
        lists = {name: value if isinstance(value, list) else [value] * len(rows) for name, value in columns.items()}
        rollout = Rollout(prompt_ids, completion_ids, logprobs, mask, completions)
        if images is not None:
            own = tool_images or [[] for _ in images]
            first = [(each or [])[: len(each or []) - len(given)] for each, given in zip(images, own, strict=True)]
            rollout.images, rollout.completion_images = self._read(first), self._read(own)
        return rollout, lists

    def _read(self, pictures: list[list[Any] | None] | None) -> PromptImages | None:
        """Returns pictures, by prompt, as the model reads them; None where there are none.

        Raises:
            ValueError: there are some, and the datasets have none.
        """
        if not any(pictures or ()):
            return None
        images: RolloutImages | None = self._trainer.rollout_images
        if images is None:
            raise ValueError(
                "images were given, but the model is trained as one of text, since the train dataset has no images; "
                "give it a column 'images', of empty lists if need be"
            )
        return [tuple(map(images.read, own or ())) for own in pictures or ()]

    def _single_turn(
        self, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None = None
    ) -> Rollout:
        """Returns what the subclass's `_generate_single_turn` gives for prompts, sampled with these settings."""
        trainer, logprobs = self._trainer, None
        pictures = None if images is None else [[image.picture for image in own] or None for own in images]
        given = (prompt_ids, pictures, self._fields(prompt_ids, images))
        self._settings = settings
        try:
            if self._returns_more:
                size = trainer.group_size
                firsts = prompt_ids[::size]
                grouped = len(firsts) * size == len(prompt_ids) and all(
                    ids == firsts[index // size] for index, ids in enumerate(prompt_ids)
                )
                completion_ids, logprobs = trainer._generate_single_turn(*given, size if grouped else 1)
            else:
                completion_ids = trainer._generate_single_turn(*given)
        finally:
            self._settings = None
        return Rollout(prompt_ids, completion_ids, logprobs)

    def _fields(self, prompt_ids: list[list[int]], images: PromptImages | None) -> dict[str, Any]:
        """Returns what TRL's processor makes of prompts beside their tokens: token types have a list a prompt."""
        if images is None:
            return {}
        layout: ImageLayout = self._trainer.images.layout
        types: dict[str, list[list[int]]] = {name: [] for name in layout.type_names}
        for ids, own in zip(prompt_ids, images, strict=True):
            marked = layout.marked_tokens(torch.tensor([ids]), [len(ids) if own else 0])
            for name, values in layout.types_of(marked).items():
                types[name] += values.tolist()
        return {**join_images([image.inputs for own in images for image in own]), **types}

    def _rewarded(
        self, rows: list[dict[str, Any]], prompts: list, completions: list, completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Returns the rewards (S, R) float32 of this process's completions, as the subclass computes them."""
        accelerator, names = self._trainer.accelerator, self._loop.rewards.names
        rewards = self._trainer._calculate_rewards(rows, prompts, completions, completion_ids)
        expected = (len(prompts) * accelerator.num_processes, len(names))
        shape = tuple(getattr(rewards, "shape", ())) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
        if shape != expected:
            raise ValueError(
                f"_calculate_rewards() returned {shape}; expected a tensor of shape {expected}: all processes' "
                f"completions, and a column for each of the reward functions {', '.join(names)}"
            )
        first = accelerator.process_index * len(prompts)
        return rewards[first : first + len(prompts)].float()

    # ---- what `super()` gives

    def generate_and_score(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns TRL's batch of new completions of the rows' prompts, with rewards and advantages."""
        if self._loop.environments is None:
            prompt_ids, _, _ = self._trainer._tokenize_prompts([row["prompt"] for row in self._loop.shown(inputs)])
            inputs = [{**row, PROMPT_IDS: ids} for row, ids in zip(inputs, prompt_ids, strict=True)]
        self._hands_out_batch = True
        try:
            return self._loop.run(inputs, self._trainer, update=self.format.batch)
        finally:
            self._hands_out_batch = False

    def new_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the batch that the subclass's `_generate_and_score_completions` makes of rows."""
        inputs = [{name: value for name, value in row.items() if name != PROMPT_IDS} for row in rows]
        batch = self._trainer._generate_and_score_completions(inputs)
        return check_batch(batch, "_generate_and_score_completions")

    def generate(self, prompts: list) -> tuple:
        """Returns TRL's tuple for new completions of prompts.

        For GRPO: prompt_ids, completion_ids, tool_mask, completions, logprobs, further columns, images, tool_images.
        For RLOO: prompt_ids, completion_ids, completions.
        """
        loop, trainer, prompts = self._loop, self._trainer, copied(prompts)
        columns: dict[str, list] = {}
        images: list | None = None
        if not self._loop_generates:
            loop.engine.sync_weights(trainer.model, trainer.state.global_step)
        if trainer.rollout_func is not None:
            rollout, columns = custom_rollout(trainer.rollout_func, prompts, trainer)
        else:
            prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
            with trainer.accelerator.autocast():
                rollout = generate(loop.engine, prompt_ids, loop.settings(), self._read(images))
        completions = loop.reader.read(prompts, rollout)
        if not self._loop_generates:
            mask = token_vectors(rollout.mask)
            loop.metrics.record_lengths(rollout, mask, is_training=trainer.model.training)
        elif isinstance(rollout, ToolRollout):
            loop.metrics.record_tools(rollout)
        if not self._returns_more:
            return rollout.prompt_ids, rollout.completion_ids, completions
        of_tools: list = []
        if trainer.toolbox is not None:
            of_tools = [[image.picture for image in own] for own in rollout.completion_images or [()] * len(prompts)]
        if any(of_tools):
            images = [
                [*(own or ()), *given] for own, given in zip(images or [None] * len(prompts), of_tools, strict=True)
            ]
        return (
            *(rollout.prompt_ids, rollout.completion_ids, rollout.mask, completions, rollout.logprobs),
            *(columns, images, of_tools),
        )

    def tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], list | None, dict[str, Any]]:
        """Returns the prompts' token ids, their images by prompt (None: there are none), and what the model reads."""
        trainer, images, environments = self._trainer, self._trainer.rollout_images, self._loop.environments
        if environments is None:
            keywords = [trainer.prompt_template_kwargs(trainer.args)] * len(prompts)
        else:
            keywords = environments.keywords(prompts)
        ids = prompt_tokens(prompts, keywords, trainer.tokenizer, images, trainer.args.max_prompt_length)
        if images is not None and is_conversational({"prompt": prompts[0]}):
            prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
        found = None if images is None else images.of_prompts(prompts)
        pictures = None if found is None else [[image.picture for image in own] or None for own in found]
        return ids, pictures, self._fields(ids, found)

    def generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: object,
        num_generations: int | None = None,
        has_tool_images: bool = False,
    ) -> Any:
        """Returns the engine's completions of prompts: GRPO also their log-probabilities, None where it has none.

        The model reads `images`; what was made of them before, multimodal_fields, says the same.
        """
        settings = self._settings or self._loop.settings()
        rollout = generate(self._engine, prompt_ids, settings, self._read(images))
        return (rollout.completion_ids, rollout.logprobs) if self._returns_more else rollout.completion_ids

    def calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """Returns the rewards (N, R) float32 of all processes' completions by reward function."""
        trainer, loop = self._trainer, self._loop
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", PROMPT_IDS)}
        if loop.environments is not None:
            columns = loop.environments.with_instances(columns)
        rewards = loop.rewards(
            *(prompts, completions, completion_ids_list, columns),
            trainer_state=trainer.state,
            log_extra=trainer._log_completion_extra,
            log_metric=trainer._log_metric,
        )
        return trainer.accelerator.gather(rewards.to(trainer.accelerator.device))

    def log_completion_extra(self, column: str, values: list) -> None:
        """Takes a further column of the table of completions."""
        self._loop.metrics.log_column(column, values)

    @property
    def logps_and_entropies(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Returns the method that scores padded rows of tokens."""
        return self.scoring.logps_and_entropies

    def log_metric(self, name: str, value: float) -> None:
        """Takes a number whose mean is logged."""
        self._loop.metrics.log_metric(name, value)

    def high_entropy_mask(self, entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        """Says which tokens that count have an entropy from the quantile `threshold` of all processes' on.

        Beyond the 80/20 rule, arXiv 2506.01939. Where no token counts, none is chosen.

        Args:
            entropies: of any shape, float32.
            mask: of the same shape, 1 for tokens that count.

        Returns:
            A bool tensor of the same shape.
        """
        accelerator, counted = self._trainer.accelerator, mask.bool()
        every = accelerator.gather(accelerator.pad_across_processes(entropies[counted], pad_index=-1.0))
        every = every[every >= 0].float()
        if not len(every):
            return torch.zeros_like(counted)
        return (entropies >= torch.quantile(every, threshold)) & counted


class _SingleTurnEngine(EngineWrapper):
    """Generates by a subclass's `_generate_single_turn`; weights go to the engine that it stands before."""

    def __init__(self, engine: RolloutEngine, generate: Callable[..., Rollout]) -> None:
        super().__init__(engine)
        self.generate = generate
