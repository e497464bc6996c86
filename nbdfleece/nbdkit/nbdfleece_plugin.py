"""The script that a real nbdkit loads: ``nbdkit python .../nbdfleece_plugin.py image=FILE``.

nbdkit runs the Python that it was built with. This file finds nbdfleece, and what that needs,
beside itself: in the ``site-packages`` that it was installed to, or in the ``.venv`` of its
source tree. docs/nbdkit-inside.md has the parameters.
"""

from __future__ import annotations

import errno
import site
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

_root = Path(__file__).resolve().parents[2]
_version = f"python{sys.version_info.major}.{sys.version_info.minor}"
for _folder in (_root, _root / ".venv" / "lib" / _version / "site-packages"):
    if _folder.is_dir() and str(_folder) not in sys.path:
        site.addsitedir(str(_folder))

import nbdkit  # noqa: E402

try:
    from nbdfleece import __version__
    from nbdfleece.nbdkit import image_plugin
    from nbdfleece.nbdkit.image_plugin import Handle, ImagePlugin
except ImportError as _error:
    raise SystemExit(
        f"nbdfleece cannot be imported by nbdkit's Python {sys.version.split()[0]}: {_error};"
        f" install it for {_version}, or name its site-packages in PYTHONPATH"
    ) from None

API_VERSION = 2
T = TypeVar("T")

_plugin = ImagePlugin()
image_plugin.log_without_tracebacks()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Have work done; the client gets the error number that the disk gave."""
    try:
        return _plugin.run(work)
    except OSError as error:
        nbdkit.set_error(error.errno or errno.EIO)
        raise


def dump_plugin() -> None:
    """Print what ``--dump-plugin`` adds; flushed, because nbdkit leaves without Python's exit."""
    print(f"nbdfleece_version={__version__}", flush=True)


def config(key: str, value: str) -> None:
    """Take a parameter."""
    _plugin.reader.add(key, value)


def config_complete() -> None:
    """See whether the parameters can be meant together."""
    _ = _plugin.parameters


def thread_model() -> int:
    """Many requests at a time: the event loop keeps them apart."""
    return nbdkit.THREAD_MODEL_PARALLEL


def get_ready() -> None:
    """See whether the image can be opened, while errors are still seen."""
    _plugin.rehearse()


def after_fork() -> None:
    """Begin the thread."""
    _plugin.start()


def cleanup() -> None:
    """Close the image."""
    _plugin.stop()


def open(readonly: bool) -> Handle:
    """Let a client in."""
    return _plugin.open(readonly)


def export_description(h: Handle) -> str:
    """What is shown."""
    return _plugin.parameters.describe()


def get_size(h: Handle) -> int:
    """Bytes of the disk."""
    return h.node.size


def block_size(h: Handle) -> tuple[int, int, int]:
    """Any request will do; whole clusters are best."""
    return 1, max(512, h.node.preferred_block_size), image_plugin.BLOCK_SIZE_MAX


def can_write(h: Handle) -> bool:
    """Whether this client may write."""
    return h.can_write


def can_multi_conn(h: Handle) -> bool:
    """All clients share one node, and a flush covers all that was written to it."""
    return True


def can_fast_zero(h: Handle) -> bool:
    """The node says at once if zeroes would be slow."""
    return True


def can_fua(h: Handle) -> int:
    """A write with FUA is flushed here."""
    return nbdkit.FUA_NATIVE


def can_cache(h: Handle) -> int:
    """The node knows what to read ahead."""
    return nbdkit.CACHE_NATIVE


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Read."""
    _run(h.node.read_into(offset, buf))


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Write."""
    _run(image_plugin.write(h.node, offset, buf, fua=bool(flags & nbdkit.FLAG_FUA)))


def flush(h: Handle, flags: int) -> None:
    """Make what was written durable."""
    _run(h.node.flush())


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Discard."""
    _run(image_plugin.trim(h.node, offset, count, fua=bool(flags & nbdkit.FLAG_FUA)))


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Write zeroes."""
    _run(
        image_plugin.write_zeroes(
            h.node,
            offset,
            count,
            unmap=bool(flags & nbdkit.FLAG_MAY_TRIM),
            fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
            fua=bool(flags & nbdkit.FLAG_FUA),
        )
    )


def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    """Read ahead."""
    _run(h.node.cache(offset, count))


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Say where holes and zeroes are."""
    only_one = bool(flags & nbdkit.FLAG_REQ_ONE)
    return _run(image_plugin.describe(h.node, offset, count, only_one=only_one))
