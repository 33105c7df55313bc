"""Holds completions with what a teacher's server says of them, which it is asked for as soon as they are there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from trl_fast.losses.given_tokens import compared_tokens
from trl_fast.rollout.samples import Samples
from trl_fast.rollout.teacher_server import TaughtTokens

from .mixture import Mixture


@dataclass
class ServerSamples(Samples):
    """Holds samples of which a teacher's server has been asked.

    - `taught`: its answer for each completion, when it is there.
    """

    taught: list[Future[TaughtTokens]] | None = None

    def compared(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and the teacher's log-probabilities (N, C) of the tokens that a divergence compares.

        Waits for the answers.

        Raises:
            ConnectionError, RuntimeError: as in `TeacherServer.ask`.
        """
        likeliest, logprobs, own_logprobs = self.answers()
        own = torch.tensor([token for ids in self.completion_ids for token in ids])
        return compared_tokens(likeliest, logprobs, own, own_logprobs, beta)

    def answers(self) -> TaughtTokens:
        """Returns what the teacher says of all N tokens, in the order of the completions; waits for it.

        Raises:
            ConnectionError, RuntimeError: as in `TeacherServer.ask`.
        """
        assert self.taught is not None, "the server is asked when samples are made"
        return TaughtTokens(*map(torch.cat, zip(*(each.result() for each in self.taught), strict=True)))


class ServerMixture(Mixture):
    """Makes samples as `Mixture` does, and asks the teacher's server, if there is one, about all of them at once."""

    def samples(self, rows: list[dict[str, Any]], own: Sequence[bool]) -> ServerSamples:
        """Returns a completion of each row, of which the server has been asked."""
        samples: Any = super().samples(rows, own)
        server, args = self._trainer.server, self._trainer.args
        if server is None:  # the teacher is here
            return samples
        pairs = zip(samples.prompt_ids, samples.completion_ids, strict=True)
        samples.taught = server.ask(pairs, args.loss_top_k, args.temperature)
        return samples
