"""From an errno to an error on the wire."""

from __future__ import annotations

import errno

import pytest

from nbdfleece.nbd.constants import CommandFlag, Error
from nbdfleece.nbd.errors import error_from_errno


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, Error.EPERM),
        (errno.EROFS, Error.EPERM),
        (errno.EACCES, Error.EPERM),
        (errno.ENOSPC, Error.ENOSPC),
        (errno.EDQUOT, Error.ENOSPC),
        (errno.EFBIG, Error.ENOSPC),
        (errno.EIO, Error.EIO),
        (errno.ENXIO, Error.EIO),
        (errno.ETIMEDOUT, Error.EIO),
        (errno.ENOMEM, Error.ENOMEM),
        (errno.EINVAL, Error.EINVAL),
        (errno.ESHUTDOWN, Error.ESHUTDOWN),
        (None, Error.EIO),
        (99999, Error.EIO),
    ],
)
def test_errno_becomes_what_the_specification_says(number: int | None, expected: Error) -> None:
    """164, 166: "EDQUOT and EFBIG to NBD_ENOSPC"."""
    assert error_from_errno(number) is expected


def test_every_errno_becomes_an_error_of_the_protocol() -> None:
    """163: and none of them success."""
    for number in errno.errorcode:
        for flags in range(64):
            assert error_from_errno(number, flags) in Error


def test_enotsup_is_for_fast_zero_alone() -> None:
    """149, 168."""
    for flags in range(64):
        expected = Error.ENOTSUP if flags & CommandFlag.FAST_ZERO else Error.EINVAL
        assert error_from_errno(errno.ENOTSUP, flags) is expected
        assert error_from_errno(errno.EOPNOTSUPP, flags) is expected


def test_eoverflow_is_for_df_alone() -> None:
    """167."""
    for flags in range(64):
        expected = Error.EOVERFLOW if flags & CommandFlag.DF else Error.EINVAL
        assert error_from_errno(errno.EOVERFLOW, flags) is expected
