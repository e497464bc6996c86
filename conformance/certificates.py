"""A throw-away CA with certificates in the directory layout of GnuTLS users (QEMU, nbdkit)."""

from __future__ import annotations

from pathlib import Path

import trustme


def make_certificates(folder: Path) -> Path:
    """Write ca-cert.pem, server-{cert,key}.pem and client-{cert,key}.pem into ``folder``."""
    folder.mkdir()
    authority = trustme.CA(key_type=trustme.KeyType.RSA)
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    for role, name in (("server", "localhost"), ("client", "client.example")):
        names = (name, "127.0.0.1", "::1") if role == "server" else (name,)
        made = authority.issue_cert(*names, common_name=name, key_type=trustme.KeyType.RSA)
        made.private_key_pem.write_to_path(folder / f"{role}-key.pem")
        for index, part in enumerate(made.cert_chain_pems):
            part.write_to_path(folder / f"{role}-cert.pem", append=index > 0)
    return folder
