"""A packed store holds the same rows for every reader, and is checked, mended and resumed like any other."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from harvest import bench, check, lock, pack, work
from harvest.bench import Bench
from shared import codec, files, layout, verify
from shared.errors import LockError, SpaceError, StoreDamagedError, StoreError, StoreMismatchError
from shared.log import Log
from shared.store import Part, Store
from tests.harvest.pair import config, harvest, one, tree

LOG = Log(quiet=True)
ACTIVATIONS = "activations/"
READ_BY_ALL = ("zstd", "blosc")  # pcodec is zarr-python's alone


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Chunks of packed stores smaller than those of stores: 96 bytes, that is 2 of 8 rows or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "LEAST_BLOCK_BYTES", 96)
        yield


@pytest.fixture(scope="module", params=codec.CODECS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def packed(name: str, pair: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """`pair`, packed; not to be changed."""
    path = tmp_path_factory.mktemp("packed") / "cold.zarr"
    pack.pack(pair, path, codec.find(name), LOG)
    return Store.open(path)


@pytest.fixture
def copy(packed: Store, tmp_path: Path) -> Store:
    return Store.at(shutil.copytree(packed.path, tmp_path / "x.zarr"))


def whole(store: Store, source: str) -> np.ndarray:
    """All rows as they were stored."""
    return store.stored(source, np.arange(store.rows))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# --- the same rows --------------------------------------------------------------------------------------------------


def test_all_but_the_activations_is_the_same_to_the_byte(pair: Store, packed: Store) -> None:
    old, new = tree(pair.path), tree(packed.path)
    assert old.keys() == new.keys()
    changed = {file for file in old if old[file] != new[file]}
    assert {file.split("/")[0] for file in changed} == {"activations", "receipts", "sealed", "zarr.json"}
    assert "receipts/plan.json" not in changed
    assert packed.header.id == pair.header.id
    assert replace(packed.header, codec=None) == pair.header


def test_every_reader_of_the_store_gives_the_same_rows(pair: Store, packed: Store) -> None:
    rows, expected = packed.read(70, 231), pair.read(70, 231)
    for source in pair.header.sources:
        assert whole(packed, source).tobytes() == pair.column(f"activations/{source}").tobytes()
        assert torch.equal(rows[source], expected[source])
        assert np.array_equal(packed.dask(source, 50).compute(), pair.dask(source).compute())


def test_zarr_reads_the_same_rows(pair: Store, packed: Store) -> None:
    group = zarr.open(packed.path, mode="r")
    for source in pair.header.sources:
        array = group[f"activations/{source}"]
        assert array[...].tobytes() == whole(pair, source).tobytes()
        assert array.attrs["scale_factor"] == pair.factor(source)
        rows = packed.form(source).chunk_rows
        assert (array.chunks, array.shards) == ((rows, array.shape[1]), (pair.shard_rows, array.shape[1]))
        assert rows < pair.chunk_rows and rows == layout.block_rows(pair.chunk_rows, 2 * array.shape[1])


def test_tensorstore_reads_the_same_rows(pair: Store, packed: Store, name: str) -> None:
    for source in pair.header.sources:
        kvstore = {"driver": "file", "path": str(packed.path / "activations" / source)}
        opening = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True)
        if name in READ_BY_ALL:
            assert np.asarray(opening.result().read().result()).tobytes() == whole(pair, source).tobytes()
        else:
            with pytest.raises(ValueError, match=r"numcodecs\.pcodec"):
                opening.result()


def test_a_store_of_bfloat16_packs_too(home: Path, tmp_path: Path, name: str) -> None:
    store = harvest(one(home, tmp_path / "b.zarr", ["resid.1"], store={"dtype": "bfloat16"}))
    pack.pack(store, tmp_path / "cold.zarr", codec.find(name), LOG)
    packed = Store.open(tmp_path / "cold.zarr")
    assert packed.dtype == torch.bfloat16 and whole(packed, "llama").dtype == np.uint16
    assert whole(packed, "llama").tobytes() == store.column("activations/llama").tobytes()
    assert zarr.open(packed.path, mode="r")["activations/llama"][...].tobytes() == whole(store, "llama").tobytes()
    assert torch.equal(packed.read(5, 90)["llama"], store.read(5, 90)["llama"])
    assert deep(packed) == []


def test_a_packed_store_packs_again_and_cannot_be_mapped(pair: Store, packed: Store, tmp_path: Path) -> None:
    pack.pack(packed, tmp_path / "again.zarr", codec.find("zstd", 1), LOG)
    again = Store.open(tmp_path / "again.zarr")
    assert all(whole(again, source).tobytes() == whole(pair, source).tobytes() for source in pair.header.sources)
    with pytest.raises(StoreError, match=r"packed and cannot be mapped: activations/gemma. Take its rows by read"):
        packed.map("activations/gemma")
    with pytest.raises(StoreError, match="cannot be mapped"):
        packed.column("activations/gemma")
    assert packed.map("norms/gemma").tobytes() == pair.map("norms/gemma").tobytes()


def test_receipts_say_what_made_the_rows_and_what_encoded_them(pair: Store, packed: Store, name: str) -> None:
    for unit in pair.units:
        old, new = (files.read_json(store.path / layout.receipt_file(unit)) for store in (pair, packed))
        versions = {**old["versions"], **codec.find(name).versions}
        assert {**new, "files": None} == {**old, "files": None, "versions": versions}


# --- what was measured ----------------------------------------------------------------------------------------------


def test_bytes_and_ratio_are_those_of_the_files(pair: Store, tmp_path: Path) -> None:
    found = pack.pack(pair, tmp_path / "x.zarr", codec.find("blosc"), LOG)
    for kind, path in (("bytes", pair.path), ("packed_bytes", tmp_path / "x.zarr")):
        sizes = {
            source: sum(file.stat().st_size for file in (path / "activations" / source).rglob("c/*/*"))
            for source in pair.header.sources
        }
        assert found[kind] == sizes
    assert found["ratio"] == {s: round(found["bytes"][s] / found["packed_bytes"][s], 3) for s in found["bytes"]}
    assert found["codec"] == {"name": "blosc", "level": 5}
    assert found["encode_mb_s"] > 0 and found["decode_mb_s"] > 0
    again = pack.pack(pair, tmp_path / "x.zarr", codec.find("blosc"), LOG)
    assert again["encode_mb_s"] is None  # nothing was left to do
    assert {**again, "encode_mb_s": 0, "decode_mb_s": 0} == {**found, "encode_mb_s": 0, "decode_mb_s": 0}


# --- stopped, twice, and other things in the way --------------------------------------------------------------------


def test_a_pack_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    pair: Store, packed: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, left = tmp_path / "x.zarr", files.write_atomic, 0

    def stopping(file: Path, parts: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(file, parts)

    monkeypatch.setattr(files, "write_atomic", stopping)
    stops, reached = 0, set()
    while not path.exists() or not Store.at(path).sealed:
        left = 4 * (stops % 4)
        try:
            pack.pack(pair, path, codec.find(name), LOG)
        except KeyboardInterrupt:
            stops += 1
            reached.add(len(Store.at(path).missing()) if path.exists() else -1)
        assert stops < 200
    assert {-1, len(pair.units)} < reached and len(reached) > 4
    assert tree(path) == tree(packed.path)
    assert not list(tmp_path.rglob("*.partial")) and not lock.folder_of(path).exists()


def test_a_second_pack_at_once_is_refused(pair: Store, tmp_path: Path) -> None:
    with (
        lock.hold(tmp_path / "x.zarr", print),
        pytest.raises(LockError, match="another harvest holds this store"),
    ):
        pack.pack(pair, tmp_path / "x.zarr", codec.find("zstd"), LOG)
    assert not (tmp_path / "x.zarr").exists()


def test_what_is_in_the_way_is_left_alone_and_named(pair: Store, copy: Store, home: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    other = codec.find("zstd", 7)
    with pytest.raises(StoreMismatchError, match=r"another form of this store is at .*'level': \d+.* -> .*'level': 7"):
        pack.pack(pair, copy.path, other, LOG)
    with pytest.raises(StoreMismatchError, match=r"another form of this store is at .*raw -> .*zstd"):
        pack.pack(pair, pair.path, other, LOG)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="in use and is no store"):
        pack.pack(pair, tmp_path / "folder", other, LOG)
    (tmp_path / "folder").rmdir()
    assert tree(tmp_path) == before
    foreign = harvest(one(home, tmp_path / "one.zarr", ["resid.0"]))
    with pytest.raises(StoreMismatchError, match="another store is at"):
        pack.pack(foreign, copy.path, other, LOG)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(files, "require_space", lambda path, needed: asked.append(needed))
    pack.pack(pair, tmp_path / "x.zarr", codec.find("blosc"), LOG)
    entries = verify.read_receipts(Store.open(tmp_path / "x.zarr"))[0]
    assert asked == [pytest.approx(sum(entry.size for entry in entries), rel=0.05)]
    monkeypatch.undo()
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(SpaceError):
        pack.pack(pair, tmp_path / "y.zarr", codec.find("blosc"), LOG)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("y")] == []


@pytest.mark.parametrize("file", ["activations/early/c/2/0", "norms/gemma/c/1", "tokens/llama/id/c/0"])
def test_a_damaged_store_is_not_packed_under_fitting_checksums(pair: Store, tmp_path: Path, file: str) -> None:
    store = Store.open(shutil.copytree(pair.path, tmp_path / "a.zarr"))
    flip(store.path / file, 3)
    with pytest.raises(
        StoreDamagedError, match=f"this store is damaged: {file} has another checksum.*First: harvest v"
    ):
        pack.pack(store, tmp_path / "x.zarr", codec.find("zstd"), LOG)
    assert not (tmp_path / "x.zarr" / "sealed").exists()


# --- verify and repair ----------------------------------------------------------------------------------------------


def deep(store: Store) -> list[verify.Fault]:
    return check.contents(store, Bench(bench.find(store.header, {}, print), "cpu", 1), 40, 0, LOG)


def test_a_packed_store_is_sound_at_every_level(packed: Store) -> None:
    assert verify.quick(packed) == verify.full(packed) == deep(packed) == []


def test_a_flipped_bit_is_found_with_its_rows(copy: Store) -> None:
    file, form, rows = "activations/gemma/c/2/0", copy.form("gemma"), copy.rows_of(2)
    data = (copy.path / file).read_bytes()
    index = layout.parse_index(data[-layout.index_bytes(form.slots) :], form.slots)
    assert index is not None
    for chunk in (0, 3):
        flip(copy.path / file, int(index[chunk].sum()) - 1)  # its last byte
    assert verify.quick(copy) == []
    first, last = rows.start, rows.start + 4 * form.chunk_rows - 1
    chunks = -(-len(rows) // form.chunk_rows)
    what = f"has another checksum in 2 of {chunks} chunks, rows {first} to {last}"
    assert verify.full(copy) == [verify.Fault(file, what, (2, "gemma"))]
    (copy.path / file).write_bytes(data)
    flip(copy.path / file, -5)
    assert [fault.what for fault in verify.full(copy)] == ["has another checksum in its index"]


def test_running_again_finds_a_packed_shard_that_cannot_be_read_and_writes_it_down(copy: Store) -> None:
    data = np.fromfile(copy.path / "activations/inner/c/1/0", np.uint8)
    data[: -layout.index_bytes(copy.form("inner").slots)] ^= 1
    data.tofile(copy.path / "activations/inner/c/1/0")
    (fault,) = deep(copy)
    assert (fault.file, fault.unit) == ("activations/inner/c/1/0", (1, "llama"))
    assert fault.what.startswith("cannot be read: ") and "another checksum" in fault.what


def test_running_again_finds_packed_rows_that_the_model_does_not_compute(pair: Store, copy: Store) -> None:
    name = "receipts/00001.gemma.json"
    receipt = files.read_json(copy.path / name)
    rows_ND = copy.stored("gemma", np.array(copy.rows_of(1))) * np.float16(1.1)
    file = layout.unit_files("gemma", 1)[0]
    receipt["files"][file] = copy.form("gemma").write(copy.path / file, rows_ND)
    files.write_json(copy.path / name, receipt)
    copy.reopen([])
    copy.seal()
    assert verify.full(copy) == []
    assert [fault.unit for fault in deep(copy)] == [(1, "gemma")]


def test_repair_makes_a_packed_unit_again_to_the_same_bytes(packed: Store, copy: Store) -> None:
    flip(copy.path / "activations/early/c/3/0", 9)
    faults = verify.full(copy)
    check.write_down(copy, faults, LOG)
    made_with = Bench(bench.find(copy.header, {}, print), "cpu", 1)
    work.repair(copy, check.to_mend(copy, faults), work.OneProcess(made_with, LOG), LOG)
    assert tree(copy.path) == tree(packed.path)


def test_packing_again_mends_what_is_damaged_without_a_model(
    pair: Store, packed: Store, copy: Store, name: str
) -> None:
    flip(copy.path / "activations/early/c/3/0", 9)
    check.write_down(copy, verify.full(copy), LOG)  # found by verify
    (copy.path / "activations/gemma/c/0/0").unlink()  # found now
    put: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        put_ = Store.put

        def counted(
            self: Store, shard: int, model: str, parts: Mapping[str, Part], made_with: Mapping[str, Any]
        ) -> dict[str, Any]:
            put.append((shard, model))
            return put_(self, shard, model, parts, made_with)

        patch.setattr(Store, "put", counted)
        pack.pack(pair, copy.path, codec.find(name), LOG)
    assert put == [(3, "llama"), (0, "gemma")]
    assert tree(copy.path) == tree(packed.path)


def test_a_harvest_of_the_same_config_goes_on_with_an_unfinished_pack(
    pair: Store, packed: Store, copy: Store, home: Path
) -> None:
    copy.reopen([(2, "llama")])
    assert harvest(config(home, copy.path)).path == copy.path
    assert tree(copy.path) == tree(packed.path)
