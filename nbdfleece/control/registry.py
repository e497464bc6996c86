"""The commands that a server has: found by name, checked, described.

A command's fields are its arguments (``kebab-case`` on the wire) and its class's name is its
own: ``SnapshotCreate`` is ``snapshot-create``. What is wrong with arguments is said in QEMU's
words.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from .command import Command
from .drafts import final_form
from .errors import QmpError

AnyCommand = TypeVar("AnyCommand", bound=Command)

_CAPITAL: Final = re.compile(r"(?<!^)([A-Z])")

_KINDS: Final[dict[object, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


class CommandSchema(msgspec.Struct, kw_only=True):
    """A command, described: ``arguments`` and ``returns`` are JSON Schemas."""

    name: str
    description: str
    arguments: dict[str, Any]
    returns: dict[str, Any]


class Schema(msgspec.Struct, kw_only=True):
    """All commands; ``definitions`` holds the schemas that the others refer to."""

    commands: list[CommandSchema]
    definitions: dict[str, Any]


def command_name(command: type[Command]) -> str:
    """The name of a command on the wire."""
    return _CAPITAL.sub(r"-\1", command.__name__).lower()


class Registry:
    """Commands by name."""

    def __init__(self, commands: Iterable[type[Command]]) -> None:
        self._commands = {command_name(command): command for command in commands}

    @property
    def names(self) -> list[str]:
        """Of all commands, sorted."""
        return sorted(self._commands)

    def find(self, name: str) -> type[Command] | None:
        """The command of that name."""
        return self._commands.get(name)

    def build(self, name: str, arguments: Mapping[str, Any]) -> Command:
        """The command of that name, or draft name, with checked arguments.

        Raises:
            QmpError: There is none, or an argument is unknown, missing or of the wrong type.
        """
        final_name, arguments = final_form(name, arguments)
        command = self._commands.get(final_name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        return fill(command, arguments)

    def schema(self) -> Schema:
        """Describe all commands."""
        names = self.names
        asked: list[Any] = []
        for name in names:
            returned = typing.get_type_hints(self._commands[name].run)["return"]
            asked += [self._commands[name], dict[str, Any] if returned is type(None) else returned]
        schemas, definitions = msgspec.json.schema_components(
            asked, ref_template="#/definitions/{name}"
        )
        described = [
            CommandSchema(
                name=name,
                description=inspect.getdoc(self._commands[name]) or "",
                arguments=schemas[2 * index],
                returns=schemas[2 * index + 1],
            )
            for index, name in enumerate(names)
        ]
        return Schema(commands=described, definitions=definitions)


def fill(command: type[AnyCommand], arguments: Mapping[str, Any], where: str = "") -> AnyCommand:
    """A command with checked arguments.

    Args:
        command: Its class.
        arguments: As they were sent.
        where: What messages put before arguments' names: where they are inside others.

    Raises:
        QmpError: An argument is unknown, missing or of the wrong type.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(command)}
    for argument in arguments:
        if argument not in fields:
            raise QmpError(f"Parameter '{where}{argument}' is unexpected")
    values = {}
    for argument, field in fields.items():
        if argument in arguments:
            values[field.name] = _convert(where + argument, arguments[argument], field.type)
        elif field.required:
            raise QmpError(f"Parameter '{where}{argument}' is missing")
    return command(**values)


def _convert(argument: str, value: Any, wanted: Any) -> Any:
    """A value of an argument's type.

    Raises:
        QmpError: It is of another; the top level in QEMU's words.
    """
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        kinds = [_kind(each) for each in _alternatives(wanted)]
        if isinstance(value, str) and typing.get_origin(wanted) is typing.Literal:
            raise QmpError(f"Parameter '{argument}' does not accept value '{value}'") from None
        if _kind(type(value)) not in kinds:
            raise QmpError(
                f"Invalid parameter type for '{argument}', expected: {kinds[0]}"
            ) from None
        raise QmpError(f"Invalid parameter '{argument}': {error}") from None


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)


def _kind(wanted: Any) -> str:
    """JSON's name of a type: of a struct an object, of a set of literals a string."""
    if typing.get_origin(wanted) is typing.Literal:
        return "string"
    return _KINDS.get(typing.get_origin(wanted) or wanted, "object")
