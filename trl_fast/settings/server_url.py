"""Reads the address of a generation server, and keeps passwords out of whatever is shown."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

_EXPECTED = "expected http://HOST:PORT, such as http://localhost:8000"


@dataclass(frozen=True)
class ServerURL:
    """Holds an address without its user and password, and these apart, which no message shows.

    - `address`: such as http://localhost:8000, without a slash at its end.
    - `credentials`: user and password, or None.
    """

    address: str
    credentials: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return f"ServerURL({self.address!r})"


def server_url(settings: Any) -> ServerURL:
    """Returns the address that `vllm_server_base_url`, or else `vllm_server_host` and `vllm_server_port` say.

    Raises:
        ValueError: it is malformed; the message names the setting, and hides user, password and query.
    """
    if settings.vllm_server_base_url is not None:
        return read_server_url(settings.vllm_server_base_url, "vllm_server_base_url")
    host = settings.vllm_server_host
    if not isinstance(host, str) or not host or re.search(r"[/@?#\s]", host):
        raise ValueError(
            f"vllm_server_host: expected the name of a host or its IP address alone, got {without_password(host)!r}; "
            "a whole URL is for vllm_server_base_url"
        )
    try:
        inner = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        inner = host
    return read_server_url(f"http://{inner}:{settings.vllm_server_port}", "vllm_server_host")


def read_server_url(url: Any, name: str) -> ServerURL:
    """Returns a server's address.

    name: the setting.

    Raises:
        ValueError: it is malformed; the message hides user, password and query.
    """

    def refused(problem: str, remedy: str = _EXPECTED) -> ValueError:
        return ValueError(f"{name}={without_password(url)!r} {problem}; {remedy}")

    if not isinstance(url, str) or not url.strip():
        raise refused("is no URL")
    if re.search(r"[\s\x00-\x1f\\]", url):
        raise refused("has white space or a backslash")
    parts = _split(url)
    if "://" not in url:
        meant = f"did you mean {without_password('http://' + url)!r}?"
        raise refused("has no scheme", _EXPECTED if url.startswith("http") else meant)
    if parts is None or not parts.hostname or not _is_host(parts.hostname):
        raise refused("has a malformed host or port")
    if parts.scheme not in ("http", "https"):
        raise refused(f"has the scheme {parts.scheme!r}")
    if parts.query or parts.fragment:
        raise refused("has a query or a fragment", "leave out what follows the port and path")
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        raise refused("ends with /v1, the place of completions only", "leave /v1 out")
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
    if parts.username is None and parts.password is None:
        return ServerURL(address)
    return ServerURL(address, (unquote(parts.username or ""), unquote(parts.password or "")))


def _split(url: str) -> SplitResult | None:
    """Returns the parts of a URL; None if it has none, or a port that there is not."""
    try:
        parts = urlsplit(url)
        # The port is read when it is asked for.
        return None if parts.port == 0 or parts.netloc.endswith(":") else parts
    except ValueError:
        return None


def _is_host(name: str) -> bool:
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def without_password(url: Any) -> Any:
    """Returns a URL to be shown: what may be user, password or query is left out. What is no text stays."""
    if not isinstance(url, str):
        return url
    hidden = re.sub(r"(?s)^(\w+://)?.*@", r"\1***@", url)
    return re.sub(r"(?s)\?.*", "?…", hidden)
