"""TLS of what stands in for qemu-nbd: QEMU's objects, QEMU's and libnbd's clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from .look_alike import OURS, Twin, call, checked, need, ours, theirs

__all__ = ["ours", "theirs"]

pytestmark = need("qemu-nbd", "qemu-img", "nbdinfo")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificates for both sides, and a key."""
    place = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place / "ca-cert.pem")
    server = authority.issue_cert("localhost")
    client = authority.issue_cert(
        "client.example", common_name="client", organization_name="Example, Inc."
    )
    for name, cert in (("server", server), ("client", client)):
        cert.private_key_pem.write_to_path(place / f"{name}-key.pem")
        cert.cert_chain_pems[0].write_to_path(place / f"{name}-cert.pem")
    (place / "keys.psk").write_text(f"alice:{'17' * 32}\n")
    return place


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"secret" + bytes(65530))
    return path


def client_name(pki: Path) -> str:
    """The client's distinguished name as QEMU writes it: in the certificate's order."""
    certificate = x509.load_pem_x509_certificate((pki / "client-cert.pem").read_bytes())
    return ",".join(part.rfc4514_string() for part in certificate.subject.rdns)


def server_flags(pki: Path) -> list[str]:
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={pki},verify-peer=on"
    return ["--object", creds, "--tls-creds", "t", "-f", "raw", "-e", "3"]


def tls_uri(where: str, pki: Path) -> str:
    where = where.replace("nbd+unix", "nbds+unix")
    return f"{where}&tls-certificates={pki}&tls-verify-peer=false"


def test_clients_speak_tls_and_no_other(pki: Path, image: Path, ours: Twin, theirs: Twin) -> None:
    found = []
    for twin in (ours, theirs):
        with twin.serving(*server_flags(pki), image) as where:
            assert call("nbdinfo", where).returncode == 1
            info = json.loads(checked("nbdinfo", "--json", tls_uri(where, pki)))
            (export,) = info["exports"]
            del export["uri"]
            # QEMU 10 tells INFO of it without a context, and GO not: requirement 34.
            export.pop("can_block_status_payload", None)
            found.append(info)
            options = f"driver=nbd,server.type=unix,server.path={twin.socket},tls-creds=c"
            creds = f"tls-creds-x509,id=c,endpoint=client,dir={pki}"
            options += ",tls-hostname=localhost"
            checked("qemu-img", "info", "--object", creds, "--image-opts", options)
    assert found[0] == found[1]
    assert found[0]["TLS"]


def test_exports_are_listed_over_tls_alike(
    pki: Path, image: Path, ours: Twin, theirs: Twin
) -> None:
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={pki},verify-peer=no"
    flags = ["-L", "--object", creds, "--tls-creds=t"]
    for twin in (ours, theirs):
        with twin.serving(*server_flags(pki), image):
            mine = checked(*OURS, *flags, "-k", twin.socket)
            assert "demands TLS" in ours.fails("-L", "-k", twin.socket).stderr
            checked_flags = ["-L", "--object", creds.replace("verify-peer=no", "verify-peer=on")]
            checked_flags += ["--tls-creds=t", "--tls-hostname=localhost", "-k", str(twin.socket)]
            assert checked(*OURS, *checked_flags) == mine
            wrong = [word.replace("=localhost", "=example.com") for word in checked_flags]
            assert "Hostname mismatch" in ours.fails(*wrong).stderr
    assert "size:  65536" in mine


@pytest.mark.parametrize(
    "authz",
    [
        "authz-simple,id=a,identity={}",
        "authz-list,id=a,rules.0.match=O=Exa*CN=cli?nt,rules.0.format=glob,rules.0.policy=allow",
    ],
)
def test_client_that_is_named_is_let_in(
    pki: Path, image: Path, ours: Twin, theirs: Twin, authz: str
) -> None:
    flags = ["--object", authz.format(client_name(pki).replace(",", ",,")), "--tls-authz=a"]
    for twin in (theirs, ours):
        with twin.serving(*server_flags(pki), *flags, image) as where:
            assert checked("nbdinfo", "--size", tls_uri(where, pki)) == "65536\n"


def test_client_that_is_not_named_is_refused(
    pki: Path, image: Path, ours: Twin, theirs: Twin
) -> None:
    flags = ["--object", "authz-simple,id=a,identity=CN=other", "--tls-authz=a"]
    for twin in (theirs, ours):
        with twin.serving(*server_flags(pki), *flags, image) as where:
            done = call("nbdinfo", "--size", tls_uri(where, pki))
            assert done.returncode == 1
            assert done.stdout == ""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python has TLS-PSK")
def test_keys_need_a_newer_python_and_that_is_said(pki: Path, image: Path, ours: Twin) -> None:
    creds = f"tls-creds-psk,id=t,endpoint=server,dir={pki}"
    done = ours.fails("-k", ours.socket, "--object", creds, "--tls-creds=t", "-f", "raw", image)
    assert "Python 3.13" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 13), reason="TLS-PSK needs Python 3.13")
def test_clients_with_a_key_are_let_in(pki: Path, image: Path, ours: Twin) -> None:
    creds = f"tls-creds-psk,id=t,endpoint=server,dir={pki}"
    client = f"tls-creds-psk,id=t,endpoint=client,dir={pki},username=alice"
    with ours.serving("--object", creds, "--tls-creds=t", "-f", "raw", "-e", "2", image):
        flags = ["-L", "--object", client, "--tls-creds=t", "-k", ours.socket]
        theirs = checked("qemu-nbd", *flags).replace("  transaction size: 64-bit\n", "")
        assert checked(*OURS, *flags) == theirs  # qemu-nbd 7.2 has not that line


def test_object_of_the_other_side_is_refused(pki: Path, image: Path, ours: Twin) -> None:
    flags = [word.replace("endpoint=server", "endpoint=client") for word in server_flags(pki)]
    assert "server endpoint" in ours.fails("-k", ours.socket, *flags, image).stderr
