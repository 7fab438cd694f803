"""Nobody but programs on this machine reaches a service by default; others need its token."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from pnode_dist import ConfigurationError
from pnode_dist.serve.access import check_address, is_authorised, read_token

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "::1", "localhost"])
def test_an_address_of_this_machine_needs_no_token(host: str) -> None:
    check_address(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node1", ""])
def test_any_other_address_needs_a_token_or_insecure(host: str) -> None:
    with pytest.raises(ConfigurationError, match="can be reached by others: must have a --token-file, or --insecure"):
        check_address(host, None, insecure=False)
    check_address(host, TOKEN, insecure=False)
    check_address(host, None, insecure=True)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header", [f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic(f"anyone:{TOKEN}"), basic(f":{TOKEN}")]
)
def test_the_token_is_taken_as_bearer_token_and_as_password(header: str) -> None:
    assert is_authorised(header, TOKEN)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer",
        f"Digest {TOKEN}",
        basic(TOKEN),
        "Basic !",
        "Basic /w==",
        "Bearer é",
    ],
)
def test_any_other_header_is_refused(header: str | None) -> None:
    assert not is_authorised(header, TOKEN)
    assert is_authorised(header, None)


def test_a_token_is_read_from_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="mode 640: must be 600, for its owner alone"):
        read_token(path)


@pytest.mark.parametrize("text", ["", "short", "0123456789 abcdef", "0123456789\nabcdefg", "0123456789abcdé"])
def test_a_token_that_can_be_guessed_or_not_sent_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="--token-file"):
        read_token(path)
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_token(tmp_path / "missing")
