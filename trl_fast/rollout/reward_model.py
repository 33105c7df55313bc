"""Asks reward models about completions: sequence classifiers with one label."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_fast.data.chat_template import apply_chat_template
from trl_fast.data.formats import is_conversational
from trl_fast.modeling.loading import is_quantized, load_reward_model

_TOKENIZER_KEYWORDS = ("revision", "trust_remote_code")


class RewardModel:
    """Asks a sequence classifier with one label about prompt and completion as one text: a reward source.

    Args:
        model: on its device; it is put into eval mode.
        tokenizer: None loads the model's own.
        model_init_kwargs: `revision` and `trust_remote_code` of them are for loading the tokenizer.
        max_length, chat_template_kwargs: as in `RewardFunctions`.

    Raises:
        ValueError: the model has more than one label.
        TypeError: it is a module without a config.
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
                f"reward model {self.__name__!r} has num_labels={config.num_labels}, but a reward is one number"
            )
        if tokenizer is None:
            known = {key: value for key, value in (model_init_kwargs or {}).items() if key in _TOKENIZER_KEYWORDS}
            tokenizer = AutoTokenizer.from_pretrained(path, **known)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model looks for the last token that is none of these.
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template_kwargs = chat_template_kwargs or {}

    def __call__(self, prompts: list, completions: list) -> list[float]:
        """Returns a reward for each completion.

        Raises:
            ValueError: a text has more tokens than the model has positions.
        """
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
        positions = getattr(cast("Any", self.model.config).get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(f"a prompt and its completion have {longest} tokens, the model has {positions} positions")
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(**inputs.to(device)).logits[:, 0].tolist()


def load_classifier(source: str | torch.nn.Module, init_kwargs: dict | None, device: torch.device) -> torch.nn.Module:
    """Returns a reward model, loaded where `source` is its name, on the device unless it has places of its own."""
    model: Any = source
    if isinstance(source, str):
        # The checkpoint's own dtype, and all of it on one device unless something else is asked for.
        model = load_reward_model(source, **{"dtype": "auto", "device_map": None, **(init_kwargs or {})})
    spread = getattr(model, "hf_device_map", None) is not None
    return model if spread or is_quantized(model) else model.to(device)
