"""TLS: credentials, who the client is, and a channel inside another channel.

**Credentials** are files as GnuTLS programs (QEMU, nbdkit, libnbd) keep them: a
directory with ``ca-cert.pem``, ``server-cert.pem``, ``server-key.pem`` and perhaps
``ca-crl.pem``; or a file of pre-shared keys, one ``user:hexkey`` in a line, as
``psktool`` writes it.

**The channel** (:class:`TlsChannel`) runs OpenSSL over two memory buffers, so that
the connection's driver stays the same: what the socket has is written into the
one, what OpenSSL wants to send is taken out of the other. The TLS handshake
happens inside the first receives; the time that it may take is part of the
handshake's time.

Nothing older than TLS 1.2 is spoken. There are no session tickets: a connection
lasts for as long as its client needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import UsageError
from ..nbd.limits import KIB
from ..nbd.outcomes import TlsMode
from .channel import Channel

_CIPHERTEXT_BYTES_MAX: Final = 256 * KIB
"""Ciphertext that waits for the socket at most, and what is received at one time."""

_received = memoryview(bytearray(_CIPHERTEXT_BYTES_MAX))
"""Where ciphertext is received, on its way into OpenSSL: used by one call at a time."""

_ATTRIBUTES: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "userId": "UID",
}
"""OpenSSL's names of attributes and those of RFC 4514, which GnuTLS and QEMU print."""


class Authorizer(Protocol):
    """Decides who may have which export."""

    def refusal(self, export: str, identity: str | None) -> str | None:
        """Why a client may not have an export, or None if it may.

        Args:
            export: Its name.
            identity: A distinguished name as RFC 4514 writes it, the name of a pre-shared
                key, or None for a client that has not authenticated.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorization:
    """Who may have which export.

    Attributes:
        identities: For exports' names, or patterns of them, the clients that may have them.
            Clients are patterns of a distinguished name as RFC 4514 writes it
            (``CN=client,O=Example,C=GB``), or of a name in the file of pre-shared keys.
            Patterns (``*``, ``?``, ``[...]``) are of whole names, never of beginnings.
        otherwise: The clients that may have an export without an entry; None for all.
    """

    identities: Mapping[str, Sequence[str]] = field(default_factory=dict)
    otherwise: Sequence[str] | None = None

    def refusal(self, export: str, identity: str | None) -> str | None:
        """Why a client may not have an export, or None if it may."""
        patterns = self._patterns(export)
        if patterns is None:
            return None
        if identity is None:
            return f"export '{export}' is for clients that authenticate"
        if any(fnmatchcase(identity, pattern) for pattern in patterns):
            return None
        return f"'{identity}' may not use export '{export}'"

    def _patterns(self, export: str) -> Sequence[str] | None:
        """The clients that may have an export; None for all."""
        found = [
            clients for names, clients in self.identities.items() if fnmatchcase(export, names)
        ]
        return [client for clients in found for client in clients] if found else self.otherwise


@dataclass(frozen=True, slots=True)
class AllOf:
    """Lets those in whom all of several let in.

    Attributes:
        rules: The several.
    """

    rules: Sequence[Authorizer]

    def refusal(self, export: str, identity: str | None) -> str | None:
        """Why a client may not have an export, or None if it may."""
        refusals = (rule.refusal(export, identity) for rule in self.rules)
        return next((refusal for refusal in refusals if refusal is not None), None)


class Credentials:
    """What the server shows of itself and asks of clients; made by the functions below.

    Attributes:
        context: For OpenSSL.
    """

    def __init__(self) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        self.context.num_tickets = 0
        self._keys: dict[str, bytes] = {}
        self._named: str | None = None

    def use_keys(self, keys: dict[str, bytes]) -> None:
        """Authenticate by pre-shared keys instead of certificates."""
        context: Any = self.context  # typeshed has set_psk_server_callback from 3.13 on
        self._keys = keys
        context.set_ciphers("PSK")
        context.set_psk_server_callback(self._find_key)

    def _find_key(self, identity: str | None) -> bytes:
        key = self._keys.get(identity or "")
        if key is None:
            return b""  # OpenSSL refuses it
        self._named = identity
        return key

    def take_named(self) -> str | None:
        """The user that the handshake which has just gone on has named, once."""
        named, self._named = self._named, None
        return named


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """How a server does TLS.

    Attributes:
        credentials: See :func:`load_certificates` and :func:`load_keys`.
        mode: FORCEDTLS or SELECTIVETLS.
    """

    credentials: Credentials
    mode: TlsMode = TlsMode.FORCEDTLS


def load_certificates(
    directory: str | os.PathLike[str], *, verify_clients: bool = False
) -> Credentials:
    """Read a GnuTLS-style directory.

    Args:
        directory: With ``server-cert.pem`` and ``server-key.pem``.
        verify_clients: Clients must show a certificate that ``ca-cert.pem`` has signed and
            ``ca-crl.pem``, if it exists, has not revoked.

    Raises:
        UsageError: A file is missing or cannot be used; the text names it.
    """
    place = Path(directory)
    credentials = Credentials()
    context = credentials.context
    certificate, key = place / "server-cert.pem", place / "server-key.pem"
    _check_readable(certificate, key)
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"TLS: {certificate} and {key.name} cannot be used: {error}") from error
    if verify_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authority(context, place / "ca-cert.pem")
        if (place / "ca-crl.pem").exists():
            _load_authority(context, place / "ca-crl.pem")
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return credentials


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"TLS: {path} cannot be used: {error}") from error


def _check_readable(*paths: Path) -> None:
    for path in paths:
        try:
            path.open("rb").close()
        except OSError as error:
            raise UsageError(f"TLS: cannot read {path}: {error.strerror}") from error


def load_keys(path: str | os.PathLike[str]) -> Credentials:
    """Read a file of pre-shared keys, one ``user:hexkey`` in a line.

    Raises:
        UsageError: The file cannot be used, or this Python has no TLS-PSK.
    """
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        raise UsageError(
            "TLS with pre-shared keys needs Python 3.13 or later: use certificates instead"
        )
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"TLS: cannot read {os.fspath(path)}: {error}") from error
    credentials = Credentials()
    credentials.use_keys(_parse_keys(text, os.fspath(path)))
    return credentials


def _parse_keys(text: str, path: str) -> dict[str, bytes]:
    keys = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, _, digits = line.strip().rpartition(":")
        if not user or not re.fullmatch("(?:[0-9a-fA-F]{2})+", digits):
            raise UsageError(f"TLS: {path}, line {number} is not 'user:hexkey'")
        keys[user] = bytes.fromhex(digits)
    if not keys:
        raise UsageError(f"TLS: {path} has no keys")
    return keys


def distinguished_name(certificate: Mapping[str, Any] | None, whose: str = "subject") -> str | None:
    """A certificate's subject as RFC 4514 writes it, the most specific part first.

    Args:
        certificate: As ``SSLObject.getpeercert()`` gives it; empty if there is none.
        whose: "issuer" for the name of who has signed it.
    """
    if not certificate:
        return None
    parts = [
        "+".join(f"{_ATTRIBUTES.get(name, name)}={_escape(value)}" for name, value in rdn)
        for rdn in certificate[whose]
    ]
    return ",".join(reversed(parts))


def _escape(value: str) -> str:
    """RFC 4514, 2.4."""
    value = re.sub(r'([,+"\\<>;=])', r"\\\1", value)
    value = re.sub(r"^([ #])", r"\\\1", value)
    return re.sub(r"(?<!\\) $", r"\\ ", value)


class TlsChannel:
    """TLS, the server's side, inside another channel.

    Args:
        inner: Carries the ciphertext; owned by this channel from now on.
        credentials: The server's.

    Attributes:
        identity: Who the client has proven to be: a distinguished name or the name of a key.
    """

    def __init__(self, inner: Channel, credentials: Credentials) -> None:
        self._inner = inner
        self._credentials = credentials
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = credentials.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = memoryview(b"")
        self._is_handshaking = True
        self._is_drained = True
        self.identity: str | None = None
        self.peer = inner.peer
        self.reader_fd = inner.reader_fd
        self.writer_fd = inner.writer_fd

    def recv_into(self, view: memoryview, /) -> int:
        """Receive plaintext; before there is any, do the TLS handshake."""
        if self._is_drained:
            self._receive_ciphertext()
        self._is_drained = False
        if self._is_handshaking and not self._shake_hands():
            raise BlockingIOError
        count = self._decrypt(view)
        if count is None:
            raise BlockingIOError
        return count

    @property
    def subject(self) -> str | None:
        """The distinguished name in the client's certificate."""
        return distinguished_name(self._ssl.getpeercert())

    @property
    def issuer(self) -> str | None:
        """The distinguished name of who has signed the client's certificate."""
        return distinguished_name(self._ssl.getpeercert(), "issuer")

    def _receive_ciphertext(self) -> None:
        count = self._inner.recv_into(_received)
        if count:
            self._incoming.write(_received[:count])
        else:
            self._incoming.write_eof()

    def _shake_hands(self) -> bool:
        """Go on with the handshake; whether it is done."""
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._is_drained = True
            return False
        except ssl.SSLError as error:
            raise ConnectionError(f"TLS handshake failed: {error.reason or error}") from error
        finally:
            self.identity = self._credentials.take_named() or self.identity
        self._is_handshaking = False
        self.identity = self.identity or distinguished_name(self._ssl.getpeercert())
        return True

    def _decrypt(self, view: memoryview) -> int | None:
        """Fill ``view`` from the records that are here; 0 at the end, None if there is nothing."""
        count = 0
        read: Any = self._ssl.read  # typeshed does not know that it fills a buffer
        try:
            while count < len(view):
                length = read(len(view) - count, view[count:])
                if not length:
                    break
                count += length
        except ssl.SSLWantReadError:
            self._is_drained = True
            return count or None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._is_drained = count == 0
        return count

    def sendmsg(self, views: list[memoryview], /) -> int:
        """Encrypt and send, about :data:`_CIPHERTEXT_BYTES_MAX` at a time.

        OpenSSL cuts what it is given into records, in less time than if it is given records.
        """
        self.send_own()
        count = 0
        for view in views:
            room = _CIPHERTEXT_BYTES_MAX - self._outgoing.pending
            if room <= 0:
                break
            written = self._ssl.write(view[:room])
            count += written
            if written < len(view):
                break
        with contextlib.suppress(BlockingIOError):
            self.send_own()  # what is left is told by the next call
        return count

    def send_own(self) -> None:
        """Send ciphertext that waits."""
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return
            self._unsent = self._unsent[self._inner.sendmsg([self._unsent]) :]

    def has_pending(self) -> bool:
        """Whether records may be left that were received already."""
        return not self._is_drained

    def finish(self) -> None:
        """Send the close_notify alert; it is not waited for the client's."""
        if not self._is_handshaking:
            with contextlib.suppress(ssl.SSLError):  # the client's is not here yet, or it is gone
                self._ssl.unwrap()
        self.send_own()
        self._inner.finish()

    def discard(self) -> bool:
        """Throw away what is there."""
        return self._inner.discard()

    def close(self) -> None:
        """Close the channel inside."""
        self._inner.close()
