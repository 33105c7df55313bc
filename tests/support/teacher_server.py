"""A vLLM server in the test's process that tells the log-probabilities of a small model, as those of prompts."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch
from transformers import AutoModelForCausalLM

from support.vllm import fake_server


def teacher_server(model_path: str, answers: dict | None = None) -> AbstractContextManager:
    """Serves a teacher; the arguments and what it has are those of `fake_server`, but for the completions."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    lock = threading.Lock()

    def complete(body: dict) -> list[dict]:
        with lock:
            return [
                {"prompt_logprobs": prompt_logprobs(model, ids, body["prompt_logprobs"])} for ids in body["prompt"]
            ]

    return fake_server(answers, complete)


@torch.no_grad()
def prompt_logprobs(model: torch.nn.Module, ids: list[int], count: int) -> list[dict | None]:
    """Lists what vLLM says of a prompt's tokens: each own log-probability first, then the likeliest ones.

    It knows no temperature.
    """
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    places: list[dict | None] = [None]
    for own, row in zip(ids[1:], logprobs, strict=False):
        order = row.argsort(descending=True).tolist()
        chosen = {own: order.index(own) + 1} | {token: rank + 1 for rank, token in enumerate(order[:count])}
        places.append(
            {
                str(token): {"logprob": row[token].item(), "rank": rank, "decoded_token": "?"}
                for token, rank in chosen.items()
            }
        )
    return places
