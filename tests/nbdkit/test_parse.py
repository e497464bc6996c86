"""Values are read as nbdkit 1.42 reads them: the expectations are what it answered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdfleece.nbdkit.parse import parse_delay, parse_probability, parse_size, read_password


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1k", 1024),
        (" 5", 5),
        ("-0", 0),
        ("+3", 3),
        ("9223372036854775807", (1 << 63) - 1),
        ("1s", 512),
        ("2b", 2),
        ("3M", 3 << 20),
        ("1E", 1 << 60),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1KiB", "8E", "", "k", "1.5M", "-1", "9223372036854775808"])
def test_bad_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="could not parse size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "delay"),
    [
        ("1", (1, 0)),
        ("1.5", (1, 500000000)),
        ("2ms", (0, 2000000)),
        ("3us", (0, 3000)),
        ("4ns", (0, 4)),
        ("1.5s", (1, 500000000)),
        ("0.1", (0, 100000000)),
        ("1e3", (1000, 0)),
        (" 1", (1, 0)),
        ("0x10", (16, 0)),
    ],
)
def test_delay_is_read(text: str, delay: tuple[int, int]) -> None:
    assert parse_delay("wait", text) == delay


@pytest.mark.parametrize(
    "text", ["5m", "6h", "", "x", "-1", "inf", "nan", "5sec", "2msec", "100000000000"]
)
def test_bad_delay_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^wait: "):
        parse_delay("wait", text)


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("0.5", 0.5),
        ("50%", 0.5),
        ("1:10", 0.1),
        ("1.5", 1.5),
        ("150%", 1.5),
        ("0", 0.0),
        ("1/4", 0.25),
        ("3:1", 3.0),
        ("1e-3", 0.001),
        ("0x1p-2", 0.25),
        ("  0.5", 0.5),
    ],
)
def test_probability_is_read(text: str, probability: float) -> None:
    assert parse_probability("chance", text) == pytest.approx(probability)


@pytest.mark.parametrize("text", ["", "x", "-1", "1:0", "1:3x", "nan", "inf", "0.5 "])
def test_bad_probability_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^chance: "):
        parse_probability("chance", text)


def test_password_is_literal_or_in_a_file_or_behind_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"secret\nmore\n")
    assert read_password("literal", stdin_is_free=False) == b"literal"
    assert read_password("", stdin_is_free=False) == b""
    assert read_password(f"+{path}", stdin_is_free=False) == b"secret"
    fd = os.open(path, os.O_RDONLY)
    assert read_password(f"-{fd}", stdin_is_free=False) == b"secret"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("-", "stdin is not available"),
        ("-1", "stdin/stdout/stderr"),
        ("-x", "could not parse number"),
        ("-987", "Bad file descriptor"),
        ("+/nowhere", "No such file"),
    ],
)
def test_password_that_cannot_be_read_says_why(value: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_password(value, stdin_is_free=False)
