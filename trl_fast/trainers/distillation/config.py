"""Defines DistillationConfig: TRL's arguments and defaults, and data that a student has not sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of

from ..online.sampling_config import SamplingConfig, check_rows_are_whole


@dataclass
class DistillationConfig(SamplingConfig):
    """Holds the arguments of DistillationTrainer: a student learns a teacher's next-token distributions.

    Set first: `output_dir`, `teacher_model_name_or_path`, `learning_rate`, `max_completion_length`,
    `per_device_train_batch_size`; `beta` for the divergence; `lmbda` below 1 to learn from given completions too.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    other_batch_size: ClassVar[str] = "change how many completions are made at a time"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "entropy", "completions/mean_length", "completions/clipped_ratio", "grad_norm", "learning_rate"),
        "eval_loss",
    )
    # A teacher stays as it is, and is no adapter of the student: what a `ReferencePolicy` asks of other methods.
    sync_ref_model: ClassVar[bool] = False
    model_adapter_name: ClassVar[str | None] = None
    ref_adapter_name: ClassVar[str | None] = None

    # The teacher.
    teacher_model_name_or_path: str | None = None
    """Teacher: a hub name or a folder, for the command line and where the trainer is given none."""

    teacher_model_revision: str | None = None
    """Branch, tag or commit of the teacher on the hub. None: its main branch."""

    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of from_pretrained for a teacher given by name. None: none."""

    # What is learned.
    beta: float = 1.0
    """Which divergence: 0 is forward KL, 1 reverse KL, between them lies the generalised Jensen-Shannon one."""

    divergence: str = one_of("trl_fast.ops.divergence.formulas:KINDS", default="jsd")
    """Kind of divergence: jsd, skewed_forward_kl, skewed_reverse_kl (both with beta as their skew) or tvd."""

    teacher_top_k: int | None = None
    """Compare only so many of the teacher's likeliest tokens, and all others together. None: the whole vocabulary."""

    lmbda: float = 1.0
    """Share of micro-batches whose completions the student samples; the others learn given ones."""

    seq_kd: bool = False
    """Let the teacher sample the completions that the student does not, instead of reading them from the dataset."""

    num_generations: int = 1
    """Completions for each prompt, which is computed once for all of them."""

    tool_timeout: float | None = None
    """Seconds after which a tool that has not answered is an error. None: no limit."""

    max_tool_calling_iterations: int | None = None
    """Times that a completion may call tools. None: until it is too long."""

    _VALID_DICT_FIELDS = SamplingConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_values()
        if self.seq_kd and self.lmbda == 1:
            raise ValueError("seq_kd=True with lmbda=1: the teacher would sample nothing; set lmbda below 1")
        check_rows_are_whole(self)
        self._check_groups()

    def _check_groups(self) -> None:
        from trl_fast.settings.divisors import divisors, either

        sizes = {"per_device_train_batch_size": self.completions_per_step}
        if self.eval_strategy != "no":
            sizes["per_device_eval_batch_size"] = self.per_device_eval_batch_size * self.world_size
        for name, size in sizes.items():
            if size % self.num_generations:
                raise ValueError(
                    f"num_generations={self.num_generations} does not divide the {size} completions that are made at "
                    f"a time ({name}={getattr(self, name)}); use num_generations={either(divisors(size))}"
                )

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and the divergence.

        Raises:
            ValueError: one is out of its range, or none of its choices.
        """
        super().check_values()
        check_choice(self, "divergence")
        from trl_fast.ops.divergence.formulas import DivergenceFormula

        DivergenceFormula.of(self.divergence, self.beta)

    @property
    def loss_temperature(self) -> float:
        """Returns what divides both models' logits in the loss."""
        return self.temperature

    @property
    def evaluates_given(self) -> bool:
        """Says whether evaluation is on the dataset's completions, and not on the student's own."""
        return self.lmbda == 0 and not self.seq_kd

    @property
    def reads_given(self) -> bool:
        """Says whether training reads completions of the dataset."""
        return self.lmbda < 1 and not self.seq_kd

    @property
    def steps_per_generation(self) -> int:
        """Returns the micro-batches that one generation serves: those of an optimizer step."""
        return self.gradient_accumulation_steps

    @property
    def generate_every(self) -> int:
        """Returns the number of micro-batches after which new completions are made."""
        return self.gradient_accumulation_steps

    @property
    def is_on_policy(self) -> bool:
        """Says that each optimizer step makes new completions."""
        return True

    @property
    def completions_per_step(self) -> int:
        """Returns the completions made at a time, those of an optimizer step in all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def given_prompt_limit(self) -> int | None:
        """Returns the tokens that are kept of a prompt whose completion is given, however long that is; None: all."""
        return None

    @property
    def prompt_limit(self) -> int | None:
        """Returns the tokens that are left of a prompt whose completion is sampled, its last ones; None: all."""
        return None


def check_prompt_room(args: Any) -> None:
    """Checks that `max_length` leaves a token for a prompt before a sampled completion.

    Raises:
        ValueError: it does not.
    """
    if args.max_length is not None and args.max_length <= (args.max_completion_length or 0):
        raise ValueError(
            f"max_completion_length={args.max_completion_length} with max_length={args.max_length} leaves no token "
            "for a prompt; raise max_length, or set max_completion_length lower"
        )


def set_generation_batch_size(args: Any) -> None:
    """Sets `generation_batch_size` where it is None, to the different prompts of a process's optimizer step.

    Raises:
        ValueError: it is another number than num_generations leaves.
    """
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.generation_batch_size is None and rows % args.num_generations == 0:
        args.generation_batch_size = rows // args.num_generations
    if (args.generation_batch_size or 0) * args.num_generations != rows:
        raise ValueError(
            f"generation_batch_size={args.generation_batch_size} prompts with num_generations="
            f"{args.num_generations} are not the {rows} completions that a process learns in a step "
            "(per_device_train_batch_size * gradient_accumulation_steps); leave generation_batch_size out"
        )


def check_sync_frequency(args: Any) -> None:
    """Checks that each step's completions are to be sampled with its weights.

    Raises:
        ValueError: `vllm_sync_frequency` is not 1.
    """
    if args.vllm_sync_frequency != 1:
        raise ValueError(
            f"vllm_sync_frequency={args.vllm_sync_frequency}: completions are sampled with the weights of their "
            "step, whatever samples them; leave it at 1"
        )
