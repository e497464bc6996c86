from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from nbdfleece.control.command import Command
from nbdfleece.control.commands import all_commands
from nbdfleece.control.controlled import Controlled
from nbdfleece.control.errors import QmpError
from nbdfleece.control.registry import Registry, command_name


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    number: int


class DoTheThing(Command):
    """Does it."""

    node_name: str
    mode: Literal["safe", "hard"] = "safe"
    names: list[str] | None = None
    granularity: int | None = None
    persistent: bool = False
    inner: Inner | None = None

    async def run(self, server: Controlled) -> list[Inner]:
        return []


REGISTRY = Registry([DoTheThing])


def build(**arguments: Any) -> DoTheThing:
    command = REGISTRY.build("do-the-thing", {"node-name": "n", **arguments})
    assert isinstance(command, DoTheThing)
    return command


def test_name_is_the_class_name_in_kebab_case() -> None:
    assert command_name(DoTheThing) == "do-the-thing"


def test_arguments_are_kebab_case_and_have_defaults() -> None:
    assert build() == DoTheThing(node_name="n")


def test_null_stands_for_an_argument_left_out() -> None:
    assert build(names=None) == DoTheThing(node_name="n")


def test_nested_arguments_are_structs() -> None:
    assert build(inner={"number": 3}).inner == Inner(3)


def test_unknown_command_is_refused() -> None:
    with pytest.raises(QmpError, match="The command x has not been found") as caught:
        REGISTRY.build("x", {})
    assert caught.value.error_class == "CommandNotFound"


@pytest.mark.parametrize(
    ("arguments", "description"),
    [
        ({}, "Parameter 'node-name' is missing"),
        ({"node-name": "n", "x": 1}, "Parameter 'x' is unexpected"),
        ({"node_name": "n"}, "Parameter 'node_name' is unexpected"),
        ({"node-name": 3}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": None}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": "n", "names": "a"}, "Invalid parameter type for 'names', expected: array"),
        (
            {"node-name": "n", "granularity": "a"},
            "Invalid parameter type for 'granularity', expected: integer",
        ),
        (
            {"node-name": "n", "persistent": 1},
            "Invalid parameter type for 'persistent', expected: boolean",
        ),
        ({"node-name": "n", "mode": 1}, "Invalid parameter type for 'mode', expected: string"),
        ({"node-name": "n", "mode": "x"}, "Parameter 'mode' does not accept value 'x'"),
        ({"node-name": "n", "inner": 1}, "Invalid parameter type for 'inner', expected: object"),
        (
            {"node-name": "n", "inner": {"number": 1, "x": 2}},
            "Invalid parameter 'inner': Object contains unknown field `x`",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_qemus_words(
    arguments: dict[str, Any], description: str
) -> None:
    with pytest.raises(QmpError) as caught:
        REGISTRY.build("do-the-thing", arguments)
    assert str(caught.value) == description


def test_schema_describes_arguments_and_returns() -> None:
    schema = REGISTRY.schema()
    (command,) = schema.commands
    assert (command.name, command.description) == ("do-the-thing", "Does it.")
    assert command.arguments == {"$ref": "#/definitions/DoTheThing"}
    assert command.returns == {"type": "array", "items": {"$ref": "#/definitions/Inner"}}
    assert set(schema.definitions["DoTheThing"]["properties"]) == {
        "node-name",
        "mode",
        "names",
        "granularity",
        "persistent",
        "inner",
    }


def test_every_command_is_documented_and_described() -> None:
    commands = all_commands().schema().commands
    assert len(commands) == len(all_commands().names)
    for command in commands:
        assert command.description, command.name
        assert not command.description.startswith("A command with its arguments"), command.name
