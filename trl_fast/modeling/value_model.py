"""Makes and checks value models: classifiers with one label that read a number at every token of the policy's."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_fast.parallel.partitions import whole_shape

from .classifier_head import HEAD, has_classifier_head
from .loading import backbone, is_quantized


def check_classifier(model: object, argument: str, vocab_size: int) -> None:
    """Checks that a model reads one number at any token of the policy's.

    argument: the trainer's name for it. vocab_size: the tokens that the policy may sample.

    Raises:
        TypeError: it is no model of transformers.
        ValueError: it has another head or number of labels, or lacks tokens.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"{argument}: expected a model of transformers, got {type(model).__name__}")
    name, classifier = type(model).__name__, cast("Any", model)
    if not has_classifier_head(model):
        raise ValueError(
            f"{argument}: {name} has no head {HEAD!r} that reads a single token, as those of "
            "AutoModelForSequenceClassification for decoders have"
        )
    if classifier.config.num_labels != 1:
        raise ValueError(f"{argument}: {name} has num_labels={classifier.config.num_labels}; expected 1")
    check_vocabulary(classifier, argument, vocab_size)


def check_vocabulary(model: PreTrainedModel, argument: str, vocab_size: int) -> None:
    """Checks that a model reads, and where it has a head of tokens scores, each token that the policy may sample.

    argument: the trainer's name for it. vocab_size: those tokens.

    Raises:
        ValueError: it has fewer.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    known = min(whole_shape(cast("Any", layer).weight)[0] for layer in layers if layer is not None)
    if known < vocab_size:
        raise ValueError(
            f"{argument}: {type(model).__name__} has {known} tokens, but it is given those that the policy samples, "
            f"of {vocab_size}; use models with one tokenizer, or call its resize_token_embeddings({vocab_size})"
        )


def make_value_model(policy: PreTrainedModel, reward_model: PreTrainedModel | None) -> PreTrainedModel:
    """Makes a value model in the policy's dtype: a copy of the reward model, as in arXiv 2203.02155; without one the
    policy's layers, with a new, random head.

    Raises:
        ValueError: the policy is quantised, or transformers has no classifier of its kind.
    """
    if reward_model is not None:
        return cast("Any", copy.deepcopy(reward_model)).to(policy.dtype).requires_grad_(True)
    if is_quantized(policy):
        raise ValueError("value_model=None cannot copy quantised weights; give a value_model")
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ValueError(
            f"value_model=None: transformers has no classifier for {type(policy).__name__}; give a value_model"
        ) from error
    backbone(model).load_state_dict(backbone(policy).state_dict())
    return model.to(policy.device)
