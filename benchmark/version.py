"""Which nbdfleece was measured: results of different ones do not belong into one table."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nbdfleece import __version__

PACKAGE = Path(__file__).parent.parent / "nbdfleece"


class OtherRun(Exception):
    """Results that are to be gone on with are of another nbdfleece or of other options."""


def ours(package: Path = PACKAGE) -> str:
    """The version, and a hash of the source: what is measured may not be committed yet."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:10]}"


def check_same(folder: Path, what: str, found: object, wanted: object) -> None:
    """Refuse to go on with results that were made otherwise.

    Raises:
        OtherRun: They were.
    """
    if found != wanted:
        raise OtherRun(
            f"{folder} cannot be gone on with: its {what} is {found}, now it is {wanted};"
            " measure into an empty folder"
        )
