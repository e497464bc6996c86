from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.control.errors import SessionError
from nbdfleece.control.texts import DEPTH_MAX, TEXT_BYTES_MAX, TextSplitter

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), JSON_VALUES, max_size=4)


def texts(*pieces: bytes) -> list[bytes]:
    splitter = TextSplitter()
    found = []
    for piece in pieces:
        splitter.receive(piece)
        while (text := splitter.next_text()) is not None:
            found.append(text)
    return found


@given(st.lists(OBJECTS, max_size=4), st.sampled_from(["", " ", "\n", "\r\n", "\r\n\r\n\t"]))
def test_objects_in_one_piece_are_found_whatever_is_between(values, between) -> None:
    stream = between.join(json.dumps(value) for value in values).encode()
    assert [json.loads(text) for text in texts(stream)] == values


@given(st.lists(OBJECTS, min_size=1, max_size=3), st.integers(0, 200))
def test_objects_cut_anywhere_are_found(values, cut) -> None:
    stream = "".join(json.dumps(value, ensure_ascii=False) for value in values).encode()
    assert [json.loads(text) for text in texts(stream[:cut], stream[cut:])] == values


@given(OBJECTS)
def test_object_one_byte_at_a_time_is_found(value) -> None:
    stream = json.dumps(value).encode()
    assert [json.loads(t) for t in texts(*(bytes([byte]) for byte in stream))] == [value]


def test_text_without_brackets_ends_with_its_line() -> None:
    assert texts(b"nonsense\r\n{}") == [b"nonsense", b"{}"]


def test_string_never_closed_ends_with_its_line() -> None:
    assert texts(b'{"a": "b\n{}') == [b'{"a": "b', b"{}"]


def test_stray_closing_bracket_ends_with_its_line() -> None:
    assert texts(b"}}}\n{}") == [b"}}}", b"{}"]


def test_brackets_and_escapes_in_strings_do_not_count() -> None:
    text = rb'{"a}": "\"}]\\"}'
    assert texts(text) == [text]


@pytest.mark.parametrize("start", [b'{"a": "', b"[", b"nonsense"])
def test_text_too_long_ends_the_session(start: bytes) -> None:
    splitter = TextSplitter()
    splitter.receive(start + b"x" * (TEXT_BYTES_MAX - len(start)))
    assert splitter.next_text() is None
    splitter.receive(b"x")
    with pytest.raises(SessionError, match="size limit"):
        splitter.next_text()


def test_space_is_not_kept() -> None:
    splitter = TextSplitter()
    for _ in range(100):
        splitter.receive(b" " * 65536)
        assert splitter.next_text() is None
    splitter.receive(b"{}")
    assert splitter.next_text() == b"{}"


def test_text_as_deep_as_allowed_is_found() -> None:
    text = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    assert texts(text) == [text]


def test_text_too_deep_ends_the_session() -> None:
    with pytest.raises(SessionError, match="nesting"):
        texts(b"[" * (DEPTH_MAX + 1))


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_noise_is_cut_and_never_fails_otherwise(pieces) -> None:
    texts(*pieces)
