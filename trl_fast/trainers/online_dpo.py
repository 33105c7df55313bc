"""Defines OnlineDPOTrainer, with TRL's interface and behaviour, on shared prompts and the fused head."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.losses.advantages import Advantages, summed_rewards
from trl_fast.losses.dpo import DPOLossConfig, dpo_loss
from trl_fast.losses.online_dpo import online_dpo_metrics
from trl_fast.modeling.scoring import score
from trl_fast.ops import HeadOptions
from trl_fast.parallel.failures import failing_together
from trl_fast.rollout import GivenReward, RolloutEngine
from trl_fast.settings.older_names import deprecated

from .base.step import StepResult, router_keywords, with_router_loss
from .base.tokenizers import older_tokenizer_name
from .base.trl_attributes import answers_to
from .online.batch_trainer import BatchTrainer
from .online.pairs import PairUpdate, ScoredSamples, chosen_first, make_pair_update, with_short_prompts
from .online.trl_attributes import ONLINE_DPO_ATTRIBUTES
from .online_dpo_config import OnlineDPOConfig

logger = logging.getLogger(__name__)


def online_dpo_step(
    model: torch.nn.Module,
    update: PairUpdate,
    config: DPOLossConfig,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
) -> StepResult:
    """Computes the loss of one micro-batch of pairs and its metrics.

    Args:
        model: the policy, with `modeling.scoring.attach_scoring`, on the device of the update.
        update: the pairs.
        config: the loss, of `losses.online_dpo.online_dpo_loss_config`.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
    """
    reference = update.loss_inputs.sequence_logprobs(update.ref_logprobs)
    scored = score(
        model,
        update.batch,
        token_loss=lambda scores, rows: dpo_loss(scores, update.loss_inputs, reference, config, rows),
        group_sizes=update.group_sizes,
        head=head,
        **router_keywords(router_coef),
    )
    assert scored.loss is not None, "a token loss was asked for"
    loss, metrics = with_router_loss(scored.loss, scored, router_coef)
    vectors = (update.ref_logprobs, update.scores, update.has_end)
    found = online_dpo_metrics(scored.tokens.logprobs, update.loss_inputs, *vectors, config.beta)
    return StepResult(loss, {**metrics, **found}, scored.tokens)


@answers_to(ONLINE_DPO_ATTRIBUTES)
class OnlineDPOTrainer(BatchTrainer):
    """Trains by Online Direct Preference Optimization (arXiv 2402.04792): DPO of two completions of the policy itself.

    Args:
        model: a name, a causal language model, or a PeftModel.
        ref_model: the reference policy, an object or a name; None: the policy as it is now, which with PEFT is the
            same model with its adapter off.
        reward_funcs: one or several of: a function of prompts, completions, completion_ids and the dataset's columns
            to a list of rewards, sync or async; a reward model or its name. None: `args.reward_model_path`.
        args: the config; TRL's own is accepted too.
        data_collator, compute_metrics, preprocess_logits_for_metrics: accepted and not used.
        train_dataset, eval_dataset: rows with `prompt`, text or messages; reward functions see the other columns.
        processing_class: the tokenizer, or the processor for images; None: the model's. Its older name is `tokenizer`.
        reward_processing_classes: tokenizers of the reward models; None loads theirs.
        rollout_func: (prompts, trainer) to a dict of prompt_ids, completion_ids and logprobs, and maybe further
            columns for the reward functions. Each prompt comes twice, one after the other.
        rollout_engine: what generates, a `trl_fast.rollout.RolloutEngine`; None: what the arguments say.
        older: fields of the config, and `reward_model`, which older scripts give to the trainer.

    Raises:
        ValueError, TypeError: bad arguments or data, by name, before training starts.
        NotImplementedError: a judge, which TRL has dropped.
    """

    method = "online_dpo"
    config_class = OnlineDPOConfig
    length_setting = OnlineDPOConfig.length_setting
    args: OnlineDPOConfig
    samples_class = ScoredSamples
    uncalled_hooks = {
        **dict.fromkeys(
            ("_generate", "_generate_vllm", "_generate_vllm_server", "_generate_vllm_colocate"),
            "give a rollout_func or a rollout_engine",
        ),
        "_calculate_rewards_from_functions": "give reward_funcs",
        "_forward": "override compute_loss(model, inputs)",
        **dict.fromkeys(
            ("tokenize_row", "process_vision_row"), "tokenize the dataset before, into prompt_ids beside prompt"
        ),
        "_enable_gradient_checkpointing": "use gradient_checkpointing and gradient_checkpointing_kwargs",
    }

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None = None,
        reward_funcs: GivenReward | list[GivenReward] | None = None,
        args: OnlineDPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        quantization_config: object | None = None,
        rollout_func: Callable[[list, Any], dict[str, Any]] | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **older: Any,
    ) -> None:
        name = type(self).__name__
        processing_class = older_tokenizer_name(name, processing_class, tokenizer)
        reward_funcs, reward_processing_classes = _of_older(name, older, reward_funcs, reward_processing_classes)
        given: Any = model
        config: Any = self.resolve_config(args, given).with_older_arguments(type(self), older)
        _say_unused(
            name,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.set_up(
            *(model, config, train_dataset, eval_dataset, processing_class),
            ref_model=ref_model,
            reward_funcs=config.reward_model_path if reward_funcs is None else reward_funcs,
            reward_processing_classes=reward_processing_classes,
            peft_config=peft_config,
            quantization_config=quantization_config,
            rollout_func=rollout_func,
            rollout_engine=rollout_engine,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    # ---- the rollout

    @property
    def group_size(self) -> int:
        """Returns the completions of a prompt."""
        return 2

    @property
    def beta(self) -> float:
        """Returns the weight of the reference in the present epoch."""
        return self.args.beta_of(self.state.epoch or 0.0)

    def compute_advantages(self, samples: Any, rewards: torch.Tensor) -> Advantages:
        """Computes by how much each completion's score exceeds that of the other one; rewards: (N, R), as in the base.

        A score is the weighted sum of the rewards, less the penalty where there is no end token. Where no source gave
        a reward that sum is 0, as in TRL, and the pair is not learned from.
        """
        summed = summed_rewards(rewards, self.reward_functions.weights.to(rewards.device))
        scores = summed.nan_to_num(nan=0.0)
        samples.has_end = torch.tensor([not self.end_ids.isdisjoint(ids) for ids in samples.completion_ids])
        if self.args.missing_eos_penalty is not None:
            ended = self.accelerator.gather(samples.has_end.to(rewards.device))
            scores = scores - self.args.missing_eos_penalty * ~ended
        first = self.accelerator.process_index * len(samples)
        samples.scores = scores[first : first + len(samples)].cpu()
        samples.has_score = ~summed[first : first + len(samples)].isnan().cpu()
        pairs = scores.view(-1, 2)
        margins = pairs - pairs.flip(1)
        return Advantages(margins.flatten(), scores, margins[:, 0] == 0)

    def update_of(self, samples: Any) -> PairUpdate:
        """Returns the pairs of completions whose scores are known."""
        samples = samples.select(chosen_first(samples))
        if self.images is None:
            samples = with_short_prompts(samples, self.args.max_length)
        batch = self.updates.token_batch(samples)
        return make_pair_update(samples, batch, self.reference_logprobs(batch))

    # ---- the update

    def _compute_loss(self, model: torch.nn.Module, inputs: PairUpdate) -> torch.Tensor:
        """Computes the loss of one micro-batch of pairs, and records its metrics."""
        result = online_dpo_step(
            model,
            inputs,
            self.args.loss_config(self.state.epoch or 0.0),
            head=self.head_options,
            router_coef=self.router_aux_loss_coef,
        )
        self.record(result.metrics)
        return result.loss


def _of_older(name: str, older: dict[str, Any], rewards: Any, tokenizers: Any) -> tuple[Any, Any]:
    """Returns the reward sources and their tokenizers, also under the names of older TRL, which `older` loses.

    Raises:
        NotImplementedError: a judge.
    """
    if older.pop("judge", None) is not None:
        raise NotImplementedError(
            "judge: TRL dropped judges in 0.28; OnlineDPOTrainer has reward_funcs only, so give a function of prompts "
            "and completions, in which a prompt's two stand side by side, that returns a higher number for the better"
        )
    for before, now in (("reward_model", "reward_funcs"), ("reward_processing_class", "reward_processing_classes")):
        given = older.pop(before, None)
        if given is None:
            continue
        deprecated(name, before, f"it works; `{now}` is the present name.")
        if now == "reward_funcs":
            rewards = given if rewards is None else rewards
        else:
            tokenizers = given if tokenizers is None else tokenizers
    return rewards, tokenizers


def _say_unused(name: str, **arguments: object) -> None:
    """Warns of arguments that were given and are not used."""
    for argument, value in arguments.items():
        if value is not None:
            logger.warning(f"{argument} is not used: {name} makes its pairs, and evaluates their loss and metrics.")
