"""Answers messages one after the other, token by token: a conversation with a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel, TaskType
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.trainer_utils import get_last_checkpoint

from trl_fast.input_errors import error_line
from trl_fast.modeling.adapter_folder import fit_to_tokenizer, is_adapter, load_with_adapter, read_adapter
from trl_fast.modeling.loading import base_model, load_causal_lm, load_tokenizer
from trl_fast.rollout import end_token_ids
from trl_fast.trainers.base.config import machine_has_bf16

STOPPED, CUT_OFF = "stopped", "cut off at max_new_tokens"


@dataclass(frozen=True)
class AnswerSettings:
    """Says how answers are sampled; temperature 0: always the likeliest token."""

    max_new_tokens: int
    temperature: float
    top_p: float


class _Streamer(TextStreamer):
    """Gives the text of an answer on as it is generated, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text)


class Talker:
    """Holds a model and a conversation with it.

    Attributes:
        messages: the conversation so far, with its system message.
        system: that message; None: there is none.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []

    @property
    def has_template(self) -> bool:
        """Says whether the tokenizer knows how a conversation is written; otherwise plain text is completed."""
        return self.tokenizer.chat_template is not None

    @property
    def description(self) -> str:
        """Returns what the model is and where it runs, in a few words."""
        inner = base_model(self.model)
        adapter = " with an adapter" if isinstance(self.model, PeftModel) else ""
        size = sum(weight.numel() for weight in inner.parameters())
        dtype = str(inner.dtype).removeprefix("torch.")
        return f"{type(inner).__name__}{adapter}, {size / 1e6:,.0f} million weights, {dtype}, on {inner.device}"

    def reset(self, system: str | None) -> None:
        """Begins a new conversation."""
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str, write: Callable[[str], None]) -> str | None:
        """Answers a message, which stays in the conversation with the answer.

        Args:
            write: is given the answer's text piece by piece, as it is generated.

        Returns:
            STOPPED if Ctrl-C ended the answer, CUT_OFF if max_new_tokens did, else None.

        Raises:
            ValueError: the chat template refuses the conversation, or it has no room for an answer.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            input_ids = self._input_ids(text)
        except ValueError:
            self.messages = before
            raise
        streamer = _Streamer(self.tokenizer, write)
        outcome: str | None = None
        try:
            output = self._generate(input_ids, streamer)
            if output.shape[1] - input_ids.shape[1] >= self.settings.max_new_tokens and not self._ends(output):
                outcome = CUT_OFF
        except KeyboardInterrupt:
            outcome = STOPPED
        self.messages.append({"role": "assistant", "content": streamer.text.strip()})
        return outcome

    def _input_ids(self, text: str) -> torch.Tensor:
        """Returns the tokens (1, T) int64 of the conversation; of one that is too long, without its oldest turns.

        Raises:
            ValueError: as in `answer`.
        """
        room = self._room()
        while True:
            ids = self._tokens(text)
            if room is None or len(ids) <= room:
                return torch.tensor([ids], device=base_model(self.model).device)
            first = len(self.messages) > 1 and self.messages[0]["role"] == "system"
            oldest = self.messages[first : first + 2]
            if not self.has_template or len(oldest) < 2:
                raise ValueError(
                    f"the message has {len(ids)} tokens, and the model has room for {room} before an answer of "
                    f"max_new_tokens={self.settings.max_new_tokens}; shorten one of them"
                )
            del self.messages[first : first + 2]

    def _room(self) -> int | None:
        """Returns how many tokens may stand before an answer; None: there is no limit."""
        positions = getattr(base_model(self.model).config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - self.settings.max_new_tokens

    def _tokens(self, text: str) -> list[int]:
        if not self.has_template:
            return self.tokenizer(text)["input_ids"]
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error_line(error)}") from error
        return encoded["input_ids"]

    def _ends(self, output: torch.Tensor) -> bool:
        """Says whether the last of generated tokens (1, T) is one that ends an answer."""
        return output[0, -1].item() in end_token_ids(base_model(self.model), self.tokenizer)

    @torch.no_grad()
    def _generate(self, input_ids: torch.Tensor, streamer: TextStreamer) -> torch.Tensor:
        """Generates after the tokens (1, T) of a conversation; returns both."""
        settings, inner = self.settings, base_model(self.model)
        samples = settings.temperature > 0
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=samples,
            eos_token_id=sorted(end_token_ids(inner, self.tokenizer)),
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
            **({"temperature": settings.temperature, "top_p": settings.top_p} if samples else {}),
        )
        generate: Any = self.model.generate
        return generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
        )


def load_talker(
    name_or_path: str,
    settings: AnswerSettings,
    *,
    base: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Talker:
    """Loads a model or an adapter, by hub name or folder, onto the best device here.

    Of a folder that holds only checkpoints, the newest is taken. dtype: None: as stored, on a CPU without bfloat16
    products float32. base: base model of an adapter; None: the one that it names.

    Raises:
        ValueError, OSError: there is neither, it is a classifier, or its files are broken.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    device = best_device()
    dtype = dtype or ("float32" if device == "cpu" and not machine_has_bf16() else "auto")
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        name_or_path = get_last_checkpoint(str(folder)) or name_or_path
    if is_adapter(name_or_path, revision):
        if read_adapter(name_or_path, revision).task_type == TaskType.SEQ_CLS:
            raise ValueError(f"{name_or_path!r} is an adapter of a reward model, which gives numbers and no answers")
        adapted, tokenizer = load_with_adapter(
            name_or_path, base=base, dtype=dtype, device_map=device, for_merging=False, **options
        )
        return Talker(adapted, tokenizer, settings)
    if base is not None:
        raise ValueError(f"base_model is for adapters, and {name_or_path!r} is none; leave it out")
    options["revision"] = revision or "main"
    model = load_causal_lm(name_or_path, dtype=dtype, device_map=device, **options)
    architectures = AutoConfig.from_pretrained(name_or_path, **options).architectures or ()
    for name in architectures:
        if name.endswith("ForSequenceClassification"):
            raise ValueError(f"{name_or_path!r} is a classifier ({name}), which gives numbers and no answers")
    tokenizer = load_tokenizer(name_or_path, **options)
    fit_to_tokenizer(model, tokenizer)
    return Talker(model.eval(), tokenizer, settings)


def best_device() -> str:
    """Returns the device to talk on: the GPU, or the GPUs together, if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "auto"
    return "mps" if torch.backends.mps.is_available() else "cpu"
