"""A filter keeps what it says, counts what it drops, and is the same from the cache."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, StoreError
from shared.flags import BOS, CLIPPED, FIRST, HELD_OUT, MASKED, SINK, SPECIAL, TRAIN
from shared.mixture import open_mixture
from shared.store import Store
from shared.view import View
from tests.build import make_store
from train import filter as filters
from train.filter import Kept, RowsConfig, kept_rows, require_rows
from train.weights import shares

ROWS = 101  # 4 shards of 32 rows, the last of 5, and chunks of 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("filter") / "small.zarr", rows=ROWS, factor={"a": 4.0})


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


def kept(store: View, sources: list[str] | None = None, **asked: Any) -> Kept:
    return kept_rows(store, RowsConfig(sources=sources, **asked))


def test_rows_with_flags_or_faults_of_any_source_are_dropped(flagged: Store) -> None:
    assert kept(flagged).kept_N.tolist() == [False, True, False, False, False, False]
    assert kept(flagged, split="held_out").kept_N.tolist() == [False] * 6
    assert kept(flagged, ["a"]).kept_N.tolist() == [False, True, False, False, False, False]
    assert kept(flagged, ["a"], split="held_out").kept_N.tolist() == [False, False, False, True, False, True]
    assert kept(flagged, ["b"]).kept_N.tolist() == [True, True, True, False, False, False]
    assert kept(flagged, ["b"], split="held_out").kept_N.tolist() == [False, False, False, False, True, False]
    assert kept(flagged, ["b"], split="all").kept_N.tolist() == [True, True, True, False, True, False]


def test_a_dropped_row_counts_once_under_the_first_rule_that_drops_it(flagged: Store) -> None:
    assert kept(flagged).dropped == {"held_out": 3, "masked": 0, "special": 1, "positions": 1, "sink": 0}
    of_test = {"training": 3, "masked": 2, "special": 0, "positions": 1, "sink": 0}
    assert kept(flagged, split="held_out").dropped == of_test
    sinks = kept(flagged, ["a"], special="keep", positions=":")
    assert sinks.dropped == {"held_out": 3, "masked": 0, "sink": 1}
    named = kept(flagged, ["b"], split="all", documents=["document-1"], max_norm_multiple=0)
    assert named.dropped == {"documents": 3, "masked": 1, "special": 0, "positions": 1}


def test_masked_rows_are_dropped_whatever_the_rules(flagged: Store) -> None:
    loose = kept(flagged, split="all", special="keep", positions=":", max_norm_multiple=0)
    assert loose.kept_N.tolist() == [True, True, True, True, False, False]


def test_a_filter_that_keeps_nothing_says_what_dropped_the_rows(flagged: Store) -> None:
    with pytest.raises(ConfigError, match=r"no row is left to serve: dropped: training 3, masked 2, positions 1\. "):
        require_rows(kept(flagged, split="held_out"))
    require_rows(kept(flagged))


filters_of = st.builds(
    RowsConfig,
    split=st.sampled_from(["train", "held_out", "all"]),
    special=st.sampled_from(["drop", "keep"]),
    positions=st.sampled_from(["1:", ":", "0:", ":4", "2:9", "1:3", "50:"]),
    max_norm_multiple=st.sampled_from([0.0, 0.5, 1.0, 10.0, 100.0]),
    documents=st.none() | st.lists(st.sampled_from(["document-0", "document-1", "document-[2-5]", "*7", "*"])),
    sources=st.none() | st.lists(st.sampled_from(["a", "b"]), unique=True, min_size=1),
)


@given(filters_of)
@settings(deadline=None)
def test_a_filter_is_what_its_words_say_row_by_row(store: Store, asked: RowsConfig) -> None:
    names = asked.sources or ["a", "b"]
    start, stop = asked.span
    column = {name: store.column(name) for name in ("rows/document", "documents/split")}
    of_source = {name: [store.column(f"{table}/{name}") for table in ("norms", "faults")] for name in names}
    of_model = {
        name: [store.column(f"rows/{store.source(name).model}/{table}") for table in ("flags", "position")]
        for name in names
    }
    scale = store.header.scale
    assert scale is not None
    expected = []
    for row in range(ROWS):
        document = int(column["rows/document"][row])
        drops = [asked.split != "all" and ["train", "held_out"][column["documents/split"][document]] != asked.split]
        if asked.documents is not None:
            tens = {"document-0": [0], "document-1": [1], "document-[2-5]": range(2, 6), "*7": [7], "*": range(10)}
            drops.append(not any(document in tens[one] for one in asked.documents))
        for name in names:
            (norm, fault), (flags, position) = ([one[row] for one in of[name]] for of in (of_source, of_model))
            drops += [
                bool(fault & MASKED),
                asked.special == "drop" and bool(flags & SPECIAL),
                not start <= position < stop,
                asked.max_norm_multiple > 0 and norm > asked.max_norm_multiple * scale[name]["median_norm"],
            ]
        expected.append(not any(drops))
    found = kept_rows(store, asked)
    assert found.kept_N.tolist() == expected
    assert found.kept_N.sum() + sum(found.dropped.values()) == ROWS


def test_what_the_filter_keeps_is_what_the_moments_call_ordinary(tmp_path: Path) -> None:
    # Exact where one source takes part and its model is the store's only one.
    store = make_store(tmp_path / "one.zarr", rows=ROWS, models={"a": "m", "b": "m"}, factor={"a": 4.0})
    for split in ("train", "held_out"):
        kept_N = kept(store, ["a"], split=split).kept_N
        moments = store.moments("a", [f"ordinary/{split}"])
        assert moments.count == kept_N.sum() > 0
        mean_D = 4.0 * store.column("activations/a")[kept_N].astype(np.float64).mean(0)
        assert np.allclose(moments.mean_D, mean_D, atol=1e-2)  # moments are of the values before the cast to fp16


def test_unknown_names_are_refused_with_what_there_is(store: Store) -> None:
    with pytest.raises(StoreError, match="a, b"):
        kept(store, ["c"])
    with pytest.raises(ConfigError, match=r"no document of this name: document-77\. rows.documents takes ids, such as"):
        kept(store, documents=["document-1", "document-77"])
    with pytest.raises(ConfigError, match="no document of this name: x-"):
        kept(store, documents=["x-*"])


@pytest.mark.parametrize("positions", ["1", "2:2", "3:1", "a:", "-1:", "1:2:3", ""])
def test_positions_are_written_as_a_slice(positions: str) -> None:
    with pytest.raises(ValueError, match="Write START:STOP"):
        RowsConfig(positions=positions)


# --- mixtures --------------------------------------------------------------------------------------------------------

SIZES = {"pair": 101, "more": 60, "rest": 37}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Three stores of some documents of one name; rows of one are eight times as long as those of another."""
    folder, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0)
    split = np.array([TRAIN, HELD_OUT] * 5)
    made = []
    for n, (name, rows) in enumerate(SIZES.items()):
        values = {s: rng.lognormal(3 * n, 1, (rows, 1)) * rng.normal(size=(rows, w)) for s, w in (("a", 6), ("b", 4))}
        made.append(make_store(folder / f"{name}.zarr", rows=rows, values=values, split=split, seed=n))
    return made


@given(filters_of)
@settings(deadline=None)
def test_every_store_of_a_mixture_keeps_what_it_keeps_alone(stores: list[Store], asked: RowsConfig) -> None:
    mixed, alone = kept_rows(open_mixture(stores), asked), [kept_rows(store, asked) for store in stores]
    assert np.array_equal(mixed.kept_N, np.concatenate([one.kept_N for one in alone]))
    assert mixed.dropped == {rule: sum(one.dropped[rule] for one in alone) for rule in alone[0].dropped}


def test_a_document_or_pattern_of_any_store_of_a_mixture_will_do(stores: list[Store], tmp_path: Path) -> None:
    web = make_store(tmp_path / "web.zarr", rows=50, corpus="web/")
    mixed = open_mixture([stores[0], web])
    some = kept(mixed, split="all", documents=["web/*"])
    assert not some.kept_N[:101].any() and some.kept_N[101:].sum() == kept(web, split="all").kept_N.sum() > 0
    with pytest.raises(ConfigError, match="no document of this name: none/"):
        kept(mixed, documents=["web/*", "none/*"])


weights_of = st.fixed_dictionaries({name: st.integers(1, 50).map(lambda n: n / 10) for name in SIZES})


@given(filters_of, weights_of)
@settings(deadline=None)
def test_weights_are_the_shares_of_the_kept_rows_to_a_row(
    stores: list[Store], asked: RowsConfig, weights: dict[str, float]
) -> None:
    mixed = open_mixture(stores)
    whole, found = kept_rows(mixed, asked), kept_rows(mixed, asked.model_copy(update={"weights": weights}))
    parts = [np.split(one.kept_N, np.cumsum(list(SIZES.values()))[:-1]) for one in (whole, found)]
    before, left = ([int(part.sum()) for part in one] for one in parts)
    assert left == shares(before, [weights[name] for name in SIZES])
    assert not (found.kept_N & ~whole.kept_N).any()
    assert found.dropped == {**whole.dropped, "weights": sum(before) - sum(left)}
    assert found.kept_N.sum() + sum(found.dropped.values()) == len(found.kept_N)


def test_the_rows_that_stay_do_not_depend_on_the_seed_of_the_order(stores: list[Store]) -> None:
    mixed, weights = open_mixture(stores), {"pair": 1.0, "more": 1.0, "rest": 1.0}
    found = [kept(mixed, weights=weights, seed=seed).kept_N for seed in (0, 7)]
    assert np.array_equal(*found) and 0 < found[0].sum() < kept(mixed).kept_N.sum()


def test_a_store_of_which_nothing_is_kept_leaves_nothing_of_a_weighed_mixture(
    stores: list[Store], tmp_path: Path
) -> None:
    web = make_store(tmp_path / "web.zarr", rows=50, corpus="web/")
    found = kept(open_mixture([stores[0], web]), documents=["web/*"], weights={"pair": 1.0, "web": 1.0})
    assert not found.kept_N.any() and found.dropped["weights"] == kept(web).kept_N.sum() > 0
    message = r"no row is left to serve: dropped: .*: every store of rows\.weights must have rows that pass the other"
    with pytest.raises(ConfigError, match=message):
        require_rows(found)


def test_weights_are_above_0_and_of_a_mixture(stores: list[Store]) -> None:
    for weight in (0.0, -0.5):
        with pytest.raises(ValueError, match="Give every store a weight above 0"):
            RowsConfig(weights={"pair": 0.5, "more": weight})
    with pytest.raises(ConfigError, match=r"rows\.weights are of several stores, and this is one"):
        kept(stores[0], weights={"pair": 1.0})


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Keep every bitmap; what is computed is listed."""
    monkeypatch.setattr(filters, "WORTH_KEEPING", 0)
    monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "cache"))
    computed, genuine = [], filters._filtered

    def filtered(store: View, asked: RowsConfig, names: list[str]) -> Kept:
        computed.append(asked.split)
        return genuine(store, asked, names)

    monkeypatch.setattr(filters, "_filtered", filtered)
    return computed


def same(one: Kept, two: Kept) -> bool:
    return (
        np.array_equal(one.kept_N, two.kept_N) and one.kept_N.dtype == two.kept_N.dtype and one.dropped == two.dropped
    )


def test_a_bitmap_is_computed_once_for_a_store_and_filter(store: Store, cached: list[str], tmp_path: Path) -> None:
    first = kept(store)
    assert same(first, kept(store)) and same(first, kept(store, ["b", "a"])) and cached == ["train"]
    assert not same(first, kept(store, ["a"])) and cached == ["train", "train"]
    assert not same(first, kept(store, split="held_out")) and cached == ["train", "train", "held_out"]
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 3


def test_a_bitmap_of_other_rules_is_not_read(store: Store, cached: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(store)
    monkeypatch.setattr(filters, "RULES", filters.RULES + 1)
    kept(store)
    assert len(cached) == 2


def test_a_store_of_the_same_id_and_other_values_has_its_own_bitmap(cached: list[str], tmp_path: Path) -> None:
    one, two = (make_store(tmp_path / f"{n}.zarr", faults={"a": np.full(100, n * SINK, "u1")}) for n in range(2))
    assert one.header.id == two.header.id
    assert not same(kept(one), kept(two)) and len(cached) == 2


def test_a_bitmap_is_of_the_weights_of_its_stores_and_not_of_their_names(
    stores: list[Store], cached: list[str], tmp_path: Path
) -> None:
    weights = {"pair": 0.25, "more": 0.75}
    first = kept(open_mixture(stores[:2]), weights=weights)
    assert same(first, kept(open_mixture(stores[:2]), weights=weights)) and first.dropped["weights"] > 0
    before = len(cached)
    assert not same(first, kept(open_mixture(stores[:2]))) and len(cached) == before + 1
    for name, store in (("more", stores[0]), ("pair", stores[1])):
        (tmp_path / f"{name}.zarr").symlink_to(store.path)
    swapped = open_mixture([tmp_path / "more.zarr", tmp_path / "pair.zarr"])
    assert swapped.seals == open_mixture(stores[:2]).seals
    assert not same(first, kept(swapped, weights=weights))
    assert same(first, kept(swapped, weights={"more": 0.25, "pair": 0.75})) and len(cached) == before + 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_bitmap_that_is_not_what_was_written_is_computed_again(
    store: Store, cached: list[str], tmp_path: Path, damage: str
) -> None:
    first = kept(store)
    (place,) = (tmp_path / "cache" / "rows").iterdir()
    data = bytearray(place.read_bytes())
    data[-3] ^= 0b1000
    changed = {"flip": bytes(data), "cut": place.read_bytes()[:-4], "empty": b"", "other": b"{}\nabc"}
    place.write_bytes(changed[damage])
    assert same(kept(store), first) and len(cached) == 2
    assert same(kept(store), first) and len(cached) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_costs_time_only(store: Store, cached: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    assert same(kept(store), kept(store)) and len(cached) == 2


def test_a_file_where_the_cache_should_be_costs_time_only(store: Store, cached: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert same(kept(store), kept(store)) and len(cached) == 2
