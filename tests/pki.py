"""Certificates as GnuTLS programs keep them: one folder for both sides."""

from __future__ import annotations

from pathlib import Path

import trustme


def make_pki(place: Path) -> Path:
    """Fill a folder: an authority, a server called localhost, a client."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place / "ca-cert.pem")
    server = authority.issue_cert("localhost", "127.0.0.1", "::1")
    client = authority.issue_cert(
        "client.example", common_name="client", organization_name="Example, Inc."
    )
    for name, cert in (("server", server), ("client", client)):
        cert.private_key_pem.write_to_path(place / f"{name}-key.pem")
        cert.cert_chain_pems[0].write_to_path(place / f"{name}-cert.pem")
    return place
