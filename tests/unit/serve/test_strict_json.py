"""JSON in and out of the service is JSON, without Python's extensions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.serve import strict_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_every_document_is_read_back_as_it_was_written(document: object) -> None:
    assert strict_json.parsed(strict_json.written(document)) == document


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is repeated"),
        (b"\xff\xfe1\x00", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "Exceeds the limit"),
        (b"{} {}", "Extra data"),
    ],
)
def test_what_is_not_json_is_refused_with_a_reason(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.parsed(text)


def test_numbers_that_are_not_finite_are_not_written() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            strict_json.written({"output": [value]})


@pytest.mark.parametrize("text", ["true", "null", '"1"', "[1]", "{}", "1e999", "-1e999", "1" + "0" * 400])
def test_only_finite_numbers_are_numbers(text: str) -> None:
    assert strict_json.number(json.loads(text)) is None
    assert strict_json.number(json.loads("-1.5e2")) == -150.0
    assert strict_json.number(2**53) == 2.0**53
