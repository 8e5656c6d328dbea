"""The reader equals plain indexing, and the filter drops what it says."""

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import Packing
from shared.errors import ConfigError, StoreError
from shared.flags import BOS, CLIPPED, FIRST, HELD_OUT, MASKED, SINK, SPECIAL, TRAIN
from shared.store import Store
from tests.build import make_store
from train.reader import Reader, kept_rows

ROWS = 101  # 4 shards of 32 rows, the last of 5, and chunks of 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("reader") / "small.zarr", rows=ROWS, factor={"a": 4.0})


@pytest.fixture(scope="module", params=["raw", "zstd", "blosc", "pcodec"])
def any_store(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The rows of `store`, raw and packed by every codec."""
    if request.param == "raw":
        return store
    packing = Packing(request.param, 4, {"a": 4, "b": 2})
    path = tmp_path_factory.mktemp("packed") / "small.zarr"
    return make_store(path, rows=ROWS, factor={"a": 4.0}, packing=packing)


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six rows of two documents, three in each; the second is held out."""
    flags = {"model_a": [FIRST, 0, SPECIAL, 0, 0, 0], "model_b": [0, BOS, 0, FIRST, 0, 0]}
    faults = {"a": [0, CLIPPED, SINK, 0, MASKED, 0], "b": [0, 0, 0, 0, 0, SINK | MASKED]}
    return make_store(
        tmp_path_factory.mktemp("reader") / "flagged.zarr", rows=6, shard_rows=4, chunk_rows=2, documents=2, seed=SEED,
        split=np.array([TRAIN, HELD_OUT]),
        flags={name: np.array(bits, np.uint8) for name, bits in flags.items()},
        faults={name: np.array(bits, np.uint8) for name, bits in faults.items()},
    )  # fmt: skip


SEED = next(s for s in range(100) if np.random.default_rng(s).integers(0, 7, 1)[0] == 3)  # cuts the documents at row 3


def test_rows_with_flags_or_faults_of_any_involved_source_are_dropped(flagged: Store) -> None:
    assert kept_rows(flagged, ["a", "b"]).kept_N.tolist() == [False, True, False, False, False, False]
    assert kept_rows(flagged, ["a", "b"], HELD_OUT).kept_N.tolist() == [False] * 6
    assert kept_rows(flagged, ["a"]).kept_N.tolist() == [False, True, False, False, False, False]
    assert kept_rows(flagged, ["a"], HELD_OUT).kept_N.tolist() == [False, False, False, True, False, True]
    assert kept_rows(flagged, ["b"]).kept_N.tolist() == [True, True, True, False, False, False]
    assert kept_rows(flagged, ["b"], HELD_OUT).kept_N.tolist() == [False, False, False, False, True, False]


def test_a_dropped_row_counts_once_under_the_first_rule_that_drops_it(flagged: Store) -> None:
    assert kept_rows(flagged, ["a", "b"]).dropped == {"held_out": 3, "masked": 0, "special": 1, "first": 1, "sink": 0}
    assert kept_rows(flagged, ["a", "b"], HELD_OUT).dropped == {
        "training": 3,
        "masked": 2,
        "special": 0,
        "first": 1,
        "sink": 0,
    }
    assert kept_rows(flagged, ["a"], drop=["sink"]).dropped == {"held_out": 3, "masked": 0, "sink": 1}


def test_masked_rows_are_dropped_whatever_the_rules(flagged: Store) -> None:
    assert kept_rows(flagged, ["a", "b"], HELD_OUT, drop=[]).kept_N.tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_kept_and_dropped_are_all_rows(store: Store) -> None:
    for split in (TRAIN, HELD_OUT):
        kept = kept_rows(store, ["a", "b"], split)
        assert kept.kept_N.sum() + sum(kept.dropped.values()) == ROWS
        assert kept.kept_N.any()


def test_what_the_filter_keeps_is_what_the_moments_call_ordinary(tmp_path: Path) -> None:
    # Exact where one source takes part and its model is the store's only one.
    store = make_store(tmp_path / "one.zarr", rows=ROWS, models={"a": "m", "b": "m"}, factor={"a": 4.0})
    for split, name in ((TRAIN, "train"), (HELD_OUT, "held_out")):
        kept_N = kept_rows(store, ["a"], split).kept_N
        moments = store.moments("a", [f"ordinary/{name}"])
        assert moments.count == kept_N.sum() > 0
        mean_D = 4.0 * store.column("activations/a")[kept_N].astype(np.float64).mean(0)
        assert np.allclose(moments.mean_D, mean_D, atol=1e-2)  # moments are of the values before the cast to fp16


def test_unknown_names_are_refused_with_what_there_is(store: Store) -> None:
    with pytest.raises(ConfigError, match="sink"):
        kept_rows(store, ["a"], drop=["sinks"])
    with pytest.raises(StoreError, match="a, b"):
        kept_rows(store, ["c"])
    with pytest.raises(StoreError, match="a, b"):
        Reader(store, ["c"])


@given(st.lists(st.integers(0, ROWS - 1), max_size=60))
@settings(deadline=None)
def test_gathering_equals_plain_indexing_for_any_rows(store: Store, any_store: Store, rows: list[int]) -> None:
    with Reader(any_store, ["a", "b"]) as reader:
        out = {name: np.full((len(rows), width), np.nan, np.float16) for name, width in reader.widths.items()}
        used = reader.gather(np.array(rows, np.int64), out)
    assert used.tolist() == sorted(rows)
    for name, x_BD in out.items():
        assert np.array_equal(x_BD, store.column(f"activations/{name}")[used])


@given(st.sets(st.integers(0, ROWS - 1)), st.integers(1, 40))
@settings(deadline=None)
def test_streaming_gives_the_rows_in_batches_in_file_order(
    store: Store, any_store: Store, rows: set[int], batch: int
) -> None:
    with Reader(any_store, ["b"]) as reader:
        parts = list(reader.stream(np.array(sorted(rows), np.int64), batch))
    assert [len(rows_B) for rows_B, _ in parts[:-1]] == [batch] * (len(parts) - 1)
    assert [int(row) for rows_B, _ in parts for row in rows_B] == sorted(rows)
    for rows_B, x in parts:
        assert np.array_equal(x["b"], store.column("activations/b")[rows_B])


@given(st.lists(st.integers(0, ROWS - 1), max_size=5), st.integers(1, 90))
@settings(deadline=None)
def test_what_is_asked_for_and_forgotten_changes_no_value(
    store: Store, any_store: Store, starts: list[int], length: int
) -> None:
    with Reader(any_store, ["a"]) as reader:
        reader.will_need(np.array(starts, np.int64), length)
        reader.forget(np.array(starts, np.int64), length)
        out = {"a": np.empty((ROWS, 6), np.float16)}
        reader.gather(np.arange(ROWS), out)
    assert np.array_equal(out["a"], store.column("activations/a"))


def test_giving_back_memory_gives_it_back(tmp_path: Path) -> None:
    big = make_store(
        tmp_path / "big.zarr", rows=4096, shard_rows=4096, chunk_rows=1024, sources={"a": 1024}, documents=3
    )
    with Reader(big, ["a"]) as reader:
        reader.gather(np.arange(4096), {"a": np.empty((4096, 1024), np.float16)})
        assert _resident("big.zarr/activations/a") == 8 * 1024
        reader.forget(np.array([0, 2048]), 1024)
        assert _resident("big.zarr/activations/a") <= 4 * 1024 + 64


def _resident(name: str) -> int:
    """KiB of the maps of files whose path holds `name` that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        inside = name in line if not key.endswith(":") else inside
        total += int(rest[0]) if inside and key == "Rss:" else 0
    return total


def test_closing_twice_is_harmless(store: Store) -> None:
    reader = Reader(store, ["a"])
    reader.gather(np.arange(ROWS), {"a": np.empty((ROWS, 6), np.float16)})
    assert str(store.path / "activations") in Path("/proc/self/maps").read_text()
    reader.close()
    reader.close()
    assert str(store.path / "activations") not in Path("/proc/self/maps").read_text()


def test_the_limit_of_open_files_is_raised_where_it_may_be(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    Reader(store, ["a", "b"]).close()
    assert asked == [(2 * 4 + 256, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 100))
    with pytest.raises(StoreError, match="ulimit"):
        Reader(store, ["a", "b"])
