from __future__ import annotations

from pathlib import Path

import pytest

from nbdfleece.backup import BackupDirectory, BackupError, split_point
from nbdfleece.backup.directory import check_point_name, disk_file_name
from nbdfleece.backup.manifest import encode_manifest
from nbdfleece.errors import StateError, UsageError

from .test_manifest import make_point


@pytest.fixture
def directory(tmp_path: Path) -> BackupDirectory:
    """``tuesday`` on ``monday``, without their images."""
    directory = BackupDirectory(tmp_path / "backup")
    directory.create()
    tuesday = make_point()
    monday = make_point(kind="full", parent=None, file="monday.vda.qcow2")
    monday.name, monday.parent, monday.checkpoint = "monday", None, "first"
    monday.started = monday.started.replace(hour=1)
    directory.publish(tuesday)
    directory.publish(monday)
    return directory


def test_points_come_oldest_first(directory: BackupDirectory) -> None:
    assert [point.name for point in directory.points()] == ["monday", "tuesday"]
    assert directory.newest().name == "tuesday"


def test_point_is_found_by_its_name_or_its_checkpoint(directory: BackupDirectory) -> None:
    assert directory.find("monday").name == "monday"
    assert directory.find("first").name == "monday"
    with pytest.raises(BackupError, match="'x'"):
        directory.find("x")


def test_manifest_under_another_name_is_refused(directory: BackupDirectory) -> None:
    directory.manifest_path("x").write_bytes(encode_manifest(make_point()))
    with pytest.raises(BackupError, match="that of 'tuesday'"):
        directory.point("x")


def test_chain_goes_down_to_a_full_one(directory: BackupDirectory) -> None:
    chain = directory.chain(directory.point("tuesday"), "vda")
    assert [point.name for point, _ in chain] == ["tuesday", "monday"]


def test_chain_that_is_broken_is_an_error(directory: BackupDirectory) -> None:
    tuesday = directory.point("tuesday")
    directory.manifest_path("monday").unlink()
    with pytest.raises(BackupError, match="no restore point 'monday'"):
        directory.chain(tuesday, "vda")
    monday = make_point(parent="tuesday")
    monday.name = "monday"
    directory.publish(monday)
    with pytest.raises(BackupError, match="comes back on itself"):
        directory.chain(tuesday, "vda")
    headless = make_point(parent=None)
    headless.name = "monday"
    directory.publish(headless)
    with pytest.raises(BackupError, match="without a full one"):
        directory.chain(tuesday, "vda")


def test_one_writer_any_readers_and_a_prune_alone(directory: BackupDirectory) -> None:
    with directory.writing(), directory.reading(), directory.reading():
        with pytest.raises(StateError, match="another pull or prune"), directory.writing():
            pass
        with pytest.raises(StateError, match="in use"), directory.replacing():
            pass
    with directory.replacing(), pytest.raises(StateError, match="prune"), directory.reading():
        pass


def test_damaged_prune_journal_stops_everything(directory: BackupDirectory) -> None:
    (directory.path / "prune.journal").write_bytes(b"\xff")
    with pytest.raises(BackupError, match="damaged"), directory.reading():
        pass


def test_empty_directory_has_no_newest_point(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="no restore points"):
        BackupDirectory(tmp_path).newest()


@pytest.mark.parametrize("name", ["a", "2026-11-23T04", "a.b+c_d", "0" * 128])
def test_good_names_are_good(name: str) -> None:
    assert check_point_name(name) == name


def test_names_of_files_tell_point_and_disk_apart() -> None:
    names = {disk_file_name("a.b", "c"), disk_file_name("a", "b.c"), disk_file_name("a", "b/c")}
    assert names == {"a.b.c.qcow2", "a.b%2Ec.qcow2", "a.b%2Fc.qcow2"}
    with pytest.raises(UsageError, match="too long"):
        disk_file_name("a", "x" * 101)


def test_point_is_what_follows_the_last_at_sign(tmp_path: Path) -> None:
    assert split_point("dir") == ("dir", None)
    assert split_point("dir@x") == ("dir", "x")
    assert split_point("user@host/dir@x") == ("user@host/dir", "x")
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert split_point(str(odd)) == (str(odd), None)


def test_journal_of_a_complete_point_is_no_cut_pull_and_goes(directory: BackupDirectory) -> None:
    for name in ("monday", "wednesday", "prune"):
        directory.journal_path(name).write_bytes(b"")
    assert directory.cut_pulls() == ["wednesday"]
    directory.journal_path("prune").unlink()
    with directory.writing():
        assert not directory.journal_path("monday").exists()
        assert directory.journal_path("wednesday").exists()
