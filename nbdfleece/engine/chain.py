"""A disk's chain of checkpoints: the record that lives in the image.

The checkpoints stand in the order in which they were made. Each one owns the
bitmap of what changed from it to the next; the last one's bitmap is recording.
The changes from K to N are therefore the union of the bitmaps of K..N-1, and a
checkpoint is deleted by merging its bitmap into the one before.

The record is packed small, because it has to fit into the header cluster twice:
the encoding is MessagePack, deflated, and a bitmap that is named as its
checkpoint (the rule) costs no second name.
"""

from __future__ import annotations

import secrets
import zlib
from enum import IntEnum
from typing import Final

import msgspec

from ..errors import StateError

RECORD_BYTES_MAX: Final = 4 << 20
"""Bytes of an inflated record that are looked at; more cannot be an honest chain."""

NAME_BYTES_MAX: Final = 255
"""Bytes of a checkpoint's name, so that ``qemu:dirty-bitmap:NAME`` stays a short string on the
wire (proto.md, "Protocol phases": names should not be longer than 256 bytes)."""


class CheckpointState(IntEnum):
    """How far a checkpoint's life has got; what is not COMMITTED is settled at the next start."""

    COMMITTED = 0
    PENDING = 1
    """Its backup is not finished: it goes unless another disk of it has it committed."""
    DELETING = 2
    """Its deletion was decided: it goes on every disk."""


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True):
    """A named point in time, as one disk records it.

    Attributes:
        id: 16 hexadecimal digits; the same on every disk of the checkpoint.
        name: What people call it.
        created_ns: Nanoseconds since the epoch.
        size: Bytes of the disk then.
        owner: Whose it is; "" nobody's in particular.
        bitmap: The name of its bitmap in the image, if that is not ``name``.
        state: Settled or not.
        disks: Identities of all disks that it is made on, until it is settled.
    """

    id: str
    name: str
    created_ns: int
    size: int
    owner: str = ""
    bitmap: str = ""
    state: CheckpointState = CheckpointState.COMMITTED
    disks: tuple[str, ...] = ()

    @property
    def bitmap_name(self) -> str:
        """The name of its bitmap in the image."""
        return self.bitmap or self.name

    def in_state(self, state: CheckpointState) -> Checkpoint:
        """The same checkpoint in another state."""
        disks = self.disks if state is CheckpointState.PENDING else ()
        return msgspec.structs.replace(self, state=state, disks=disks)


class PendingChange(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True):
    """A change of bitmaps of several images that is under way (:mod:`.offline`).

    Attributes:
        operation: ``add``, ``remove``, ``clear``, ``enable``, ``disable`` or ``merge``.
        bitmap: The bitmap that it is about.
        id: The same on every image.
        disks: Identities of all images.
        names: Their file names at that time, for people.
        done: It has been done on this image.
        sources: What is merged into the bitmap.
        granularity: Of a bitmap that is added; 0 for the usual.
        recording: Whether a bitmap that is added records.
    """

    operation: str
    bitmap: str
    id: str = ""
    disks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    done: bool = False
    sources: tuple[str, ...] = ()
    granularity: int = 0
    recording: bool = True

    def describe(self, path: str) -> str:
        """What to say of an image on which it was interrupted, to whoever wants to use that."""
        return (
            f"{path}: '{self.operation}' of bitmap '{self.bitmap}' was interrupted on the images"
            f" {', '.join(self.names)}: run 'nbdfleece bitmap settle' with all of them"
        )


class JointChange(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True):
    """A transaction over the bitmaps of several disks that is under way (:mod:`.joint`).

    Attributes:
        id: The same on every disk.
        disks: Identities of all disks.
        renames: The names that bitmaps are to have, by the index in their names until then
            (:meth:`interim_name`); "" for one that the image does not hold.
        removed: The bitmaps that are to go.
        done: It has been done on this disk.
    """

    id: str
    disks: tuple[str, ...]
    renames: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    done: bool = False

    def interim_name(self, index: int) -> str:
        """What a bitmap is called until the transaction is done."""
        return f"{self.id}.{index}"

    @property
    def names(self) -> tuple[str, ...]:
        """All bitmaps that it is about."""
        interim = (self.interim_name(index) for index in range(len(self.renames)))
        return (*self.renames, *self.removed, *interim)


class Chain(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True):
    """The checkpoints of one disk, oldest first.

    Attributes:
        disk_id: 16 hexadecimal digits by which other disks' records name this disk; ""
            as long as the image holds no record.
        logged: Whether the stored bits of what records are kept a superset by activity
            logs, so that they can be believed although they are in use.
        change: A change of bitmaps that was begun on several images and not settled.
        joint: A transaction that was begun on several disks and not settled.
    """

    version: int = 1
    disk_id: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    logged: bool = False
    change: PendingChange | None = None
    joint: JointChange | None = None

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def newest(self) -> Checkpoint | None:
        """The checkpoint whose bitmap records."""
        return self.checkpoints[-1] if self.checkpoints else None

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of that name."""
        for checkpoint in self.checkpoints:
            if checkpoint.name == name:
                return checkpoint
        return None

    def index(self, name: str) -> int:
        """The place of a checkpoint.

        Raises:
            StateError: There is none of that name.
        """
        for index, checkpoint in enumerate(self.checkpoints):
            if checkpoint.name == name:
                return index
        raise StateError(f"there is no checkpoint '{name}'")

    def with_logs(self, logged: bool) -> Chain:
        """The chain of a disk whose recording bitmaps are logged, or not."""
        return msgspec.structs.replace(self, logged=logged)

    def with_change(self, change: PendingChange | None) -> Chain:
        """The chain of an image on which a change is under way, or not any more."""
        return msgspec.structs.replace(self, change=change)

    def with_joint(self, joint: JointChange | None) -> Chain:
        """The chain of a disk on which a transaction is under way, or not any more."""
        return msgspec.structs.replace(self, joint=joint)

    def with_identity(self) -> Chain:
        """The chain of a disk that can be named by others."""
        return msgspec.structs.replace(self, disk_id=self.disk_id or new_identity())

    def with_added(self, checkpoint: Checkpoint) -> Chain:
        """The chain with one more checkpoint at its end."""
        return msgspec.structs.replace(self, checkpoints=(*self.checkpoints, checkpoint))

    def without(self, name: str) -> Chain:
        """The chain without a checkpoint."""
        kept = tuple(each for each in self.checkpoints if each.name != name)
        return msgspec.structs.replace(self, checkpoints=kept)

    def without_checkpoints(self) -> Chain:
        """The chain of a disk that has none any more."""
        return msgspec.structs.replace(self, checkpoints=())

    def with_state(self, name: str, state: CheckpointState) -> Chain:
        """The chain with one checkpoint in another state."""
        changed = tuple(
            each.in_state(state) if each.name == name else each for each in self.checkpoints
        )
        return msgspec.structs.replace(self, checkpoints=changed)


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Chain)


def pack_chain(chain: Chain) -> bytes:
    """Encode a chain for the image's private header extension."""
    return zlib.compress(_encoder.encode(chain), 9)


def unpack_chain(record: bytes) -> Chain:
    """Decode a chain.

    Raises:
        StateError: The record is none of ours, or of a later version; the text says which.
    """
    inflate = zlib.decompressobj()
    try:
        packed = inflate.decompress(record, RECORD_BYTES_MAX)
        if inflate.unconsumed_tail:
            raise StateError(f"the chain record is larger than {RECORD_BYTES_MAX} bytes")
        chain = _decoder.decode(packed)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise StateError(f"the chain record cannot be decoded: {error}") from None
    if chain.version != 1:
        raise StateError(f"the chain record has version {chain.version}, this program knows 1")
    if len({each.name for each in chain.checkpoints}) != len(chain):
        raise StateError("the chain record names a checkpoint twice")
    return chain


def new_identity() -> str:
    """What no other checkpoint or disk is called by."""
    return secrets.token_hex(8)


def check_name(name: str, what: str) -> None:
    """Refuse names that cannot serve on the wire, in the image or in a message.

    Args:
        name: The name.
        what: What it is the name of.

    Raises:
        StateError: The name is empty, too long, or has characters that cannot be printed.
    """
    if not name.isprintable():
        raise StateError(f"the {what} name {name!r} has characters that cannot be printed")
    if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise StateError(
            f"the name of a {what} has 1 to {NAME_BYTES_MAX} bytes, '{name[:40]}' has not"
        )
