from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdfleece.control.errors import SessionError
from nbdfleece.control.protocol import (
    Answer,
    QmpProtocol,
    Request,
    pack_error,
    pack_event,
    pack_return,
)


def negotiated() -> QmpProtocol:
    protocol = QmpProtocol()
    protocol.receive_data(b'{"execute": "qmp_capabilities"}')
    assert isinstance(protocol.next_message(), Answer)
    return protocol


def answer(protocol: QmpProtocol, data: bytes) -> dict[str, Any]:
    protocol.receive_data(data)
    message = protocol.next_message()
    assert isinstance(message, Answer)
    assert message.data.endswith(b"\r\n")
    return dict(json.loads(message.data))


def failure(description: str, error_class: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": description}}


def test_greeting_has_qemus_shape() -> None:
    greeting = json.loads(QmpProtocol().greeting())
    assert greeting["QMP"]["capabilities"] == []
    assert set(greeting["QMP"]["version"]["qemu"]) == {"major", "minor", "micro"}
    assert greeting["QMP"]["version"]["package"].startswith("nbdfleece ")


def test_command_before_negotiation_is_refused() -> None:
    expected = failure(
        "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
    )
    assert answer(QmpProtocol(), b'{"execute": "query-version"}\n') == expected


def test_negotiation_repeats_the_id_and_enters_command_mode() -> None:
    protocol = QmpProtocol()
    text = b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": {"a": [1]}}'
    assert answer(protocol, text) == {"return": {}, "id": {"a": [1]}}
    assert protocol.in_command_mode


def test_negotiation_of_an_unknown_capability_is_refused_and_may_be_tried_again() -> None:
    protocol = QmpProtocol()
    text = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    assert answer(protocol, text) == failure('Capability "oob" not available')
    assert not protocol.in_command_mode
    assert answer(protocol, b'{"execute": "qmp_capabilities"}') == {"return": {}}


def test_second_negotiation_is_refused() -> None:
    assert answer(negotiated(), b'{"execute": "qmp_capabilities"}') == failure(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )


def test_request_carries_name_arguments_and_id() -> None:
    protocol = negotiated()
    protocol.receive_data(b'{"execute": "quit", "arguments": {"x": 1}, "id": null}')
    assert protocol.next_message() == Request("quit", {"x": 1}, None)
    assert protocol.next_message() is None


@pytest.mark.parametrize(
    ("text", "description"),
    [
        (b"[1]", "QMP input must be a JSON object"),
        (b"3\n", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute": 3}', "QMP input member 'execute' must be a string"),
        (b'{"execute": "a", "arguments": []}', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "a", "argumen": {}}', "QMP input member 'argumen' is unexpected"),
        (b'{"exec-oob": "a"}', "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_malformed_message_is_refused_in_qemus_words(text: bytes, description: str) -> None:
    assert answer(negotiated(), text) == failure(description)


@pytest.mark.parametrize("text", [b"nonsense\n", b"{]", b'{"a": "\xff"}', b'{"a": 1e999}'])
def test_text_that_is_not_json_is_refused_and_the_session_goes_on(text: bytes) -> None:
    protocol = negotiated()
    assert answer(protocol, text)["error"]["desc"].startswith("JSON parse error, ")
    protocol.receive_data(b'{"execute": "quit"}')
    assert isinstance(protocol.next_message(), Request)


def test_refused_message_repeats_its_id() -> None:
    assert answer(negotiated(), b'{"id": 3}')["id"] == 3


def test_return_and_error_repeat_the_id() -> None:
    assert json.loads(pack_return([1], "x")) == {"return": [1], "id": "x"}
    assert json.loads(pack_error("no", "DeviceNotFound", 4)) == {
        "error": {"class": "DeviceNotFound", "desc": "no"},
        "id": 4,
    }


def test_event_has_a_timestamp_of_seconds_and_microseconds() -> None:
    event = json.loads(pack_event("SHUTDOWN", {"guest": False}, 5_000_007_999))
    assert event == {
        "event": "SHUTDOWN",
        "data": {"guest": False},
        "timestamp": {"seconds": 5, "microseconds": 7},
    }


@given(st.binary(max_size=200))
def test_noise_is_answered_or_ends_the_session(data: bytes) -> None:
    protocol = negotiated()
    protocol.receive_data(data + b"\n")
    for _ in range(len(data) + 1):
        try:
            message = protocol.next_message()
        except SessionError:
            return
        if message is None:
            return
    raise AssertionError("more messages than bytes")
