from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.cli.sizes import SIZE_MAX, format_size, parse_age, parse_size
from nbdfleece.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("10", 10), ("7b", 7), ("3s", 1536), ("1k", 1024), ("2M", 2 << 20)]
    + [
        ("1G", 1 << 30),
        ("1t", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        (f"{SIZE_MAX}", SIZE_MAX),
    ],
)
def test_size_is_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "1.5G", "-1", "+1", " 1", "1 k", "1KiB", "1kk", "٣", "8E", "9" * 5000]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.text(max_size=8))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert 0 <= parse_size(text) <= SIZE_MAX


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "?"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB")]
    + [(SIZE_MAX, "8 EiB")],
)
def test_size_is_printed_for_people(size: int | None, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("word", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("0w", 0)]
)
def test_age_is_seconds(word: str, seconds: int) -> None:
    assert parse_age(word) == seconds


@pytest.mark.parametrize("word", ["", "7", "d", "-1d", "1.5h", "7 d", "1y"])
def test_no_age_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="no age"):
        parse_age(word)
