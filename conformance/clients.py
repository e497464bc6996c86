"""Foreign clients against a server: what users run, with its results checked.

Each check runs a real program (nbdinfo, nbdcopy, nbddump, qemu-img, qemu-io, qemu-nbd -L, fio,
nbd-client) against the server, and compares what it gives with what the suite's own client
reads. Outcomes have the form of cases' outcomes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.case import READ_ONLY, TCP, TLS_FORCED, WRITABLE, Server
from conformance.content import BLOCK, HOLE, KIB, MIB, ZEROES
from conformance.errors import Finding, NotApplicable, expect, require
from conformance.runner import FAIL, NOT_APPLICABLE, PASS, Outcome
from conformance.servers import Adapter, Place, StartError, Unsupported
from conformance.wire import Flag

CLIENT_SECONDS = 180.0
STEP = 16 * MIB


@dataclass
class Site:
    """A running server and the programs to run against it."""

    place: Place
    server: Server
    _seen: dict[str, Any] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return self.server.uri()

    @property
    def name(self) -> str:
        return self.server.export.name

    def run(self, *words: str, status: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; another exit status than ``status`` is a failure."""
        require(self.place.programs.has(words[0]), f"{words[0]} is not installed")
        try:
            result = subprocess.run(
                self.place.programs.argv(*words),
                cwd=self.place.folder,
                capture_output=True,
                text=True,
                timeout=CLIENT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise Finding(f"{words[0]} ran for more than {CLIENT_SECONDS} s") from error
        said = " ".join(result.stderr.split())[-300:]
        expect(result.returncode in status, f"{words[0]}: status {result.returncode}: {said}")
        return result

    def facts(self) -> tuple[int, Flag]:
        """Size and transmission flags with structured replies, as the suite's client sees them."""
        with self.server.haggle() as client:
            client.agree_structured()
            client.go(self.name)
            return client.export.size, client.export.flags

    def contexts(self) -> set[str]:
        with self.server.haggle() as client:
            return set(client.list_contexts(self.name).names)

    def content(self) -> bytes:
        """All bytes of the export, as the suite's client reads them now."""
        with self.server.enter() as client:
            size = client.export.size
            require(size <= 1 << 30, "the export is too large to read it all")
            parts = [client.read(at, min(STEP, size - at)) for at in range(0, size, STEP)]
        return b"".join(parts)

    def digest(self) -> str:
        """Of the content; kept for a read-only export."""
        if "digest" not in self._seen or self.server.export.writable:
            self._seen["digest"] = hashlib.sha256(self.content()).hexdigest()
        found: str = self._seen["digest"]
        return found

    def same(self, path: Path) -> str:
        """The file's bytes are the export's."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.unlink()
        expect(digest == self.digest(), "content differs")
        return f"sha256 {digest[:16]}"

    def qemu_options(self, *more: str) -> str:
        """The export for ``--image-opts``."""
        endpoint = self.server.endpoint
        if endpoint.path:
            address = ["server.type=unix", f"server.path={endpoint.path}"]
        else:
            address = [
                "server.type=inet",
                f"server.host={endpoint.host}",
                f"server.port={endpoint.port}",
            ]
        return ",".join(["driver=nbd", *address, f"export={self.name}", *more])


Check = Callable[[Site], str]


@dataclass(frozen=True)
class ClientCase:
    run: Check
    name: str
    configuration: str


CLIENT_CASES: list[ClientCase] = []


def client(name: str, on: str = READ_ONLY) -> Callable[[Check], Check]:
    """Register a check under the command line's gist."""

    def register(run: Check) -> Check:
        CLIENT_CASES.append(ClientCase(run, name, on))
        return run

    return register


def run_clients(adapter: Adapter, words: Iterable[str] = ()) -> Iterator[Outcome]:
    """Run the checks whose names have one of ``words`` against each configuration."""
    asked = list(words)
    for configuration in (READ_ONLY, TCP, WRITABLE, TLS_FORCED):
        wanted = [
            case
            for case in CLIENT_CASES
            if case.configuration == configuration
            and (not asked or any(word in case.name for word in asked))
        ]
        if wanted:
            yield from _run_configuration(adapter, configuration, wanted)


def _run_configuration(
    adapter: Adapter, configuration: str, cases: list[ClientCase]
) -> Iterator[Outcome]:
    try:
        running = adapter.start(configuration)
    except (Unsupported, StartError) as error:
        kind = NOT_APPLICABLE if isinstance(error, Unsupported) else FAIL
        yield from (_outcome(case, kind, str(error), 0.0) for case in cases)
        return
    try:
        yield from run_site(Site(adapter.place, running.server), cases)
    finally:
        running.stop()


def run_site(site: Site, cases: list[ClientCase]) -> Iterator[Outcome]:
    for case in cases:
        started = time.monotonic()
        try:
            made = PASS, case.run(site)
        except NotApplicable as reason:
            made = NOT_APPLICABLE, str(reason)
        except Finding as finding:
            made = FAIL, str(finding)
        yield _outcome(case, *made, time.monotonic() - started)


def _outcome(case: ClientCase, outcome: str, evidence: str, seconds: float) -> Outcome:
    return Outcome(
        case.name,
        (),
        "client",
        "M",
        case.configuration,
        outcome,
        " ".join(evidence.split())[:600],
        round(seconds, 3),
    )


# --- nbdinfo


@client("nbdinfo")
def nbdinfo_plain(site: Site) -> str:
    """The size and the export's name are shown."""
    shown = site.run("nbdinfo", site.uri).stdout
    expect(f"export-size: {site.facts()[0]}" in shown, shown[:300])
    return shown.partition("\n")[0]


@client("nbdinfo --size")
def nbdinfo_size(site: Site) -> str:
    """The size alone."""
    shown = site.run("nbdinfo", "--size", site.uri).stdout.strip()
    expect(shown == str(site.facts()[0]), shown)
    return shown


@client("nbdinfo --list")
def nbdinfo_list(site: Site) -> str:
    """The list of exports has the export."""
    shown = site.run("nbdinfo", "--list", site.uri).stdout
    expect(f'export="{site.name}"' in shown, shown[:300])
    return shown.partition("\n")[0]


@client("nbdinfo --json")
def nbdinfo_json(site: Site) -> str:
    """JSON with the size and the contexts."""
    (export,) = json.loads(site.run("nbdinfo", "--json", site.uri).stdout)["exports"]
    expect(export["export-size"] == site.facts()[0], f"{export['export-size']}")
    contexts = set(export.get("contexts", []))
    expect(contexts == site.contexts() or not contexts, f"{contexts}")
    return f"{export['export-size']} bytes, {len(contexts)} contexts"


_CAN = {
    "cache": Flag.SEND_CACHE,
    "df": Flag.SEND_DF,
    "fast-zero": Flag.SEND_FAST_ZERO,
    "flush": Flag.SEND_FLUSH,
    "fua": Flag.SEND_FUA,
    "multi-conn": Flag.CAN_MULTI_CONN,
    "trim": Flag.SEND_TRIM,
    "zero": Flag.SEND_WRITE_ZEROES,
}


def _can(site: Site) -> str:
    flags = site.facts()[1]
    asked = [("--can", word, bool(flags & flag)) for word, flag in _CAN.items()]
    asked.append(("--is", "read-only", bool(flags & Flag.READ_ONLY)))
    for option, word, offered in asked:
        status = site.run("nbdinfo", option, word, site.uri, status=(0, 2)).returncode
        expect((status == 0) == offered, f"{option} {word}: status {status}, flags {flags!r}")
    return f"{len(asked)} capabilities"


@client("nbdinfo --can, --is")
def nbdinfo_can(site: Site) -> str:
    """The capabilities are the transmission flags."""
    return _can(site)


@client("nbdinfo --can, --is, writable", on=WRITABLE)
def nbdinfo_can_when_writable(site: Site) -> str:
    """The same of a writable export."""
    return _can(site)


def _map(site: Site, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(site.run("nbdinfo", *words, "--json", site.uri).stdout)
    return found


@client("nbdinfo --map")
def nbdinfo_map(site: Site) -> str:
    """The map covers the export, and what it calls zero is zero."""
    require("base:allocation" in site.contexts(), "no base:allocation")
    extents, content = _map(site, "--map"), site.content()
    expect(sum(extent["length"] for extent in extents) == len(content), "does not cover")
    for extent in extents:
        if extent["type"] & 2:
            part = content[extent["offset"] : extent["offset"] + extent["length"]]
            expect(not any(part), f"not zero: {extent}")
    return f"{len(extents)} extents"


@client("nbdinfo --map --totals")
def nbdinfo_totals(site: Site) -> str:
    """The totals add up to the size."""
    require("base:allocation" in site.contexts(), "no base:allocation")
    totals = _map(site, "--map", "--totals")
    expect(sum(total["size"] for total in totals) == site.facts()[0], f"{totals}")
    return ", ".join(f"{total['description']} {total['size']}" for total in totals)


@client("nbdinfo --map=qemu:dirty-bitmap:NAME")
def nbdinfo_bitmap(site: Site) -> str:
    """The map of each dirty bitmap is what is known to be dirty."""
    require(site.server.export.dirty, "no dirty bitmaps")
    for name, dirty in site.server.export.dirty.items():
        extents = _map(site, f"--map=qemu:dirty-bitmap:{name}")
        got = [(e["offset"], e["offset"] + e["length"]) for e in extents if e["type"] & 1]
        expect(got == list(dirty), f"{name}: {got}")
    return f"{len(site.server.export.dirty)} bitmaps"


@client("nbddump")
def nbddump(site: Site) -> str:
    """A dump of the first bytes."""
    words = ("nbddump", "--length", "64", site.uri)
    shown = site.run(*words).stdout
    expect(site.content()[:8].hex(" ") in shown, shown[:200])
    return shown.partition("\n")[0]


# --- nbdcopy


def _copy(site: Site, *options: str) -> str:
    target = site.place.path(".copy")
    site.run("nbdcopy", *options, site.uri, str(target))
    return site.same(target)


@client("nbdcopy URI FILE")
def nbdcopy_to_file(site: Site) -> str:
    """The copy is the export."""
    return _copy(site)


@client("nbdcopy --connections=8 --requests=16")
def nbdcopy_parallel(site: Site) -> str:
    """The same with eight connections."""
    return _copy(site, "--connections=8", "--requests=16", "--request-size=262144")


@client("nbdcopy --synchronous")
def nbdcopy_synchronous(site: Site) -> str:
    """The same, one request at a time."""
    return _copy(site, "--synchronous")


@client("nbdcopy --no-extents")
def nbdcopy_without_extents(site: Site) -> str:
    """The same without the map."""
    return _copy(site, "--no-extents")


@client("nbdcopy URI null:")
def nbdcopy_to_nowhere(site: Site) -> str:
    """Reading all and keeping nothing ends well."""
    site.run("nbdcopy", site.uri, "null:")
    site.run("nbdcopy", "--no-extents", site.uri, "null:")
    return "ended"


@client("nbdcopy URI FILE over TCP", on=TCP)
def nbdcopy_over_tcp(site: Site) -> str:
    """The same over TCP."""
    return _copy(site)


@client("nbdcopy nbds URI", on=TLS_FORCED)
def nbdcopy_over_tls(site: Site) -> str:
    """The same over TLS."""
    return _copy(site)


@client("nbdinfo nbds URI", on=TLS_FORCED)
def nbdinfo_over_tls(site: Site) -> str:
    """TLS is shown."""
    shown = site.run("nbdinfo", site.uri).stdout
    expect("with TLS" in shown, shown[:200])
    return shown.partition("\n")[0]


# --- qemu


@client("qemu-img info")
def qemu_img_info(site: Site) -> str:
    """The virtual size."""
    shown = site.run("qemu-img", "info", "--output=json", "--image-opts", site.qemu_options())
    size = json.loads(shown.stdout)["virtual-size"]
    expect(size == site.facts()[0], f"{size}")
    return f"{size} bytes"


def _qemu_map(site: Site, *more: str) -> list[dict[str, Any]]:
    words = ("qemu-img", "map", "--output=json", "--image-opts", site.qemu_options(*more))
    found: list[dict[str, Any]] = json.loads(site.run(*words).stdout)
    return found


@client("qemu-img map")
def qemu_img_map(site: Site) -> str:
    """The map covers the export, and what it calls zero is zero."""
    extents, content = _qemu_map(site), site.content()
    expect(sum(extent["length"] for extent in extents) == len(content), "does not cover")
    for extent in extents:
        part = content[extent["start"] : extent["start"] + extent["length"]]
        expect(not extent["zero"] or not any(part), f"not zero: {extent}")
    return f"{len(extents)} extents"


@client("qemu-img map with x-dirty-bitmap")
def qemu_img_map_of_bitmap(site: Site) -> str:
    """QEMU's way to show a bitmap: what is dirty is not present."""
    require(site.server.export.dirty, "no dirty bitmaps")
    for name, dirty in site.server.export.dirty.items():
        extents = _qemu_map(site, f"x-dirty-bitmap=qemu:dirty-bitmap:{name}")
        got = [(e["start"], e["start"] + e["length"]) for e in extents if not e["data"]]
        expect(got == list(dirty), f"{name}: {got}")
    return f"{len(site.server.export.dirty)} bitmaps"


@client("qemu-img compare")
def qemu_img_compare(site: Site) -> str:
    """The export is what a raw file of its content is."""
    path = site.place.path(".raw")
    path.write_bytes(site.content())
    shown = site.run("qemu-img", "compare", "-f", "raw", "-F", "raw", site.uri, str(path))
    path.unlink()
    expect("identical" in shown.stdout, shown.stdout)
    return shown.stdout.strip()


def _convert(site: Site, source: list[str]) -> str:
    image, raw = site.place.path(".qcow2"), site.place.path(".raw")
    site.run("qemu-img", "convert", "-O", "qcow2", "-W", "-m", "16", *source, str(image))
    site.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    image.unlink()
    return site.same(raw)


@client("qemu-img convert -W -m 16 from the export")
def qemu_img_convert_from(site: Site) -> str:
    """A full backup into qcow2 is the export."""
    return _convert(site, ["-f", "raw", site.uri])


@client("qemu-img convert over TLS", on=TLS_FORCED)
def qemu_img_convert_over_tls(site: Site) -> str:
    """The same over TLS."""
    creds = f"tls-creds-x509,id=t0,endpoint=client,dir={site.server.certificates}"
    options = site.qemu_options("tls-creds=t0", "tls-hostname=localhost")
    return _convert(site, ["--object", creds, "--image-opts", options])


@client("qemu-img bench")
def qemu_img_bench(site: Site) -> str:
    """A thousand reads, sixteen at a time."""
    words = ("bench", "-c", "1000", "-d", "16", "-s", "65536", "-S", "65536", "-f", "raw")
    shown = site.run("qemu-img", *words, site.uri).stdout
    expect("Run completed" in shown, shown)
    return shown.strip().rpartition("\n")[2]


@client("qemu-io -r")
def qemu_io_reads(site: Site) -> str:
    """Zeroes and holes read as zero, and the map can be read."""
    commands = [f"read -P 0 {start} {end - start}" for start, end in (ZEROES, HOLE)]
    words = [word for line in [*commands, "map"] for word in ("-c", line)]
    shown = site.run("qemu-io", "-r", "-f", "raw", *words, site.uri).stdout
    expect("Pattern verification failed" not in shown, shown[:300])
    return shown.strip().rpartition("\n")[2]


@client("qemu-nbd -L")
def qemu_nbd_list(site: Site) -> str:
    """QEMU lists the export."""
    path = site.server.endpoint.path
    require(path, "not on a Unix socket")
    shown = site.run("qemu-nbd", "-L", "-k", path).stdout
    expect(f"export: '{site.name}'" in shown, shown[:300])
    return shown.partition("\n")[0]


@client("nbd-client -l", on=TCP)
def nbd_client_list(site: Site) -> str:
    """nbd-client lists the export."""
    endpoint = site.server.endpoint
    shown = site.run("nbd-client", "-l", endpoint.host, str(endpoint.port)).stdout
    lines = [line.strip() for line in shown.splitlines()]
    expect(any(line.partition(":")[0] == site.name for line in lines), shown[:300])
    return " ".join(shown.split())


# --- writing


def _blank(site: Site) -> None:
    with site.server.enter() as raw:
        size = raw.export.size
        for at in range(0, size, STEP):
            raw.write(at, b"\xee" * min(STEP, size - at))


def _restore(site: Site, *words: str, zeroed: bool = False) -> str:
    """Write the known disk to the export by a program, then compare all bytes."""
    disk = site.place.images.content
    if zeroed:
        with site.server.enter() as raw:
            for at in range(0, disk.size, STEP):
                raw.write(at, bytes(min(STEP, disk.size - at)))
    else:
        _blank(site)
    site.run(*words)
    expect(site.content() == disk.read(0, disk.size), "the restored disk differs")
    return "restored"


@client("qemu-img convert -n to the export", on=WRITABLE)
def qemu_img_convert_to(site: Site) -> str:
    """A restore from qcow2 over old content."""
    image = str(site.place.images.qcow2)
    return _restore(site, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", image, site.uri)


@client("qemu-img convert -n --target-is-zero -W", on=WRITABLE)
def qemu_img_convert_to_zeroed(site: Site) -> str:
    """A restore from qcow2 onto a disk of zeroes, out of order."""
    image = str(site.place.images.qcow2)
    words = ["convert", "-n", "--target-is-zero", "-W", "-f", "qcow2", "-O", "raw", image]
    return _restore(site, "qemu-img", *words, site.uri, zeroed=True)


@client("nbdcopy FILE URI", on=WRITABLE)
def nbdcopy_from_file(site: Site) -> str:
    """A restore from a raw file over old content."""
    return _restore(site, "nbdcopy", str(site.place.images.raw), site.uri)


@client("nbdcopy --destination-is-zero --flush", on=WRITABLE)
def nbdcopy_from_file_to_zeroed(site: Site) -> str:
    """A restore from a raw file onto a disk of zeroes, flushed."""
    words = ("nbdcopy", "--destination-is-zero", "--flush", str(site.place.images.raw), site.uri)
    return _restore(site, *words, zeroed=True)


@client("qemu-io writes", on=WRITABLE)
def qemu_io_writes(site: Site) -> str:
    """Write, zero with and without unmap, discard, flush and FUA: the bytes are right."""
    _blank(site)
    script = [
        "write -P 0x11 0 64k",
        "write -zu 1M 1M",
        "write -z -n 2M 64k",
        "discard 3M 1M",
        "flush",
        "write -f -P 0x22 5M 4k",
        "read -P 0x11 0 64k",
    ]
    if not site.facts()[1] & Flag.SEND_FAST_ZERO:
        script = [line for line in script if "-n" not in line]
    words = [word for line in script for word in ("-c", line)]
    shown = site.run("qemu-io", "-f", "raw", "-d", "unmap", *words, site.uri)
    expect("verification failed" not in shown.stdout, shown.stdout[:300])
    content = site.content()
    expect(content[: 64 * KIB] == b"\x11" * BLOCK, "written bytes")
    expect(not any(content[MIB : 2 * MIB]), "zeroed bytes")
    expect(content[4 * MIB : 5 * MIB] == b"\xee" * MIB, "bytes behind the discarded ones")
    expect(content[5 * MIB : 5 * MIB + 4096] == b"\x22" * 4096, "FUA bytes")
    return f"{len(script)} commands"


@client("fio --ioengine=nbd --verify", on=WRITABLE)
def fio_verify(site: Site) -> str:
    """Random writes of 4 to 64 KiB, sixteen deep, verified by checksums."""
    words = [
        "--name=v",
        "--ioengine=nbd",
        f"--uri={site.uri}",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--size=32m",
        "--iodepth=16",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--output-format=json",
    ]
    shown = site.run("fio", *words).stdout
    job = json.loads(shown[shown.index("{") :])["jobs"][0]
    expect(not job["error"], f"error {job['error']}")
    return f"{job['write']['total_ios']} writes, {job['read']['total_ios']} verified"
