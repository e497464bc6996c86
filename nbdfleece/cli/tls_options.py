"""Options of a server about TLS, and about who may have which export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import option_group

if TYPE_CHECKING:
    from ..server.tls import Authorization, TlsSettings

tls_options = option_group(
    click.option(
        "--tls",
        type=click.Choice(["off", "on", "require"]),
        help="on: the client's choice, but for exports that need it; require: always. "
        "Default: require if there are certificates or keys, else off.",
    ),
    click.option(
        "--tls-certificates",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where server-cert.pem, server-key.pem and ca-cert.pem are.",
    ),
    click.option(
        "--tls-psk",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Pre-shared keys instead of certificates: lines of USER:HEXKEY, as psktool makes "
        "them. Needs Python 3.13.",
    ),
    click.option(
        "--tls-verify-peer",
        is_flag=True,
        help="Clients must show a certificate that ca-cert.pem has signed.",
    ),
    click.option(
        "--authorize",
        nargs=2,
        multiple=True,
        metavar="EXPORT CLIENT",
        help="Let a client have an export, and nobody else who is not named so too. EXPORT is a "
        "name, CLIENT a distinguished name ('CN=backup,O=Example') or the user of a key; both "
        "may be patterns with * and ?. May be repeated; exports that no EXPORT fits are closed.",
    ),
)


def build_tls(values: dict[str, Any]) -> TlsSettings | None:
    """How to do TLS; None for not at all.

    Raises:
        UsageError: The options contradict each other, or a file cannot be used.
    """
    from ..nbd.outcomes import TlsMode
    from ..server.tls import TlsSettings, load_certificates, load_keys

    certificates, keys, mode = values["tls_certificates"], values["tls_psk"], values["tls"]
    _check_tls(values)
    if mode == "off" or (certificates is None and keys is None):
        return None
    credentials = (
        load_keys(keys)
        if keys is not None
        else load_certificates(certificates, verify_clients=values["tls_verify_peer"])
    )
    return TlsSettings(
        credentials=credentials,
        mode=TlsMode.SELECTIVETLS if mode == "on" else TlsMode.FORCEDTLS,
    )


def _check_tls(values: dict[str, Any]) -> None:
    certificates, keys, mode = values["tls_certificates"], values["tls_psk"], values["tls"]
    if certificates is not None and keys is not None:
        raise UsageError("--tls-certificates and --tls-psk exclude each other")
    if mode in ("on", "require") and certificates is None and keys is None:
        raise UsageError(f"--tls {mode} needs --tls-certificates or --tls-psk")
    if values["tls_verify_peer"] and certificates is None:
        raise UsageError("--tls-verify-peer needs --tls-certificates")
    identifies = mode != "off" and (values["tls_verify_peer"] or keys is not None)
    if values["authorize"] and not identifies:
        raise UsageError("--authorize needs clients with a name: --tls-verify-peer or --tls-psk")


def build_authorization(rules: Sequence[tuple[str, str]]) -> Authorization | None:
    """Who may have which export; None for everybody all."""
    from ..server.tls import Authorization

    if not rules:
        return None
    identities: dict[str, list[str]] = {}
    for export, client in rules:
        identities.setdefault(export, []).append(client)
    return Authorization(identities=identities, otherwise=())
