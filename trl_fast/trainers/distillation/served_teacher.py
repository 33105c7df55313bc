"""Defines what methods share whose teacher a vLLM server runs: arguments, and the client."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl_fast.settings.choices import check_choice, one_of

from .config import DistillationConfig

logger = logging.getLogger(__name__)

# The token at which reverse KL is estimated: the completion's own, or the student's likeliest.
REVERSE_TOKENS = ("sampled", "argmax")
SAMPLED, ARGMAX = REVERSE_TOKENS
# Arguments of a teacher beside the student, and what to do where a server runs it.
_OF_A_MODEL = ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs")
URL_SETTING = "teacher_model_server_url"


@dataclass
class ServedTeacherConfig(DistillationConfig):
    """Holds the arguments of a method whose teacher a vLLM server may run.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    url_settings: ClassVar[tuple[str, ...]] = (*DistillationConfig.url_settings, URL_SETTING)

    # The teacher.
    teacher_model_server_url: str | None = field(default=None, repr=False)
    """URL of the vLLM server that runs the teacher, such as http://localhost:8000. None: no server does."""

    teacher_server_timeout: float = 60.0
    """Seconds to wait for the teacher's server to be up."""

    vllm_server_port: int = 8001
    """Port of the student's server, beside the teacher's."""

    # What is learned.
    loss_top_k: int = 1
    """beta=0: the teacher's likeliest tokens that are compared. Other beta: 1, beside the completion's own token."""

    loss_add_tail: bool = True
    """Compare all other tokens too, as one. False: the distributions among those that are compared."""

    reverse_kl_top_1_mode: str = one_of(REVERSE_TOKENS, default="sampled")
    """Token at which reverse KL is estimated: sampled (the completion's own) or argmax (the student's likeliest)."""

    @property
    def is_served(self) -> bool:
        """Says whether a server runs the teacher."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model_server_url is not None:
            from trl_fast.settings.server_url import read_server_url

            read_server_url(self.teacher_model_server_url, URL_SETTING)
        if not self.is_served:
            return
        for name in _OF_A_MODEL:
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: the server runs the teacher; leave it out")
        if self.seq_kd:
            raise ValueError(
                "seq_kd=True: the server scores completions only; leave it out, and put the teacher's into the dataset"
            )
        if self.temperature != 1:
            logger.warning(
                f"temperature={self.temperature} divides the student's logits only, as in TRL: vLLM tells log-probs "
                "of prompts without a temperature; temperature=1 compares alike."
            )

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does, and what is compared.

        Raises:
            ValueError: one is out of its range, or none of its choices, or does not go with another.
        """
        super().check_values()
        check_choice(self, "reverse_kl_top_1_mode")
        if self.divergence != "jsd":
            raise ValueError(
                f"divergence={self.divergence!r}: which tokens are compared is defined for 'jsd' only; use it"
            )
        if self.teacher_top_k is not None:
            raise ValueError(f"teacher_top_k={self.teacher_top_k}: loss_top_k stands in its place; leave it out")

    def check_served(self) -> None:
        """Checks that a server can tell what is compared.

        Raises:
            ValueError: it cannot.
        """
        if self.reverse_kl_top_1_mode != SAMPLED:
            raise ValueError(
                f"reverse_kl_top_1_mode={self.reverse_kl_top_1_mode!r}: a server does not tell log-probs of tokens "
                f"that the student chooses; use {SAMPLED!r}, or a teacher beside the student"
            )
        if self.loss_top_k < 1:
            raise ValueError(
                f"loss_top_k={self.loss_top_k}: a server tells of a few tokens only; set their number, or use a "
                "teacher beside the student"
            )
        if self.beta > 0 and self.loss_top_k != 1:
            raise ValueError(
                f"loss_top_k={self.loss_top_k} with beta={self.beta}: reverse KL is estimated at one token; set "
                "loss_top_k=1, or beta=0"
            )

    def check_something_is_learned(self) -> None:
        """Checks that more than one class is compared.

        Raises:
            ValueError: each distribution would be that of one token.
        """
        if self.loss_top_k == 1 and self.beta in (0, 1) and not self.loss_add_tail:
            raise ValueError(
                f"loss_add_tail=False with loss_top_k=1 and beta={self.beta}: one token alone has probability 1 for "
                "both, so nothing would be learned; set loss_add_tail=True"
                + (", or loss_top_k above 1" if self.beta == 0 else "")
            )


def open_teacher_server(args: ServedTeacherConfig, student: Any) -> Any:
    """Returns a client of the teacher's server, a `TeacherServer`, when that is up.

    Raises:
        ConnectionError, RuntimeError: as in `TeacherServer`.
    """
    from trl_fast.rollout.teacher_server import TeacherServer
    from trl_fast.settings.server_url import read_server_url

    from .teacher import head_size

    url = read_server_url(args.teacher_model_server_url, URL_SETTING)
    timeout = args.teacher_server_timeout
    return TeacherServer(url, setting=URL_SETTING, timeout=timeout, vocab_size=head_size(student))
