"""Every fault of a file is found at the level that promises it, and named with its unit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import verify
from shared.errors import StoreDamagedError
from shared.layout import crc32c
from shared.store import Store
from shared.verify import Fault
from tests.build import make_store

FILE = "activations/a/c/1/0"  # rows 32 to 63 in chunks of 8, 6 wide
UNIT = (1, "model_a")
RECEIPT = "receipts/00001.model_a.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("verify") / "x.zarr", rows=100, shard_rows=32, chunk_rows=8).path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "x.zarr")


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def swap(one: Path, two: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_sound_store_has_no_fault(original: Path) -> None:
    read: list[int] = []
    store = Store.open(original)
    assert verify.quick(store) == verify.full(store, tick=read.append) == []
    entries = verify.read_receipts(store)[0]
    names = {str(file.relative_to(original)) for file in original.rglob("c/**/*") if file.is_file()}
    assert {entry.name for entry in entries} == names
    assert sum(read) == sum((original / name).stat().st_size for name in names)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("is missing", lambda path: (path / FILE).unlink()),
        ("has 100 bytes, not 452", lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:100])),
        ("has 453 bytes, not 452", lambda path: (path / FILE).write_bytes((path / FILE).read_bytes() + b"x")),
    ],
)
def test_a_file_of_another_size_is_found_at_once(path: Path, what: str, change: Callable[[Path], object]) -> None:
    change(path)
    assert verify.quick(Store.at(path)) == verify.full(Store.at(path)) == [Fault(FILE, what, UNIT)]


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (0, " in 1 of 4 chunks, rows 32 to 39"),
        (3 * 96 + 5, " in 1 of 4 chunks, rows 56 to 63"),
        (4 * 96 + 3, " in its index"),
        (451, " in its index"),
    ],
)
def test_a_flipped_bit_is_found_by_its_checksum_with_its_rows(path: Path, at: int, where: str) -> None:
    flip(path / FILE, at)
    assert verify.quick(Store.at(path)) == []
    assert verify.full(Store.at(path)) == [Fault(FILE, f"has another checksum{where}", UNIT)]


def test_a_zeroed_block_is_found_in_all_its_chunks(path: Path) -> None:
    data = (path / FILE).read_bytes()
    (path / FILE).write_bytes(data[:90] + bytes(100) + data[190:])
    (fault,) = verify.full(Store.at(path))
    assert fault.what == "has another checksum in 2 of 4 chunks, rows 32 to 47"


@pytest.mark.parametrize("name", ["norms/a/c/2", "faults/b/c/0", "moments/b/c/3/0/0"])
def test_files_beside_the_activations_have_checksums_too(path: Path, name: str) -> None:
    flip(path / name, 0)
    (fault,) = verify.full(Store.at(path))
    shard, source = int(name.split("/c/")[1][0]), name.split("/")[1]
    assert fault == Fault(name, "has another checksum", (shard, f"model_{source}"))


def test_a_damaged_table_is_of_the_plan_and_of_no_unit(path: Path) -> None:
    flip(path / "rows/model_a/token/c/0", 0)
    assert verify.full(Store.at(path)) == [Fault("rows/model_a/token/c/0", "has another checksum", None)]


def test_swapped_shards_are_found_by_their_checksums(path: Path) -> None:
    swap(path / FILE, path / "activations/a/c/2/0")
    assert verify.quick(Store.at(path)) == []
    assert [fault.unit for fault in verify.full(Store.at(path))] == [(1, "model_a"), (2, "model_a")]


def test_shards_swapped_with_their_receipts_are_found_at_once(path: Path) -> None:
    for name in ("activations/a/c/{}/0", "norms/a/c/{}", "faults/a/c/{}", "moments/a/c/{}/0/0"):
        swap(path / name.format(1), path / name.format(2))
    swap(path / RECEIPT, path / "receipts/00002.model_a.json")
    found = [str(fault) for fault in verify.quick(Store.at(path))]
    assert f"{RECEIPT} is of shard 2 of model_a (shard 1 of model_a)" in found
    assert "receipts/00002.model_a.json is of shard 1 of model_a (shard 2 of model_a)" in found


def test_a_foreign_shard_is_found_by_its_checksum_and_with_its_receipt_at_once(path: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "y.zarr", rows=100, shard_rows=32, chunk_rows=8, seed=1, sources={"a": 6, "b": 5})
    shutil.copy(other.path / FILE, path / FILE)
    assert [fault.unit for fault in verify.full(Store.at(path))] == [UNIT]
    shutil.copy(other.path / RECEIPT, path / RECEIPT)
    assert verify.quick(Store.at(path))[0] == Fault(RECEIPT, "is of another store", UNIT)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"id": "x", "files": {}}', "is of another store"),
        (None, "names other files than its unit writes"),
    ],
)
def test_a_receipt_that_says_something_else_is_found_at_once(path: Path, content: str | None, what: str) -> None:
    if content is None:
        edit(path / RECEIPT, lambda receipt: receipt["files"].pop(FILE))  # type: ignore[attr-defined]
    else:
        (path / RECEIPT).write_text(content)
    faults = verify.quick(Store.at(path))
    assert faults[0] == Fault(RECEIPT, what, UNIT)
    assert faults[1:] == [Fault(RECEIPT, "is not the one that was sealed", UNIT)]


def test_a_receipt_that_was_changed_afterwards_is_not_the_sealed_one(path: Path) -> None:
    edit(path / RECEIPT, lambda receipt: receipt.update(threads=99))
    assert verify.quick(Store.at(path)) == [Fault(RECEIPT, "is not the one that was sealed", UNIT)]


def test_a_missing_receipt_is_a_fault_of_a_finished_store_and_work_to_do_in_an_unfinished_one(path: Path) -> None:
    (path / RECEIPT).unlink()
    assert verify.quick(Store.at(path)) == [Fault(RECEIPT, "is missing", UNIT)]
    (path / "sealed").unlink()
    assert verify.quick(Store.at(path)) == []
    (path / "receipts/plan.json").unlink()
    assert verify.quick(Store.at(path)) == [Fault("receipts/plan.json", "is missing", None)]


@pytest.mark.parametrize("content", ["", "{}", '{"id": 1, "receipts": {}, "files": {}}'])
def test_a_broken_seal_is_named(path: Path, content: str) -> None:
    (path / "sealed").write_text(content)
    what = "is of another store" if "id" in content else "cannot be read"
    assert verify.quick(Store.at(path)) == [Fault("sealed", what)]


def test_a_changed_zarr_json_is_found_at_once(path: Path) -> None:
    flip(path / "norms/a/zarr.json", 3)
    (path / "faults/a/zarr.json").unlink()
    faults = {fault.file: fault.what for fault in verify.quick(Store.at(path))}
    assert faults == {"norms/a/zarr.json": "has another checksum", "faults/a/zarr.json": "is missing"}


def test_a_checksum_does_not_find_what_was_made_to_fit(path: Path) -> None:
    """Why there is a check that runs the model again."""
    data = bytes((path / FILE).stat().st_size)
    (path / FILE).write_bytes(data)
    chunks = [crc32c([data[i : i + 96]]) for i in range(0, 384, 96)]
    new = {"size": len(data), "crc32c": crc32c([data]), "chunks": chunks}
    edit(path / RECEIPT, lambda receipt: receipt["files"].update({FILE: new}))  # type: ignore[attr-defined]
    receipt = (path / RECEIPT).read_bytes()
    edit(path / "sealed", lambda sealed: sealed["receipts"].update({Path(RECEIPT).name: crc32c([receipt])}))  # type: ignore[attr-defined]
    assert verify.full(Store.at(path)) == []


def test_what_a_check_has_written_down_keeps_a_store_closed_until_it_is_sealed_again(path: Path) -> None:
    store = Store.open(path)
    store.condemn(["FILE has another checksum"], [UNIT])
    with pytest.raises(
        StoreDamagedError, match=r"1 files of .*x.zarr are damaged: FILE has another checksum. See harv"
    ):
        Store.open(path)
    assert store.condemned == (["FILE has another checksum"], [UNIT])
    receipt = (path / RECEIPT).read_bytes()
    store.reopen([UNIT])
    assert store.missing() == [UNIT] and not store.sealed
    (path / RECEIPT).write_bytes(receipt)
    store.seal()
    assert Store.open(path).condemned == ([], [])
