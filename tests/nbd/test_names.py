"""Strings and queries; how they act in options is tested with the negotiation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import UsageError
from nbdfleece.nbd.constants import OptionReply
from nbdfleece.nbd.errors import OptionError
from nbdfleece.nbd.names import (
    check_string,
    decode_string,
    list_contexts,
    quote_name,
    select_contexts,
)


@pytest.mark.parametrize("text", ["a\0b", "x" * 4097, "ü" * 2049, "\ud800"])
def test_string_that_cannot_be_sent_is_refused(text: str) -> None:
    """1."""
    with pytest.raises(UsageError, match="export name"):
        check_string(text, "export name")


@pytest.mark.parametrize("data", [b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"x" * 4097])
def test_string_that_must_not_be_sent_gets_err_invalid(data: bytes) -> None:
    """1: surrogates and overlong encodings are not UTF-8 either."""
    with pytest.raises(OptionError) as caught:
        decode_string(data, "query")
    assert caught.value.reply == OptionReply.ERR_INVALID


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=1000))
def test_legal_string_goes_through(text: str) -> None:
    check_string(text, "text")
    assert decode_string(memoryview(text.encode()), "text") == text


NAMES = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]


@given(st.lists(st.sampled_from([*NAMES, "base:", "qemu:", "qemu:dirty-bitmap:", "x:y", ""])))
def test_queries_against_a_model(queries: list[str]) -> None:
    """53-62, 191, written the slow way."""
    wild = {"base:", "qemu:", "qemu:dirty-bitmap:"}
    listed = [
        name
        for name in NAMES
        if not queries or any(name == q or (q in wild and name.startswith(q)) for q in queries)
    ]
    assert list_contexts(NAMES, queries) == listed
    selected = [(i, name) for i, name in enumerate(NAMES) if name in queries]
    assert select_contexts(NAMES, queries) == selected


def test_quoted_names_are_short_and_printable() -> None:
    assert quote_name("disk") == "'disk'"
    assert len(quote_name("x" * 4096)) < 100
    assert quote_name("a\nb\x1b[0m").isprintable()
