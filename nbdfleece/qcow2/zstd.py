"""The module that inflates zstd, where there is one.

Distributions' own Pythons have no package of backports.zstd; there an image that is compressed
with zstd is refused when it is opened (:func:`.checks.check_supported`), and all others work.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

__all__ = ["HAS_ZSTD", "zstd"]

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    HAS_ZSTD = True
except ImportError:
    HAS_ZSTD = False
    zstd = SimpleNamespace(ZstdError=ValueError)  # type: ignore[assignment]
