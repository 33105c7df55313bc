"""PPO's rollouts: prompts in, completions with their rewards and their divergence from the reference out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import AnyDataset, longest_sequence
from trl_fast.data.prompt_only import PROMPT_IDS, prepare_prompt_dataset, prompts_of_tokens
from trl_fast.data.repeat_sampler import RepeatSampler, repeat_stream
from trl_fast.losses.advantages import Advantages, summed_rewards
from trl_fast.losses.ppo import kl_penalties, rollout_metrics
from trl_fast.modeling.scoring import evaluating
from trl_fast.rollout import Rollout
from trl_fast.rollout.samples import Samples

from ..online.completions_log import CompletionsLog
from ..online.generation_metrics import GenerationMetrics
from ..online.rollouts import Rollouts
from .config import PPOConfig


@dataclass(frozen=True)
class ScoredRollout:
    """S completions of this process: rows' prompts, texts, samples with log-probabilities, and what they earned.

    rewards (S, R) by reward function; scores (S,), their sum less the penalty; kl (N,) by token. On the CPU.
    """

    prompts: list
    completions: list
    samples: Samples
    rewards: torch.Tensor
    scores: torch.Tensor
    kl: torch.Tensor


class PPORollouts(Rollouts, GenerationMetrics):
    """The part of PPOTrainer that reads datasets, samples, scores and shows."""

    length_setting = "response_length"

    # ---- data

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: PPOConfig, name: str
    ) -> AnyDataset:
        how = {"num_proc": args.dataset_num_proc, "name": name}
        dataset = prompts_of_tokens(dataset, processing_class, **how)
        return prepare_prompt_dataset(dataset, processing_class, chat_template_kwargs=args.chat_template_kwargs, **how)

    def _check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: PPOConfig, name: str) -> None:
        maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = longest_sequence(dataset, self.token_columns) if self._shows_tokens(dataset) else 0
        if maximum and longest + args.response_length > maximum:
            raise ValueError(
                f"the longest prompt of the {name} dataset has {longest} tokens, which with response_length="
                f"{args.response_length} are more than the {maximum} positions of {type(model).__name__}; shorten one "
                "of them"
            )

    def get_train_dataloader(self) -> DataLoader:
        """Shuffled prompts, each step's the ones of a rollout; what does not fill one is left out."""
        args, dataset = self.args, self.train_dataset
        if isinstance(dataset, IterableDataset):
            dataset = repeat_stream(dataset.shuffle(seed=args.seed), 1, args.batch_size)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * args.num_mini_batches,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if dataset is None else dataset
        return RepeatSampler(dataset, 1, batch_size=self.args.batch_size, seed=self.args.seed)

    # ---- the rollout

    def _generate(self, rows: list[dict[str, Any]]) -> Rollout:
        """Completions of the rows' prompts, cut after the first stop token."""
        self.engine.sync_weights(self.model, self.state.global_step)
        settings, size = self.args.sampling_settings(), self.args.local_rollout_forward_batch_size
        whole = Rollout([], [])
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            with self.accelerator.autocast():
                part = self.engine.generate([list(row[PROMPT_IDS]) for row in chunk], settings)
            part = self._checked(part, chunk)
            whole.prompt_ids += part.prompt_ids
            whole.completion_ids += [_cut(ids, self.stop_ids) for ids in part.completion_ids]
        return whole

    @torch.no_grad()
    def roll_out(self, rows: list[dict[str, Any]]) -> ScoredRollout:
        """Completions of the rows' prompts, with their rewards and their divergence from the reference.

        Raises:
            ValueError: the rollout or a reward function returned something else than was expected.
            RuntimeError: a reward function raised.
        """
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", PROMPT_IDS)}
        with self._rescue():
            rollout = self._generate(rows)
            completions = self._decode(prompts, rollout.completion_ids)
            rewards = self.reward_functions(
                prompts,
                completions,
                rollout.completion_ids,
                {**columns, PROMPT_IDS: rollout.prompt_ids},
                trainer_state=self.state,
                log_extra=self.log_column,
                log_metric=self.log_metric,
            ).cpu()
            scores = self._scores(rewards, rollout)
        samples = Samples.of(rollout.prompt_ids, rollout.completion_ids)
        everyone, size = range(len(samples)), self.args.local_rollout_forward_batch_size
        samples.old_logprobs = self.updates.score(samples, self.policy_logprobs, everyone, size)
        reference = self.updates.score(samples, self.reference_logprobs, everyone, size)
        kl = kl_penalties(samples.flat("old_logprobs"), torch.cat(reference), self.args.kl_estimator)
        return ScoredRollout(prompts, completions, samples, rewards, scores, kl)

    def _scores(self, rewards: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """Scores (S,) from rewards (S, R): their sum, less the penalty where there is no EOS token."""
        scores = summed_rewards(rewards, self.reward_functions.weights.cpu())
        if scores.isnan().any():
            raise ValueError(
                f"reward_model: {', '.join(self.reward_functions.names)} returned None for completion "
                f"{scores.isnan().nonzero()[0].item()}; PPO needs a number for each"
            )
        if self.args.missing_eos_penalty is not None:
            eos = self.processing_class.eos_token_id
            missing = torch.tensor([eos not in ids for ids in rollout.completion_ids])
            scores = scores - self.args.missing_eos_penalty * missing
        return scores

    def _record_rollout(self, found: ScoredRollout, advantages: torch.Tensor) -> float:
        """Records a rollout's metrics and completions, and gives its mean divergence, of all processes.

        advantages: (S,) on the CPU, shown beside the completions.
        """
        accelerator, samples = self.accelerator, found.samples
        self._record_lengths(Rollout(samples.prompt_ids, samples.completion_ids), None)
        vectors = (samples.flat("old_logprobs"), found.kl, found.scores)
        metrics = rollout_metrics(*(v.to(accelerator.device) for v in vectors), self.kl_control.coefficient)
        self.record(metrics)
        eos = self.processing_class.eos_token_id
        ended = torch.tensor(sum(ids.count(eos) for ids in samples.completion_ids), device=accelerator.device)
        self.record_value("val/num_eos_tokens", accelerator.gather(ended).sum().item())
        vectors = (found.rewards, advantages, found.scores)
        rewards, advantages, scores = (accelerator.gather(v.to(accelerator.device)) for v in vectors)
        self._warn_of_equal_rewards(scores, len(scores), found.prompts)
        shown = Advantages(advantages, rewards, torch.zeros(0))
        self._keep_completions(found.prompts, found.completions, rewards, shown)
        total, count = accelerator.reduce(torch.stack(metrics["objective/kl"]), "sum").tolist()
        return total / count

    def _warn_of_cut_off(self, cut_off: torch.Tensor) -> None:
        """As in the base, where completions are to end at all."""
        if self.stop_ids:
            super()._warn_of_cut_off(cut_off)

    # ---- evaluation

    def prediction_step(self, model: torch.nn.Module, inputs: list[dict[str, Any]], *_: Any, **__: Any) -> tuple:
        """Records the metrics of completions that are made for the evaluation; there is no loss."""
        found = self.roll_out(inputs)
        self._record_rollout(found, torch.full_like(found.scores, torch.nan))
        return None, None, None

    def generate_completions(self, sampling: bool = False) -> None:
        """Shows completions of the evaluation prompts, or of training ones, with their rewards.

        sampling: only of the first batch.
        """
        loader = self.get_train_dataloader() if self.eval_dataset is None else self.get_eval_dataloader()
        log = CompletionsLog(None)
        with evaluating(self.model):
            for rows in loader:
                found = self.roll_out(rows)
                by_function = dict(zip(self.reward_functions.names, found.rewards.t().tolist(), strict=True))
                nothing = [math.nan] * len(rows)
                log.add(by_function, prompt=found.prompts, completion=found.completions, advantage=nothing)
                if sampling:
                    break
        if self.accelerator.is_main_process:
            log.show(self.state.global_step, self.args.num_completions_to_print)


def end_tokens(args: PPOConfig, processing_class: PreTrainedTokenizerBase) -> tuple[set[int], set[int]]:
    """The tokens that count as ends, and those that completions are cut after.

    Raises:
        ValueError: the arguments need an EOS token that there is not.
    """
    eos, stop = processing_class.eos_token_id, args.stop_token_id
    if eos is None:
        for name in ("stop_token", "missing_eos_penalty"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)!r} needs an EOS token, but the tokenizer has none")
    if args.stop_token == "eos":
        stop = eos
    ends = {token for token in (stop, None if stop is not None else eos) if token is not None}
    return ends or {processing_class.pad_token_id}, set() if stop is None else {stop}


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """Token ids up to and including the first end token."""
    return ids[: next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))]
