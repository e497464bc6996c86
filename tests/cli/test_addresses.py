from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.cli.addresses import default_control, default_listen, parse_listen
from nbdfleece.errors import UsageError
from nbdfleece.nbd.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("unix:/run/a b", NbdUri(transport="unix", socket="/run/a b")),
        ("tcp:localhost", NbdUri(transport="tcp", host="localhost")),
        ("tcp:localhost:1", NbdUri(transport="tcp", host="localhost", port=1)),
        ("tcp::1", NbdUri(transport="tcp", host="", port=1)),
        ("tcp:[::1]:1", NbdUri(transport="tcp", host="::1", port=1)),
        ("vsock:3:10809", NbdUri(transport="vsock", cid=3)),
        ("vsock:any:1", NbdUri(transport="vsock", cid=0xFFFFFFFF, port=1)),
        ("nbd://h:2/", NbdUri(transport="tcp", host="h", port=2)),
        ("nbd+unix:///?socket=/s", NbdUri(transport="unix", socket="/s")),
        ("nbd:unix:/s", NbdUri(transport="unix", socket="/s")),
    ],
)
def test_address_is_read(text: str, uri: NbdUri) -> None:
    assert parse_listen(text) == uri


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "tcp", "tcp:::1", "tcp:h:70000", "vsock:3", "vsock:x:1", "http://h/", "/s"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)


@given(st.sampled_from(["", "unix:", "tcp:", "vsock:", "nbd:", "nbd://"]), st.text(max_size=12))
def test_any_text_is_read_or_refused(start: str, text: str) -> None:
    with suppress(UsageError):
        parse_listen(start + text)


def test_usual_places_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert default_control() == Path("/run/user/1/nbdfleece/control.sock")
    assert default_listen().socket == "/run/user/1/nbdfleece/nbd.sock"


def test_usual_places_of_root_need_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_control() == Path("/run/nbdfleece/control.sock")


def test_user_without_a_session_is_told_what_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="--listen and --control"):
        default_control()
