"""Loads a teacher, and holds its vocabulary against the student's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.modeling.adapters import has_virtual_tokens
from trl_fast.modeling.loading import base_model, load_causal_lm, load_tokenizer
from trl_fast.parallel.partitions import whole_shape

from ..base.parallelism import parallel_options
from .config import DistillationConfig
from .gold_config import GOLDConfig

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


def chosen_teacher(given: str | Model | None, args: DistillationConfig) -> str | Model:
    """Returns the teacher that a trainer is given, else the one that the arguments name.

    Raises:
        TypeError: it is neither a name nor a model.
        ValueError: there is none; or arguments for loading it come with a model that is loaded.
    """
    teacher = args.teacher_model_name_or_path if given is None else given
    if teacher is None:
        raise ValueError(
            "teacher_model is missing; give the trainer a name or a model, or set teacher_model_name_or_path"
        )
    if not isinstance(teacher, (str, PreTrainedModel, PeftModel)):
        raise TypeError(
            "teacher_model: expected a hub name, a folder, a transformers.PreTrainedModel or a peft.PeftModel, got "
            f"{type(teacher).__name__}"
        )
    if not isinstance(teacher, str):
        for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
            if getattr(args, name):
                raise ValueError(f"{name} needs a teacher_model given by name; this one is loaded already")
    return teacher


def check_is_another(
    student: str | Model, teacher: str | Model, args: DistillationConfig, quantization_config: object | None
) -> None:
    """Checks that a teacher is not the student, before either is loaded where both are names.

    Raises:
        ValueError: it is the same object, shares weights with it, or is the same checkpoint loaded in the same way.
    """
    remedy = "its divergence from itself is 0, so nothing would be learned; give another teacher_model"
    if isinstance(student, str) and isinstance(teacher, str):
        own: Any = args.model_init_kwargs or {}
        options = (own, _options(args))
        alike = options[0].get("revision") == options[1].get("revision") and quantization_config is None
        quantized = [each.get("quantization_config") for each in options]
        if student == teacher and alike and quantized[0] is quantized[1]:
            raise ValueError(f"teacher_model={teacher!r} is the model that is trained: {remedy}")
    elif isinstance(student, torch.nn.Module) and isinstance(teacher, torch.nn.Module):
        weights = {id(weight) for weight in student.parameters()}
        if any(id(weight) in weights for weight in teacher.parameters()):
            what = "the model that is trained" if teacher is student else "made of the weights of the trained model"
            raise ValueError(f"teacher_model ({type(base_model(teacher)).__name__}) is {what}: {remedy}")


def load_teacher(teacher: str | Model, args: DistillationConfig) -> Model:
    """Returns a teacher, loaded if it is given by name: in float32 unless teacher_model_init_kwargs say otherwise.

    Raises:
        OSError, ValueError: as in `modeling.loading.load_causal_lm`.
    """
    if not isinstance(teacher, str):
        if has_virtual_tokens(teacher):
            raise ValueError(
                "teacher_model: its adapter puts tokens of its own before each row, which the student has not; give a "
                "teacher without such an adapter"
            )
        return teacher
    options = {"trust_remote_code": args.trust_remote_code, **_options(args)}
    try:
        return load_causal_lm(teacher, **options | parallel_options(args, options))
    except (OSError, ValueError) as error:
        raise type(error)(f"teacher_model: {error}") from error


def _options(args: DistillationConfig) -> dict[str, Any]:
    """Returns the keywords of from_pretrained with which a teacher is loaded."""
    options: dict[str, Any] = dict(args.teacher_model_init_kwargs or {})  # type: ignore[arg-type]
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    return options


def shared_vocabulary(
    student: Model, teacher: Model, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig
) -> int | None:
    """Returns how many tokens both models know, where one head is padded further than the other; None: both alike.

    Where the teacher's name has a tokenizer, the two tokenizers are compared.

    Raises:
        ValueError: tokenizers or vocabularies differ, or teacher_top_k is larger than the vocabulary.
    """
    sizes = head_sizes(student, teacher)
    other = _tokenizer_of(teacher, args)
    if other is not None:
        _check_tokens(tokenizer, other)
    known = min(sizes)
    if sizes[0] != sizes[1]:
        shown = f"the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}"
        if other is None:
            raise ValueError(
                f"teacher_model: {shown}, and the teacher has no tokenizer here which would tell whether more of them "
                "than padding differ; give it by name, or a teacher with the same vocabulary"
            )
        largest = max(max(each.get_vocab().values()) for each in (tokenizer, other))
        if largest >= known:
            raise ValueError(
                f"teacher_model: {shown}, but a tokenizer has the token id {largest}; use a teacher with the same "
                "vocabulary"
            )
    if args.teacher_top_k is not None and args.teacher_top_k > known:
        raise ValueError(
            f"teacher_top_k={args.teacher_top_k} is more than the {known} tokens of the vocabulary; set it lower, or "
            "leave it out to compare all"
        )
    return None if sizes[0] == sizes[1] else known


def columns_of_one(student: Model, teacher: Model) -> range:
    """Returns the columns that only the larger one of two heads has."""
    return range(*sorted(head_sizes(student, teacher)))


def head_sizes(*models: Model) -> list[int]:
    """Returns the columns of each model's head.

    Raises:
        ValueError: a model has no head.
    """
    return [head_size(model) for model in models]


def head_size(model: Model) -> int:
    """Returns the columns of a model's head.

    Raises:
        ValueError: it has no head.
    """
    return whole_shape(_head_of(model).weight)[0]


def _head_of(model: Model) -> Any:
    head = base_model(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(base_model(model)).__name__} has no head; expected a causal language model")
    return head


def _tokenizer_of(teacher: Model, args: DistillationConfig) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a teacher's name; None where there is none to be had."""
    name = base_model(teacher).config._name_or_path
    if not name:
        return None
    try:
        revision = _options(args).get("revision", "main")
        return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        return None


def tokenizer_of_teacher(teacher: Model, args: GOLDConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that the arguments name for a teacher, or that of the teacher's name.

    Raises:
        OSError, ValueError: it cannot be loaded, or there is none.
    """
    name = args.teacher_tokenizer_name_or_path
    if name is None:
        found = _tokenizer_of(teacher, args)
        if found is None:
            raise ValueError(
                "teacher_tokenizer_name_or_path is missing: the teacher was not loaded by a name which would tell its "
                "tokenizer; set it to a hub name or a folder"
            )
        return found
    # A revision is one of the teacher's own repository.
    own = name == base_model(teacher).config._name_or_path
    revision = _options(args).get("revision", "main") if own else "main"
    try:
        return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise type(error)(f"teacher_tokenizer_name_or_path: {error}") from error


def _check_tokens(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Checks that two tokenizers have the same text at each id that both have; special tokens may have other names.

    Raises:
        ValueError: they have not; names the first such id.
    """
    texts = [{index: token for token, index in each.get_vocab().items()} for each in (own, other)]
    special = own.added_tokens_decoder.keys() | other.added_tokens_decoder.keys()
    differing = sorted(index for index in texts[0].keys() & texts[1].keys() if texts[0][index] != texts[1][index])
    words = [index for index in differing if index not in special]
    if words or _moved(*(each.get_vocab() for each in (own, other))):
        index = (words or differing or [0])[0]
        found = [each.get(index) for each in texts]
        raise ValueError(
            f"teacher_model: its tokenizer differs from the student's: token {index} is {found[1]!r} for the teacher "
            f"and {found[0]!r} for the student; use a teacher with the student's tokenizer, or GOLDTrainer with "
            "use_uld_loss=True"
        )
    if differing:
        index = differing[0]
        logger.warning(
            f"teacher_model: {len(differing)} special tokens have other names than the student's; the first is token "
            f"{index}, {texts[1][index]!r} for the teacher, {texts[0][index]!r} for the student."
        )


def _moved(own: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Says whether a token that both tokenizers have stands at different ids."""
    return any(other.get(token, index) != index for token, index in own.items())


def same_family(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Says whether two models are of one class, so that what is understood of one head is understood of the other."""
    return type(student) is type(teacher)


def check_sharded_head(model: Model, *, shards_weights: bool) -> None:
    """Checks that a head whose weight an engine holds in parts carries no adapter.

    Raises:
        NotImplementedError: it does.
    """
    if shards_weights and isinstance(_head_of(model), BaseTunerLayer):
        raise NotImplementedError(
            "peft_config: an adapter on the head is not served where an engine holds weights in parts; leave the head "
            "out of target_modules"
        )
