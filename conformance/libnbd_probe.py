"""Ask a server everything that libnbd's Python binding can ask, and print it as JSON.

Run by the cases as a program of its own, because libnbd's calls have no time limits, and so
that a Debian tree's newer libnbd can be the one that asks. Uses nothing but libnbd.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import nbd

MIB = 1 << 20
AREA = 8 * MIB
SPANS = ((0, 1), (0, 2 * MIB), (3 * MIB, 4 * MIB), (1000, 70000))
CAPABILITIES = (
    "can_cache",
    "can_df",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_zero",
    "is_read_only",
    "is_rotational",
)


def connected(uri: str) -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.set_full_info(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    return handle


def facts(handle: nbd.NBD) -> dict[str, Any]:
    return {
        "version": handle.get_version(),
        "size": handle.get_size(),
        "protocol": handle.get_protocol(),
        "structured": handle.get_structured_replies_negotiated(),
        "extended": bool(
            hasattr(handle, "get_extended_headers_negotiated")
            and handle.get_extended_headers_negotiated()
        ),
        "tls": handle.get_tls_negotiated(),
        "allocation": handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION),
        "capabilities": [name for name in CAPABILITIES if getattr(handle, name)()],
    }


def read_digests(handle: nbd.NBD) -> list[list[Any]]:
    """[offset, length, sha256 by pread, sha256 by pread_structured, chunks] of each span."""
    found: list[list[Any]] = []
    for offset, length in SPANS:
        structured, chunks = read_structured(handle, offset, length)
        digests = [digest(handle.pread(length, offset)), digest(structured)]
        found.append([offset, length, *digests, chunks])
    return found


def read_structured(handle: nbd.NBD, offset: int, length: int) -> tuple[bytearray, int]:
    """The bytes that the chunks of one READ make up, and the number of chunks."""
    parts = bytearray(length)
    kinds: list[int] = []

    def chunk(data: bytes, at: int, kind: int, _: Any) -> int:
        kinds.append(kind)
        parts[at - offset : at - offset + len(data)] = data
        return 0

    handle.pread_structured(length, offset, chunk)
    return parts, len(kinds)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def extents(handle: nbd.NBD) -> list[int]:
    found: list[int] = []

    def got(context: str, offset: int, entries: list[int], error: Any) -> int:
        found.extend(entries)
        return 0

    handle.block_status(64 * MIB, 0, got)
    return found


def pipelined(handle: nbd.NBD) -> int:
    """How many of 64 asynchronous reads succeeded."""
    buffers = [nbd.Buffer(65536) for _ in range(64)]
    cookies = [handle.aio_pread(buffer, n * 32768) for n, buffer in enumerate(buffers)]
    for _ in range(10_000):
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]
        if not cookies:
            break
        handle.poll(100)
    return len(buffers) - len(cookies)


def past_the_end(handle: nbd.NBD) -> str:
    """The error of a READ past the end, which libnbd would refuse to send by itself."""
    handle.set_strict_mode(0)
    try:
        handle.pread(512, handle.get_size())
    except nbd.Error as error:
        return error.errno or "unknown"
    return "none"


def writes(handle: nbd.NBD) -> dict[str, bool]:
    """Whether each way of writing reads back right."""
    handle.pwrite(b"w" * 65536, AREA)
    made = {"pwrite": handle.pread(65536, AREA) == b"w" * 65536}
    if handle.can_zero():
        handle.zero(4096, AREA)
        made["zero"] = handle.pread(8192, AREA) == bytes(4096) + b"w" * 4096
    if handle.can_trim():
        handle.trim(4096, AREA + 8192)
        made["trim"] = handle.pread(4096, AREA + 12288) == b"w" * 4096
    if handle.can_fua():
        handle.pwrite(b"f" * 512, AREA, nbd.CMD_FLAG_FUA)
        made["fua"] = handle.pread(512, AREA) == b"f" * 512
    if handle.can_flush():
        handle.flush()
    return made


def main(uri: str, write: bool) -> None:
    handle = connected(uri)
    found = facts(handle)
    found["reads"] = read_digests(handle)
    found["extents"] = extents(handle) if found["allocation"] else []
    found["pipelined"] = pipelined(handle)
    if write:
        found["writes"] = writes(handle)
    found["past_the_end"] = past_the_end(handle)
    handle.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["write"])
