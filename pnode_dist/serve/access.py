"""Who may send requests: the address that the service listens at, and the token that a request must carry."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import stat
from pathlib import Path

from pnode_dist.errors import ConfigurationError

SHORTEST_TOKEN = 16
_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def is_loopback(host: str) -> bool:
    """Return True if only programs on the same machine can connect to the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, token: str | None, insecure: bool) -> None:
    """Raise `ConfigurationError` for an address that others can reach without a token, unless `insecure`."""
    if not is_loopback(host) and token is None and not insecure:
        raise ConfigurationError(
            f"serve: --host {host}: can be reached by others: must have a --token-file, or --insecure in a network "
            "where everybody may use the service"
        )


def read_token(path: Path) -> str:
    """Return the token in a file: at least 16 printable ASCII characters, readable by its owner alone.

    Raises `ConfigurationError`.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not ASCII"
        raise ConfigurationError(f"serve: --token-file {path}: cannot be read: {reason}") from None
    if mode & _FOR_OTHERS:
        raise ConfigurationError(
            f"serve: --token-file {path}: mode {stat.S_IMODE(mode):o}: must be 600, for its owner alone"
        )
    token = text.strip()
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"serve: --token-file {path}: must hold a token of at least {SHORTEST_TOKEN} characters without spaces"
        )
    return token


def is_authorised(header: str | None, token: str | None) -> bool:
    """Return True if an `Authorization` header carries the token, or if none is needed.

    It may be a bearer token, or the password of any user: clients that know of no tokens take a URL such as
    `http://user:TOKEN@host:4242`.
    """
    if token is None:
        return True
    scheme, _, value = (header or "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("ascii").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())
