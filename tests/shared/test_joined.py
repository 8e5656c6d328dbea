"""Rows of several views stand one behind the other, whoever holds them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import CODECS, Packing
from shared.errors import StoreError
from shared.joined import Joined, plan_of
from shared.moments import CLASSES, Moments
from shared.store import Store
from shared.view import View
from tests.build import make_store
from train.reader import Reader

SIZES = (101, 5, 70)  # of shards of 32, 8 and 64 rows


def joined(views: Sequence[View]) -> Joined:
    return Joined(views[0].path, replace(views[0].header, plan=plan_of(views)), views)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder, default = tmp_path_factory.mktemp("joined"), CODECS["zstd"].default
    packings = (None, Packing("zstd", default, {"a": 4, "b": 8}), None)
    return [
        make_store(folder / f"{n}.zarr", rows, shard, seed=n, documents=n + 2, packing=packing, corpus=f"{n}/")
        for n, (rows, shard, packing) in enumerate(zip(SIZES, (32, 8, 64), packings, strict=True))
    ]


@pytest.fixture(scope="module")
def whole(three: list[Store]) -> Joined:
    return joined(three)


def stored(view: View, name: str) -> np.ndarray:
    return view.stored(name, np.arange(view.rows))


def test_rows_shards_and_documents_are_numbered_through(three: list[Store], whole: Joined) -> None:
    assert (whole.rows, whole.shards, whole.header.plan["documents"]) == (176, 4 + 1 + 2, 2 + 3 + 4)
    assert [row for shard in range(7) for row in whole.rows_of(shard)] == list(range(176))
    assert whole.document_ids() == [name for one in three for name in one.document_ids()]
    assert whole.document_ids()[2] == "1/document-0"
    document_N, row_n = whole.column("rows/document"), whole.column("documents/row")
    assert np.array_equal(document_N, np.concatenate([whole.map("rows/document", shard) for shard in range(7)]))
    assert np.array_equal(np.repeat(np.arange(9), np.diff(row_n)), document_N)
    assert (document_N.dtype, row_n.dtype) == (np.int32, np.int64) and row_n[-1] == 176
    assert whole.members == [one.header.id for one in three] and len(set(whole.seals)) == 3


def test_tables_stand_behind_one_another(three: list[Store], whole: Joined) -> None:
    for name in ("norms/a", "faults/b", "moments/a", "rows/model_b/flags", "rows/model_a/position", "documents/split"):
        assert np.array_equal(whole.column(name), np.concatenate([one.column(name) for one in three]), equal_nan=True)
    shards = [one.map("faults/a", shard) for one in three for shard in range(one.shards)]
    assert all(np.array_equal(whole.map("faults/a", n), faults_S) for n, faults_S in enumerate(shards))
    assert isinstance(whole.map("norms/a", 6), np.memmap)
    with pytest.raises(StoreError, match=r"this table is not joined over several stores: tokens/model_a/id\. Open one"):
        whole.column("tokens/model_a/id")


def test_moments_are_those_of_all_rows(three: list[Store], whole: Joined) -> None:
    for name, width in (("a", 6), ("b", 4)):
        found, expected = whole.moments(name, CLASSES), Moments.empty(width)
        for one in three:
            expected = expected.merge(one.moments(name, CLASSES))
        assert found.count == expected.count > 0 and found.largest == expected.largest
        assert np.array_equal(found.norms_H, expected.norms_H)
        np.testing.assert_allclose(found.mean_D, expected.mean_D, rtol=1e-12)
        np.testing.assert_allclose(found.m2_D, expected.m2_D, rtol=1e-12)


@given(st.lists(st.integers(0, 175), min_size=1, max_size=40))
def test_rows_are_taken_from_whichever_store_has_them(three: list[Store], whole: Joined, rows: list[int]) -> None:
    for name in ("a", "b"):
        expected = np.concatenate([stored(one, name) for one in three])
        assert np.array_equal(whole.stored(name, np.array(rows)), expected[rows], equal_nan=True)


@given(st.lists(st.integers(0, 176), min_size=2, max_size=9, unique=True))
def test_pieces_across_the_borders_are_fetched_and_forgotten_where_they_lie(
    three: list[Store], whole: Joined, cuts: list[int]
) -> None:
    pieces = [(start, stop) for start, stop in pairwise(sorted(cuts))]
    expected = np.concatenate([stored(one, "a") for one in three])
    rows_B = np.concatenate([np.arange(*piece) for piece in pieces])
    out_BD = np.empty((len(rows_B), 6), np.float16)
    shards = whole.activations("a")
    with ThreadPoolExecutor(2) as pool:
        shards.will_need(pieces, pool)
        shards.take(rows_B, out_BD, pool)
        shards.forget(pieces)
    assert np.array_equal(out_BD, expected[rows_B], equal_nan=True)


def test_every_piece_reaches_each_store_once_in_its_own_numbers(whole: Joined) -> None:
    pieces = [(90, 101), (100, 107), (106, 176)]
    told = [here for _, here in whole.activations("a")._split(pieces)]  # type: ignore[attr-defined]
    assert told == [[(90, 101), (100, 101)], [(0, 5)], [(0, 1), (0, 70)]]


def test_views_of_views_are_joined_alike(three: list[Store], whole: Joined) -> None:
    nested = joined([joined(three[:2]), three[2]])
    assert nested.members == whole.members and nested.shards == whole.shards
    assert np.array_equal(stored(nested, "b"), stored(whole, "b"), equal_nan=True)
    for name in ("rows/document", "documents/row", "documents/id_end"):
        assert np.array_equal(nested.column(name), whole.column(name))
    with Reader(nested, ["a"]) as reader:
        batches = [x["a"].copy() for _, x in reader.stream(np.arange(176), 50)]
    assert np.array_equal(np.concatenate(batches), stored(whole, "a"), equal_nan=True)


def test_views_that_agree_on_what_tells_the_class_of_a_row_are_asked_together(whole: Joined) -> None:
    assert whole.beside("a") == ["model_a", "model_b"] and whole.stores == [whole]
