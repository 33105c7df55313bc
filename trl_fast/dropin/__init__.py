"""Answers `import trl` with trl_fast."""

from .finder import install_as_trl

__all__ = ["install_as_trl"]
