"""Generates completions in several turns: where the policy calls tools, it reads their results and goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_fast.data.images.messages import images_of
from trl_fast.parallel.agreement import largest_over_ranks

from .engine import EngineWrapper, Rollout, RolloutEngine, SamplingSettings, asks_together, generate
from .images import PromptImages, RolloutImage, RolloutImages
from .responses import find_response_template, parse_message, tool_turn_ids
from .tools import Toolbox, run_tools


@dataclass
class ToolRollout(Rollout):
    """Holds completions with the results of tools in between, whose tokens have mask and log-probability 0.

    Args:
        messages: each completion as messages: the assistant's, the tools', the assistant's again …
        calls, failures: how many tools were called, and how many of the calls failed.
    """

    messages: list[list[dict[str, Any]]] = field(default_factory=list)
    calls: int = 0
    failures: int = 0


@dataclass
class _Dialogue:
    """Holds a prompt and its completion so far, and the functions that it may call."""

    prompt_ids: list[int]
    toolbox: Toolbox
    completion_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt_images: tuple[RolloutImage, ...] = ()
    images: tuple[RolloutImage, ...] = ()

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """Returns the calls that no tool has answered yet, but could."""
        return [] if self.toolbox.lost else self.messages[-1].get("tool_calls") or []

    def add(self, ids: list[int], mask: list[int], logprobs: list[float] | None = None) -> None:
        self.completion_ids += ids
        self.mask += mask
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


class ToolLoop(EngineWrapper):
    """Generates completions that may call tools: a rollout engine around another one.

    After each turn of another engine the tools that it called are run, their results are appended as the chat template
    writes them, and the engine goes on, until there are no calls, `max_iterations` turns were answered, or the
    completion has no room left. Tokens are only ever appended, never made anew from text. Results that do not fit into
    max_completion_length are left out, which ends the completion with its calls.

    Args:
        engine: what generates.
        toolbox: the functions; or, where each completion has its own, what returns a toolbox for each of so many.
        tokenizer: its chat template must write tool calls and their results. Its `response_template` is set if it has
            none.
        max_iterations: None is no limit.
        max_positions: the most tokens, prompt and completion together, that the model takes; None if it has no limit.
        chat_template_kwargs: for the template, as for the prompts.
        images: reads those of results; None: the model reads none.
        workers: as in `run_tools`.

    Raises:
        ValueError: the chat template does not serve.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        toolbox: Toolbox | Callable[[int], Sequence[Toolbox]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_iterations: int | None = None,
        max_positions: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        images: RolloutImages | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(engine)
        self._workers = workers
        tokenizer.response_template = find_response_template(tokenizer)
        self._toolbox, self.tokenizer = toolbox, tokenizer
        self.max_iterations, self.max_positions = max_iterations, max_positions
        self.template_kwargs, self.images = chat_template_kwargs or {}, images
        # Says so now if the template does not serve.
        tool_turn_ids(tokenizer, [{"role": "tool", "name": "name", "content": "result"}], **self.template_kwargs)

    def generate(
        self, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None = None
    ) -> ToolRollout:
        """Samples one completion for each prompt, of all its turns together.

        images: of each prompt, in the order of their tokens.

        Raises:
            ValueError: as the engine; or a tool gave an image, and the model reads none.
        """
        own = [()] * len(prompt_ids) if images is None else images
        given = zip(prompt_ids, self._toolboxes(len(prompt_ids)), own, strict=True)
        dialogues = [_Dialogue(list(ids), box, prompt_images=each) for ids, box, each in given]
        knows_logprobs = self._sample(dialogues, settings, settings.max_completion_length)
        calls = failures = iteration = 0
        open_ = [dialogue for dialogue in dialogues if dialogue.open_calls]
        while self._in_any_process(len(open_)) and iteration != self.max_iterations:
            calls_now = [dialogue.open_calls for dialogue in open_]
            results = run_tools([dialogue.toolbox for dialogue in open_], calls_now, self._workers)
            calls, failures = calls + results.calls, failures + results.failures
            answered = [
                dialogue
                for dialogue, messages in zip(open_, results.messages, strict=True)
                if not dialogue.toolbox.lost and self._answer(dialogue, messages, settings.max_completion_length)
            ]
            self._go_on(answered, settings)
            open_ = [dialogue for dialogue in answered if dialogue.open_calls]
            iteration += 1
        return ToolRollout(
            prompt_ids=prompt_ids,
            completion_ids=[dialogue.completion_ids for dialogue in dialogues],
            logprobs=[dialogue.logprobs for dialogue in dialogues] if knows_logprobs else None,
            mask=[dialogue.mask for dialogue in dialogues],
            messages=[dialogue.messages for dialogue in dialogues],
            calls=calls,
            failures=failures,
            completion_images=[dialogue.images for dialogue in dialogues],
        )

    def _toolboxes(self, count: int) -> Sequence[Toolbox]:
        return [self._toolbox] * count if isinstance(self._toolbox, Toolbox) else self._toolbox(count)

    def _answer(self, dialogue: _Dialogue, messages: list[dict[str, Any]], longest: int) -> bool:
        """Appends the results of a dialogue's calls; whether they fit."""
        earlier = sum(message["role"] == "tool" for message in dialogue.messages)
        images = self._images_of(messages)
        given = None if self.images is None else (self.images.reader, [image.picture for image in images])
        ids = tool_turn_ids(self.tokenizer, messages, earlier, images=given, **self.template_kwargs)
        # GLM 4 ends a call with the token that results begin with; Command R7B's template repeats the turn's end.
        if ids[:1] == dialogue.completion_ids[-1:] and ids[0] in self.tokenizer.get_added_vocab().values():
            ids = ids[1:]
        length = len(dialogue.completion_ids) + len(ids)
        full = self.max_positions is not None and len(dialogue.prompt_ids) + length >= self.max_positions
        if length > longest or full:
            return False
        dialogue.add(ids, [0] * len(ids))
        dialogue.messages += messages
        dialogue.images += images
        return True

    def _images_of(self, messages: list[dict[str, Any]]) -> tuple[RolloutImage, ...]:
        if self.images is not None:
            return self.images.of_messages(messages)
        if images_of(messages):
            raise ValueError(
                f"tool {messages[0]['name']!r} gave an image, but the model is trained as one of text, since the "
                "train dataset has no images; give it a column 'images', of empty lists if need be"
            )
        return ()

    def _go_on(self, dialogues: list[_Dialogue], settings: SamplingSettings) -> None:
        """Samples the next turn of each dialogue that has room for it.

        They go to the engine together as far as the positions allow: a turn may be as long as the largest room of
        those beside it, and is cut to its own.
        """
        rooms = [(settings.max_completion_length - len(d.completion_ids), d) for d in dialogues]
        rest = [(room, dialogue) for room, dialogue in rooms if room > 0]
        while self._in_any_process(len(rest)):
            most = self._in_any_process(max([room for room, _ in rest], default=0))
            fits = [self.max_positions is None or len(d.ids) + most <= self.max_positions for _, d in rest]
            # What stands alone has the engine say that it is too long.
            fits = fits if any(fits) else [True] * len(rest)
            now = [dialogue for (_, dialogue), fit in zip(rest, fits, strict=True) if fit]
            self._sample(now, settings, most)
            rest = [pair for pair, fit in zip(rest, fits, strict=True) if not fit]

    def _in_any_process(self, number: int) -> int:
        """Returns a number, or the largest of all processes' where they ask the engine together."""
        return largest_over_ranks(number) if asks_together(self.engine) else number

    def _sample(self, dialogues: list[_Dialogue], settings: SamplingSettings, longest: int) -> bool:
        """Adds a turn to each dialogue; whether its log-probabilities are known."""
        prefixes = [dialogue.ids for dialogue in dialogues]
        images = [dialogue.prompt_images + dialogue.images for dialogue in dialogues]
        settings_now = replace(settings, max_completion_length=longest)
        rollout = generate(self.engine, prefixes, settings_now, images if any(images) else None)
        for index, (dialogue, prefix) in enumerate(zip(dialogues, prefixes, strict=True)):
            room = settings.max_completion_length - len(dialogue.completion_ids)
            ids = list(rollout.completion_ids[index][:room])
            mask = [1] * len(ids) if rollout.mask is None else rollout.mask[index][:room]
            dialogue.add(ids, mask, None if rollout.logprobs is None else rollout.logprobs[index][:room])
            dialogue.messages.append(parse_message(self.tokenizer, ids, prefix, dialogue.toolbox.schemas))
        return rollout.logprobs is not None
