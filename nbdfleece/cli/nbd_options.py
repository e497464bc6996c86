"""From the flags of qemu-nbd to what is to be served."""

from __future__ import annotations

import logging
from typing import Final

from ..block.guest_options import DetectZeroes
from ..errors import UsageError
from ..nbd.constants import DEFAULT_PORT
from ..nbd.uri import TCP_PORT_MAX
from ..qcow2.backing import BackingPolicy
from ..server.limits import Limits
from ..standalone.disk import DiskOptions
from ..standalone.image_server import ServeOptions
from ..standalone.listing import list_exports
from ..standalone.node_options import parse_image_opts
from ..standalone.objects import Objects
from ..standalone.opening import SnapshotChoice
from .nbd_flags import Given

_CACHE_MODES: Final = ("writeback", "none", "writethrough", "directsync", "unsafe")
_DISCARD_MODES: Final = ("ignore", "off", "unmap", "on")
_NUMBER_MAX: Final = (1 << 31) - 1
_OFFSET_MAX: Final = (1 << 63) - 1
_PER_IMAGE: Final = (
    "export-name",
    "description",
    "offset",
    "format",
    "load-snapshot",
    "bitmap",
    "allocation-depth",
    "aio",
    "discard",
    "cache",
    "nocache",
)

_log = logging.getLogger("nbdfleece.cli")


def build_options(given: Given, policy: BackingPolicy) -> ServeOptions:
    """What is to be served, and to whom.

    Raises:
        UsageError: The flags cannot be meant together.
    """
    if len(given.names) != 1:
        raise UsageError("Invalid number of arguments: one image is to be served")
    _warn_of_ignored(given)
    shared = given.number("shared", _NUMBER_MAX)
    clients_max = 1 if shared is None else shared or None
    limits = Limits()
    handshake_seconds = given.number("handshake-limit", _NUMBER_MAX)
    objects = _objects(given)
    credentials, authorizer = given.last("tls-creds"), given.last("tls-authz")
    _check_tls(given)
    return ServeOptions(
        disk=_disk_options(given, policy),
        export=given.last("export-name") or "",
        description=given.last("description") or "",
        bitmaps=given.all("bitmap")[::-1],  # as qemu-nbd lists them
        allocation_depth=given.has("allocation-depth"),
        clients_max=clients_max,
        is_persistent=given.has("persistent"),
        limits=Limits(
            handshake_seconds=(
                limits.handshake_seconds if handshake_seconds is None else handshake_seconds
            ),
            connections_max=min(clients_max or limits.connections_max, limits.connections_max),
            excess_waits=True,
        ),
        tls=objects.tls(credentials, "server").server_settings() if credentials else None,
        authorizer=objects.authorizer(authorizer) if authorizer else None,
    )


def _disk_options(given: Given, policy: BackingPolicy) -> DiskOptions:
    given.once("cache", "nocache")
    given.once("aio")
    given.once("discard")
    if given.has("image-opts") and given.has("format"):
        raise UsageError("--image-opts and -f are mutually exclusive")
    if given.has("load-snapshot") and given.has("bitmap"):
        raise UsageError("--bitmap: bitmaps are the disk's, not those of --load-snapshot")
    discard = given.choice("discard", _DISCARD_MODES) in ("unmap", "on")
    detect_zeroes = DetectZeroes(given.choice("detect-zeroes", ("off", "on", "unmap")))
    if detect_zeroes is DetectZeroes.UNMAP and not discard:
        raise UsageError("--detect-zeroes=unmap is not allowed without --discard=unmap")
    return DiskOptions(
        name=given.names[0],
        is_options=given.has("image-opts"),
        format=given.last("format"),
        read_only=given.has("read-only", "load-snapshot"),
        offset=given.number("offset", _OFFSET_MAX) or 0,
        snapshot=_snapshot(given.last("load-snapshot")),
        is_temporary=given.has("snapshot"),
        discard=discard,
        detect_zeroes=detect_zeroes,
        writethrough=given.choice("cache", _CACHE_MODES) in ("writethrough", "directsync"),
        policy=policy,
    )


def _warn_of_ignored(given: Given) -> None:
    """Say once what is accepted and means nothing here."""
    cache = given.choice("cache", _CACHE_MODES)
    if given.has("nocache") or cache in ("none", "directsync"):
        _log.warning("O_DIRECT is not used: the page cache stays in use, flushes are done")
    if cache == "unsafe":
        _log.warning("--cache=unsafe is ignored: flushes are done all the same")
    if given.choice("aio", ("threads", "native", "io_uring")) != "threads":
        _log.warning("--aio is ignored: files are read by threads")
    if given.has("trace"):
        _log.warning("--trace is ignored: QEMU's tracing is not here; -v logs what happens")


def _snapshot(text: str | None) -> SnapshotChoice | None:
    """Read ``ID_OR_NAME`` or ``snapshot.id=ID,snapshot.name=NAME``."""
    if text is None:
        return None
    if not text.startswith("snapshot."):
        return SnapshotChoice(either=text)
    options = parse_image_opts(text).take_child("snapshot")
    assert options is not None, "the text begins with 'snapshot.'"
    choice = SnapshotChoice(snapshot_id=options.take_text("id"), name=options.take_text("name"))
    options.finish("load-snapshot")
    return choice


def _objects(given: Given) -> Objects:
    objects = Objects()
    for text in given.all("object"):
        objects.add(text)
    return objects


def _check_tls(given: Given) -> None:
    for flag in ("tls-authz", "tls-hostname"):
        if given.has(flag) and not given.has("tls-creds"):
            raise UsageError(f"--{flag} is not permitted without --tls-creds")
    if given.has("tls-hostname") and not given.has("list"):
        raise UsageError("TLS hostname is only supported with export list")


def address(given: Given) -> str | tuple[str, int]:
    """Where to listen or to connect to: a Unix socket's path, or host and port.

    Raises:
        UsageError: The port is none.
    """
    path = given.last("socket")
    if path is not None:
        return path
    port = given.number("port", TCP_PORT_MAX)
    return given.last("bind") or "0.0.0.0", DEFAULT_PORT if port is None else port


def print_list(given: Given) -> None:
    """Print the exports of another server.

    Raises:
        UsageError: The flags cannot be meant together.
        NbdfleeceError: The server cannot be reached, or does not list its exports.
    """
    if given.names:
        raise UsageError("List mode is incompatible with a file name")
    if given.has(*_PER_IMAGE):
        raise UsageError("List mode is incompatible with per-device settings")
    if given.has("fork"):
        raise UsageError("List mode is incompatible with forking")
    if given.has("tls-authz"):
        raise UsageError("TLS authorization is incompatible with export list")
    _check_tls(given)
    credentials = given.last("tls-creds")
    tls = _objects(given).tls(credentials, "client") if credentials else None
    where = address(given)
    hostname = given.last("tls-hostname") or (None if isinstance(where, str) else where[0])
    exports = list_exports(where, tls, hostname)
    print(f"exports available: {len(exports)}")
    for export in exports:
        print("\n".join(export.lines()))
