"""Runs of rows: written after each row, gone on with, and with the raw limit beside ours."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark import clients
from benchmark.__main__ import main
from benchmark.images import Images
from benchmark.rows.base import Row
from benchmark.rows.maps import IncrementalPull
from benchmark.rows.reads import PullTcp, PullUnix
from benchmark.rows.snapshots import PullWhileWriting
from benchmark.run import run_rows
from benchmark.servers import Nbdfleece, RawLimit, Setup
from benchmark.version import OtherRun, ours

OPTIONS = {"rounds": 1, "seconds": 0.5}


def run(rows: list[Row], images: Images, folder: Path, **more: Any) -> bool:
    place = images.place
    servers = [Nbdfleece(place), RawLimit(place), RawLimit(place, copying=True)]
    arguments: dict[str, Any] = {"check": False, "resume": True, "minutes": None}
    return run_rows(rows, servers, folder, OPTIONS, **(arguments | more))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def test_run_is_split_and_goes_on_with_the_rows_that_are_missing(
    images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [PullUnix(images), PullTcp(images)]
    assert run(rows[:1], images, tmp_path, check=True)
    assert not run(rows, images, tmp_path, minutes=0.0)
    assert "not measured yet: pull-tcp" in capsys.readouterr().out
    before = rows_of(tmp_path)
    assert run(rows, images, tmp_path)
    after = rows_of(tmp_path)
    assert [row["name"] for row in after] == ["pull-unix", "pull-tcp"]
    assert after[0] == before[0]
    for row in after:
        assert [it["failure"] for it in row["contestants"]] == [None, None]
        assert 0 < row["metrics"][0]["raw_ratio"]["median"] < 10
    assert "of the raw limit, aim 0.8" in (tmp_path / "table.md").read_text()


def test_rows_of_another_nbdfleece_or_other_options_are_not_gone_on_with(
    images: Images, tmp_path: Path
) -> None:
    assert run([PullUnix(images)], images, tmp_path)
    data = {"rows": rows_of(tmp_path)}
    for key, other in (("ours", "0.0.1+0000000000"), ("rounds", 9)):
        changed = json.loads(json.dumps(data))
        changed["rows"][0]["options"][key] = other
        (tmp_path / "results.json").write_text(json.dumps(changed))
        with pytest.raises(OtherRun, match=f"row pull-unix: {key} is {other}".replace("+", r"\+")):
            run([PullTcp(images)], images, tmp_path)
        assert len(rows_of(tmp_path)) == 1


def test_wrong_content_is_a_failure_of_that_contestant(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = PullUnix(images)
    wrong = row.place.memory / "wrong.raw"
    wrong.write_bytes(bytes(images.size))
    setup = replace(row.setup(), bare=wrong)
    monkeypatch.setattr(row, "setup", lambda: setup)
    assert run([row], images, tmp_path, check=True)
    mine, limit = rows_of(tmp_path)[0]["contestants"]
    assert mine["failure"] is None
    assert "WrongContent" in limit["failure"]
    assert limit["samples"] == {}


def test_raw_limit_pulls_beside_a_writer(images: Images, tmp_path: Path) -> None:
    """Where bytes are overwritten it is shown twice, the second time with copies."""
    assert run([PullWhileWriting(images)], images, tmp_path)
    (row,) = rows_of(tmp_path)
    assert [it["failure"] for it in row["contestants"]] == [None, None, None]
    assert [it["label"] for it in row["contestants"]][2] == "raw limit: copies"
    assert row["metrics"][0]["raw_ratio"] is not None
    assert row["metrics"][1]["raw_ratio"] is None


def test_raw_limit_has_what_changed_pulled_too(images: Images, tmp_path: Path) -> None:
    assert run([IncrementalPull(images, 1 << 30)], images, tmp_path, check=True)
    (row,) = rows_of(tmp_path)
    assert [it["failure"] for it in row["contestants"]] == [None, None, None]
    assert min(it["samples"]["client-cpu"][0] for it in row["contestants"]) > 0


def test_incremental_pull_of_something_else_is_found(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "data_extents", lambda uri: [(0, 65536)])
    assert run([IncrementalPull(images, 1 << 30)], images, tmp_path, check=True)
    (row,) = rows_of(tmp_path)
    own, *limits = row["contestants"]
    assert "WrongContent" in own["failure"]
    assert [it["failure"] for it in limits] == [None, None]


def test_copy_is_filled_anew_where_a_server_has_written(images: Images) -> None:
    place, source = images.place, images.raw
    with place.copies.of(source, place) as first, first.open("r+b") as file:
        file.write(bytes(1 << 20))
        file.seek(0, 2)
        file.write(b"more")
    with place.copies.of(source, place) as second, place.copies.of(source, place) as third:
        assert second == first != third
        subprocess.run(["cmp", source, second], check=True)
        subprocess.run(["cmp", source, third], check=True)
    holed = place.path(".holed")
    with holed.open("wb") as file:
        file.write(b"data")
        file.truncate(1 << 30)
    with place.copies.of(holed, place) as sparse:
        assert sparse.stat().st_blocks == holed.stat().st_blocks
    assert not sparse.exists()
    place.copies.clear()
    assert not second.exists()


def test_fragmented_image_is_sound_and_has_that_many_pieces(images: Images) -> None:
    path = images.fragmented(64)
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    mapped = subprocess.run(
        ["qemu-img", "map", "--output=json", str(path)], check=True, capture_output=True
    )
    assert 48 < len(json.loads(mapped.stdout)) <= 64
    with Nbdfleece(images.place).serve(Setup({"vda": path})) as running:
        assert clients.pull(running.uri()) > 0


def test_disks_that_nobody_writes_are_only_read(images: Images) -> None:
    """Like the peers' they are opened for reading; one file for two disks could not be written."""
    setup = Setup({"vda": images.full, "vdb": images.full})
    with Nbdfleece(images.place).serve(setup) as running:
        exports = running.qmp.execute("query-nbd-exports")
        assert [each["read-only"] for each in exports] == [True, True]
        assert clients.pull(running.uri("vdb")) > 0


def test_version_knows_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = ours(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert ours(tmp_path) != first
    assert first.startswith("0.1.0+")


def test_rows_may_stand_behind_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "list", "--rounds", "2", "pull-unix"])
    main()
    assert "pull-unix" in capsys.readouterr().out
