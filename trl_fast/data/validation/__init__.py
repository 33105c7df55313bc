"""Checks preference data: pairs, repetitions, leaks, labels, lengths, messages, tokens and characters."""

from .findings import Finding, Kind
from .report import ValidationReport
from .validator import validate

__all__ = ["Finding", "Kind", "ValidationReport", "validate"]
