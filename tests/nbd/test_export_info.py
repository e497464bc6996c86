"""What an export may claim. Numbers are those of the conformance requirements."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.nbd.constants import TransmissionFlag
from nbdfleece.nbd.export_info import ExportInfo


@pytest.mark.parametrize(
    "values",
    [
        {"name": "a\0"},
        {"name": "x" * 4097},
        {"description": "x" * 4097},
        {"contexts": ["base:\0"]},
        {"contexts": ["allocation"]},
        {"contexts": [":allocation"]},
        {"contexts": ["base:"]},
        {"contexts": ["qemu:dirty-bitmap:"]},
        {"contexts": ["base:allocation", "base:allocation"]},
        {"size": -1},
        {"size": 1 << 63},
        {"minimum_block_size": 0},
        {"minimum_block_size": 3},
        {"minimum_block_size": 131072},
        {"preferred_block_size": 256},
        {"preferred_block_size": 5000},
        {"preferred_block_size": 512, "minimum_block_size": 4096},
        {"preferred_block_size": 1 << 32, "maximum_payload": (1 << 32) - 1},
        {"maximum_payload": 65535},
        {"maximum_payload": 65536, "preferred_block_size": 131072},
        {"maximum_payload": 1 << 32},
    ],
)
def test_export_that_cannot_be_served_is_refused(values: dict[str, Any]) -> None:
    """1, 44, 61, 93, 94, 95; CVE-2017-2630: sizes stay below 2^63."""
    with pytest.raises(UsageError):
        ExportInfo(**{"name": "disk", "size": 1, **values})


@pytest.mark.parametrize("size", [0, 1, 511, 513, (1 << 63) - 1])
def test_any_size_can_be_served(size: int) -> None:
    assert ExportInfo(name="disk", size=size).size == size


CAPABILITIES = [
    "read_only",
    "rotational",
    "can_multi_conn",
    "can_trim",
    "can_write_zeroes",
    "can_fast_zero",
    "can_cache",
]


@pytest.mark.parametrize("on", list(product([False, True], repeat=len(CAPABILITIES))))
def test_transmission_flags_never_promise_too_much(on: tuple[bool, ...]) -> None:
    """66, 67, 70, 71."""
    given = dict(zip(CAPABILITIES, on, strict=True))
    export = ExportInfo(name="disk", size=1, **given)
    flags = export.transmission_flags(
        structured_replies=False, extended_headers=False, contexts_selected=True
    )
    zeroes = given["can_write_zeroes"] and not given["read_only"]
    expected = {
        TransmissionFlag.HAS_FLAGS: True,
        TransmissionFlag.SEND_FLUSH: True,
        TransmissionFlag.SEND_FUA: True,
        TransmissionFlag.READ_ONLY: given["read_only"],
        TransmissionFlag.ROTATIONAL: given["rotational"],
        TransmissionFlag.CAN_MULTI_CONN: given["can_multi_conn"],
        TransmissionFlag.SEND_TRIM: given["can_trim"],
        TransmissionFlag.SEND_CACHE: given["can_cache"],
        TransmissionFlag.SEND_WRITE_ZEROES: zeroes,
        TransmissionFlag.SEND_FAST_ZERO: zeroes and given["can_fast_zero"],
        TransmissionFlag.SEND_DF: False,
        TransmissionFlag.SEND_RESIZE: False,
        TransmissionFlag.BLOCK_STATUS_PAYLOAD: False,
    }
    assert {flag: bool(flags & flag) for flag in TransmissionFlag} == expected
