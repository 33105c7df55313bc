"""Lets the reward sources of a trainer be exchanged at any time, under the names that TRL's trainers give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_fast.rollout import GivenReward, RewardFunctions
from trl_fast.rollout.environments import distinct_names
from trl_fast.rollout.rewards import RewardModel, as_list

from .environments import EnvironmentRollouts


class ChangeableRewards(RewardFunctions):
    """Holds reward sources as lists that may be exchanged or changed in place; the next call asks what is there then.

    Names and weights stay while the number of sources does. Arguments as in `RewardFunctions`.

    Attributes:
        reward_funcs: functions and models.
        reward_processing_classes: the models' tokenizers, None for functions.
        names: also the names of what is logged.
        weights: (R,) float32.
    """

    def __init__(self, reward_funcs: GivenReward | list[GivenReward] | None, **options: Any) -> None:
        super().__init__(reward_funcs, **options)
        self._options = {
            name: value for name, value in options.items() if name not in ("reward_processing_classes", "weights")
        }
        self._show()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns rewards (N, R) float32, as the base does, of the sources that are there now.

        Raises:
            ValueError: as in the base; or numbers of sources, names and weights differ.
        """
        self._update()
        return super().__call__(*args, **kwargs)

    def prepare_models(self, prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """Has reward models prepared, as the base does; what is prepared is shown."""
        super().prepare_models(prepare)
        self._show()

    def _show(self) -> None:
        models = [source if isinstance(source, RewardModel) else None for source in self.functions]
        pairs = list(zip(self.functions, models, strict=True))
        self.reward_funcs: list[Any] = [source if model is None else model.model for source, model in pairs]
        self.reward_processing_classes: list[Any] = [None if model is None else model.tokenizer for model in models]
        self._shown = self._state()

    def _state(self) -> list[int]:
        return [id(source) for source in (*self.reward_funcs, None, *self.reward_processing_classes)]

    def _update(self) -> None:
        """Makes the sources anew where they, or their tokenizers, are others."""
        count, names, weights = len(self.reward_funcs), self.names, self.weights
        if self._state() != self._shown:
            tokenizers = self.reward_processing_classes
            known = tokenizers if len(tokenizers) == count else None
            super().__init__(self.reward_funcs, reward_processing_classes=known, **self._options)
            self.names = names if len(names) == count else self.names
            self.weights = self.weights if len(weights) != count and (weights == 1).all() else weights
            self._show()
        for name, values in (("reward_func_names", self.names), ("reward_weights", self.weights)):
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} reward functions; set one for each")

    def set_sources(self, given: GivenReward | list[GivenReward]) -> None:
        """Exchanges the sources; tokenizers stay while the number of sources does.

        Raises:
            ValueError, TypeError: something is no reward source.
        """
        self.reward_funcs = list(given) if isinstance(given, list | tuple) else [given]
        self._update()

    def set_tokenizers(self, given: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None]) -> None:
        """Exchanges the models' tokenizers.

        Raises:
            ValueError: there is not one for each source.
        """
        self.reward_processing_classes = list(given) if isinstance(given, list | tuple) else [given]
        if len(self.reward_processing_classes) != len(self.reward_funcs):
            raise ValueError(
                f"reward_processing_classes: expected one for each of {len(self.reward_funcs)} reward functions, got "
                f"{len(self.reward_processing_classes)}"
            )
        self._update()

    def set_weights(self, given: torch.Tensor | Iterable[float]) -> None:
        """Exchanges the weights, (R,) or a list of numbers.

        Raises:
            ValueError: a weight is not finite.
        """
        weights = torch.as_tensor(given if isinstance(given, torch.Tensor) else list(given), dtype=torch.float32)
        if weights.ndim != 1 or not weights.isfinite().all():
            raise ValueError(f"reward_weights: expected finite numbers, one for each reward function, got {given}")
        self.weights = weights

    def set_names(self, given: Iterable[str]) -> None:
        """Exchanges the names under which rewards are logged."""
        self.names = list(given)


def make_changeable_rewards(
    given: GivenReward | list[GivenReward] | None,
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None,
    args: Any,
    environments: EnvironmentRollouts | None = None,
) -> ChangeableRewards:
    """Returns the reward sources of a trainer: those given, and those of environments, which weigh 1.

    `args`: its config, with reward_weights and reward_timeout.

    Raises:
        ValueError, TypeError: as in `RewardFunctions`.
    """
    init_kwargs: Any = args.model_init_kwargs or {}
    weights = args.reward_weights
    more: list[Any] = [] if environments is None else list(environments.reward_sources)
    if more:
        sources, readers = as_list(given), as_list(tokenizers)
        more_readers: list[Any] = [*readers, *[None] * len(more)]
        given, tokenizers = [*sources, *more], more_readers if readers else None
        weights = None if weights is None else [*weights, *[1.0] * len(more)]
    rewards = ChangeableRewards(
        given,
        reward_processing_classes=tokenizers,
        weights=weights,
        model_init_kwargs={"trust_remote_code": args.trust_remote_code, **init_kwargs},
        device=args.device,
        chat_template_kwargs=args.chat_template_kwargs,
        timeout=args.reward_timeout,
    )
    own_names = rewards.names[: len(rewards) - len(more)]
    rewards.set_names([*own_names, *distinct_names(more, own_names)])
    return rewards
