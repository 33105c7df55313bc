"""Names models and files as people do, and keeps secrets out of what is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_fast.settings.server_url import without_password

_SECRETS = {"token", "hub_token", "use_auth_token", "api_key", "password", "secret"}
HIDDEN = "<hidden>"


def short_name(model: str) -> str:
    """Returns a hub name as it is, and of a folder its own name."""
    return Path(model).resolve().name if model and os.path.isdir(model) else model


def without_secrets(value: Any, name: str = "") -> Any:
    """Returns a setting's value for JSON: tokens and passwords hidden, and what JSON cannot hold as text."""
    if name in _SECRETS and value not in (None, True, False):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return without_password(value) if "://" in value else str(getattr(value, "value", value))
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def command_without_secrets(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line, those after --hub_token and its like hidden."""
    shown: list[str] = []
    hides = False
    for word in words:
        flag, equals, _ = word.partition("=")
        names_secret = flag.startswith("--") and flag.lstrip("-").replace("-", "_") in _SECRETS
        text = f"{flag}={HIDDEN}" if names_secret and equals else str(without_secrets(word))
        shown.append(HIDDEN if hides else text)
        hides = names_secret and not equals
    return shown
