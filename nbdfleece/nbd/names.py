"""Strings of the protocol, and the query language of metadata contexts.

Strings are UTF-8 without NUL, at most 4096 bytes. A context's name is ``namespace:leaf``.
A query that is a context's full name finds that context. In LIST_META_CONTEXT these queries
find more than one:

===========================  =========================================
``base:``                    every context of the namespace ``base``
``qemu:``                    every context of the namespace ``qemu``
``qemu:dirty-bitmap:``       every dirty bitmap
===========================  =========================================

SET_META_CONTEXT selects by full names only. Names compare exactly. A query for something else,
or without a namespace, finds nothing and is no error.

Spec: proto.md, "Protocol phases" (strings), "Metadata querying"; QEMU docs/interop/nbd.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ..errors import UsageError
from .constants import STRING_BYTES_MAX, OptionReply
from .errors import OptionError

LIST_WILDCARDS: Final = frozenset({"base:", "qemu:", "qemu:dirty-bitmap:"})
"""Queries of LIST_META_CONTEXT that stand for all names that begin with them."""

QUOTED_CHARACTERS_MAX: Final = 80
"""Characters of a name that a message repeats."""


def check_string(text: str, what: str) -> None:
    """Check a string that the server is to send.

    Raises:
        UsageError: It cannot be sent; ``what`` names it.
    """
    if "\0" in text:
        raise UsageError(f"{what} contains a NUL character")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what} cannot be written as UTF-8") from None
    if length > STRING_BYTES_MAX:
        raise UsageError(f"{what} has {length} bytes, but {STRING_BYTES_MAX} is the most")


def check_context_names(names: Sequence[str]) -> None:
    """Check the names of the metadata contexts of an export.

    Raises:
        UsageError: A name is not ``namespace:leaf``, is one of the wildcards, or comes twice.
    """
    for name in names:
        check_string(name, "metadata context name")
        namespace, _, leaf = name.partition(":")
        if not namespace or not leaf or name in LIST_WILDCARDS:
            raise UsageError(f"metadata context name '{name}' is not 'namespace:leaf'")
    if len(set(names)) != len(names):
        raise UsageError("a metadata context name is given twice")


def decode_string(data: bytes | memoryview, what: str) -> str:
    """Decode a string that a client sent.

    Raises:
        OptionError: Too long, a NUL in it, or not UTF-8: ERR_INVALID; ``what`` names it.
    """
    if len(data) > STRING_BYTES_MAX:
        raise OptionError(
            OptionReply.ERR_INVALID,
            f"the {what} has {len(data)} bytes, but {STRING_BYTES_MAX} is the most",
        )
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        raise OptionError(OptionReply.ERR_INVALID, f"the {what} is not UTF-8") from None
    if "\0" in text:
        raise OptionError(OptionReply.ERR_INVALID, f"the {what} contains a NUL character")
    return text


def list_contexts(names: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The contexts that LIST_META_CONTEXT shows, in the order of ``names``.

    Args:
        names: What the export offers.
        queries: What the client asks for; none at all means everything.
    """
    if not queries:
        return list(names)
    prefixes = tuple(LIST_WILDCARDS.intersection(queries))
    wanted = frozenset(queries)
    return [name for name in names if name in wanted or name.startswith(prefixes)]


def select_contexts(names: Sequence[str], queries: Iterable[str]) -> list[tuple[int, str]]:
    """The contexts that SET_META_CONTEXT selects, each once, with its id.

    Args:
        names: What the export offers; a context's id is its place here.
        queries: What the client asks for; only full names select.
    """
    wanted = frozenset(queries)
    return [(index, name) for index, name in enumerate(names) if name in wanted]


def quote_name(name: str) -> str:
    """A name for a message: printable, and short whatever a client sent."""
    shown = name if len(name) <= QUOTED_CHARACTERS_MAX else name[:QUOTED_CHARACTERS_MAX] + "…"
    return "'" + "".join(c if c.isprintable() else "�" for c in shown) + "'"
