"""Header extensions and the chain record: what moves them, what keeps them, who is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.errors import StateError
from nbdfleece.qcow2.bitmap_store import BitmapStore
from nbdfleece.qcow2.extension_area import PLACEHOLDER_MAGIC, scan_extension_area
from nbdfleece.qcow2.header import Autoclear
from nbdfleece.qcow2.image import Qcow2Image
from nbdfleece.qcow2.private_extension import EXTENSION_MAGIC
from tests.qcow2.bitmap_image import (
    check_image,
    create,
    listed_bitmaps,
    qemu_dirty_ranges,
    qemu_img,
)
from tests.qcow2.stored_bitmaps import (
    BITMAPS_EXTENSION,
    MIB,
    NEW_BITS,
    check_clean,
    extension_types,
    frozen,
    header_features,
    insert_extension,
    kept,
    load_from,
    marked,
    qemu_io,
    recording,
    store_in,
)


@pytest.fixture
def path(folder: Path) -> Path:
    return create(folder / "disk.qcow2")


async def test_private_bit_and_record_survive_what_only_reads(path: Path) -> None:
    await store_in(path, [frozen("a", marked(10 * MIB, 65536, seed=6))], b"record")
    qemu_img("check", path)
    qemu_img("info", path)
    qemu_img("convert", "-O", "raw", path, path.with_suffix(".raw"))
    qemu_dirty_ranges(path, "a")
    store, _ = await load_from(path)
    assert store.private_bit_was_set
    assert store.record == (b"record", True)


async def test_qemu_opening_for_writing_clears_the_bit_but_keeps_the_record(path: Path) -> None:
    await store_in(path, [frozen("a", marked(10 * MIB, 65536, seed=6))], b"record")
    qemu_io(path, "write 0 4k")
    assert not header_features(path) & Autoclear.PRIVATE
    store, _ = await load_from(path)
    assert not store.private_bit_was_set
    assert store.record == (b"record", False)


async def test_record_stays_stale_until_it_is_stored_again(path: Path) -> None:
    """What QEMU may have changed is not called fresh because of an unrelated change of ours."""
    bits = marked(10 * MIB, 65536, seed=6)
    await store_in(path, [frozen("a", bits)], b"record")
    qemu_io(path, "write 0 4k")
    await store_in(path, [frozen("a", bits), frozen("b", bits)], None)
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    assert not store.private_bit_was_set
    await store_in(path, [kept("a")], b"again")
    store, _ = await load_from(path)
    assert store.record == (b"again", True)
    assert store.private_bit_was_set


async def test_replace_without_payload_keeps_the_record_in_force(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=6)
    await store_in(path, [frozen("a", bits)], b"record")
    await store_in(path, [kept("a"), frozen("b", bits)], None)
    store, _ = await load_from(path)
    assert store.record == (b"record", True)
    assert store.private_bit_was_set


async def test_writer_that_keeps_no_promise_makes_the_record_stale(path: Path) -> None:
    await store_in(path, [recording("live", NEW_BITS, in_use=False)], b"record")
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert store.record == (b"record", True)
    await store.mark_in_use()
    assert store.record == (b"record", False)
    await image.close()
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    assert not store.private_bit_was_set
    await store_in(path, [recording("live", NEW_BITS, in_use=False)], b"anew")
    store, _ = await load_from(path)
    assert store.record == (b"anew", True)
    assert store.private_bit_was_set


@pytest.mark.parametrize("has_data_file", [False, True])
async def test_opening_for_writing_clears_foreign_autoclear_bits_only(
    folder: Path, has_data_file: bool
) -> None:
    options = {"data_file": folder / "disk.data"} if has_data_file else {}
    path = create(folder / "disk.qcow2", **options)
    await store_in(path, [frozen("a", NEW_BITS)], b"record")
    content = bytearray(path.read_bytes())
    content[93] |= 0x10
    path.write_bytes(content)
    await (await Qcow2Image.open(path, read_only=True)).close()
    assert path.read_bytes() == bytes(content)
    await (await Qcow2Image.open(path, read_only=False)).close()
    assert header_features(path) == Autoclear.BITMAPS | Autoclear.PRIVATE


async def test_directory_without_its_autoclear_bit_is_void(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], b"record")
    content = bytearray(path.read_bytes())
    content[95] &= 0xFE
    path.write_bytes(content)
    store, _ = await load_from(path)
    assert store.entries == []
    await store_in(path, [frozen("b", NEW_BITS)], None)
    assert set(listed_bitmaps(path)) == {"b"}
    check_image(path)


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize("name_length", [5, 300])
async def test_backing_file_name_and_foreign_extensions_survive(
    folder: Path, cluster_size: int, name_length: int
) -> None:
    base = create(folder / ("b" * 100 + ".qcow2"), 10 * MIB)
    name = "./" * ((name_length - 5) // 2) + base.name
    path = folder / "disk.qcow2"
    options = f"cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", "-o", options, path)
    before = extension_types(path)
    bits = marked(10 * MIB, 65536, seed=7)
    await store_in(path, [frozen("a", bits)], b"record")
    assert extension_types(path) == [*before, BITMAPS_EXTENSION, EXTENSION_MAGIC]
    assert f"backing file: {name}" in qemu_img("info", path).stdout
    check_clean(path)
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())
    # QEMU has room to write the header anew.
    qemu_img("rebase", "-u", "-b", "./" * 30 + base.name, "-F", "qcow2", path)
    store, _ = await load_from(path)
    assert store.record == (b"record", False)
    check_clean(path)


async def test_switched_fields_never_straddle_a_sector(folder: Path) -> None:
    """Whatever extensions come before, and even if QEMU's own straddles."""
    for filler in range(0, 80, 8):
        path = create(folder / f"{filler}.qcow2")
        insert_extension(path, 0x12345678, bytes(filler))
        if filler % 16:
            qemu_img("bitmap", "--add", path, "qemu")
        bits = marked(10 * MIB, 65536, seed=filler)
        await store_in(path, [frozen("a", bits)], None)
        await store_in(path, [kept("a"), frozen("b", bits)], b"record")
        area = scan_extension_area(path.read_bytes()[: 1 << 16], "")
        (place,) = area.find(BITMAPS_EXTENSION)
        assert not place.straddles_sectors
        assert set(listed_bitmaps(path)) == {"a", "b"}
        check_clean(path)
        store, loaded = await load_from(path)
        assert store.record == (b"record", True)
        assert loaded == {"a": bits, "b": bits}
        qemu_io(path, "write 0 1")  # QEMU writes the header anew


@pytest.mark.parametrize("end", [488, 496])
async def test_header_without_room_for_a_record_still_gets_bitmaps(folder: Path, end: int) -> None:
    path = create(folder / "disk.qcow2", 1 * MIB, cluster_size=1024)
    insert_extension(path, 0x12345678, bytes(end - 112 - 8))
    insert_extension(path, 0x12345679, bytes(1024 - end - 8 - 8 - 72))
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[:1024]), "").find(0x12345679)
    content[place.offset - 8 : place.offset] = bytes(8)
    bits = marked(1 * MIB, 512, seed=1)
    path.write_bytes(content)
    await store_in(path, [frozen("a", bits)], None)
    check_clean(path)
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())


async def test_image_that_loses_all_bitmaps_opens_without_a_warning(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=8)
    await store_in(path, [frozen("a", bits)], b"one")
    await store_in(path, [], b"two")
    result = qemu_img("info", path)
    assert result.stderr == ""
    assert listed_bitmaps(path) == {}
    assert PLACEHOLDER_MAGIC in extension_types(path)
    check_clean(path)
    store, _ = await load_from(path)
    assert store.record == (b"two", True)
    await store_in(path, [frozen("b", bits)], None)
    assert PLACEHOLDER_MAGIC not in extension_types(path)
    assert qemu_dirty_ranges(path, "b") == list(bits.dirty_ranges())
    store, _ = await load_from(path)
    assert store.record == (b"two", True)


async def test_payload_too_large_for_the_header_names_both_and_changes_nothing(
    folder: Path,
) -> None:
    path = create(folder / "disk.qcow2", 1 * MIB, cluster_size=512)
    bits = marked(1 * MIB, 65536, seed=9)
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"needs 200 bytes.* 512-byte clusters"):
        await store_in(path, [frozen("a", bits)], bytes(200))
    assert path.read_bytes() == before
    await store_in(path, [frozen("a", bits)], bytes(40))
    assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())
    check_clean(path)


async def test_payload_room_grows_with_the_cluster(path: Path) -> None:
    bits = marked(10 * MIB, 65536, seed=9)
    await store_in(path, [frozen("a", bits)], bytes(30000))
    with pytest.raises(StateError, match="use larger clusters"):
        await store_in(path, [frozen("a", bits)], bytes(31000))
    store, _ = await load_from(path)
    assert 30000 < store.payload_bytes_max < 31000
    await store_in(path, [frozen("a", bits)], bytes(store.payload_bytes_max))
    check_clean(path)


async def test_record_is_noted_as_in_force_before_the_first_guest_write(path: Path) -> None:
    """A power cut may have taken the note; QEMU must not make us lose the record later."""
    await store_in(path, [recording("live", NEW_BITS, in_use=False)], b"record")
    content = bytearray(path.read_bytes())
    (place,) = scan_extension_area(bytes(content[: 1 << 16]), "").find(EXTENSION_MAGIC)
    content[place.offset + 8 : place.offset + 16] = bytes(8)
    path.write_bytes(content)
    image = await Qcow2Image.open(path, read_only=False)
    store = await BitmapStore.load(image)
    assert store.record == (b"record", True)
    await store.mark_in_use()
    await image.close()
    qemu_io(path, "write 0 4k")
    assert (await load_from(path))[0].record == (b"record", False)


async def test_two_bitmaps_extensions_that_differ_are_damage(path: Path) -> None:
    await store_in(path, [frozen("a", NEW_BITS)], None)
    insert_extension(path, BITMAPS_EXTENSION, bytes(24))
    store, _ = await load_from(path)
    assert "two bitmaps extensions" in store.damaged[0].reason
    image = await Qcow2Image.open(path, read_only=False)
    await (await BitmapStore.load(image)).repair()
    await image.close()
    assert listed_bitmaps(path) == {}
    check_image(path)


@pytest.mark.parametrize("end", range(440, 504, 8))
async def test_empty_record_fits_or_is_refused_wherever_the_extensions_end(
    folder: Path, end: int
) -> None:
    path = create(folder / "disk.qcow2", 1 * MIB, cluster_size=512)
    insert_extension(path, 0x12345678, bytes(end - 112 - 8))
    bits = marked(1 * MIB, 512, seed=1)
    try:
        await store_in(path, [frozen("a", bits)], b"")
    except StateError:
        assert listed_bitmaps(path) == {}
    else:
        assert qemu_dirty_ranges(path, "a") == list(bits.dirty_ranges())
    check_clean(path)
