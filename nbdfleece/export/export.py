"""Exports: what an NBD client can name, and the view behind it.

An export is a block node with a name, a direction (read-only or not) and the
metadata contexts that it offers. It knows nothing of sockets; the server turns
requests into calls of the node, and the contexts into block status replies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ..block.node import BlockNode
from ..errors import StateError
from .contexts import MetadataContext


@dataclass(slots=True, kw_only=True)
class Export:
    """One entry of the :class:`ExportTable`.

    Attributes:
        name: What the client asks for; "" is the default export.
        node: The bytes.
        description: For people; shown by LIST and INFO.
        read_only: Writes are refused whatever the node can do.
        can_trim: Whether TRIM is offered; on a read-only export it means "I am done with
            this range" and reaches the node's ``trim`` (design rule 1 holds for the rest).
        can_multi_conn: Whether clients are told that they may have several connections.
        contexts: The metadata contexts offered, in the order of LIST.
        minimum_block_size: Bytes, a power of two up to 64 KiB; smaller requests are refused.
        preferred_block_size: Bytes, a power of two; None for what the node prefers.
        maximum_payload: Bytes of data in one message; None for the server's limit.
        requires_block_size: Clients that do not ask for the block sizes are turned away.
        rotational: Clients are told that seeking is slow.
        tls_only: Shown and served over TLS only.
        connections_max: At most so many clients at once; None means no limit of its own.
        connections: How many clients have it open now; kept by the server.
    """

    name: str
    node: BlockNode
    description: str = ""
    read_only: bool = True
    can_trim: bool = False
    can_multi_conn: bool = True
    contexts: tuple[MetadataContext, ...] = ()
    minimum_block_size: int = 1
    preferred_block_size: int | None = None
    maximum_payload: int | None = None
    requires_block_size: bool = False
    rotational: bool = False
    tls_only: bool = False
    connections_max: int | None = None
    connections: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.node.size

    def context(self, name: str) -> MetadataContext | None:
        """The offered context of that name."""
        for context in self.contexts:
            if context.name == name:
                return context
        return None


class ExportTable:
    """The exports of a server by name, in the order in which they were added.

    Args:
        exports: The first ones.
        prepare: Called with each export before it is offered: may change it, or refuse it by
            an exception.
    """

    def __init__(
        self,
        exports: Iterable[Export] = (),
        prepare: Callable[[Export], None] = lambda export: None,
    ) -> None:
        self._exports: dict[str, Export] = {}
        self._prepare = prepare
        for export in exports:
            self.add(export)

    def add(self, export: Export) -> None:
        """Offer one more export.

        Raises:
            StateError: The name is taken.
        """
        if export.name in self._exports:
            raise StateError(f"export '{export.name}' exists already")
        self._prepare(export)
        self._exports[export.name] = export

    def remove(self, name: str) -> Export:
        """Stop offering an export; connected clients are the server's affair.

        Raises:
            StateError: There is none of that name.
        """
        try:
            return self._exports.pop(name)
        except KeyError:
            raise StateError(f"there is no export '{name}'") from None

    def has(self, name: str) -> bool:
        """Whether the name is taken."""
        return name in self._exports

    def find(self, name: str) -> Export | None:
        """The export of that name; "" also names the only export if there is just one."""
        if name == "" and "" not in self._exports and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._exports.values()))

    def __len__(self) -> int:
        return len(self._exports)
