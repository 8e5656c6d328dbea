"""Files and folders are whole or absent, and nothing temporary outlives a sweep."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import files
from shared.errors import SpaceError


class BrokenError(Exception):
    """What the writers of these tests raise."""


def two_parts_then_a_fault() -> Iterator[bytes]:
    yield b"new"
    yield b"er"
    raise BrokenError


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- files ----------------------------------------------------------------------------------------------------------


def test_parts_are_written_one_after_another_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    files.write_atomic(path, [b"ab", memoryview(b"cd"), b"", b"e"])
    assert path.read_bytes() == b"abcde"
    files.write_atomic(path, b"x")
    assert path.read_bytes() == b"x"
    assert names(tmp_path) == ["a", "a/b", "a/b/file"]


def test_a_writer_that_raises_leaves_the_old_file_and_nothing_temporary(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "file", b"old")
    with pytest.raises(BrokenError):
        files.write_atomic(tmp_path / "file", two_parts_then_a_fault())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_writer_that_raises_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        files.write_atomic(tmp_path / "file", two_parts_then_a_fault())
    assert names(tmp_path) == []


def test_while_it_is_written_a_file_has_a_temporary_name(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        (name,) = names(tmp_path)
        assert name.startswith("file.")
        assert name.endswith(files.TEMPORARY)
        yield b"x"

    files.write_atomic(tmp_path / "file", parts())
    assert names(tmp_path) == ["file"]


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "file").exists()))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name a descriptor")
    monkeypatch.setattr(os, "fsync", record)
    files.write_atomic(tmp_path / "file", b"x")
    (file, before), (folder, after) = synced
    assert file.name.startswith("file.")
    assert (before, after, folder) == (False, True, tmp_path.resolve())


def test_json_reads_back_with_its_keys_in_the_order_they_were_given(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"b": [1, 0.1], "a": "ä"})
    assert list(files.read_json(tmp_path / "a").items()) == [("b", [1, 0.1]), ("a", "ä")]
    assert (tmp_path / "a").read_bytes() == '{\n "b": [\n  1,\n  0.1\n ],\n "a": "ä"\n}\n'.encode()


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_at_the_end_of_the_block(tmp_path: Path) -> None:
    with files.folder_atomic(tmp_path / "up" / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_bytes(b"1")
        assert temporary.parent == tmp_path / "up"
        assert temporary.name.endswith(files.TEMPORARY)
        assert not (tmp_path / "up" / "folder").exists()
    assert names(tmp_path) == ["up", "up/folder", "up/folder/sub", "up/folder/sub/a"]


def test_a_folder_takes_the_place_of_the_old_one_with_all_its_content(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with files.folder_atomic(tmp_path / "folder") as temporary:
            (temporary / name).write_bytes(b"")
    assert names(tmp_path) == ["folder", "folder/new"]


def test_a_block_that_raises_leaves_the_old_folder_and_nothing_temporary(tmp_path: Path) -> None:
    with files.folder_atomic(tmp_path / "folder") as temporary:
        (temporary / "old").write_bytes(b"")
    with pytest.raises(BrokenError), files.folder_atomic(tmp_path / "folder") as temporary:
        (temporary / "new").write_bytes(b"")
        raise BrokenError
    assert names(tmp_path) == ["folder", "folder/old"]


def test_everything_in_a_folder_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_file", synced.append)
    with files.folder_atomic(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_bytes(b"1")
    assert set(synced) == {temporary, temporary / "sub", temporary / "sub" / "a"}


# --- sweep and space ------------------------------------------------------------------------------------------------


def test_a_sweep_removes_temporary_files_and_folders_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    keep = ["a", "sub/b", "sub/partial", "sub/x.partial.json"]
    for name in [*keep, "a.1.partial", "sub/deep/b.2.partial", "c.3.partial/file", "c.3.partial/inner.4.partial"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert files.sweep(tmp_path) == 4
    assert [name for name in names(tmp_path) if (tmp_path / name).is_file()] == sorted(keep)
    assert files.sweep(tmp_path) == 0


def test_a_sweep_leaves_what_is_being_written_beside_a_folder_whose_name_only_begins_alike(tmp_path: Path) -> None:
    with files.folder_atomic(tmp_path / "pair.zarr") as other, files.folder_atomic(tmp_path / "pair") as own:
        (other / "a").write_bytes(b"x")
        (own / "a").write_bytes(b"x")
        assert files.sweep(tmp_path / "pair") == 1
        assert not own.exists() and (other / "a").exists()
        own.mkdir()
    assert names(tmp_path) == ["pair", "pair.zarr", "pair.zarr/a"]


def test_a_sweep_of_a_folder_that_is_not_there_removes_nothing(tmp_path: Path) -> None:
    assert files.sweep(tmp_path / "gone") == 0


def test_space_is_that_of_the_disk_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet.zarr") > 0


def test_too_little_space_is_refused_with_both_sizes_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_500_000_000)
    files.require_space(tmp_path, 1_500_000_000)
    with pytest.raises(SpaceError) as caught:
        files.require_space(tmp_path / "a.zarr", 2_000_000_000)
    assert str(caught.value) == (
        f"no space left for this store: {tmp_path / 'a.zarr'} needs 2.00 GB, 1.50 GB are free. "
        "Free some space, choose another path, or store fewer rows (rows.count)"
    )


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRANARY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "granary"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "granary"
    monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"


def test_one_process_at_a_time_holds_a_lock_file_and_its_death_lets_go(tmp_path: Path) -> None:
    path, waited = tmp_path / "copies" / "x", []
    code = (
        "import sys; from pathlib import Path; from shared.files import alone\n"
        "with alone(Path(sys.argv[1]), print): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"

        def waits() -> None:
            waited.append(path)
            other.kill()

        with files.alone(path, waits):
            assert waited == [path]
        with files.alone(path, waits):
            assert waited == [path]
