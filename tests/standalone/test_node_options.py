"""File names and QEMU's node options are read into one form, and nothing is left unread."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import UsageError
from nbdfleece.standalone.node_options import (
    Options,
    parse_image_opts,
    parse_json_options,
    parse_name,
    parse_size,
    split_commas,
)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("disk.qcow2", {"file": {"filename": "disk.qcow2"}}),
        ("/a:b/disk", {"file": {"filename": "/a:b/disk"}}),
        ("./a:b", {"file": {"filename": "./a:b"}}),
        ("file:a,b", {"file": {"driver": "file", "filename": "a,b"}}),
        ("host_device:/dev/vg/lv", {"file": {"driver": "host_device", "filename": "/dev/vg/lv"}}),
        (
            'json:{"driver": "qcow2", "file.filename": "a", "file": null}',
            UsageError,
        ),
        (
            'json:{"driver":"raw","file":{"driver":"file","filename":"a"},"offset":512}',
            {"driver": "raw", "file": {"driver": "file", "filename": "a"}, "offset": 512},
        ),
        (
            'json:{"file.filename": "a", "backing.file.filename": "b"}',
            {"file": {"filename": "a"}, "backing": {"file": {"filename": "b"}}},
        ),
        ("nbd:localhost:10809", UsageError),
        ("nbd+unix:///x", UsageError),
        ("json:[1]", UsageError),
        ("json:{", UsageError),
        ('json:{"a":1,"a":2}', UsageError),
        ("json:" + "[" * 100000, UsageError),
    ],
)
def test_name_is_read_into_options(name: str, values: Any) -> None:
    if values is UsageError:
        with pytest.raises(UsageError):
            parse_name(name)
    else:
        assert parse_name(name).values == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("driver=raw,file.filename=a,,b", {"driver": "raw", "file": {"filename": "a,b"}}),
        ("a=b=c", {"a": "b=c"}),
        ("file=", {"file": ""}),
        ("driver", UsageError),
        ("driver=raw,", UsageError),
        ("a=1,a=2", UsageError),
        ("a=1,a.b=2", UsageError),
        ("a.b=2,a=1", UsageError),
    ],
)
def test_image_opts_are_read_into_options(text: str, values: Any) -> None:
    if values is UsageError:
        with pytest.raises(UsageError):
            parse_image_opts(text)
    else:
        assert parse_image_opts(text).values == values


@given(st.lists(st.text(alphabet="ab,=", min_size=1), min_size=1))
def test_commas_in_values_survive_being_doubled(parts: list[str]) -> None:
    parts = [part.strip(",") or "x" for part in parts]  # a comma at the edge of a part is lost
    assert split_commas(",".join(part.replace(",", ",,") for part in parts)) == parts


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("1k", 1024), ("3M", 3 << 20), ("7E", 7 << 60)]
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "-1", "1.5k", "8E", "1x", "0x10", "\u0661"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="to be a size"):
        parse_size(text, "x")


def test_value_of_a_wrong_kind_is_refused_by_name() -> None:
    options = parse_json_options('{"a": 1, "b": "maybe", "c": -1, "d": "x", "e": [1], "f": true}')
    options.where = "file."
    takes = {
        "a": options.take_text,
        "b": options.take_switch,
        "c": options.take_size,
        "d": options.take_child,
        "e": options.take_text,
        "f": options.take_size,
    }
    for name, take in takes.items():
        with pytest.raises(UsageError, match=rf"'file\.{name}'"):
            take(name)


def test_choice_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="one of on, off"):
        Options({"a": "maybe"}).take_text("a", "on", "off")


def test_what_is_not_taken_is_refused_by_name() -> None:
    options = parse_image_opts("driver=raw,file.filename=x,file.zz=1")
    options.take_text("driver")
    child = options.take_child("file")
    options.finish("raw")
    assert child is not None
    child.take_text("filename")
    with pytest.raises(UsageError, match=r"driver 'file' does not support the option 'file\.zz'"):
        child.finish("file")
