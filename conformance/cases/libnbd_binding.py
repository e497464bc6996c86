"""The same server through libnbd, an independent client, by its Python binding."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from conformance import libnbd_probe
from conformance.case import TCP, TLS_FORCED, WRITABLE, Server, requirement
from conformance.errors import Failed, NotApplicable, expect, require
from conformance.wire import Flag

PROBE_SECONDS = 120


def probe(server: Server) -> dict[str, Any]:
    """What :mod:`conformance.libnbd_probe` finds; once per running server."""
    if "libnbd" not in server.memo:
        server.memo["libnbd"] = _run(server)
    found: dict[str, Any] = server.memo["libnbd"]
    return found


def _run(server: Server) -> dict[str, Any]:
    script = Path(libnbd_probe.__file__).read_text()
    argv = [*server.python, "-", server.uri()] + ["write"] * server.export.writable
    try:
        result = subprocess.run(
            argv, input=script, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"libnbd waited for more than {PROBE_SECONDS} s") from error
    if "No module named 'nbd'" in result.stderr:
        raise NotApplicable("libnbd's Python binding (python3-libnbd) is not installed")
    expect(not result.returncode, result.stderr.strip().rpartition("\n")[2])
    made: dict[str, Any] = json.loads(result.stdout)
    return made


@requirement(171)
def libnbd_connects_with_all_it_knows(server: Server) -> str:
    """libnbd agrees on the best that both speak, and sees the size that we see."""
    found = probe(server)
    with server.enter() as client:
        expect(found["size"] == client.export.size, f"{found['size']}, raw {client.export.size}")
    expect(found["protocol"] == "newstyle-fixed", found["protocol"])
    return (
        f"libnbd {found['version']}: structured {found['structured']}, "
        f"extended {found['extended']}, {', '.join(found['capabilities'])}"
    )


@requirement(171, on=TCP)
def libnbd_connects_over_tcp(server: Server) -> str:
    """The same over TCP."""
    return libnbd_connects_with_all_it_knows(server) or ""


@requirement(77, on=TLS_FORCED)
def libnbd_connects_over_tls(server: Server) -> str:
    """libnbd with GnuTLS against the server's TLS."""
    found = probe(server)
    expect(found["tls"], "TLS was not agreed")
    return f"libnbd {found['version']}"


@requirement(67)
def libnbd_sees_the_flags_that_we_see(server: Server) -> str:
    """libnbd's capabilities are the transmission flags."""
    found = probe(server)
    with server.enter() as client:
        wanted = {
            "is_read_only": Flag.READ_ONLY,
            "can_flush": Flag.SEND_FLUSH,
            "can_fua": Flag.SEND_FUA,
            "can_trim": Flag.SEND_TRIM,
            "can_zero": Flag.SEND_WRITE_ZEROES,
            "can_multi_conn": Flag.CAN_MULTI_CONN,
        }
        for name, flag in wanted.items():
            offered = bool(client.export.flags & flag)
            expect(offered == (name in found["capabilities"]), f"{name}: {found['capabilities']}")
    return ", ".join(found["capabilities"])


@requirement(133, 131)
def libnbd_reads_the_content(server: Server) -> str:
    """pread and pread_structured give what the disk holds."""
    disk = server.export.content
    require(disk, "the content is not known")
    assert disk is not None
    reads = probe(server)["reads"]
    for offset, length, plain, structured, _ in reads:
        wanted = hashlib.sha256(disk.read(offset, length)).hexdigest()
        expect(plain == wanted, f"pread {offset}+{length}")
        expect(structured == wanted, f"pread_structured {offset}+{length}")
    return f"{len(reads)} spans, chunks {[read[4] for read in reads]}"


@requirement(155)
def libnbd_maps_the_disk(server: Server) -> str:
    """block_status of base:allocation describes something of 64 MiB."""
    found = probe(server)
    require(found["allocation"], "no base:allocation")
    lengths = found["extents"][0::2]
    expect(lengths and all(lengths), f"{found['extents']}")
    return f"{len(lengths)} extents over {sum(lengths):#x}"


@requirement(101)
def libnbd_pipelines_64_reads(server: Server) -> None:
    """64 asynchronous reads all succeed."""
    expect(probe(server)["pipelined"] == 64, f"{probe(server)['pipelined']} of 64")


@requirement(165)
def libnbd_gets_einval_past_the_end(server: Server) -> None:
    """A READ past the end reaches libnbd's caller as EINVAL."""
    expect(probe(server)["past_the_end"] == "EINVAL", probe(server)["past_the_end"])


@requirement(138, 146, on=WRITABLE)
def libnbd_writes_and_reads_back(server: Server) -> str:
    """pwrite, zero, trim and FUA by libnbd read back right."""
    made = probe(server)["writes"]
    expect(all(made.values()), f"{made}")
    return ", ".join(made)
