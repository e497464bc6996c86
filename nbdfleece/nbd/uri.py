"""NBD URIs: how an export on a server is written in one line.

===========================================  ====================================
``nbd://HOST[:PORT]/EXPORT``                 TCP
``nbds://...``                               TCP, TLS or nothing
``nbd+unix:///EXPORT?socket=PATH``           Unix domain socket
``nbds+unix:///EXPORT?socket=PATH``          Unix domain socket, TLS or nothing
``nbd+vsock://[CID[:PORT]]/EXPORT``          vsock (as libnbd; not in the specification)
``nbds+vsock://...``                         vsock, TLS or nothing
===========================================  ====================================

Everything after the first slash of the path is the export's name, percent-encoded. A path may be
missing (``nbd+unix://?socket=PATH``, as nbdkit prints it): the default export. QEMU's older form,
``nbd:HOST:PORT[:exportname=NAME]`` and ``nbd:unix:PATH[:exportname=NAME]``, is understood, never
printed.

Spec: uri.md, "The NBD Uniform Resource Indicator (URI) format".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urlsplit

from ..errors import UsageError
from .constants import DEFAULT_PORT
from .names import check_string

Transport = Literal["tcp", "unix", "vsock"]
TlsType = Literal["anon", "x509", "psk"]

VSOCK_HOST_CID: Final = 2
"""The machine that a virtual machine runs on: where libnbd looks if no CID is given."""
TCP_PORT_MAX: Final = (1 << 16) - 1
VSOCK_PORT_MAX: Final = (1 << 32) - 1

_SCHEMES: Final[dict[str, tuple[Transport, bool]]] = {
    "nbd": ("tcp", False),
    "nbds": ("tcp", True),
    "nbd+unix": ("unix", False),
    "nbds+unix": ("unix", True),
    "nbd+vsock": ("vsock", False),
    "nbds+vsock": ("vsock", True),
}
_SCHEME_NAMES: Final = {parts: name for name, parts in _SCHEMES.items()}
_TLS_TYPES: Final[dict[str, TlsType]] = {"anon": "anon", "x509": "x509", "psk": "psk"}
_PARAMETERS: Final = frozenset(
    {
        "socket",
        "tls-type",
        "tls-hostname",
        "tls-verify-peer",
        "tls-certificates",
        "tls-psk-file",
    }
)
_UNWRITTEN: Final = re.compile(r"[\x00-\x20\x7f]")
"""What a URI cannot contain as it is, and urlsplit would drop in silence."""
_PORT: Final = re.compile(r":([^]:@]*)$")
_LEGACY_TCP: Final = re.compile(r"(\[[^]]*\]|[^:\[]*):(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUri:
    """An export on a server. :func:`str` gives the URI.

    Attributes:
        transport: How to get there.
        tls: Without TLS the connection must fail.
        export: The export's name; "" is the default export.
        host: Name or address for TCP, without brackets.
        port: For TCP and vsock.
        cid: The other machine, for vsock.
        socket: Path of the Unix domain socket; an abstract one begins with NUL.
        username: For TLS-PSK.
        tls_type: How TLS authenticates.
        tls_hostname: The name that the server's certificate must bear, if not ``host``.
        tls_verify_peer: Whether to verify the server; None leaves it to the client.
        tls_certificates: Directory of certificates and keys (as libnbd; not in the spec).
        tls_psk_file: File of pre-shared keys (as libnbd; not in the spec).
    """

    transport: Transport
    tls: bool = False
    export: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    cid: int = VSOCK_HOST_CID
    socket: str = ""
    username: str | None = None
    tls_type: TlsType | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    tls_certificates: str | None = None
    tls_psk_file: str | None = None

    def __str__(self) -> str:
        scheme = _SCHEME_NAMES[self.transport, self.tls]
        path = quote(self.export, safe="/:@!$'()*,;=~")
        query = "&".join(f"{key}={value}" for key, value in self._parameters())
        return f"{scheme}://{self._authority()}/{path}" + (f"?{query}" if query else "")

    def _authority(self) -> str:
        user = "" if self.username is None else quote(self.username, safe="") + "@"
        if self.transport == "unix":
            return user
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        if self.transport == "vsock":
            return f"{user}{self.cid}{port}"
        host = quote(self.host, safe=":")
        if ":" in self.host:
            host = f"[{host}]"
        return user + host + port

    def _parameters(self) -> list[tuple[str, str]]:
        """The query in the spec's order, encoded."""
        found: list[tuple[str, str | None]] = [
            ("socket", _quote_path(self.socket) if self.transport == "unix" else None),
            ("tls-type", self.tls_type),
            ("tls-hostname", self.tls_hostname and quote(self.tls_hostname, safe=":")),
            (
                "tls-verify-peer",
                None if self.tls_verify_peer is None else f"{self.tls_verify_peer:d}",
            ),
            ("tls-certificates", self.tls_certificates and _quote_path(self.tls_certificates)),
            ("tls-psk-file", self.tls_psk_file and _quote_path(self.tls_psk_file)),
        ]
        return [(key, value) for key, value in found if value is not None]


def parse_uri(text: str) -> NbdUri:
    """Read an NBD URI, or QEMU's older form.

    Raises:
        UsageError: It is none, or asks for something that cannot be meant. Unknown parameters
            are named, as the specification wishes.
    """
    if text.startswith("nbd:") and not text.startswith("nbd://"):
        return _parse_legacy(text)
    if _UNWRITTEN.search(text):
        raise UsageError(f"{text!r} is not a URI: spaces and control characters must be encoded")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is not a URI: {error}") from None
    if parts.scheme not in _SCHEMES:
        raise UsageError(f"{text!r} is not an NBD URI: the schemes are {', '.join(_SCHEMES)}")
    if "//" not in text or parts.fragment or parts.password is not None:
        raise UsageError(f"{text!r} is not an NBD URI: it has no '//', or a fragment or password")
    address = parts.netloc.rpartition("@")[2]
    if address.count(":") > 1 and not address.startswith("["):
        raise UsageError(f"{text!r} is not a URI: an IPv6 address needs brackets")
    return _build(text, parts)


def _build(text: str, parts: SplitResult) -> NbdUri:
    transport, tls = _SCHEMES[parts.scheme]
    query = _parse_query(text, parts.query)
    if ("socket" in query) != (transport == "unix"):
        raise UsageError(f"{text!r}: 'socket=' is needed with {_unix_schemes()}, and only there")
    if transport == "unix" and _host(parts):
        raise UsageError(f"{text!r}: a Unix domain socket has no host")
    return NbdUri(
        transport=transport,
        tls=tls,
        export=_decode(text, parts.path.removeprefix("/"), "export name"),
        host=(_host(parts) or "localhost") if transport == "tcp" else "",
        port=_parse_port(text, parts, transport),
        cid=_parse_cid(text, _host(parts)) if transport == "vsock" else VSOCK_HOST_CID,
        socket=_unquote_path(query.get("socket", "")),
        username=None if parts.username is None else _decode(text, parts.username, "user name"),
        tls_type=_parse_tls_type(text, query.get("tls-type")),
        tls_hostname=_optional(text, query, "tls-hostname"),
        tls_verify_peer=_parse_verify(text, query.get("tls-verify-peer")),
        tls_certificates=_optional_path(query, "tls-certificates"),
        tls_psk_file=_optional_path(query, "tls-psk-file"),
    )


def _unix_schemes() -> str:
    return " and ".join(name for name, (transport, _) in _SCHEMES.items() if transport == "unix")


def _host(parts: SplitResult) -> str:
    return unquote(parts.hostname or "")


def _parse_query(text: str, query: str) -> dict[str, str]:
    """The parameters, still encoded; each at most once."""
    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, equals, value = item.partition("=")
        if key not in _PARAMETERS or not equals:
            raise UsageError(f"{text!r}: unknown parameter {key!r}")
        if key in found:
            raise UsageError(f"{text!r}: parameter {key!r} is given twice")
        found[key] = value
    return found


def _decode(text: str, encoded: str, what: str) -> str:
    try:
        decoded = unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        raise UsageError(f"{text!r}: the {what} is not UTF-8") from None
    check_string(decoded, f"{text!r}: the {what}")
    return decoded


def _optional(text: str, query: dict[str, str], key: str) -> str | None:
    return _decode(text, query[key], key) if key in query else None


def _optional_path(query: dict[str, str], key: str) -> str | None:
    return _unquote_path(query[key]) if key in query else None


def _unquote_path(encoded: str) -> str:
    return os.fsdecode(unquote_to_bytes(encoded))


def _quote_path(path: str) -> str:
    return quote(os.fsencode(path), safe="/:@!$'()*,;=~")


def _parse_port(text: str, parts: SplitResult, transport: Transport) -> int:
    """The port; urlsplit's own property does not know that vsock's have 32 bits."""
    match = _PORT.search(parts.netloc)
    if match is None or not match[1]:
        return DEFAULT_PORT
    port_max = VSOCK_PORT_MAX if transport == "vsock" else TCP_PORT_MAX
    if not match[1].isascii() or not match[1].isdigit() or int(match[1]) > port_max:
        raise UsageError(f"{text!r}: {match[1]!r} is not a port")
    return int(match[1])


def _parse_cid(text: str, host: str) -> int:
    if not host:
        return VSOCK_HOST_CID
    if not host.isascii() or not host.isdigit() or int(host) >= 1 << 32:
        raise UsageError(f"{text!r}: {host!r} is not a vsock CID")
    return int(host)


def _parse_tls_type(text: str, value: str | None) -> TlsType | None:
    if value is None:
        return None
    if value not in _TLS_TYPES:
        raise UsageError(f"{text!r}: tls-type is one of {', '.join(_TLS_TYPES)}")
    return _TLS_TYPES[value]


def _parse_verify(text: str, value: str | None) -> bool | None:
    if value not in (None, "0", "1"):
        raise UsageError(f"{text!r}: tls-verify-peer is 0 or 1")
    return None if value is None else value == "1"


def _parse_legacy(text: str) -> NbdUri:
    """``nbd:HOST:PORT[:exportname=NAME]`` or ``nbd:unix:PATH[:exportname=NAME]``."""
    address, _, export = text.removeprefix("nbd:").partition(":exportname=")
    check_string(export, f"{text!r}: the export name")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path:
            raise UsageError(f"{text!r}: the path of the socket is missing")
        return NbdUri(transport="unix", export=export, socket=path)
    match = _LEGACY_TCP.fullmatch(address)
    if match is None or int(match[2]) > TCP_PORT_MAX:
        raise UsageError(f"{text!r} is not an NBD address: nbd:HOST:PORT or nbd:unix:PATH")
    host = match[1].removeprefix("[").removesuffix("]")
    return NbdUri(transport="tcp", export=export, host=host or "localhost", port=int(match[2]))
