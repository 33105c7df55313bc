"""Defines SFTConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from packaging.version import Version

from trl_fast.settings.batch_layouts import PACKED, PADDED
from trl_fast.settings.choices import (
    ASSISTANT_TURNS,
    PACKING_STRATEGIES,
    SEPARATELY,
    TOGETHER,
    TRUNCATION_MODES,
    check_choice,
    one_of,
)
from trl_fast.settings.older_names import deprecated, older_name

from .base.config import BaseConfig

if TYPE_CHECKING:
    from trl_fast.data import SFTFormat, SFTLength

_OLDER_DATASET_KWARGS = ("add_special_tokens", "append_concat_token")


def _marks_with_images() -> bool:
    """Says whether a processor marks what the assistant says."""
    return Version(transformers.__version__) >= Version("5.18.0.dev0")


@dataclass
class SFTConfig(BaseConfig):
    """Holds the arguments of SFTTrainer: supervised fine-tuning on texts, conversations or prompts with completions.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `packing` for short
    examples; `completion_only_loss` or `assistant_only_loss` for what is learned.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "eval_loss"),
    )

    learning_rate: float = 2e-5
    """Initial learning rate of AdamW."""

    disable_dropout: bool = False
    """Switch dropout off in the model."""

    chat_template_path: str | None = None
    """Chat template to use: a Jinja file (.jinja, .j2), or a tokenizer's hub name or folder. None: the tokenizer's."""

    dataset_text_field: str = "text"
    """Column of plain text."""

    dataset_kwargs: dict[str, Any] | str | None = None
    """Only skip_prepare_dataset: true, for rows that have input_ids and labels as they should be. None: prepare."""

    eos_token: str | None = None
    """Token that ends a text or turn. None: the tokenizer's own."""

    max_length: int | None = 1024
    """Longest row in tokens, and the length that packing fills. None: no limit."""

    truncation_mode: str = one_of(TRUNCATION_MODES, default="keep_start")
    """Which end of a row longer than max_length stays: keep_start or keep_end."""

    shuffle_dataset: bool = False
    """Shuffle the rows before and after packing."""

    packing: bool = False
    """Put several examples into rows of max_length tokens."""

    packing_strategy: str = one_of(PACKING_STRATEGIES, default="bfd")
    """How examples are put into rows: bfd, bfd_split or wrapped.

    bfd: whole examples, longer ones cut; bfd_split: longer ones in pieces; wrapped: one stream of tokens, cut
    anywhere, in which an example sees the one before it.
    """

    eval_packing: bool | None = None
    """Packing of the evaluation dataset. None: as `packing`."""

    padding_free: bool = False
    """The same as batch_layout='packed': one row without padding."""

    completion_only_loss: bool | None = None
    """Learn completions only, not prompts. None: where the data have a prompt and a completion."""

    assistant_only_loss: bool = False
    """Learn only what the assistant says in conversations."""

    assistant_turns: str = one_of(ASSISTANT_TURNS, default=TOGETHER)
    """How the assistant's turns of a conversation are learned: together or separately.

    together: in one sequence, in which all turns keep their thoughts; separately: each turn after what the chat
    template shows of the conversation before it, as at inference. Goes with assistant_only_loss.
    """

    loss_type: str = one_of("trl_fast.losses.sft:TOKEN_LOSSES", default="nll")
    """Loss: nll (negative log-likelihood) or dft (dynamic fine-tuning, arXiv 2508.05629)."""

    # Names of older TRL versions.
    max_seq_length: int | None = older_name(now="max_length")
    use_liger: bool | None = older_name("the fused head is always on, so it has no effect.")
    dataset_batch_size: int | None = older_name("the dataset is processed in batches of 1000, so it has no effect.")
    num_of_sequences: int | None = older_name("packing needs no buffer, so it has no effect.")
    chars_per_token: float | None = older_name("packing counts tokens, so it has no effect.")
    infinite: bool | None = older_name(
        "the trainer goes through the data as often as max_steps asks, so it has no effect."
    )

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["dataset_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._translate_older_values()
        check_choice(self, "loss_type")
        check_choice(self, "packing_strategy")
        check_choice(self, "assistant_turns")
        self._check_turns()
        self.row_length(self.packing or bool(self.eval_packing))
        if self.padding_free:
            if self.batch_layout == PADDED:
                raise ValueError("padding_free=True contradicts batch_layout='padded'; choose one of them")
            self.batch_layout = PACKED

    def _check_turns(self) -> None:
        """Checks that what does not go with turns that are learned separately is off."""
        if self.assistant_turns != SEPARATELY:
            return
        name = f"assistant_turns={SEPARATELY!r}"
        if not self.assistant_only_loss:
            raise ValueError(
                f"{name} learns what the assistant says, each turn once; set assistant_only_loss=True, or leave "
                "assistant_turns out"
            )
        if self.packing or self.eval_packing:
            packing = "packing" if self.packing else "eval_packing"
            raise ValueError(
                f"{packing}=True cuts rows and mixes them, and {name} needs the turns of a conversation in one row; "
                f"set {packing}=False: rows have no padding without it either, where the model allows that"
            )
        if self.skips_preparation:
            raise ValueError(
                f"dataset_kwargs={{'skip_prepare_dataset': True}} makes no turns of conversations, which {name} asks "
                "for; leave one of them out"
            )

    def _translate_older_values(self) -> None:
        from trl_fast.data.dataset_packing import OLDER_STRATEGIES

        owner = type(self).__name__
        if self.loss_type == "chunked_nll":
            deprecated(owner, "loss_type='chunked_nll'", "it works; 'nll' is the same.")
            self.loss_type = "nll"
        if self.packing_strategy in OLDER_STRATEGIES:
            now = OLDER_STRATEGIES[self.packing_strategy]
            deprecated(owner, f"packing_strategy={self.packing_strategy!r}", f"it works; {now!r} is its present name.")
            self.packing_strategy = now
        if self.truncation_mode == "keep_end":
            deprecated(owner, "truncation_mode='keep_end'", "it works; 'keep_start' is the present default.")
        for name in self.dataset_kwargs or {}:
            if name in _OLDER_DATASET_KWARGS:
                deprecated(
                    owner, f"dataset_kwargs[{name!r}]", "packing adds no tokens of its own, so it has no effect."
                )
            elif name != "skip_prepare_dataset":
                raise ValueError(f"dataset_kwargs: {name!r} is unknown; expected only 'skip_prepare_dataset'")

    @property
    def skips_preparation(self) -> bool:
        """Says whether the dataset is to be taken as it is."""
        return bool((self.dataset_kwargs or {}).get("skip_prepare_dataset", False))

    def row_format(self, completion_only_loss: bool, chat_template: str | None) -> SFTFormat:
        """Says how rows become token ids and labels, given what is known of the data and the tokenizer."""
        from trl_fast.data import SFTFormat

        return SFTFormat(
            self.dataset_text_field,
            completion_only_loss,
            self.assistant_only_loss,
            chat_template,
            self.assistant_turns == SEPARATELY,
        )

    def row_length(self, packing: bool) -> SFTLength:
        """Says what happens to rows longer than max_length.

        Raises:
            ValueError: the truncation mode is unknown, or packing has no length to pack to.
        """
        from trl_fast.data import SFTLength

        return SFTLength(self.max_length, self.truncation_mode, self.packing_strategy if packing else None)

    def check_for_collator(self) -> None:
        """Checks the settings for a data_collator that is given.

        Raises:
            ValueError: rows hold several sequences, which it would not keep apart.
        """
        if self.assistant_turns == SEPARATELY:
            raise ValueError(
                f"data_collator: with assistant_turns={SEPARATELY!r} a row holds several sequences, which only the "
                "trainer's own collator keeps apart; leave data_collator out, or set assistant_turns='together'"
            )
        if self.packing and self.packing_strategy != "wrapped":
            raise ValueError(
                f"data_collator: with packing_strategy={self.packing_strategy!r} a row holds several examples, which "
                "only the trainer's own collator keeps apart; leave data_collator out, or set packing=False"
            )

    def check_for_images(self, completion_only: bool, whole_prompts: bool, *, formatted: bool) -> None:
        """Checks the settings for a dataset with images.

        completion_only: whether only completions are learned. whole_prompts: whether all tokens of a prompt with
        images see each other in the model. formatted: whether there is a formatting_func.

        Raises:
            ValueError: one of them cannot be had with images, as in TRL.
        """
        without = "leave it out: rows have no padding without it either, where the model allows that"
        refused = {
            "packing=True": (self.packing, without),
            "eval_packing=True": (self.eval_packing, without),
            "padding_free=True": (self.padding_free, without),
            "truncation_mode='keep_end'": (
                self.max_length is not None and self.truncation_mode == "keep_end",
                "it would cut images off the beginnings of rows; use 'keep_start', or set max_length=None",
            ),
            "completion_only_loss=False": (
                whole_prompts and not completion_only,
                "the tokens of a prompt see each other in this model, so they cannot be learned; give rows of "
                "'prompt' and 'completion'",
            ),
            "assistant_only_loss=True": (
                self.assistant_only_loss and self.assistant_turns != SEPARATELY and not _marks_with_images(),
                f"transformers {transformers.__version__} marks nothing there, 5.18 does; upgrade it, or set "
                f"assistant_turns={SEPARATELY!r}",
            ),
            "formatting_func": (formatted, "it makes text, which has no images; give messages, or text, as a column"),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                raise ValueError(f"{name} is not supported with images in the dataset; {reason}")
