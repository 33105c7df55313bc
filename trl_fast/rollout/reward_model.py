"""Asks reward models about completions: sequence classifiers with one label."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_fast.data.chat_template import apply_chat_template
from trl_fast.data.formats import is_conversational
from trl_fast.modeling.loading import is_quantized, load_reward_model
from trl_fast.parallel.agreement import together
from trl_fast.parallel.gathering import gathered, is_sharded
from trl_fast.parallel.partitions import whole_shape

_TOKENIZER_KEYWORDS = ("revision", "trust_remote_code")


class RewardModel:
    """Asks a sequence classifier with one label about prompt and completion as one text: a reward source.

    Args:
        model: on its device; it is put into eval mode.
        tokenizer: None loads the model's own.
        model_init_kwargs: `revision` and `trust_remote_code` of them are for loading the tokenizer.
        max_length, chat_template_kwargs: as in `RewardFunctions`.

    Raises:
        ValueError: the model does not give one number a text (it is tried out on two short ones), lacks tokens of the
            tokenizer, or has no tokenizer with a pad or end token.
        TypeError: it is a module without a config, or the tokenizer is none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        max_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not hasattr(model, "config"):
            raise TypeError(
                f"reward_funcs: {type(model).__name__} is no model of transformers; pass a function instead"
            )
        config: Any = model.config
        path = config._name_or_path
        self.__name__ = path.rstrip("/").split("/")[-1] or type(model).__name__
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has num_labels={config.num_labels}, but a reward is one number; give "
                "a sequence classifier with num_labels=1"
            )
        self.tokenizer = _checked_tokenizer(
            self.__name__, tokenizer or _load_tokenizer(path, model_init_kwargs), model
        )
        # The model looks for the last token that is none of these.
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval()
        # Read here, since an engine that the model is wrapped in has a config of its own.
        self._max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_length = max_length
        self.chat_template_kwargs = chat_template_kwargs or {}
        with gathered(model):  # what DeepSpeed's ZeRO-3 has sharded as it was loaded
            self._try_out()

    def _try_out(self) -> None:
        pad = self.tokenizer.pad_token_id
        token = next(token for token in self.tokenizer.get_vocab().values() if token != pad)
        try:
            # Some models take no single row of one token.
            ids = {"input_ids": [[token] * 2, [token] * 3]}
            logits = self._logits(self.tokenizer.pad(ids, padding_side="right", return_tensors="pt"))
        except Exception as error:
            raise ValueError(
                f"reward model {self.__name__!r} cannot read a text: {type(error).__name__}: "
                f"{' '.join(str(error).split())}; give a sequence classifier of transformers with num_labels=1"
            ) from error
        if logits.shape != (2, 1) or not logits.isfinite().all():
            found = (
                "numbers that are not finite" if logits.shape == (2, 1) else f"logits of shape {tuple(logits.shape)}"
            )
            raise ValueError(
                f"reward model {self.__name__!r} ({type(self.model).__name__}) gives {found} for two texts; expected "
                "a sequence classifier that gives one finite number each"
            )

    def check_conversations(self) -> None:
        """Raises ValueError if conversations cannot be made texts."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"reward model {self.__name__!r}: prompts are conversations, but its tokenizer "
                f"{self.tokenizer.name_or_path!r} has no chat template; set tokenizer.chat_template and give the "
                "tokenizer as reward_processing_classes"
            )

    def __call__(self, prompts: list, completions: list) -> list[float]:
        """Returns a reward for each completion.

        Raises:
            ValueError: a text has more tokens than the model has positions.
        """
        read = functools.partial(self._inputs, prompts, completions)
        # Processes that share a model call it together: all of them, or none.
        inputs = together(read) if is_sharded(self.model) else read()
        return self._logits(inputs)[:, 0].tolist()

    def _inputs(self, prompts: list, completions: list) -> Any:
        """Returns the model's inputs, padded rows of prompts with their completions."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if is_conversational({"prompt": prompts[0]}):
            keywords = self.chat_template_kwargs
            texts = [apply_chat_template({"messages": text}, self.tokenizer, **keywords)["text"] for text in texts]
        inputs = self.tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=False,
        )
        longest = inputs["input_ids"].shape[1]
        positions = self._max_positions
        if positions is not None and longest > positions:
            raise ValueError(f"a prompt and its completion have {longest} tokens, the model has {positions} positions")
        return inputs

    def _logits(self, inputs: Any) -> torch.Tensor:
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(**inputs.to(device)).logits


def _load_tokenizer(path: str, model_init_kwargs: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    known = {key: value for key, value in (model_init_kwargs or {}).items() if key in _TOKENIZER_KEYWORDS}
    try:
        if not path:
            raise OSError("the model does not tell where it is from")
        return AutoTokenizer.from_pretrained(path, **known)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward model {path!r}: its tokenizer cannot be loaded ({' '.join(str(error).split())}); give it as "
            "reward_processing_classes"
        ) from error


def _checked_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, with its end token for pad token if it has none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"reward_processing_classes: expected a tokenizer for reward model {name!r}, got "
            f"{type(tokenizer).__name__}"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"reward model {name!r}: its tokenizer has neither a pad token nor an end token; set "
                "tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    with suppress(AttributeError, NotImplementedError):  # Some classifiers do not tell.
        _check_vocabulary(name, tokenizer, whole_shape(model.get_input_embeddings().weight)[0])
    return tokenizer


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= known:
        raise ValueError(
            f"reward model {name!r} has {known} tokens, but its tokenizer {tokenizer.name_or_path!r} gives up to "
            f"token {largest}; give the tokenizer that it was trained with as reward_processing_classes"
        )


def load_classifier(source: str | torch.nn.Module, init_kwargs: dict | None, device: torch.device) -> torch.nn.Module:
    """Returns a reward model, loaded where `source` is its name, on the device unless it has places of its own."""
    model: Any = source
    if isinstance(source, str):
        # The checkpoint's own dtype, and all of it on one device unless something else is asked for.
        model = load_reward_model(source, **{"dtype": "auto", "device_map": None, **(init_kwargs or {})})
    spread = getattr(model, "hf_device_map", None) is not None
    return model if spread or is_quantized(model) else model.to(device)
