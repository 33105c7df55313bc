"""Defines how collators are called that make tensors for a model's own forward, as transformers' and TRL's are."""

from __future__ import annotations

from typing import Any


class TensorCollator:
    """Collates rows into a dict of tensors; a subclass writes `torch_call`, which subclasses of TRL's override."""

    return_tensors: str

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        """Returns the rows' batch.

        Raises:
            ValueError: another kind of tensors than PyTorch's is asked for.
        """
        kind = self.return_tensors if return_tensors is None else return_tensors
        if kind != "pt":
            raise ValueError(f"return_tensors={kind!r}: there are only PyTorch's tensors, 'pt'")
        return self.torch_call(features)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        raise NotImplementedError
