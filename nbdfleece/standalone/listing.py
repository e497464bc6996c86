"""A client that asks a server for its exports and prints them as ``qemu-nbd --list`` does.

Blocking, over one connection that never leaves the handshake phase.

Spec: proto.md, "Fixed newstyle negotiation", "Option types".
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import NbdfleeceError, ProtocolError, UsageError
from ..nbd.constants import (
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
)
from .objects import TlsObject

TIMEOUT_SECONDS: Final = 30.0
"""How long a server may be silent."""

REPLY_BYTES_MAX: Final = 1 << 20
REPLIES_MAX: Final = 1 << 16
"""No server has a reason for more, to one option."""

_FLAG_NAMES: Final = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    TransmissionFlag.SEND_RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
    TransmissionFlag.BLOCK_STATUS_PAYLOAD: "block-status-payload",
}


class ListingError(NbdfleeceError):
    """The server does not list its exports."""


@dataclass(slots=True)
class ListedExport:
    """What a server says of an export.

    Attributes:
        name: What clients ask for.
        description: For people.
        size: Bytes; None if the server says nothing of the export but its name.
        flags: Transmission flags, known ones or not.
        block_sizes: Minimum, preferred, maximum payload, in bytes.
        contexts: Metadata contexts.
    """

    name: str
    description: str = ""
    size: int | None = None
    flags: int = 0
    block_sizes: tuple[int, int, int] | None = None
    contexts: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The export as ``qemu-nbd --list`` prints it."""
        yield f" export: '{self.name}'"
        if self.description:
            yield f"  description: {self.description}"
        if self.size is not None:
            names = " ".join(name for flag, name in _FLAG_NAMES.items() if self.flags & flag)
            yield f"  size:  {self.size}"
            yield f"  flags: 0x{self.flags:x} ( {names} )"
        if self.block_sizes is not None:
            labels = ("min block", "opt block", "max block")
            yield from (
                f"  {label}: {n}" for label, n in zip(labels, self.block_sizes, strict=True)
            )
        if self.contexts:
            yield f"  available meta contexts: {len(self.contexts)}"
            yield from (f"   {name}" for name in self.contexts)


def list_exports(
    address: str | tuple[str, int], tls: TlsObject | None = None, hostname: str | None = None
) -> list[ListedExport]:
    """Ask a server for all its exports.

    Args:
        address: A Unix socket's path, or host and port.
        tls: Credentials; None for a connection in the clear.
        hostname: What the server's certificate must be for; None does not check it.

    Raises:
        UsageError: The credentials cannot be used.
        ListingError: The server cannot be reached, or refuses.
        ProtocolError: What it says is not NBD.
    """
    with _connect(address) as sock:
        client = _Client(sock)
        try:
            client.greet()
            if tls is not None:
                client.start_tls(_client_context(tls, hostname), hostname)
            return client.list_all()
        except (OSError, EOFError) as error:
            raise ListingError(f"the connection to the server failed: {error}") from error


def _connect(address: str | tuple[str, int]) -> socket.socket:
    where = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
    try:
        if isinstance(address, tuple):
            return socket.create_connection(address, TIMEOUT_SECONDS)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_SECONDS)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise ListingError(f"Failed to connect to '{where}': {error.strerror or error}") from error


def _client_context(tls: TlsObject, hostname: str | None) -> ssl.SSLContext:
    """What OpenSSL needs of a client's credentials."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.kind == "x509" and tls.verify_peer and hostname is not None
    if tls.kind == "psk":
        _use_key(context, tls)
        return context
    certificate, key = tls.directory / "client-cert.pem", tls.directory / "client-key.pem"
    try:
        if tls.verify_peer:
            context.load_verify_locations(tls.directory / "ca-cert.pem")
        else:
            context.verify_mode = ssl.CERT_NONE
        if certificate.exists():
            context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"TLS: {tls.directory} cannot be used: {error}") from error
    return context


def _use_key(context: Any, tls: TlsObject) -> None:
    """Authenticate by a pre-shared key; the typeshed has the callback from 3.13 on."""
    if not hasattr(context, "set_psk_client_callback"):
        raise UsageError("TLS with pre-shared keys needs Python 3.13 or later")
    try:
        lines = tls.keys_file.read_text("utf-8").splitlines()
        keys = dict(line.rsplit(":", 1) for line in lines if ":" in line)
        key = bytes.fromhex(keys[tls.username])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"TLS: no key of '{tls.username}' in {tls.keys_file}: {error}") from error
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("PSK")
    context.set_psk_client_callback(lambda hint: (tls.username, key))


class _Client:
    """The client's side of a handshake."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def greet(self) -> None:
        """Read the greeting and answer it."""
        magic, option_magic, flags = struct.unpack(">QQH", self._receive(18))
        if magic != NBD_MAGIC or option_magic != OPTION_MAGIC:
            raise ProtocolError(
                "the server does not speak NBD, or only the protocol of before 2014"
            )
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the server does not list its exports: it is too old")
        self._sock.sendall(struct.pack(">I", ClientFlag.FIXED_NEWSTYLE))

    def start_tls(self, context: ssl.SSLContext, hostname: str | None) -> None:
        """Go on inside TLS."""
        for _ in self._ask(Option.STARTTLS):
            raise ProtocolError("the server answers STARTTLS by more than an acknowledgement")
        name = hostname if context.check_hostname else None
        self._sock = context.wrap_socket(self._sock, server_hostname=name)

    def list_all(self) -> list[ListedExport]:
        """The exports with all that the server says of them."""
        exports = []
        for kind, data in self._ask(Option.LIST):
            if kind == OptionReply.SERVER and len(data) >= 4:
                end = 4 + int.from_bytes(data[:4], "big")
                exports.append(ListedExport(_text(data[4:end]), _text(data[end:])))
        has_contexts = self._is_accepted(Option.STRUCTURED_REPLY)
        for export in exports:
            self._look_at(export)
            if has_contexts:
                self._list_contexts(export)
        self._send(Option.ABORT)
        return exports

    def _is_accepted(self, option: Option) -> bool:
        try:
            return list(self._ask(option)) == []
        except ListingError:
            return False

    def _look_at(self, export: ListedExport) -> None:
        name = export.name.encode()
        types = (InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)
        asked = struct.pack(f">I{len(name)}sH3H", len(name), name, len(types), *types)
        try:
            replies = list(self._ask(Option.INFO, asked))
        except ListingError:
            return  # qemu-nbd too shows the name alone then
        for kind, data in replies:
            if kind == OptionReply.INFO and len(data) >= 2:
                _note(export, int.from_bytes(data[:2], "big"), data[2:])

    def _list_contexts(self, export: ListedExport) -> None:
        name = export.name.encode()
        try:
            asked = struct.pack(f">I{len(name)}sI", len(name), name, 0)
            replies = list(self._ask(Option.LIST_META_CONTEXT, asked))
        except ListingError:
            return
        export.contexts = [
            _text(data[4:]) for kind, data in replies if kind == OptionReply.META_CONTEXT
        ]

    def _ask(self, option: Option, data: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """Send an option; the replies up to the acknowledgement, as kind and data.

        Raises:
            ListingError: The server refuses.
        """
        self._send(option, data)
        for _ in range(REPLIES_MAX):
            magic, answered, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != OPTION_REPLY_MAGIC or answered != option or length > REPLY_BYTES_MAX:
                raise ProtocolError("the server's reply to an option is none")
            payload = self._receive(length)
            if kind == OptionReply.ACK:
                return
            if kind >> 31:
                raise ListingError(_describe_refusal(option, kind, payload))
            yield kind, payload
        raise ProtocolError("the server's replies to an option do not end")

    def _send(self, option: Option, data: bytes = b"") -> None:
        self._sock.sendall(struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data)

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self._sock.recv(length - len(data))
            if not part:
                raise EOFError("the server has closed it")
            data += part
        return bytes(data)


def _note(export: ListedExport, kind: int, data: bytes) -> None:
    """Take up one piece of information."""
    if kind == InfoType.EXPORT and len(data) == 10:
        export.size, export.flags = struct.unpack(">QH", data)
    elif kind == InfoType.BLOCK_SIZE and len(data) == 12:
        export.block_sizes = struct.unpack(">III", data)
    elif kind == InfoType.NAME:
        export.name = _text(data)
    elif kind == InfoType.DESCRIPTION:
        export.description = _text(data)


def _describe_refusal(option: Option, kind: int, payload: bytes) -> str:
    name = OptionReply(kind).name if kind in OptionReply.__members__.values() else f"{kind:#x}"
    if kind == OptionReply.ERR_TLS_REQD:
        return "the server demands TLS: give --tls-creds"
    text = f": {_text(payload)}" if payload else ""
    return f"the server refuses {option.name} ({name}){text}"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
