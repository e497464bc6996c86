"""QEMU's ``--object``: credentials for TLS, and who may connect.

Certificates are those of a folder as :func:`~nbdfleece.server.tls.load_certificates` reads
it, pre-shared keys are in ``keys.psk`` of the folder.

Spec: ``tls-creds-x509``, ``tls-creds-psk``, ``authz-*`` in qapi/crypto.json and qapi/authz.json.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ..errors import UsageError
from ..server.tls import Authorizer, TlsSettings, load_certificates, load_keys
from .node_options import Options, parse_image_opts, parse_json_options

Endpoint = Literal["server", "client"]

_KEYS_FILE: Final = "keys.psk"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsObject:
    """Credentials that are not read yet.

    Attributes:
        kind: Certificates or pre-shared keys.
        endpoint: Whose they are.
        directory: Where the files are.
        verify_peer: Whether the other side must show a certificate that can be verified.
        username: What a client with a pre-shared key calls itself.
    """

    kind: Literal["x509", "psk"]
    endpoint: Endpoint
    directory: Path
    verify_peer: bool = True
    username: str = "qemu"

    @property
    def keys_file(self) -> Path:
        """Where the pre-shared keys are."""
        return self.directory / _KEYS_FILE

    def server_settings(self) -> TlsSettings:
        """Read the credentials for a server.

        Raises:
            UsageError: A file is missing or cannot be used.
        """
        if self.kind == "psk":
            return TlsSettings(credentials=load_keys(self.keys_file))
        return TlsSettings(
            credentials=load_certificates(self.directory, verify_clients=self.verify_peer)
        )


class Rule(NamedTuple):
    """Whom a rule is about, and whether they may connect."""

    match: str
    allows: bool
    is_glob: bool = False

    def fits(self, identity: str) -> bool:
        """Whether the rule is about this client."""
        if not self.is_glob:
            return identity == self.match
        parts = (
            ".*" if char == "*" else "." if char == "?" else re.escape(char) for char in self.match
        )
        return re.fullmatch("".join(parts), identity, re.DOTALL) is not None


class Rules(NamedTuple):
    """The first rule that fits decides; if none does, ``otherwise``."""

    rules: tuple[Rule, ...]
    otherwise: bool = False

    def allow(self, identity: str) -> bool:
        """Whether a client may connect."""
        for rule in self.rules:
            if rule.fits(identity):
                return rule.allows
        return self.otherwise


class ObjectAuthorizer:
    """What an ``authz-*`` object decides for every export.

    Rules name clients as QEMU does: ``O=Example,CN=client`` if the certificate has the parts
    in this order.

    Args:
        rules: Gives the rules that hold now.
    """

    def __init__(self, rules: Callable[[], Rules]) -> None:
        self._rules = rules

    def refusal(self, export: str, identity: str | None) -> str | None:
        """Why a client may not have the export, or None if it may."""
        if identity is None:
            return f"export '{export}' is for clients that authenticate"
        try:
            allowed = self._rules().allow(in_certificate_order(identity))
        except UsageError as error:
            _log.error("nobody is let in: %s", error)
            allowed = False
        return None if allowed else f"'{identity}' may not use export '{export}'"


def in_certificate_order(identity: str) -> str:
    """A distinguished name as QEMU's rules have it: its parts as in the certificate.

    RFC 4514, and so the server, has them the other way round.
    """
    return ",".join(reversed(re.findall(r"(?:\\.|[^,\\])+", identity)))


class Objects:
    """The objects of a server by their ids."""

    def __init__(self) -> None:
        self._objects: dict[str, TlsObject | ObjectAuthorizer] = {}

    def add(self, text: str) -> None:
        """Define an object: ``TYPE,id=ID,...``, or JSON with ``qom-type``.

        Raises:
            UsageError: It cannot be meant, is of a type that is not supported, or its id is
                taken.
        """
        self._define(_parse(text), f"--object {text}")

    def add_values(self, values: dict[str, Any]) -> None:
        """Define an object by its properties, ``qom-type`` and ``id`` among them.

        Raises:
            UsageError: As of :meth:`add`, or its credentials cannot be read.
        """
        self._define(Options(values), f"object '{values.get('id')}'")

    def _define(self, options: Options, where: str) -> None:
        kind = options.take_text("qom-type") or ""
        name = options.take_text("id")
        if name is None:
            raise UsageError(f"{where}: 'id' is missing")
        if name in self._objects:
            raise UsageError(f"{where}: there is an object '{name}' already")
        make = _MAKERS.get(kind)
        if make is None:
            raise UsageError(
                f"objects of type '{kind}' are not supported; these are: {', '.join(_MAKERS)}"
            )
        made = make(options)
        options.finish(kind)
        self._objects[name] = made

    def remove(self, name: str) -> None:
        """Forget an object; servers that were started with it keep it.

        Raises:
            UsageError: There is none.
        """
        if self._objects.pop(name, None) is None:
            raise UsageError(f"object '{name}' not found")

    def tls(self, name: str, endpoint: Endpoint) -> TlsObject:
        """Credentials by their id.

        Raises:
            UsageError: There are none, or they are those of the other side.
        """
        found = self._objects.get(name)
        if found is None:
            raise UsageError(f"No TLS credentials with id '{name}'")
        if not isinstance(found, TlsObject):
            raise UsageError(f"Object with id '{name}' is not TLS credentials")
        if found.endpoint != endpoint:
            raise UsageError(f"TLS credentials '{name}' are not for a {endpoint} endpoint")
        return found

    def authorizer(self, name: str) -> Authorizer:
        """An ``authz-*`` object by its id.

        Raises:
            UsageError: There is none.
        """
        found = self._objects.get(name)
        if not isinstance(found, ObjectAuthorizer):
            raise UsageError(f"No authorization object with id '{name}'")
        return found


def _parse(text: str) -> Options:
    if text.startswith("{"):
        return parse_json_options(text)
    return parse_image_opts(f"qom-type={text}")


def _tls_object(kind: Literal["x509", "psk"], options: Options) -> TlsObject:
    directory = options.take_text("dir")
    if directory is None:
        raise UsageError(f"tls-creds-{kind}: 'dir' is missing")
    endpoint = options.take_text("endpoint", "server", "client") or "client"
    options.take_switch("sanity-check")  # what cannot be used is refused in any case
    verify_peer = options.take_switch("verify-peer")
    username = options.take_text("username") if kind == "psk" else None
    return TlsObject(
        kind=kind,
        endpoint="server" if endpoint == "server" else "client",
        directory=Path(directory),
        verify_peer=verify_peer is not False,
        username=username or "qemu",
    )


def _x509(options: Options) -> TlsObject:
    return _tls_object("x509", options)


def _psk(options: Options) -> TlsObject:
    return _tls_object("psk", options)


def _simple(options: Options) -> ObjectAuthorizer:
    identity = options.take_text("identity")
    if identity is None:
        raise UsageError("authz-simple: 'identity' is missing")
    rules = Rules((Rule(identity, allows=True),))
    return ObjectAuthorizer(lambda: rules)


def _list(options: Options) -> ObjectAuthorizer:
    rules = _take_rules(options)
    return ObjectAuthorizer(lambda: rules)


def _list_file(options: Options) -> ObjectAuthorizer:
    name = options.take_text("filename")
    if name is None:
        raise UsageError("authz-list-file: 'filename' is missing")
    path = Path(name).absolute()
    rules = _read_rules(path)
    if options.take_switch("refresh") is False:
        return ObjectAuthorizer(lambda: rules)
    return ObjectAuthorizer(lambda: _read_rules(path))


_MAKERS: Final[dict[str, Callable[[Options], TlsObject | ObjectAuthorizer]]] = {
    "tls-creds-x509": _x509,
    "tls-creds-psk": _psk,
    "authz-simple": _simple,
    "authz-list": _list,
    "authz-list-file": _list_file,
}


def _read_rules(path: Path) -> Rules:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"authz-list-file: cannot read {path}: {error}") from error
    options = parse_json_options(text)
    rules = _take_rules(options)
    options.finish("authz-list-file")
    return rules


def _take_rules(options: Options) -> Rules:
    """Rules as a JSON list, or as ``rules.0.match=...,rules.1.match=...``."""
    found: Any = options.values.pop("rules", [])
    if isinstance(found, dict):
        if sorted(found) != sorted(map(str, range(len(found)))):
            raise UsageError("authorization rules are to be numbered from 0 on")
        found = [found[str(index)] for index in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(rule, dict) for rule in found):
        raise UsageError("authorization rules are to be a list")
    policy = options.take_text("policy", "allow", "deny")
    return Rules(
        tuple(_make_rule(Options(rule, f"rules.{index}.")) for index, rule in enumerate(found)),
        otherwise=policy == "allow",
    )


def _make_rule(options: Options) -> Rule:
    match = options.take_text("match")
    policy = options.take_text("policy", "allow", "deny")
    if match is None or policy is None:
        raise UsageError(f"'{options.where}match' and '{options.where}policy' are both needed")
    is_glob = options.take_text("format", "exact", "glob") == "glob"
    options.finish("authz-list")
    return Rule(match, policy == "allow", is_glob)
