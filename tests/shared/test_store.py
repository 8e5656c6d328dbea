"""Every reader sees the same bytes in a store, and what a kill, a repetition or another order may not change.

Letters: N rows, S rows per shard, C rows per chunk, D width, X classes, K length of packed moments.
"""

import itertools
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import files, layout
from shared.codec import CODECS, Packing
from shared.config import fingerprint
from shared.errors import StoreDamagedError, StoreError, StoreMismatchError, StoreUnfinishedError
from shared.flags import CLIPPED, MASKED, SINK, count_faults
from shared.header import Header
from shared.moments import CLASSES, Moments
from shared.source import Model, Source
from shared.store import Part, Store
from tests.build import tree

ABSENT = 2**64 - 1
MADE_WITH = {"device": "cpu", "threads": 1, "versions": {"torch": "2"}}
ONE = {"s": ("m", 3)}
TWO = {"low": ("m", 3), "high": ("m", 2), "other": ("chat-2", 1)}  # two sources of one model and one of another
CASES = {
    "one chunk": (4, 4, 4, ONE),
    "one row": (1, 4, 2, ONE),
    "one shard with chunks beyond the rows": (3, 8, 2, TWO),
    "one shard, ragged chunk": (7, 8, 4, ONE),
    "full shards": (12, 6, 2, TWO),
    "ragged shard and chunk": (11, 6, 2, TWO),
    "shards of one chunk": (10, 4, 4, ONE),
    "shards of one row": (3, 1, 1, TWO),
}

Break = Callable[[Path], object]


# --- the stores of these tests --------------------------------------------------------------------------------------


def make_header(rows: int, shard_rows: int, chunk_rows: int, sources: Mapping[str, tuple[str, int]]) -> Header:
    names = dict.fromkeys(model for model, _ in sources.values())
    return Header(
        {"format": 1, "corpus": "abc", "models": list(names), "rows": {"count": rows, "seed": 0}},
        {name: Model(name, f"/models/{name}", f"w-{name}", f"t-{name}", "float32", "eager") for name in names},
        {name: Source(name, model, "resid.1", width) for name, (model, width) in sources.items()},
        {
            "rows": rows,
            "shard_rows": shard_rows,
            "chunk_rows": chunk_rows,
            "shards": -(-rows // shard_rows),
            "dtype": "float16",
        },
    )


def make_tables(header: Header, documents: tuple[str, ...] = ("a", "ä/b", "c")) -> dict[str, np.ndarray]:
    """Tables of the right names and types; only those of ids hold together."""
    rows, shards, encoded = header.plan["rows"], header.plan["shards"], [name.encode() for name in documents]
    tables = {
        "rows/document": np.arange(rows, dtype=np.int32),
        "segments/document": np.arange(5, dtype=np.int32),
        "segments/row": np.arange(6, dtype=np.int64),
        "documents/id": np.frombuffer(b"".join(encoded), np.uint8),
        "documents/id_end": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        "documents/row": np.arange(len(documents) + 1, dtype=np.int64),
        "documents/split": np.array([0, 1, 0][: len(documents)], np.uint8),
    }
    for model in header.models:
        tables |= {
            f"rows/{model}/token": np.arange(rows, dtype=np.int64) * 2**33,
            f"rows/{model}/position": np.arange(rows, dtype=np.int32)[::-1],
            f"rows/{model}/flags": np.arange(rows, dtype=np.uint8) % 8,
            f"tokens/{model}/id": np.arange(9, dtype=np.int32) + 100_000,
            f"tokens/{model}/end": np.array([-1, 2, 3, 4, 5, 6, 7, -1, -1], np.int32),
            f"tokens/{model}/segment": np.arange(6, dtype=np.int64),
            f"batches/{model}/segment": np.arange(5, dtype=np.int32),
            f"batches/{model}/end": np.arange(shards, dtype=np.int64),
            f"batches/{model}/shard": np.arange(shards + 1, dtype=np.int64),
        }
    return tables


def values_of(header: Header, source: str) -> np.ndarray:
    """All rows of a source, fp32, in the model's own units; some beyond fp16."""
    seed = list(header.sources).index(source)
    values_ND = np.random.default_rng(seed).standard_normal((header.plan["rows"], header.sources[source].width))
    return (values_ND * 40_000).astype(np.float32)


def make_part(store: Store, shard: int, source: str) -> Part:
    rows = store.rows_of(shard)
    x_ND = values_of(store.header, source)[rows.start : rows.stop]
    scaled_ND = x_ND / np.float32(store.factor(source))
    faults_N = (np.abs(scaled_ND) > 65_504).any(1) * CLIPPED + (np.arange(len(rows)) % 2) * SINK
    classes_X = [x_ND[np.arange(rows.start, rows.stop) % len(CLASSES) == index] for index in range(len(CLASSES))]
    return Part(
        scaled_ND.clip(-65_504, 65_504).astype(np.float16),
        np.sqrt((x_ND**2).sum(1)),
        faults_N.astype(np.uint8),
        np.stack([Moments.of(torch.from_numpy(rows_ND)).pack() for rows_ND in classes_X]),
    )


def plan(path: Path, header: Header) -> Store:
    """A store that is ready for its units."""
    scale = {name: {"factor": 2.0**index, "largest": 1.0} for index, name in enumerate(header.sources)}
    return Store.create(path, header, make_tables(header)).freeze(scale)


def put(store: Store, shard: int, model: str) -> dict[str, Any]:
    names = [source.name for source in store.header.sources.values() if source.model == model]
    return store.put(shard, model, {name: make_part(store, shard, name) for name in names}, MADE_WITH)


def make(path: Path, header: Header) -> Store:
    store = plan(path, header)
    for unit in store.missing():
        put(store, *unit)
    store.seal()
    return Store.open(path)


def expected(store: Store) -> dict[str, np.ndarray]:
    """Every array of a store of these tests, from what was put rather than from the disk."""
    arrays = make_tables(store.header)
    for name in store.header.sources:
        parts = [make_part(store, shard, name) for shard in range(store.shards)]
        arrays[f"activations/{name}"] = np.concatenate([part.activations_ND for part in parts])
        arrays[f"norms/{name}"] = np.concatenate([part.norms_N for part in parts])
        arrays[f"faults/{name}"] = np.concatenate([part.faults_N for part in parts])
        arrays[f"moments/{name}"] = np.stack([part.moments_XK for part in parts])
    return arrays


def arrays_on_disk(path: Path) -> set[str]:
    metadata = {str(file.parent.relative_to(path)): files.read_json(file) for file in path.rglob("zarr.json")}
    return {name for name, content in metadata.items() if content["node_type"] == "array"}


def data_files(path: Path) -> set[str]:
    """Every file of every array but its zarr.json."""
    found = (file for name in arrays_on_disk(path) for file in (path / name).rglob("*") if file.is_file())
    return {str(file.relative_to(path)) for file in found if file.name != "zarr.json"}


def crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


CRC_OF_BYTE = [crc_of_byte(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, byte by byte (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_OF_BYTE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, so none waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished store of each shape, not to be changed."""
    return make(tmp_path_factory.mktemp("made") / "a.zarr", make_header(*request.param))


@pytest.fixture
def ragged() -> Header:
    return make_header(*CASES["ragged shard and chunk"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of 11 rows in shards of 6 and chunks of 2, not to be changed."""
    header = make_header(*CASES["ragged shard and chunk"])
    return make(tmp_path_factory.mktemp("original") / "a.zarr", header).path


@pytest.fixture
def finished(tmp_path: Path, original: Path) -> Path:
    """A copy of `original`, to be damaged."""
    return shutil.copytree(original, tmp_path / "a.zarr")


# --- one store, four readers ----------------------------------------------------------------------------------------


def read_with_zarr(path: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open(path, mode="r")[name][...])


def read_with_tensorstore(path: Path, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def read_by_map(path: Path, name: str) -> np.ndarray:
    store = Store.open(path)
    maps = [store.map(name, index) for index in range(len(list((path / name / "c").iterdir())))]
    assert not any(mapped.flags.writeable for mapped in maps)
    return np.concatenate(maps)


def read_by_column(path: Path, name: str) -> np.ndarray:
    return Store.open(path).column(name)


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore, read_by_map, read_by_column])
def test_every_array_reads_as_what_was_put(made: Store, read: Callable[[Path, str], np.ndarray]) -> None:
    arrays = expected(made)
    assert arrays_on_disk(made.path) == arrays.keys()
    for name, values in arrays.items():
        found = read(made.path, name)
        assert (found.dtype, found.shape) == (values.dtype, values.shape), name
        assert found.tobytes() == values.tobytes(), name


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 30), chunk=st.integers(1, 5), chunks=st.integers(1, 4), width=st.integers(1, 5))
def test_activations_of_any_shape_read_the_same_everywhere(rows: int, chunk: int, chunks: int, width: int) -> None:
    header = make_header(rows, chunk * chunks, chunk, {"s": ("m", width)})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.zarr"
        store = Store.create(path, header, {}).freeze({"s": {"factor": 4.0}})
        for unit in store.missing():
            put(store, *unit)
        store.seal()
        wanted = expected(store)["activations/s"]
        for read in (read_with_zarr, read_with_tensorstore, read_by_column):
            assert read(path, "activations/s").tobytes() == wanted.tobytes()
        for shard in range(store.shards):
            rows_of = store.rows_of(shard)
            assert store.map("activations/s", shard).tobytes() == wanted[rows_of.start : rows_of.stop].tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_packed_activations_of_any_shape_read_the_same_everywhere(tmp_path: Path, codec: str) -> None:
    for number, case in enumerate(CASES.values()):
        packing = Packing(codec, CODECS[codec].default, dict.fromkeys(case[3], max(1, case[2] // 2)))
        store = make(tmp_path / f"{number}.zarr", replace(make_header(*case), codec=packing))
        for name, values in expected(store).items():
            readers = [read_with_zarr, read_with_tensorstore, read_by_column]
            if name.startswith("activations/"):
                readers = [read_with_zarr, read_as_stored] + [read_with_tensorstore] * (codec != "pcodec")
            assert all(read(store.path, name).tobytes() == values.tobytes() for read in readers), name
        assert Store.open(store.path).header.codec == packing


def read_as_stored(path: Path, name: str) -> np.ndarray:
    store = Store.open(path)
    return store.stored(name.split("/")[1], np.arange(store.rows))


def test_tables_of_several_files_read_the_same_everywhere(
    tmp_path: Path, ragged: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "TABLE_CHUNK", 4)
    store = make(tmp_path / "a.zarr", ragged)
    assert len(list((store.path / "tokens/m/id/c").iterdir())) == 3
    for name, values in make_tables(ragged).items():
        for read in (read_with_zarr, read_with_tensorstore, read_by_column):
            assert read(store.path, name).tobytes() == values.tobytes(), name


def test_any_piece_of_a_table_is_read_from_the_files_that_hold_it(
    tmp_path: Path, ragged: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "TABLE_CHUNK", 4)
    store = make(tmp_path / "a.zarr", ragged)
    values, opened, genuine = make_tables(ragged)["tokens/m/id"], [], Store.map
    monkeypatch.setattr(Store, "map", lambda self, *given: (opened.append(given[1]), genuine(self, *given))[1])
    assert len(values) == 9
    for start in range(9):
        for stop in range(start + 1, 10):
            opened.clear()
            assert store.lazily("tokens/m/id")[start:stop].tolist() == values[start:stop].tolist()
            assert opened == list(range(start // 4, (stop - 1) // 4 + 1))
    column = store.lazily("tokens/m/id")
    opened.clear()
    assert [column[index] for index in range(9)] == values.tolist() and opened == [0, 1, 2]
    assert [column[place:place].tolist() for place in range(11)] == [[]] * 11
    assert column[:].tolist() == values.tolist() == column[:99].tolist()
    for beyond in (9, -1):
        with pytest.raises(IndexError):
            column[beyond]


def test_tables_without_items_have_no_file_and_read_as_empty(tmp_path: Path) -> None:
    header = make_header(2, 2, 1, ONE)
    empty = {"documents/id": np.empty(0, np.uint8), "tokens/m/id": np.empty(0, np.int32)}
    store = Store.create(tmp_path / "a.zarr", header, empty)
    for name, values in empty.items():
        assert not (store.path / name / "c").exists()
        for found in (store.column(name), read_with_zarr(store.path, name), read_with_tensorstore(store.path, name)):
            assert (found.dtype, found.shape) == (values.dtype, (0,))


def test_nothing_is_compressed_and_every_array_is_little_endian(original: Path) -> None:
    for name in arrays_on_disk(original):
        codecs = files.read_json(original / name / "zarr.json")["codecs"]
        if name.startswith("activations/"):
            (sharding,) = codecs
            assert (sharding["name"], sharding["configuration"]["index_location"]) == ("sharding_indexed", "end")
            index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
            assert index == ["bytes", "crc32c"]
            codecs = sharding["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes"], name
        assert codecs[0].get("configuration", {}).get("endian", "little") == "little", name


def test_one_name_of_a_dimension_has_one_length(original: Path) -> None:
    """xarray refuses a group in which it has two."""
    lengths: dict[str, int] = {}
    for name in arrays_on_disk(original):
        meta = files.read_json(original / name / "zarr.json")
        for dim, length in zip(meta["dimension_names"], meta["shape"], strict=True):
            assert lengths.setdefault(dim, length) == length, (name, dim)
    assert lengths["row"] == 11


def test_the_array_of_activations_says_its_scale_factor(original: Path) -> None:
    group = zarr.open(original, mode="r")
    factors = {name: group[f"activations/{name}"].attrs["scale_factor"] for name in TWO}
    assert factors == {"low": 1.0, "high": 2.0, "other": 4.0}
    store = Store.open(original)
    assert {name: store.factor(name) for name in TWO} == factors


# --- the bytes of a file --------------------------------------------------------------------------------------------


def test_a_shard_file_is_a_raw_matrix_from_its_first_byte(made: Store) -> None:
    for name, shard in itertools.product(made.header.sources, range(made.shards)):
        wanted = make_part(made, shard, name).activations_ND
        raw = np.memmap(made.path / f"activations/{name}/c/{shard}/0", "<f2", "r", shape=wanted.shape)
        assert raw.tobytes() == wanted.tobytes()


def test_the_index_of_a_shard_obeys_the_spec(made: Store) -> None:
    slots = made.shard_rows // made.chunk_rows
    for name, shard in itertools.product(made.header.sources, range(made.shards)):
        width, rows = made.source(name).width, len(made.rows_of(shard))
        data = (made.path / f"activations/{name}/c/{shard}/0").read_bytes()
        present, size = -(-rows // made.chunk_rows), made.chunk_rows * width * 2
        body, index, checksum = data[: present * size], data[present * size : -4], data[-4:]
        pairs = [struct.unpack_from("<QQ", index, 16 * slot) for slot in range(len(index) // 16)]
        assert pairs == [(slot * size, size) for slot in range(present)] + [(ABSENT, ABSENT)] * (slots - present)
        assert struct.unpack("<I", checksum) == (crc32c(index),)
        padding = np.frombuffer(body, "<f2")[rows * width :]
        assert len(padding) == (present * made.chunk_rows - rows) * width
        assert np.isnan(padding).all()


def test_the_last_chunk_is_padded_to_its_full_length(original: Path) -> None:
    """11 rows in shards of 6: one row of padding."""
    norms = np.frombuffer((original / "norms/low/c/1").read_bytes(), "<f4")
    faults = np.frombuffer((original / "faults/low/c/1").read_bytes(), "|u1")
    documents = np.frombuffer((original / "rows/document/c/1").read_bytes(), "<i4")
    assert np.isnan(norms).tolist() == [False] * 5 + [True]
    assert faults.tolist() == [*make_part(Store.open(original), 1, "low").faults_N.tolist(), 0]
    assert documents.tolist() == [6, 7, 8, 9, 10, 0]


def test_the_crc_of_these_tests_is_that_of_the_rfc() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_receipts_have_the_size_and_crc_of_every_file_and_chunk(original: Path) -> None:
    listed: list[str] = []
    for receipt in map(files.read_json, sorted((original / "receipts").iterdir())):
        for name, entry in receipt["files"].items():
            data = (original / name).read_bytes()
            assert (entry["size"], entry["crc32c"]) == (len(data), crc32c(data)), name
            assert ("chunks" in entry) == name.startswith("activations/")
            if "chunks" in entry:
                size = 2 * 2 * TWO[name.split("/")[1]][1]  # C = 2 rows of fp16
                assert entry["chunks"] == [crc32c(data[i * size :][:size]) for i in range(len(entry["chunks"]))]
                assert size * len(entry["chunks"]) == len(data) - 16 * 3 - 4
            listed.append(name)
    assert sorted(listed) == sorted(data_files(original))


def test_sealed_covers_every_file_and_every_receipt(original: Path) -> None:
    sealed, store = files.read_json(original / "sealed"), Store.open(original)
    assert sealed["id"] == store.header.id
    metadata = {str(file.relative_to(original)) for file in original.rglob("zarr.json")}
    assert sealed["files"].keys() == data_files(original) | metadata
    for name, entry in sealed["files"].items():
        data = (original / name).read_bytes()
        assert entry == [len(data), crc32c(data)]
    receipts = {path.name: crc32c(path.read_bytes()) for path in (original / "receipts").iterdir()}
    assert sealed["receipts"] == receipts
    assert receipts.keys() == {
        *(f"{shard:05d}.{model}.json" for shard in range(2) for model in ("m", "chat-2")),
        "plan.json",
    }


def test_a_receipt_says_what_made_the_unit_and_counts_its_faults(tmp_path: Path) -> None:
    store = plan(tmp_path / "a.zarr", make_header(4, 4, 2, ONE))
    faults_N = np.array([CLIPPED, CLIPPED | SINK, MASKED, 0], np.uint8)
    part = replace(make_part(store, 0, "s"), faults_N=faults_N, subnormal=7)
    receipt = store.put(0, "m", {"s": part}, MADE_WITH)
    assert receipt == files.read_json(store.path / "receipts" / "00000.m.json")
    assert count_faults(faults_N) == {"clipped": 2, "masked": 1, "sink": 1}
    assert receipt["faults"] == {"s": {**count_faults(faults_N), "subnormal_components": 7}}
    assert {key: receipt[key] for key in MADE_WITH} == MADE_WITH
    assert (receipt["id"], receipt["shard"], receipt["model"]) == (store.header.id, 0, "m")


# --- the page -------------------------------------------------------------------------------------------------------


def page_section(title: str) -> str:
    page = resources.files("shared").joinpath("STORE.md").read_text(encoding="utf-8")
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_lists_exactly_the_arrays_of_a_store_with_their_types(original: Path) -> None:
    line = re.compile(r"^ +(\S+) +(u?int\d+|float\d+) +\[([^\]]*)\]", re.MULTILINE)
    listed = {name: (dtype, axes.count(",") + 1) for name, dtype, axes in line.findall(page_section("Files"))}
    models, sources = ["m", "chat-2"], list(TWO)
    named = {
        name.replace("<model>", model).replace("<source>", source): kind
        for name, kind in listed.items()
        for model, source in itertools.product(models, sources)
    }
    metadata = {name: files.read_json(original / name / "zarr.json") for name in arrays_on_disk(original)}
    assert named == {name: (meta["data_type"], len(meta["shape"])) for name, meta in metadata.items()}


def test_the_page_lists_the_attributes_of_the_group_and_its_files(original: Path) -> None:
    keys = re.findall(r"^\| `(\w+)` \|", page_section("attributes.granary"), re.MULTILINE)
    granary = files.read_json(original / "zarr.json")["attributes"]["granary"]
    assert sorted(keys) == sorted(granary)
    assert (granary["format"], granary["id"]) == (1, fingerprint(granary["spec"]))
    assert {path.name for path in original.iterdir()} == {
        *("zarr.json", "sealed", "receipts", "activations", "norms", "faults", "moments"),
        *("rows", "tokens", "segments", "documents", "batches"),
    }


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_header_reads_back_as_it_was_written(original: Path, ragged: Header) -> None:
    header = Store.open(original).header
    assert replace(header, scale=None) == ragged
    assert (list(header.models), list(header.sources)) == (["m", "chat-2"], list(TWO))  # in the order of the config
    assert header.scale == {name: {"factor": 2.0**i, "largest": 1.0} for i, name in enumerate(TWO)}


def test_moments_of_classes_are_those_of_their_rows_in_the_models_own_units(original: Path, ragged: Header) -> None:
    store = Store.open(original)
    for name, wanted in itertools.product(TWO, ([], ["ordinary/train"], ["first/train", "sink/held_out"], CLASSES)):
        kept_N = np.isin(np.arange(11) % len(CLASSES), [CLASSES.index(one) for one in wanted])
        rows_ND = values_of(ragged, name)[kept_N].astype(np.float64)
        found = store.moments(name, wanted)
        assert found.count == len(rows_ND)
        if len(rows_ND):
            np.testing.assert_allclose(found.mean_D, rows_ND.mean(0), rtol=1e-12, atol=1e-6)
            np.testing.assert_allclose(found.m2_D, rows_ND.var(0) * len(rows_ND), rtol=1e-12, atol=1e-3)
            assert found.largest == np.abs(rows_ND).max()


def test_shards_cover_all_rows_once(made: Store) -> None:
    assert [row for shard in range(made.shards) for row in made.rows_of(shard)] == list(range(made.rows))


def test_rows_read_across_shards_in_the_models_own_units(original: Path) -> None:
    store, arrays = Store.open(original), expected(Store.open(original))
    for start, stop in itertools.combinations(range(store.rows + 1), 2):
        found = store.read(start, stop)
        assert found.keys() == TWO.keys()
        for name, read_ND in found.items():
            wanted_ND = arrays[f"activations/{name}"][start:stop].astype(np.float32) * store.factor(name)
            assert read_ND.dtype == torch.float32
            assert np.array_equal(read_ND.numpy(), wanted_ND)


def test_faults_are_counted_over_all_shards(original: Path) -> None:
    store = Store.open(original)
    faults_N = expected(store)["faults/low"]
    assert store.fault_counts("low") == {
        "clipped": int((faults_N & 1 > 0).sum()),
        "masked": 0,
        "sink": int((faults_N & 4 > 0).sum()),
    }
    assert store.fault_counts("low")["clipped"] > 0


def test_document_ids_read_back(original: Path) -> None:
    assert Store.open(original).document_ids() == ["a", "ä/b", "c"]


def test_a_source_that_is_not_there_is_refused_with_those_that_are(original: Path) -> None:
    store = Store.open(str(original))
    assert store.source("high") == Source("high", "m", "resid.1", 2)
    with pytest.raises(StoreError, match=r"this store has no source: mid\. It has: low, high, other"):
        store.source("mid")


# --- units ----------------------------------------------------------------------------------------------------------


def test_a_unit_without_a_receipt_does_not_exist(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    every = [(0, "m"), (1, "m"), (0, "chat-2"), (1, "chat-2")]
    assert store.missing() == every
    put(store, 1, "m")
    assert (store.has(1, "m"), store.has(0, "m"), store.has(1, "chat-2")) == (True, False, False)
    assert store.missing() == [unit for unit in every if unit != (1, "m")]
    (store.path / "receipts" / "00001.m.json").unlink()
    assert store.missing() == every
    assert (store.path / "activations/low/c/1/0").exists()


def test_putting_a_unit_twice_gives_the_same_bytes(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    put(store, 1, "m")
    once = tree(store.path)
    put(store, 1, "m")
    assert tree(store.path) == once
    store.put(1, "m", {name: make_part(store, 1, name) for name in ("high", "low")}, MADE_WITH)
    assert tree(store.path) == once


def test_two_workers_may_put_the_same_unit_at_once(tmp_path: Path, ragged: Header) -> None:
    store, alone = plan(tmp_path / "a.zarr", ragged), plan(tmp_path / "b.zarr", ragged)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: put(store, 0, "m"), range(8)))
    put(alone, 0, "m")
    assert tree(store.path) == tree(alone.path)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1), (0, 0, 1, 2, 1, 3)])
def test_the_order_of_puts_changes_no_byte(
    tmp_path: Path, ragged: Header, original: Path, order: tuple[int, ...]
) -> None:
    store = plan(tmp_path / "b.zarr", ragged)
    every = store.missing()
    for number in order:
        put(store, *every[number])
    store.seal()
    assert tree(store.path) == tree(original)


def test_a_unit_must_hold_every_source_of_its_model_and_rows_of_the_right_shape(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    parts = {name: make_part(store, 0, name) for name in ("low", "high")}
    with pytest.raises(AssertionError):
        store.put(0, "m", {"low": parts["low"]}, MADE_WITH)
    with pytest.raises(AssertionError):
        store.put(0, "m", {"low": parts["high"], "high": parts["low"]}, MADE_WITH)
    with pytest.raises(AssertionError):
        store.put(1, "m", parts, MADE_WITH)
    assert len(store.missing()) == 4


# --- kills ----------------------------------------------------------------------------------------------------------


def syncs_of(action: Callable[[], object]) -> int:
    """How often `action` calls os.fsync: twice per file, before its rename and after."""
    count = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda descriptor: (next(count), fsync(descriptor)))
        action()
    return next(count)


def die_at(number: int, die: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call `die` in place of the os.fsync of this number."""
    count, fsync = itertools.count(), os.fsync
    patch.setattr(os, "fsync", lambda descriptor: die() if next(count) == number else fsync(descriptor))


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def killed(action: Callable[[], object], number: int) -> None:
    """Run `action` in a process that ends at once, without cleaning up, at the os.fsync of this number."""
    child = os.fork()
    if not child:
        try:
            die_at(number, lambda: os._exit(9), pytest.MonkeyPatch())
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def assert_sound(path: Path, header: Header) -> Store:
    """What resumes finds: a store whose units all have files as their receipts say."""
    store = Store.resume(path, header)
    files.sweep(path)
    assert not list(path.rglob(f"*{files.TEMPORARY}*"))
    for receipt in (path / "receipts").iterdir():
        for name, entry in files.read_json(receipt)["files"].items():
            data = (path / name).read_bytes()
            assert (len(data), crc32c(data)) == (entry["size"], entry["crc32c"])
    with pytest.raises(StoreUnfinishedError):
        Store.open(path)
    return store


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_put_killed_anywhere_leaves_a_store_that_resumes_to_the_same_bytes(
    tmp_path: Path, ragged: Header, original: Path
) -> None:
    whole = tree(original)
    store = plan(tmp_path / "b.zarr", ragged)
    for unit in store.missing()[1:]:
        put(store, *unit)
    without_the_unit = {name: data for name, data in tree(store.path).items() if name != "sealed"}
    syncs = syncs_of(lambda: put(store, 0, "m"))
    assert syncs == 2 * (2 * 4 + 1) + 2 * 3  # four files of two sources and the receipt; new folders of chunks
    for number in range(syncs):
        shutil.rmtree(store.path)
        for name, data in without_the_unit.items():
            (store.path / name).parent.mkdir(parents=True, exist_ok=True)
            (store.path / name).write_bytes(data)
        killed(lambda: put(store, 0, "m"), number)
        resumed = assert_sound(store.path, ragged)
        assert resumed.has(0, "m") == (number == syncs - 1)  # killed after the rename of the receipt
        put(resumed, 0, "m")
        resumed.seal()
        assert tree(store.path) == whole


def test_a_put_that_fails_anywhere_leaves_no_receipt_and_nothing_temporary(
    tmp_path: Path, ragged: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    for number in range(2 * (2 * 4 + 1) - 1):  # the last sync comes after the receipt
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            die_at(number, full_disk, patch)
            put(store, 0, "m")
        assert files.sweep(store.path) == 0
        assert not assert_sound(store.path, ragged).has(0, "m")


def test_a_plan_that_fails_leaves_nothing(tmp_path: Path, ragged: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        die_at(9, full_disk, patch)
        Store.create(tmp_path / "a.zarr", ragged, make_tables(ragged))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_plan_leaves_no_store_and_a_sweep_removes_the_rest(tmp_path: Path, ragged: Header) -> None:
    killed(lambda: Store.create(tmp_path / "a.zarr", ragged, make_tables(ragged)), 9)
    assert not (tmp_path / "a.zarr").exists()
    assert files.sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


# --- freezing and sealing -------------------------------------------------------------------------------------------


def test_a_scale_is_frozen_once_even_by_an_object_from_before(tmp_path: Path) -> None:
    before = Store.create(tmp_path / "a.zarr", make_header(4, 4, 2, ONE), {})
    frozen = before.freeze({"s": {"factor": 2.0}})
    put(frozen, 0, "m")
    once = tree(frozen.path)
    for store in (frozen, before, Store.resume(frozen.path, frozen.header)):
        with pytest.raises(AssertionError):
            store.freeze({"s": {"factor": 4.0}})
    assert tree(frozen.path) == once


def test_a_freeze_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header(4, 4, 2, ONE)
    Store.create(tmp_path / "a.zarr", header, {})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        die_at(0, full_disk, patch)
        Store.resume(tmp_path / "a.zarr", header).freeze({"s": {"factor": 2.0}})
    assert (tmp_path / "a.zarr" / "activations/s/zarr.json").exists()
    frozen = Store.resume(tmp_path / "a.zarr", header).freeze({"s": {"factor": 4.0}})
    assert zarr.open(frozen.path, mode="r")["activations/s"].attrs["scale_factor"] == 4.0
    assert Store.resume(frozen.path, header).header == frozen.header


def test_a_unit_can_not_be_put_before_the_scale_is_fixed(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "a.zarr", make_header(4, 4, 2, ONE), {})
    part = make_part(Store(tmp_path, replace(store.header, scale={"s": {"factor": 1.0}})), 0, "s")
    with pytest.raises(AssertionError):
        store.put(0, "m", {"s": part}, MADE_WITH)
    assert store.missing() == [(0, "m")]


def test_a_store_with_missing_units_can_not_be_sealed(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    with pytest.raises(AssertionError):
        store.seal()
    assert not store.sealed


# --- what a user can be told ----------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused_with_what_it_has(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    put(store, 0, "m")
    with pytest.raises(StoreUnfinishedError, match=r"a\.zarr has 1 of 4 units\. Run the same harvest run again"):
        Store.open(store.path)
    for unit in store.missing():
        put(store, *unit)
    with pytest.raises(StoreUnfinishedError, match="4 of 4 units"):
        Store.open(store.path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, lengthen])
@pytest.mark.parametrize(
    "name", ["activations/low/c/1/0", "moments/other/c/0/0/0", "rows/m/flags/c/0", "tokens/m/id/c/0"]
)
def test_a_file_that_is_missing_or_of_another_size_is_named(finished: Path, damage: Break, name: str) -> None:
    damage(finished / name)
    with pytest.raises(StoreDamagedError, match=r"1 files of .* are damaged") as caught:
        Store.open(finished)
    assert caught.value.value == name


def test_of_many_damaged_files_the_first_five_are_named(finished: Path) -> None:
    shutil.rmtree(finished / "activations")
    with pytest.raises(StoreDamagedError, match=r"10 files of .* and 5 more"):
        Store.open(finished)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"files": {"a": 1}}', b'{"id": "x", "files": {}}', b"\xff"]
)
def test_a_seal_that_is_broken_or_of_another_store_is_named(finished: Path, content: bytes) -> None:
    (finished / "sealed").write_bytes(content)
    with pytest.raises(StoreDamagedError) as caught:
        Store.open(finished)
    assert caught.value.value == "sealed"


def test_another_store_at_the_path_is_refused_with_the_fields_that_differ(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    before = tree(store.path)
    spec = {**ragged.spec, "corpus": "other", "rows": {"count": 11, "seed": 1}}
    with pytest.raises(StoreMismatchError) as caught:
        Store.resume(store.path, replace(ragged, spec=spec))
    assert caught.value.value == "corpus: 'abc' -> 'other'; rows.seed: 0 -> 1"
    assert str(store.path) in str(caught.value)
    assert tree(store.path) == before


def test_resuming_takes_the_scale_of_the_store_and_not_of_the_header(tmp_path: Path, ragged: Header) -> None:
    store = plan(tmp_path / "a.zarr", ragged)
    assert Store.resume(store.path, ragged).header == store.header


def not_there(path: Path) -> None:
    shutil.rmtree(path)


def an_empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def another_zarr_group(path: Path) -> None:
    shutil.rmtree(path)
    zarr.create_group(path, zarr_format=3)


def with_group(content: bytes) -> Break:
    return lambda path: (path / "zarr.json").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(not_there, an_empty_folder, a_file, another_zarr_group),
        *map(
            with_group,
            (
                b"",
                b'{"attributes": ',
                b"[]",
                b'{"attributes": {"granary": {}}}',
                b'{"attributes": {"granary": {"format": 1, "models": {}, "sources": {}}}}',
                b"\xff\xfe",
            ),
        ),
        with_group(b'{"attributes": {"granary": "x"}}'),
    ],
)
@pytest.mark.parametrize("enter", [Store.open, lambda path: Store.resume(path, make_header(4, 4, 2, ONE))])
def test_what_is_no_store_is_refused_with_its_path(tmp_path: Path, damage: Break, enter: Break) -> None:
    path = Store.create(tmp_path / "a.zarr", make_header(4, 4, 2, ONE), {}).path
    damage(path)
    with pytest.raises(StoreError, match="no Granary store here") as caught:
        enter(path)
    assert caught.value.value == path


def test_a_store_of_another_format_is_refused_with_both_numbers(finished: Path) -> None:
    group = files.read_json(finished / "zarr.json")
    group["attributes"]["granary"]["format"] = 2
    files.write_json(finished / "zarr.json", group)
    with pytest.raises(StoreError, match=r"another format of store: 2\. This version reads format 1"):
        Store.open(finished)


# --- dask -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [1, 4, 1000])
def test_a_dask_array_is_what_read_gives_in_blocks_within_shards(original: Path, block_rows: int) -> None:
    store = Store.open(original)
    whole = store.read(0, store.rows)
    for name in TWO:
        array = store.dask(name, block_rows)
        assert (array.shape, array.dtype) == ((11, store.source(name).width), np.float32)
        assert max(array.chunks[0]) <= block_rows
        assert {6, 11} <= set(np.cumsum(array.chunks[0]).tolist())  # shards of 6
        assert array.compute(scheduler="synchronous").tobytes() == whole[name].numpy().tobytes()
        assert np.allclose(array.mean(0).compute(scheduler="synchronous"), whole[name].numpy().mean(0), equal_nan=True)
