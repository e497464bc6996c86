"""The qcow2 header: decoding, checking and encoding of the first cluster.

The header, its extensions and the backing file's name lie in the first cluster.
Everything that this module does not know and the format lets pass (compatible
feature bits, header extensions, header fields past the known ones) is kept byte
for byte. No number is believed before it has been checked against QEMU's limits
and the size of the file.

Spec: qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Final

from ..errors import ImageError, UnsupportedImageError

MAGIC: Final = 0x514649FB
CLUSTER_BITS_MIN: Final = 9
CLUSTER_BITS_MAX: Final = 21
CLUSTER_BITS_MIN_EXTENDED_L2: Final = 14
L1_BYTES_MAX: Final = 32 << 20
REFCOUNT_TABLE_BYTES_MAX: Final = 8 << 20
SNAPSHOTS_MAX: Final = 65536
BACKING_NAME_BYTES_MAX: Final = 1023
REFCOUNT_ORDER_MAX: Final = 6
SIZE_MAX: Final = (1 << 63) - 1
"""QEMU's limits (block/qcow2.h)."""

HEADER_BYTES_MAX: Final = 1 << CLUSTER_BITS_MAX
"""What to read from the file's start to be sure to have the first cluster."""

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_DATA_FILE: Final = 0x44415441

_V2: Final = struct.Struct(">IIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_FEATURE_NAME: Final = struct.Struct(">BB46s")
HEADER_BYTES_V2: Final = 72
HEADER_BYTES_V3_MIN: Final = 104
HEADER_BYTES_V3: Final = 112

SIZE_FIELD: Final = 24
L1_SIZE_FIELD: Final = 36
"""Offset of the 12 bytes ``u32 l1_size, u64 l1_table_offset``."""
REFCOUNT_TABLE_FIELD: Final = 48
"""Offset of the 12 bytes ``u64 refcount_table_offset, u32 refcount_table_clusters``."""
INCOMPATIBLE_FIELD: Final = 72
AUTOCLEAR_FIELD: Final = 88


class Incompatible(IntFlag):
    """Features without which the image must not be opened."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Features that a program which does not know them clears before it writes."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1
    PRIVATE = 1 << 63
    """Ours: nobody else has written the image since (:mod:`nbdfleece.qcow2.private_extension`)."""


_INCOMPATIBLE_KNOWN: Final = 0x1F

_FEATURE_NAMES: Final = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
"""``(kind, bit, name)``: kind 0 incompatible, 1 compatible, 2 autoclear."""


@dataclass(slots=True)
class HeaderExtension:
    """One header extension.

    ``offset_in_file`` is where its data begin, in bytes; 0 until the header is placed.
    """

    type: int
    data: bytes
    offset_in_file: int = 0


@dataclass(slots=True)
class Header:
    """The header's fields under the specification's names, sizes and offsets in bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = HEADER_BYTES_V3
    compression_type: int = 0
    unknown_fields: bytes = b""
    """What lies between the known fields and ``header_length``."""
    extensions: list[HeaderExtension] = field(default_factory=list)
    backing_file: bytes | None = None

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Bits per refcount."""
        return 1 << self.refcount_order

    @property
    def has_extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes and clusters 32 subclusters."""
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest clusters lie in an external data file."""
        return bool(self.incompatible_features & Incompatible.DATA_FILE)

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which is one cluster."""
        return self.cluster_size // (16 if self.has_extended_l2 else 8)

    @property
    def backing_format(self) -> str | None:
        """The backing file's format as the image names it."""
        return self._extension_text(EXTENSION_BACKING_FORMAT)

    @property
    def data_file(self) -> str | None:
        """The external data file's name as the image gives it."""
        return self._extension_text(EXTENSION_DATA_FILE)

    def extension(self, extension_type: int) -> HeaderExtension | None:
        """The first extension of the type, or None."""
        for extension in self.extensions:
            if extension.type == extension_type:
                return extension
        return None

    def _extension_text(self, extension_type: int) -> str | None:
        extension = self.extension(extension_type)
        if extension is None:
            return None
        return extension.data.decode("utf-8", "surrogateescape")


def feature_names_extension() -> HeaderExtension:
    """The table that tells other programs the names of the feature bits."""
    rows = [_FEATURE_NAME.pack(kind, bit, name) for kind, bit, name in _FEATURE_NAMES]
    return HeaderExtension(EXTENSION_FEATURE_NAMES, b"".join(rows))


def unpack_header(data: bytes | bytearray, path: str, file_size: int) -> Header:
    """Decode and check the header, its extensions and the backing file's name.

    Args:
        data: The file's first bytes, at least one cluster or the whole file.
        path: The image's name, for messages.
        file_size: Bytes of the file.

    Raises:
        ImageError: It is no qcow2 image, or it is damaged.
        UnsupportedImageError: It needs a feature that we do not have.
    """
    header, backing = _unpack_fields(data, path)
    if header.version >= 3:
        _unpack_v3_fields(header, data, path)
    _check_features(header, path)
    backing_offset, backing_bytes = backing
    if backing_offset:
        header.backing_file = _backing_name(header, data, path, backing_offset, backing_bytes)
    header.extensions = _unpack_extensions(header, data, path, backing_offset)
    _check_unknown_features(header, path)
    _check_tables(header, path, file_size)
    return header


def _unpack_fields(data: bytes | bytearray, path: str) -> tuple[Header, tuple[int, int]]:
    """The version 2 fields, and ``(offset, length)`` of the backing file's name."""
    if len(data) < HEADER_BYTES_V2 or data[:4] != MAGIC.to_bytes(4, "big"):
        raise ImageError(path, "not a qcow2 image")
    (
        _magic,
        version,
        backing_offset,
        backing_bytes,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        snapshot_count,
        snapshots_offset,
    ) = _V2.unpack_from(data)
    if version not in (2, 3):
        raise UnsupportedImageError(path, f"qcow2 version {version} is not supported")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ImageError(
            path, "bad cluster_bits", offset=20, expected="9 to 21", found=cluster_bits
        )
    _check_encryption(path, crypt_method)
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        header_length=HEADER_BYTES_V2,
    )
    return header, (backing_offset, backing_bytes)


def _check_encryption(path: str, crypt_method: int) -> None:
    names = {1: "AES", 2: "LUKS"}
    if crypt_method in names:
        raise UnsupportedImageError(path, f"{names[crypt_method]} encryption is not supported")
    if crypt_method:
        raise ImageError(path, "bad crypt_method", offset=32, expected="0 to 2", found=crypt_method)


def _unpack_v3_fields(header: Header, data: bytes | bytearray, path: str) -> None:
    """Fill in what version 3 added."""
    if len(data) < HEADER_BYTES_V3_MIN:
        raise ImageError(path, "the file ends inside the header")
    (
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
        header.refcount_order,
        header.header_length,
    ) = _V3.unpack_from(data, HEADER_BYTES_V2)
    length = header.header_length
    if not HEADER_BYTES_V3_MIN <= length <= min(header.cluster_size, len(data)):
        raise ImageError(
            path,
            "bad header length",
            offset=100,
            expected=f"{HEADER_BYTES_V3_MIN} to the cluster size",
            found=length,
        )
    if header.refcount_order > REFCOUNT_ORDER_MAX:
        raise ImageError(
            path, "bad refcount order", offset=96, expected="0 to 6", found=header.refcount_order
        )
    if length > HEADER_BYTES_V3_MIN:
        header.compression_type = data[HEADER_BYTES_V3_MIN]
        header.unknown_fields = bytes(data[HEADER_BYTES_V3_MIN + 1 : length])


def _check_features(header: Header, path: str) -> None:
    """Feature bits that must agree with other fields."""
    has_type = bool(header.incompatible_features & Incompatible.COMPRESSION)
    if has_type != (header.compression_type != 0):
        raise ImageError(path, "the compression type and its feature bit disagree", offset=104)
    if header.compression_type > 1:
        raise UnsupportedImageError(
            path, f"compression type {header.compression_type} is not supported"
        )
    if header.has_extended_l2 and header.cluster_bits < CLUSTER_BITS_MIN_EXTENDED_L2:
        raise ImageError(path, "extended L2 entries need clusters of 16 KiB at least", offset=20)


def _backing_name(
    header: Header, data: bytes | bytearray, path: str, offset: int, length: int
) -> bytes:
    """The backing file's name, which lies in the first cluster and is not NUL-ended."""
    if length > BACKING_NAME_BYTES_MAX:
        raise ImageError(path, "the backing file's name is too long", offset=16, found=length)
    if not header.header_length <= offset <= min(header.cluster_size, len(data)) - length:
        raise ImageError(path, "the backing file's name is not in the first cluster", offset=8)
    return bytes(data[offset : offset + length])


def _unpack_extensions(
    header: Header, data: bytes | bytearray, path: str, backing_offset: int
) -> list[HeaderExtension]:
    """All extensions up to the end mark, the backing name or the end of the first cluster."""
    end = min(backing_offset or header.cluster_size, len(data))
    position = header.header_length
    extensions: list[HeaderExtension] = []
    while position + _EXTENSION.size <= end:
        extension_type, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if extension_type == EXTENSION_END:
            break
        if length > end - position:
            raise ImageError(
                path, f"header extension {extension_type:#010x} is too long", offset=position - 4
            )
        content = bytes(data[position : position + length])
        extensions.append(HeaderExtension(extension_type, content, position))
        position += -(-length // 8) * 8
    return extensions


def _check_unknown_features(header: Header, path: str) -> None:
    """Refuse incompatible features that we do not know, by the image's own names for them."""
    unknown = header.incompatible_features & ~_INCOMPATIBLE_KNOWN
    if not unknown:
        return
    names = _feature_names(header)
    bits = [bit for bit in range(64) if unknown >> bit & 1]
    text = ", ".join(names.get(bit, f"incompatible feature bit {bit}") for bit in bits)
    raise UnsupportedImageError(path, f"the image needs features that are not supported: {text}")


def _feature_names(header: Header) -> dict[int, str]:
    """The image's names of incompatible feature bits."""
    table = header.extension(EXTENSION_FEATURE_NAMES)
    if table is None:
        return {}
    whole = len(table.data) // _FEATURE_NAME.size * _FEATURE_NAME.size
    return {
        bit: name.rstrip(b"\0").decode("utf-8", "replace")
        for kind, bit, name in _FEATURE_NAME.iter_unpack(table.data[:whole])
        if kind == 0
    }


def _check_tables(header: Header, path: str, file_size: int) -> None:
    """The sizes and places of L1, refcount table and snapshot table."""
    if header.size > SIZE_MAX:
        raise ImageError(path, "the disk is too large", offset=24, found=header.size)
    cluster_bytes = header.refcount_table_clusters << header.cluster_bits
    _check_table(header, path, file_size, "L1 table", header.l1_table_offset,
                 header.l1_size * 8, L1_BYTES_MAX)  # fmt: skip
    _check_table(header, path, file_size, "refcount table", header.refcount_table_offset,
                 cluster_bytes, REFCOUNT_TABLE_BYTES_MAX)  # fmt: skip
    if not cluster_bytes:
        raise ImageError(path, "the image has no refcount table", offset=56)
    if header.snapshot_count > SNAPSHOTS_MAX:
        raise ImageError(
            path, "too many internal snapshots", offset=60, found=header.snapshot_count
        )
    if header.snapshot_count:
        # A snapshot's entry has 40 bytes at least.
        _check_table(header, path, file_size, "snapshot table", header.snapshots_offset,
                     header.snapshot_count * 40, 64 << 20)  # fmt: skip
    covered = header.l1_size * header.l2_entries << header.cluster_bits
    if covered < header.size:
        raise ImageError(path, "the L1 table is too small for the disk", offset=36,
                         expected=header.size, found=covered)  # fmt: skip


def _check_table(
    header: Header, path: str, file_size: int, name: str, offset: int, length: int, length_max: int
) -> None:
    """A table is aligned, of a sane size, after the header and inside the file."""
    if length > length_max:
        raise ImageError(path, f"the {name} is too large", expected=f"at most {length_max}",
                         found=length)  # fmt: skip
    if not length:
        return
    if offset % header.cluster_size or not offset:
        raise ImageError(path, f"the {name} is not at a cluster's start", offset=offset)
    if offset + length > -(-file_size // header.cluster_size) * header.cluster_size:
        raise ImageError(path, f"the {name} lies past the end of the file", offset=offset)


def place_extensions(header: Header) -> int:
    """Give every extension its place, in order, and return where the end mark goes."""
    position = header.header_length
    for extension in header.extensions:
        extension.offset_in_file = position + _EXTENSION.size
        position = extension.offset_in_file + -(-len(extension.data) // 8) * 8
    return position


def pack_header(header: Header, path: str) -> bytes:
    """Encode the first cluster: fields, extensions in their order, end mark, backing name.

    The extensions' ``offset_in_file`` are updated.

    Raises:
        ImageError: It does not fit the first cluster.
    """
    end = place_extensions(header) + _EXTENSION.size
    backing = header.backing_file
    if end + len(backing or b"") > header.cluster_size:
        raise ImageError(path, f"the header does not fit a cluster of {header.cluster_size} bytes")
    cluster = bytearray(header.cluster_size)
    cluster[: header.header_length] = pack_fields(header, end if backing is not None else 0)
    for extension in header.extensions:
        start = extension.offset_in_file
        _EXTENSION.pack_into(cluster, start - 8, extension.type, len(extension.data))
        cluster[start : start + len(extension.data)] = extension.data
    if backing is not None:
        cluster[end : end + len(backing)] = backing
    return bytes(cluster)


def pack_fields(header: Header, backing_offset: int) -> bytes:
    """Encode the first ``header_length`` bytes."""
    fields = _V2.pack(
        MAGIC,
        header.version,
        backing_offset,
        len(header.backing_file or b""),
        header.cluster_bits,
        header.size,
        0,
        header.l1_size,
        header.l1_table_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    )
    if header.version == 2:
        return fields
    fields += _V3.pack(
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
        header.refcount_order,
        header.header_length,
    )
    if header.header_length > HEADER_BYTES_V3_MIN:
        fields += bytes([header.compression_type]) + header.unknown_fields
    return fields.ljust(header.header_length, b"\0")
