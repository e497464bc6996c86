"""Parameters of the nbdkit plugin: what is meant, and what is refused and how."""

from __future__ import annotations

import os

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.nbdkit.image_parameters import ImageParameters, ParameterReader
from nbdfleece.qcow2.backing import BackingPolicy


def read(*words: str) -> ImageParameters:
    reader = ParameterReader()
    for word in words:
        reader.add(*word.split("=", 1))
    return reader.finish()


def test_image_is_made_absolute_because_nbdkit_changes_its_folder() -> None:
    assert read("image=a/disk.qcow2").image == os.path.join(os.getcwd(), "a/disk.qcow2")


def test_all_parameters_are_read() -> None:
    found = read("image=/x", "format=raw", "bitmap=b", "backing-files=any")
    assert found == ImageParameters(image="/x", format="raw", bitmap="b", policy=BackingPolicy.ANY)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "parameter 'image' is missing"),
        (["image="], "parameter 'image' has no value"),
        (["imgae=x"], "unknown parameter 'imgae': there are image, format"),
        (["image=x", "image=y"], "parameter 'image' is given twice"),
        (["image=x", "format=vmdk"], "parameter 'format' is one of qcow2, raw, not 'vmdk'"),
        (["image=x", "backing-files=x"], "parameter 'backing-files' is one of refuse, same-fol"),
        (["image=x", "bitmap=a", "checkpoint=b"], "bitmap and checkpoint exclude one another"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        read(*words)


@pytest.mark.parametrize("view", ["snapshot", "bitmap", "checkpoint"])
def test_view_of_something_else_than_the_disk_is_opened_for_reading(view: str) -> None:
    found = read("image=/x/disk", f"{view}=it")
    assert found.disk_options(read_only=False).read_only
    assert found.describe().startswith("disk: ")
    assert "'it'" in found.describe()
