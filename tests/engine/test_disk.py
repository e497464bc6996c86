"""A disk's bitmaps: what is in memory, and what is marked on disk."""

from __future__ import annotations

from pathlib import Path

from .rig import make_image, open_engine, qemu_img, stored_bitmaps


async def test_only_what_records_is_in_memory_and_in_use(tmp_path: Path) -> None:
    """A frozen bitmap stays clean on disk, and out of memory until it is needed."""
    image = make_image(tmp_path / "vda.qcow2")
    for name in ("old", "older", "live"):
        qemu_img("bitmap", "--add", image, name, *["--disable"] * (name != "live"))
    engine = await open_engine(tmp_path, image)
    disk = engine.disk("vda")
    in_memory = {each.name for each in disk.state.bitmaps.values() if each.bits is not None}
    assert in_memory == {"live"}
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(image.read_bytes())
    flags = {name: set(found) for name, found in stored_bitmaps(copy, after_kill=True).items()}
    assert flags == {"old": set(), "older": set(), "live": {"auto", "in-use"}}
    assert (await disk.bits("old")).is_empty()
    await engine.close()
