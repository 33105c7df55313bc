"""Defines GOLDConfig: the arguments and defaults of TRL's GOLDTrainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from trl_fast.settings.choices import check_choice, one_of
from trl_fast.settings.older_names import older_name

from ..sft_config import SFTConfig
from .config import DistillationConfig, check_prompt_room, check_sync_frequency, set_generation_batch_size

logger = logging.getLogger(__name__)

# What the loss for different tokenizers makes of a token that one of them has split.
MERGES = ("observed", "bayesian")
OBSERVED, BAYESIAN = MERGES


@dataclass
class GOLDConfig(DistillationConfig, SFTConfig):
    """Holds the arguments of GOLDTrainer: distillation from a teacher that may have another tokenizer.

    Set first: `output_dir`, `teacher_model_name_or_path`, `learning_rate`, `max_length`, `max_completion_length`,
    `lmbda`, `beta`; `use_uld_loss` for a teacher of another tokenizer. Of SFTConfig's arguments, those that change how
    rows become tokens have no effect, as in TRL.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    _GONE = {
        **DistillationConfig._GONE,
        "callbacks": "give callbacks to the trainer; their names in the config call nothing, in TRL neither",
    }

    learning_rate: float = 1e-7
    """Initial learning rate of AdamW."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the teacher."""

    shuffle_dataset: bool | None = True  # type: ignore[assignment]  # as DistillationConfig has it
    """Shuffle the training rows."""

    max_length: int | None = 1024
    """Longest prompt + completion in tokens; longer ones lose the beginning of their prompt. None: no limit.

    A prompt whose completion is sampled keeps its last max_length - max_completion_length tokens.
    """

    max_completion_length: int | None = 128
    """Tokens after which a sampled completion is cut off."""

    temperature: float = 0.9
    """Divides the logits in sampling, and both models' in the loss; not in that of use_uld_loss."""

    top_p: float = 0.95
    """Sample from the likeliest tokens that have this probability together; 1: from all."""

    lmbda: float = 0.5
    """Share of micro-batches whose completions the student samples; the others learn given ones."""

    beta: float = 0.5
    """Which divergence: 0 is forward KL, 1 reverse KL, between them lies the generalised Jensen-Shannon one."""

    generation_batch_size: int | None = None
    """Different prompts of an optimizer step, a process's share. None: what num_generations leaves of its rows."""

    # A teacher of another tokenizer.
    use_uld_loss: bool = False
    """Compare models of different tokenizers by Universal Logit Distillation; beta then is of its hybrid only."""

    teacher_tokenizer_name_or_path: str | None = None
    """Tokenizer of the teacher, with use_uld_loss: a hub name or a folder. None: the one of the teacher's name."""

    use_extended_uld: bool = True
    """Align tokens by the text that they stand for, and join those of a span. False: compare them by position."""

    uld_token_merge_strategy: str = one_of(MERGES, default="observed")
    """How tokens have rows, and several of them are joined: observed or bayesian.

    observed: a token's row is the one behind it, and the first of a span is compared; bayesian: it is the one that
    predicts it, and the last is compared, so that the product is the probability of the span.
    """

    uld_use_hybrid_loss: bool = False
    """Compare tokens that both vocabularies have by name with the divergence of beta, and only the others by rank."""

    uld_hybrid_matched_weight: float | None = None
    """Weight of the tokens that both have. None: their share of the teacher's vocabulary."""

    uld_hybrid_unmatched_weight: float | None = None
    """Weight of the other tokens; goes with uld_hybrid_matched_weight. None: their share."""

    uld_crossentropy_weight: float = 0.0
    """Weight of the completions' own likelihood; 0: none is learned."""

    uld_distillation_weight: float = 1.0
    """Weight of the distance between student and teacher."""

    uld_student_temperature: float = 1.0
    """Divides the student's logits in the loss of use_uld_loss."""

    uld_teacher_temperature: float = 1.0
    """Divides the teacher's logits in the loss of use_uld_loss."""

    uld_skip_student_eos: bool = True
    """Leave the last token of each completion out for the student."""

    uld_skip_teacher_eos: bool = True
    """Leave the end token of each completion out for the teacher."""

    vllm_server_port: int = 8001
    """Port of the server."""

    vllm_gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for the colocated engine."""

    vllm_sync_frequency: int = 1
    """Only 1: completions are always sampled with the weights of their step."""

    log_completions_steps: int = 100
    """Steps between two tables of log_completions, of those steps that are logged."""

    packing: bool = False
    """Has no effect: rows are not padded, and none is joined with another."""

    completion_only_loss: bool | None = None
    """Has no effect: completions are learned, and no prompts."""

    assistant_only_loss: bool = False
    """Has no effect: of a conversation the last answer is learned."""

    wandb_log_unique_prompts: bool | None = older_name(now="log_unique_prompts")

    _VALID_DICT_FIELDS = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *(name for name in SFTConfig._VALID_DICT_FIELDS if name not in DistillationConfig._VALID_DICT_FIELDS),
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "uld_token_merge_strategy")
        check_prompt_room(self)
        set_generation_batch_size(self)
        self._check_tokenizers()
        check_sync_frequency(self)

    def _check_tokenizers(self) -> None:
        """Checks that what is asked for goes with different tokenizers, or with one."""
        weights = ("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight")
        given = [getattr(self, name) for name in weights]
        if (given[0] is None) != (given[1] is None):
            raise ValueError(f"{weights[0]}={given[0]} goes with {weights[1]}={given[1]} only as a pair; set both")
        if not self.use_uld_loss:
            for name in ("uld_use_hybrid_loss", "teacher_tokenizer_name_or_path"):
                if getattr(self, name):
                    logger.warning(f"{name}={getattr(self, name)!r} has no effect without use_uld_loss=True.")
            return
        one_vocabulary = "compares predictions over one vocabulary; leave it out, or set use_uld_loss=False"
        if self.divergence != "jsd":
            raise ValueError(f"divergence={self.divergence!r} {one_vocabulary}")
        if self.teacher_top_k is not None:
            raise ValueError(f"teacher_top_k={self.teacher_top_k} {one_vocabulary}")
        if not self.uld_distillation_weight and not self.uld_crossentropy_weight:
            raise ValueError(
                "uld_distillation_weight=0 with uld_crossentropy_weight=0: nothing would be learned; set one above 0"
            )
        if self.seq_kd:
            raise ValueError(
                "seq_kd=True with use_uld_loss=True: the teacher would sample tokens that are not the student's; set "
                "seq_kd=False, and give its completions in the dataset"
            )

    @property
    def prompt_limit(self) -> int | None:
        """Returns the tokens that are left of a prompt whose completion is sampled."""
        if self.max_length is None or self.max_completion_length is None:
            return None
        return self.max_length - self.max_completion_length

    @property
    def evaluates_given(self) -> bool:
        """Says that evaluation is on the dataset's completions."""
        return True
