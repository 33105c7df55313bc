"""Trains in environments, as TRL's `environment_factory` does: one for each completion, reset for its prompt."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.data import AnyDataset
from trl_fast.data.images.messages import images_of
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset, tokenize_prompt
from trl_fast.data.row_places import place
from trl_fast.rollout import RolloutImages, Toolbox
from trl_fast.rollout.environments import EnvironmentReward, Environments
from trl_fast.rollout.responses import find_response_template
from trl_fast.rollout.reward_answers import shown
from trl_fast.rollout.user_calls import Outcome, described

from ..base.prepared_datasets import check_dataset_type
from .config import OnlineConfig
from .prompt_tokens import prompt_tokens

# The column by which rows choose among several factories.
CHOICE = "environment"
# What reward functions get the environments as.
_INSTANCES = "environments"
# The prompt of rows that have none, which the environment writes.
_EMPTY = [{"role": "user", "content": ""}]


def rows_or_placeholder(dataset: AnyDataset | None, environment_factory: object | None, args: Any) -> AnyDataset:
    """Returns the training dataset; where there is none and an environment writes the prompts, one of empty prompts.

    Raises:
        ValueError: there is no dataset, and no single environment that could make up for it, or no max_steps.
        TypeError: it is no dataset.
    """
    if dataset is None and environment_factory is not None:
        if isinstance(environment_factory, dict):
            raise ValueError(
                f"train_dataset is required where environment_factory is a dict: its column {CHOICE!r} says which row "
                "is for which environment"
            )
        if args.max_steps <= 0:
            raise ValueError(
                f"max_steps={args.max_steps}: without a train_dataset, where environments write the prompts, nothing "
                "else says how long to train; set max_steps"
            )
        return Dataset.from_dict({"prompt": [_EMPTY] * (args.generation_batch_size // args.num_generations)})
    check_dataset_type(dataset, "train_dataset")
    assert dataset is not None, "it was checked"
    return dataset


class EnvironmentRollouts(TrainerCallback):
    """Stands between the rollout loop and the environments; closes them when training ends.

    Args:
        environments: those of the run.
        tokenizer: makes tokens of prompts.
        args: the config.

    Attributes:
        toolbox: that of the first kind of environments, by which prompts are measured before training.
        images: reads the images of a generation; None: the model reads none.
    """

    def __init__(self, environments: Environments, tokenizer: PreTrainedTokenizerBase, args: OnlineConfig) -> None:
        self.environments = environments
        self.images: RolloutImages | None = None
        self.toolbox = next(iter(environments.kinds.values())).toolbox
        self._tokenizer, self._args = tokenizer, args
        # Tokens that a prompt may have; None is no limit.
        self._room: int | None = None

    def attach(self, trainer: Any) -> None:
        """Takes part in a trainer's run, and closes the environments when the trainer is no more, or Python ends."""
        self.images = trainer.rollout_images
        positions = most_positions(trainer.model, self._args)
        self._room = None if positions is None else positions - (self._args.max_completion_length or 0)
        trainer.add_callback(self)
        weakref.finalize(trainer, self.environments.close)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Closes the environments."""
        self.environments.close()

    @property
    def reward_sources(self) -> list[EnvironmentReward]:
        """Returns a reward source for each class of environments that tells its reward."""
        return self.environments.reward_sources()

    def toolboxes(self, count: int) -> list[Toolbox]:
        """Returns the toolbox of each completion of the present generation.

        Raises:
            ValueError: there are not as many completions.
        """
        found = [seat.toolbox for seat in self.environments.seats]
        if len(found) != count:
            raise ValueError(
                f"completions were asked for {count} prompts, but {len(found)} environments were reset for this "
                "generation, one for each of its rows; generate for these, or without an environment_factory"
            )
        return found

    # ---- data

    def prepare(
        self,
        dataset: AnyDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_kwargs: dict[str, Any],
        name: str,
        **options: Any,
    ) -> AnyDataset:
        """Returns the dataset with the tokens of its prompts before environments write on them.

        Arguments as in `prepare_prompt_dataset`. The column `prompt` may be missing.

        Raises:
            ValueError: as in `prepare_prompt_dataset`; or the dataset has no column by which rows choose, or chooses
                an environment that there is not; or `reset` does not take its columns.
        """
        columns = list(next(iter(dataset), {}))
        if _INSTANCES in columns:
            raise ValueError(
                f"The {name} dataset has a column {_INSTANCES!r}, which is what reward functions get the environments "
                "as; rename the column"
            )
        if self.environments.by_name:
            dataset = self._with_checked_choices(dataset, columns, name)
        for kind in self.environments.kinds.values():
            kind.check_reset([column for column in columns if column not in self._not_for_reset], name)
        if columns and "prompt" not in columns:
            ids = tokenize_prompt(_EMPTY, tokenizer, **chat_template_kwargs)
            return dataset.map(_with_tokens, fn_kwargs={"ids": ids})
        return prepare_prompt_dataset(
            dataset, tokenizer, chat_template_kwargs=chat_template_kwargs, name=name, **options
        )

    def _with_checked_choices(self, dataset: AnyDataset, columns: list[str], name: str) -> AnyDataset:
        """Returns the dataset whose choices were checked; those of a stream are, when their rows come."""
        known = list(self.environments.kinds)
        if columns and CHOICE not in columns:
            raise ValueError(
                f"The {name} dataset has the columns {columns}; expected {CHOICE!r} too, by which each row chooses "
                f"one of environment_factory's {known}"
            )
        if isinstance(dataset, IterableDataset):
            return dataset.map(_with_checked_choice, with_indices=True, fn_kwargs={"known": known, "name": name})
        for row, choice in enumerate(dataset[CHOICE] if columns else []):
            _check_choice(choice, row, known, name)
        return dataset

    @property
    def _not_for_reset(self) -> tuple[str, ...]:
        return (PROMPT_IDS, CHOICE) if self.environments.by_name else (PROMPT_IDS,)

    # ---- the rollout

    def reset(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Gives each row an environment, resets it, and returns the rows with what it wrote in their prompts.

        Raises:
            ValueError: a row chooses an environment that there is not, or an image was written for a model of text.
            RuntimeError: all environments failed.
        """
        hidden = self._not_for_reset
        names = [row.get(CHOICE) if self.environments.by_name else None for row in rows]
        given = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
        observations = self.environments.reset(names, given)
        self._check_some_work()
        found = []
        for row, observation in zip(rows, observations, strict=True):
            prompt = row.get("prompt", _EMPTY)
            found.append({**row, "prompt": prompt if observation is None else _written_on(prompt, observation)})
        if self.images is None and any(images_of(row["prompt"]) for row in found):
            raise ValueError(
                "an environment's reset() returned an image, but the model is trained as one of text, since the train "
                "dataset has no images; give it a column 'images', of empty lists if need be"
            )
        return found

    def _check_some_work(self) -> None:
        count = len(self.environments.seats)
        errors = [error for error in self.environments.errors if error is not None]
        if len(errors) == count:
            self.environments.report()
            raise RuntimeError(
                f"all {count} environments of a generation failed, so that there is nothing to learn from; the first: "
                f"{described(errors[0])}"
            ) from errors[0]

    def keywords(self, prompts: list) -> list[dict[str, Any]]:
        """Returns what the chat template is given beside each prompt: the tools of its environment."""
        common: Any = self._args.chat_template_kwargs or {}
        return [{**common, "tools": box.schemas} for box in self.toolboxes(len(prompts))]

    def with_tokens(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns rows with the tokens of their prompts as they are now."""
        prompts, longest = [row["prompt"] for row in rows], self._args.max_prompt_length
        ids = prompt_tokens(prompts, self.keywords(prompts), self._tokenizer, self.images, longest)
        if self._room is not None and self.images is None:
            ids = self._fitting(ids, self._room)
        return [{**row, PROMPT_IDS: each} for row, each in zip(rows, ids, strict=True)]

    def _fitting(self, ids: list[list[int]], room: int) -> list[list[int]]:
        """Returns prompts of at most `room` tokens; the environment that wrote a longer one is lost."""
        for seat, each in zip(self.environments.seats, ids, strict=True):
            if len(each) > room and seat.toolbox.lost is None:
                too_long = ValueError(
                    f"its text makes a prompt of {len(each)} tokens, and the model has positions for {room} beside "
                    f"max_completion_length={self._args.max_completion_length}"
                )
                seat.read("reset", Outcome(error=too_long))
        self._check_some_work()
        return [each[-room:] for each in ids]

    def rewarded(
        self,
        ask: Callable[[list, list, list[list[int]], dict[str, list]], torch.Tensor],
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        logged: dict[str, list],
    ) -> torch.Tensor:
        """Returns rewards (N, R) float32 of completions; NaN for those whose environment failed.

        Reward sources are asked about the others alone, since an environment that failed may be in any state.

        Args:
            ask: from prompts, completions, their tokens and columns to their rewards.
            logged: columns that reward functions log, which get None for completions that they do not see.

        Raises:
            RuntimeError: all environments failed.
        """
        self._check_some_work()
        columns = self.with_instances(columns)
        kept = [index for index, error in enumerate(self.environments.errors) if error is None]
        whole = len(kept) == len(prompts)
        if not whole:
            prompts, completions, completion_ids = (
                [values[index] for index in kept] for values in (prompts, completions, completion_ids)
            )
            columns = {name: [values[index] for index in kept] for name, values in columns.items()}
        found = ask(prompts, completions, completion_ids, columns)
        if not whole:
            count = len(self.environments.seats)
            rewards = found.new_full((count, found.shape[1]), torch.nan)
            rewards[kept] = found
            found = rewards
            for values in logged.values():
                if len(values) == len(kept):
                    known = dict(zip(kept, values, strict=True))
                    values[:] = [known.get(index) for index in range(count)]
        return self.without_failed(found)

    def without_failed(self, rewards: torch.Tensor) -> torch.Tensor:
        """Returns rewards (N, R) with NaN for completions whose environment failed, as it told its reward maybe.

        Raises:
            RuntimeError: all environments failed.
        """
        self._check_some_work()
        return rewards.masked_fill(self.failed().to(rewards.device)[:, None], torch.nan)

    def with_instances(self, columns: dict[str, list]) -> dict[str, list]:
        """Returns columns for reward functions with the environments, one a completion, among them."""
        return {**columns, _INSTANCES: self.environments.instances}

    def failed(self) -> torch.Tensor:
        """Returns whether the environment of each completion failed, (S,) bool, and names new failures."""
        self.environments.report()
        return torch.tensor([error is not None for error in self.environments.errors])


def open_environments(
    environment_factory: Any, tools: list | None, tokenizer: PreTrainedTokenizerBase, args: Any
) -> EnvironmentRollouts | None:
    """Returns the environments of a run; None without a factory.

    Raises:
        TypeError, ValueError, RuntimeError: as in `Environments`; or the tokenizer's messages cannot be read.
    """
    if environment_factory is None:
        return None
    find_response_template(tokenizer)
    environments = Environments(
        environment_factory,
        tools or (),
        timeout=args.environment_timeout,
        tool_timeout=args.tool_timeout,
        workers=args.environment_workers,
        # With a time limit reward functions, of which get_reward is one, are asked in another thread.
        in_threads=args.reward_timeout is not None,
    )
    return EnvironmentRollouts(environments, tokenizer, args)


def most_positions(model: Any, args: Any) -> int | None:
    """Returns the most tokens, prompt and completion together, that the model takes; None if it has no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (args.vllm_max_model_length if args.use_vllm else None) or positions


# At module level: datasets pickles it for its worker processes and hashes it for its cache.
def _with_checked_choice(example: dict[str, Any], row: int, known: list[str | None], name: str) -> dict[str, Any]:
    _check_choice(example[CHOICE], row, known, name)
    return {}


def _check_choice(choice: object, row: int, known: list[str | None], name: str) -> None:
    if choice not in known:
        raise ValueError(
            f"{place(name, row)}, column {CHOICE!r}: {choice!r} is none of environment_factory's {known}; mend the "
            "row, or add a factory of this name"
        )


def _with_tokens(example: dict[str, Any], ids: list[int]) -> dict[str, list[int]]:
    return {PROMPT_IDS: ids}


def _written_on(prompt: Any, observation: Any) -> list[dict[str, Any]]:
    """Returns a conversation with what an environment wrote at the end of its last message, as TRL has it.

    observation: a text, or a list of parts of a message.

    Raises:
        ValueError: the prompt is no conversation.
    """
    if isinstance(prompt, str) or not prompt:
        raise ValueError(
            f"prompt {shown(prompt)}: an environment writes on conversations only; expected a list of messages such "
            "as {'role': 'user', 'content': 'Hello.'}"
        )
    content: Any = prompt[-1]["content"]
    if isinstance(observation, list) and not isinstance(content, list):
        content = [{"type": "text", "text": content or ""}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    # A message of its own: the row keeps its prompt.
    return [*prompt[:-1], {**prompt[-1], "content": ("" if content is None else content) + observation}]
