"""Weights are shares of the rows to a row, and the rows that stay are drawn evenly, always the same.

Letters: N rows of one store.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.mixture import open_mixture
from shared.store import Store
from shared.view import View
from tests.build import make_store
from train.weights import of_stores, shares, thinned

some = st.lists(st.tuples(st.integers(0, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("kept", "weights", "given_rows"),
    [
        ([700, 300], [0.7, 0.3], [700, 300]),  # in floats, 299.99 of 300
        ([700, 300], [7, 3], [700, 300]),
        ([1000, 300], [0.7, 0.3], [700, 300]),
        ([700, 1000], [0.7, 0.3], [700, 300]),
        ([10, 10, 10], [1, 1, 1], [10, 10, 10]),
        ([100, 100], [1, 2], [50, 100]),
        ([10, 100], [1 / 3, 2 / 3], [10, 20]),
        ([5, 5], [0.9, 0.1], [5, 0]),  # 4.5 and 0.5: of equal remainders the first store has it
        ([1, 1000], [0.9, 0.1], [1, 0]),
        ([0, 1000], [0.5, 0.5], [0, 0]),
        ([12], [3.0], [12]),
    ],
)
def test_the_largest_epoch_has_the_shares_to_a_row(
    kept: list[int], weights: list[float], given_rows: list[int]
) -> None:
    assert shares(kept, weights) == given_rows


@given(some)
def test_no_row_comes_twice_and_no_larger_epoch_has_these_shares(stores: list[tuple[int, float]]) -> None:
    kept, weights = [count for count, _ in stores], [weight for _, weight in stores]
    given_rows = shares(kept, weights)
    epoch, parts = sum(given_rows), [Fraction(str(weight)) for weight in weights]
    for count, rows, part in zip(kept, given_rows, parts, strict=True):
        assert 0 <= rows <= count and abs(rows - epoch * part / sum(parts)) < 1
    assert any((epoch + 1) * part / sum(parts) > count for count, part in zip(kept, parts, strict=True))


@given(some, st.integers(1, 1000))
def test_shares_do_not_depend_on_the_unit_of_the_weights(stores: list[tuple[int, float]], times: int) -> None:
    kept, weights = [count for count, _ in stores], [round(weight * 1000) + 1.0 for _, weight in stores]
    assert shares(kept, weights) == shares(kept, [weight * times for weight in weights])


@given(st.lists(st.booleans(), max_size=300), st.data())
def test_thinning_keeps_so_many_of_the_kept_rows_and_fewer_of_these(kept: list[bool], data: st.DataObject) -> None:
    kept_N = np.array(kept, bool)
    n = data.draw(st.integers(0, int(kept_N.sum())))
    left_N = thinned(kept_N, n)
    assert left_N.sum() == n and not (left_N & ~kept_N).any() and kept_N.tolist() == kept
    fewer_N = thinned(kept_N, data.draw(st.integers(0, n)))
    assert not (fewer_N & ~left_N).any()
    assert np.array_equal(left_N, thinned(kept_N, n))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for n, name in enumerate(("pair.zarr", "more.zarr", "other/more.zarr", "plain", "far.zarr-0123456789ab")):
        make_store(folder / name, rows=20, documents=4, corpus=f"{n}/")
    return folder


def mixed(folder: Path, *names: str) -> View:
    return open_mixture([folder / name for name in names])


def test_weights_go_by_the_names_of_folders_in_the_order_of_the_stores(folder: Path) -> None:
    three = mixed(folder, "plain", "pair.zarr", "far.zarr-0123456789ab")
    assert of_stores(three, {"far": 0.1, "pair": 0.2, "plain": 0.3}) == [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"pair": 1.0}, "stores without a weight in rows.weights: more. Weigh every store, or none"),
        ({}, "stores without a weight in rows.weights: pair, more. Weigh every store, or none"),
        (
            {"pair": 1.0, "moore": 2.0},
            "rows.weights names a store that is not there: moore. Did you mean more? Known: pair, more",
        ),
    ],
)
def test_every_store_has_a_weight_and_no_other(folder: Path, weights: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        of_stores(mixed(folder, "pair.zarr", "more.zarr"), weights)
    assert str(error.value) == told


def test_a_single_store_has_no_weight(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rows\.weights are of several stores, and this is one: .*pair\.zarr\. Leave"
    ):
        of_stores(Store.open(folder / "pair.zarr"), {"pair": 1.0})


def test_two_stores_of_one_name_need_another_which_a_link_gives(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"two stores are called more, and rows\.weights go by names: .*Rename one"):
        of_stores(mixed(folder, "more.zarr", "other/more.zarr"), {"more": 1.0})
    (folder / "third.zarr").symlink_to(folder / "other/more.zarr")
    assert of_stores(mixed(folder, "more.zarr", "third.zarr"), {"more": 1.0, "third": 2.0}) == [1.0, 2.0]
