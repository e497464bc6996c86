"""How an operator names a block node: file names and QEMU's options, read into one form.

All of these become an :class:`Options`, in which dotted keys are nested::

    disk.qcow2                                              a plain file name
    file:disk.qcow2, host_device:/dev/vg/lv                 the same, with its protocol
    json:{"driver": "qcow2", "file": {"filename": "a"}}     options as JSON
    driver=qcow2,file.filename=a                            options as ``--image-opts`` has them

Values from a string are strings, so numbers and switches are read where they are asked for.

Spec: QEMU docs/interop (``json:``), qemu-nbd(8), ``BlockdevOptions`` in qapi/block-core.json.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from ..errors import UsageError

JSON_PREFIX: Final = "json:"

_PROTOCOL: Final = re.compile(r"([^/:]*):")
_FILE_PROTOCOLS: Final = ("file", "host_device")
_SIZE: Final = re.compile(r"(\d{1,20})([bBkKmMgGtTpPeE]?)", re.ASCII)
_SIZE_END: Final = 1 << 63
_SWITCHES: Final = {"on": True, "yes": True, "true": True, "y": True} | {
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}


class Options:
    """The options of one node, each to be taken once; what is left at the end is refused.

    Args:
        values: Strings, numbers, booleans, None, and mappings of the same for child nodes;
            what is taken is taken out.
        where: How messages name the node: ``""`` for the outermost, else ``"file."`` and so on.
    """

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def add_defaults(self, values: dict[str, Any]) -> None:
        """Take these for what is not given."""
        self.values = values | self.values

    def take_text(self, name: str, *choices: str) -> str | None:
        """A string, one of ``choices`` if there are any; None if it is not given.

        Raises:
            UsageError: It is something else.
        """
        value = self.values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or (choices and value not in choices):
            wanted = f"one of {', '.join(choices)}" if choices else "a string"
            raise UsageError(f"option '{self.where}{name}' is to be {wanted}, not {_show(value)}")
        return value

    def take_size(self, name: str) -> int | None:
        """A number of bytes, of a string with one of QEMU's suffixes; None if not given.

        Raises:
            UsageError: It is none, or it is too large.
        """
        value = self.values.pop(name, None)
        if value is None:
            return None
        if isinstance(value, str):
            return parse_size(value, f"option '{self.where}{name}'")
        if type(value) is not int or not 0 <= value < _SIZE_END:
            raise UsageError(f"option '{self.where}{name}' is to be a size, not {_show(value)}")
        return value

    def take_switch(self, name: str) -> bool | None:
        """On or off; None if it is not given.

        Raises:
            UsageError: It is neither.
        """
        value = self.values.pop(name, None)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str) and value in _SWITCHES:
            return _SWITCHES[value]
        raise UsageError(f"option '{self.where}{name}' is to be on or off, not {_show(value)}")

    def take_child(self, name: str) -> Options | None:
        """The options of a child node; None if there are none.

        Raises:
            UsageError: It names a node, and there are no nodes with names.
        """
        value = self.values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UsageError(
                f"option '{self.where}{name}' is {_show(value)}: give the node's own options,"
                f" such as '{self.where}{name}.filename'"
            )
        return Options(value, f"{self.where}{name}.")

    def take_nothing(self, name: str) -> bool:
        """Whether a child is said to be none: null, or an empty string."""
        if name in self.values and self.values[name] in (None, ""):
            del self.values[name]
            return True
        return False

    def take_any(self, name: str) -> bool:
        """Whether an option was given, whatever it is."""
        return self.values.pop(name, _MISSING) is not _MISSING

    def finish(self, driver: str) -> None:
        """Refuse what was not taken.

        Raises:
            UsageError: There is something; the text names it.
        """
        for name in self.values:
            raise UsageError(f"driver '{driver}' does not support the option '{self.where}{name}'")


_MISSING: Final = object()


def parse_name(text: str) -> Options:
    """Read a file name, with its protocol or as ``json:``.

    Raises:
        UsageError: The protocol is not supported, or the JSON cannot be meant.
    """
    if text.startswith(JSON_PREFIX):
        return parse_json_options(text.removeprefix(JSON_PREFIX))
    driver, name = split_protocol(text)
    file = {"filename": name} if driver is None else {"driver": driver, "filename": name}
    return Options({"file": file})


def split_protocol(text: str) -> tuple[str | None, str]:
    """A file name without the name of its driver, which stands before a colon.

    Raises:
        UsageError: There is another protocol.
    """
    match = _PROTOCOL.match(text)
    if match is None:
        return None, text
    if match[1] not in _FILE_PROTOCOLS:
        raise UsageError(
            f"'{text}': protocol '{match[1]}' is not supported (a file of that name is './{text}')"
        )
    return match[1], text[match.end() :]


def parse_image_opts(text: str) -> Options:
    """Read ``driver=qcow2,file.filename=NAME``; a comma in a value is written twice.

    Raises:
        UsageError: A key has no value, or two keys contradict one another.
    """
    flat: dict[str, Any] = {}
    for part in split_commas(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"'{part}' is no option: options are KEY=VALUE, divided by commas")
        if key in flat:
            raise UsageError(f"option '{key}' is given twice")
        flat[key] = value
    return Options(_nest(flat))


def parse_json_options(text: str) -> Options:
    """Read a JSON object.

    Raises:
        UsageError: It is none.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{text}' is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"'{text}' is not a JSON object")
    return Options(found)


def split_commas(text: str) -> list[str]:
    """The parts of ``a,b``, in which ``,,`` stands for a comma in a part."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def parse_size(text: str, what: str) -> int:
    """Read a size with one of QEMU's suffixes, all of them powers of 1024.

    Raises:
        UsageError: It is none; ``what`` says where it stood.
    """
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << 10 * "bkmgtpe".index(match[2].lower() or "b") if match else _SIZE_END
    if size >= _SIZE_END:
        raise UsageError(f"{what} is to be a size such as 512, 64k or 1G, not '{text}'")
    return size


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys may be dotted; no key may come twice."""
    flat = dict(pairs)
    if len(flat) < len(pairs):
        raise UsageError("an option comes twice in the JSON object")
    return _nest(flat)


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into mappings within mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UsageError(f"option '{key}': '{name}' has a value of its own already")
        if last in place:
            raise UsageError(f"option '{key}' is given twice, or has options of its own")
        place[last] = value
    return nested


def _show(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)
