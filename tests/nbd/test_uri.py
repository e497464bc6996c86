"""NBD URIs: the specification's examples, what others print, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.errors import UsageError
from nbdfleece.nbd.uri import NbdUri, parse_uri

TCP = NbdUri(transport="tcp", host="example.com")
UNIX = NbdUri(transport="unix", socket="sock")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com/disk", NbdUri(transport="tcp", host="example.com", export="disk")),
        ("nbd+unix:///disk?socket=sock", NbdUri(transport="unix", socket="sock", export="disk")),
        ("nbd://example.com/", TCP),
        ("nbd://example.com", TCP),
        ("nbd://example.com//disk", NbdUri(transport="tcp", host="example.com", export="/disk")),
        (
            "nbd://example.com/hello%20world",
            NbdUri(transport="tcp", host="example.com", export="hello world"),
        ),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(transport="unix", socket="\0/abstract")),
        ("nbd://example.com:10809/", TCP),
    ],
)
def test_examples_of_the_specification(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd+unix://?socket=sock", UNIX),
        ("nbd+unix:///?socket=/tmp/a%20b+c", NbdUri(transport="unix", socket="/tmp/a b+c")),
        ("nbd://[::1]:99/x", NbdUri(transport="tcp", host="::1", port=99, export="x")),
        ("nbd:///x", NbdUri(transport="tcp", host="localhost", export="x")),
        ("nbd://", NbdUri(transport="tcp", host="localhost")),
        ("NBD://example.com", TCP),
        ("nbd://example.com:/", TCP),
        ("nbd+vsock:///x", NbdUri(transport="vsock", cid=2, export="x")),
        (
            "nbds+vsock://1:4000000000/",
            NbdUri(transport="vsock", tls=True, cid=1, port=4_000_000_000),
        ),
        (
            "nbds://alice@example.com/x?tls-type=psk&tls-psk-file=/k&tls-hostname=h",
            NbdUri(
                transport="tcp",
                tls=True,
                host="example.com",
                export="x",
                username="alice",
                tls_type="psk",
                tls_psk_file="/k",
                tls_hostname="h",
            ),
        ),
        (
            "nbds+unix://alice@/x?socket=s&tls-verify-peer=0&tls-certificates=/c",
            NbdUri(
                transport="unix",
                tls=True,
                socket="s",
                export="x",
                username="alice",
                tls_verify_peer=False,
                tls_certificates="/c",
            ),
        ),
    ],
)
def test_what_else_is_understood(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd:localhost:10809", NbdUri(transport="tcp", host="localhost")),
        ("nbd:[::1]:5:exportname=a:b", NbdUri(transport="tcp", host="::1", port=5, export="a:b")),
        ("nbd::5", NbdUri(transport="tcp", host="localhost", port=5)),
        ("nbd:unix:/s:exportname=x", NbdUri(transport="unix", socket="/s", export="x")),
        ("nbd:unix:/a:b", NbdUri(transport="unix", socket="/a:b")),
    ],
)
def test_older_form_of_qemu_is_understood(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (TCP, "nbd://example.com/"),
        (NbdUri(transport="tcp", host="::1", port=5, export="a/b c"), "nbd://[::1]:5/a/b%20c"),
        (NbdUri(transport="tcp", host="fe80::1%eth0"), "nbd://[fe80::1%25eth0]/"),
        (UNIX, "nbd+unix:///?socket=sock"),
        (
            NbdUri(transport="unix", tls=True, socket="/run/a&b", export="?x#"),
            "nbds+unix:///%3Fx%23?socket=/run/a%26b",
        ),
        (NbdUri(transport="vsock", port=5, export="x"), "nbd+vsock://2:5/x"),
        (
            NbdUri(transport="tcp", tls=True, host="h", tls_type="x509", tls_verify_peer=True),
            "nbds://h/?tls-type=x509&tls-verify-peer=1",
        ),
    ],
)
def test_specification_form_is_printed(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "disk.qcow2",
        "http://example.com/",
        "nbd",
        "nbd:",
        "nbds:h:5",
        "nbd:h",
        "nbd:h:99999",
        "nbd:h:x",
        "nbd:unix:",
        "nbd://h:99999/",
        "nbd://h:x/",
        "nbd://h:-1/",
        "nbd://[::1/",
        "nbd://::1/",
        "nbd://h:1:2/",
        "nbd://user:password@h/",
        "nbd://h/x#y",
        "nbd://h/a b",
        "nbd://h/a\nb",
        "nbd://h/%ff",
        "nbd://h/%00",
        "nbd://h/" + "x" * 4097,
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=s",
        "nbd://h/x?socket=s",
        "nbd://h/x?nonsense=1",
        "nbd://h/x?x-mine=1",
        "nbd://h/x?tls-type",
        "nbd://h/x?tls-type=magic",
        "nbd://h/x?tls-verify-peer=yes",
        "nbd+unix:///x?socket=a&socket=b",
        "nbd+vsock://host/",
        "nbd+vsock://4294967296/",
        "nbd+vsock://1:4294967296/",
    ],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(text)


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
HOSTS = st.sampled_from(["localhost", "example.com", "10.0.0.1", "::1", "fe80::1%eth0"])
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(NAMES, HOSTS, st.integers(0, 65535), st.booleans(), st.none() | NAMES.filter(bool))
def test_tcp_survives_printing_and_parsing(export, host, port, tls, user) -> None:
    uri = NbdUri(transport="tcp", tls=tls, export=export, host=host, port=port, username=user)
    assert parse_uri(str(uri)) == uri


@given(NAMES, PATHS, NAMES.filter(bool))
def test_unix_survives_printing_and_parsing(export, path, hostname) -> None:
    uri = NbdUri(transport="unix", export=export, socket=path, tls_hostname=hostname)
    assert parse_uri(str(uri)) == uri


def test_path_that_is_not_utf8_survives() -> None:
    uri = NbdUri(transport="unix", socket="/run/\udcff")
    assert str(uri) == "nbd+unix:///?socket=/run/%FF"
    assert parse_uri(str(uri)) == uri


@given(st.text(max_size=60).map(lambda text: "nbd://" + text) | st.text(max_size=60))
def test_noise_is_a_uri_or_a_usage_error(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UsageError:
        return
    assert parse_uri(str(uri)) == uri
