"""Centres and factors are those of the rows that a run keeps.

Letters: N rows, D width of a source.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import StoreError
from shared.family import Wider
from shared.flags import FIRST, SPECIAL
from shared.mixture import open_mixture
from shared.store import Store
from shared.view import View
from tests.build import make_store
from train import scale as scales
from train.filter import RowsConfig, kept_rows
from train.order import Order
from train.scale import Scale, fit, geometric_median, kept_moments
from train.weights import shares, thinned

ROWS, WIDTHS, FACTORS = 400, {"a": 6, "b": 4}, {"a": 4.0, "b": 0.5}
Make = Callable[..., Store]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Rows that fp16 holds exactly, far from 0; some of b are sinks, and none of a is."""

    def made(**changes: Any) -> Store:
        rng = np.random.default_rng(3)
        values = {
            name: ((rng.normal(size=(ROWS, width)) + 3).astype(np.float16) * FACTORS[name]).astype(np.float32)
            for name, width in WIDTHS.items()
        }
        values["b"][rng.random(ROWS) < 0.04] *= 32
        path = tmp_path_factory.mktemp("scale") / "some.zarr"
        given = {"rows": ROWS, "shard_rows": 256, "chunk_rows": 32, "sources": WIDTHS, "factor": FACTORS}
        return make_store(path, **{**given, "values": values, **changes})

    return made


@pytest.fixture(scope="module")
def store(make: Make) -> Store:
    return make()


def order_of(store: Store, sources: list[str]) -> Order:
    return Order(kept_rows(store, RowsConfig(sources=sources)).kept_N, 8, 4, seed=0)


def rows(store: View, source: str, kept_N: np.ndarray) -> np.ndarray:
    return store.stored(source, np.arange(store.rows)[kept_N]).astype(np.float64) * store.factor(source)


def expected(x_ND: np.ndarray, kind: str, centre: bool, widths: list[int]) -> tuple[np.ndarray, float]:
    mean_D = x_ND.mean(0) if centre else np.zeros(x_ND.shape[1])
    centred_ND = x_ND - mean_D
    target = math.sqrt(sum(widths) / len(widths))
    factors = {
        "none": 1.0,
        "rms": 1 / math.sqrt((centred_ND**2).mean()),
        "median_norm": target / float(np.median(np.linalg.norm(centred_ND, axis=1))),
    }
    return mean_D, factors[kind]


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["none", "rms", "median_norm"])
@pytest.mark.parametrize("sources", [["a", "b"], ["a"], ["b"]], ids="+".join)
def test_the_scale_is_that_of_the_kept_rows(store: Store, sources: list[str], kind: Any, centre: bool) -> None:
    order = order_of(store, sources)
    scale = fit(store, sources, order, kind, centre)
    for name in sources:
        x_ND = rows(store, name, order.kept_N)
        mean_D, factor = expected(x_ND, kind, centre, [WIDTHS[s] for s in sources])
        np.testing.assert_allclose(scale.mean(name).numpy(), mean_D, rtol=1e-6, atol=1e-6)
        assert float(scale.factor(name)) == pytest.approx(factor, rel=1e-6)
        scaled_ND = scale.scaled(name, torch.from_numpy(x_ND).float()).double()
        if kind == "rms":
            assert float(scaled_ND.square().mean()) == pytest.approx(1.0, rel=1e-5)
        if kind == "median_norm":
            target = math.sqrt(sum(WIDTHS[s] for s in sources) / len(sources))
            assert float(np.median(scaled_ND.norm(dim=1))) == pytest.approx(target, rel=1e-5)


def kept_few_less(store: Store) -> np.ndarray:
    return kept_rows(store).kept_N


def kept_fewer(store: Store) -> np.ndarray:
    kept_N = kept_rows(store).kept_N
    return kept_N & (np.arange(ROWS) % 3 > 0)


def kept_more(store: Store) -> np.ndarray:
    return kept_rows(store, RowsConfig(positions=":", max_norm_multiple=0)).kept_N


@pytest.mark.parametrize("kept", [kept_few_less, kept_fewer, kept_more])
@pytest.mark.parametrize("source", ["a", "b"])
def test_the_moments_of_the_kept_rows_are_exact_whichever_way_they_are_found(
    store: Store, source: str, kept: Callable[[Store], np.ndarray]
) -> None:
    kept_N = kept(store)
    moments = kept_moments(store, source, kept_N)
    x_ND = rows(store, source, kept_N)
    assert moments.count == len(x_ND)
    np.testing.assert_allclose(moments.mean_D, x_ND.mean(0), rtol=1e-9)
    np.testing.assert_allclose(moments.m2_D, ((x_ND - x_ND.mean(0)) ** 2).sum(0), rtol=1e-9)
    assert moments.variance() == pytest.approx(float(((x_ND - x_ND.mean(0)) ** 2).sum(1).mean()), rel=1e-9)


def test_few_dropped_rows_are_taken_out_of_the_stored_moments_and_only_they_are_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_moments = scales._read_moments

    def spied(store: Store, source: str, wanted: np.ndarray) -> Any:
        read.append(len(wanted))
        return read_moments(store, source, wanted)

    monkeypatch.setattr(scales, "_read_moments", spied)
    kept_N = kept_rows(store).kept_N
    for name in WIDTHS:
        kept_moments(store, name, kept_N)
    sinks_of_b = int((scales.ordinary_rows(store, "a") & ~kept_N).sum())
    assert read == [sinks_of_b, 0] and sinks_of_b > 0


def test_rows_that_another_model_alone_marks_count_for_a_run_without_that_model(make: Make) -> None:
    flags = np.zeros(ROWS, np.uint8)
    flags[::5] = SPECIAL | FIRST
    store = make(flags={"model_a": np.zeros(ROWS, np.uint8), "model_b": flags})
    order = order_of(store, ["a"])
    assert (order.kept_N & (flags > 0)).any()
    scale = fit(store, ["a"], order, "rms", True)
    mean_D, factor = expected(rows(store, "a", order.kept_N), "rms", True, [6])
    np.testing.assert_allclose(scale.mean("a").numpy(), mean_D, rtol=1e-6)
    assert float(scale.factor("a")) == pytest.approx(factor, rel=1e-6)


def test_a_median_of_many_rows_is_that_of_a_sample_of_the_kept_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "MEDIAN_ROWS", 50)
    order = order_of(store, ["b"])
    sample = order.sample(50, seed=0)
    assert len(sample) == 50 and order.kept_N[sample].all()
    median = float(np.median(np.linalg.norm(rows(store, "b", sample), axis=1)))
    assert float(fit(store, ["b"], order, "median_norm", False).factor("b")) == pytest.approx(2 / median, rel=1e-6)


# --- mixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(make: Make, store: Store) -> View:
    rng = np.random.default_rng(6)
    values = {
        name: (5 - 2 * rng.normal(size=(250, width)).astype(np.float16)).astype(np.float32) * FACTORS[name]
        for name, width in WIDTHS.items()
    }
    values["a"][rng.random(250) < 0.04] *= 32
    return open_mixture([store, make(rows=250, values=values, corpus="x/")])


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [1.0, 9.0]])
@pytest.mark.parametrize("kind", ["rms", "median_norm"])
def test_the_scale_of_a_mixture_is_that_of_the_rows_that_it_keeps(
    mixed: View, kind: Any, weights: list[float] | None
) -> None:
    parts = np.split(kept_rows(mixed).kept_N, [ROWS])
    if weights is not None:
        counts = shares([int(part.sum()) for part in parts], weights)
        parts = [thinned(part, n) for part, n in zip(parts, counts, strict=True)]
    order = Order(np.concatenate(parts), 8, 4, seed=0)
    scale = fit(mixed, ["a", "b"], order, kind, True)
    for name in WIDTHS:
        x_ND = rows(mixed, name, order.kept_N)
        mean_D, factor = expected(x_ND, kind, True, list(WIDTHS.values()))
        np.testing.assert_allclose(scale.mean(name).numpy(), mean_D, rtol=1e-6, atol=1e-6)
        assert float(scale.factor(name)) == pytest.approx(factor, rel=1e-6)


def test_of_a_mixture_only_the_stores_that_gave_rows_away_are_read(
    mixed: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, genuine = list[tuple[Path, int]](), scales._read_moments
    monkeypatch.setattr(
        scales,
        "_read_moments",
        lambda one, name, wanted: (read.append((one.path, len(wanted))), genuine(one, name, wanted))[1],
    )
    first_N, second_N = np.split(kept_rows(mixed).kept_N, [ROWS])
    left_N = thinned(first_N, 40)
    kept_N = np.concatenate([left_N, second_N])
    moments = kept_moments(mixed, "a", kept_N)
    first, second = (one.path for one in mixed.stores)
    dropped = int((scales.ordinary_rows(mixed.stores[1], "a") & ~second_N).sum())
    assert read == [(first, 40), (second, dropped)] and dropped < 0.1 * second_N.sum()
    x_ND = rows(mixed, "a", kept_N)
    assert moments.count == len(x_ND)
    np.testing.assert_allclose(moments.mean_D, x_ND.mean(0), rtol=1e-9)
    np.testing.assert_allclose(moments.m2_D, ((x_ND - x_ND.mean(0)) ** 2).sum(0), rtol=1e-9)


def test_a_store_of_more_sources_has_its_own_models_beside_it(make: Make, store: Store) -> None:
    """The flags of model_b decide the class of a row of `a` in one store, and not in the other."""
    special = np.where(np.arange(ROWS) % 5 == 0, SPECIAL, 0).astype(np.uint8)
    parent = make(sources={"a": 6}, models={"a": "model_a"}, values=None, special=0.0)
    more = make(sources={"b": 4}, models={"b": "model_b"}, values=None, flags={"model_b": special}, factor={"b": 0.5})
    wide = Wider(parent, more)
    mixed = open_mixture([store, wide])
    assert [one.beside("a") for one in mixed.stores] == [["model_a", "model_b"], ["model_a"]]
    kept_N = kept_rows(mixed).kept_N
    moments = kept_moments(mixed, "a", kept_N)
    assert moments.count == kept_N.sum()
    np.testing.assert_allclose(moments.mean_D, rows(mixed, "a", kept_N).mean(0), rtol=1e-3)


# --- differences ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(make: Make) -> Store:
    """Two sources of one width, of other factors; both are sinks in places."""
    rng = np.random.default_rng(4)
    values = {
        name: ((rng.normal(size=(ROWS, 6)) + offset).astype(np.float16) * FACTORS[name]).astype(np.float32)
        for name, offset in (("a", 3), ("b", 9))
    }
    for x_ND in values.values():
        x_ND[rng.random(ROWS) < 0.04] *= 32
    return make(sources={"a": 6, "b": 6}, values=values)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["none", "rms", "median_norm"])
@pytest.mark.parametrize("names", [["a - b"], ["b", "a - b"], ["b - a", "a", "b"]], ids="+".join)
def test_the_scale_of_a_difference_is_that_of_its_kept_rows(
    twins: Store, names: list[str], kind: Any, centre: bool
) -> None:
    order = Order(kept_rows(twins).kept_N, 8, 4, seed=0)
    scale = fit(twins, names, order, kind, centre)
    x = {name: rows(twins, name, order.kept_N) for name in "ab"}
    x |= {"a - b": x["a"] - x["b"], "b - a": x["b"] - x["a"]}
    for name in names:
        mean_D, factor = expected(x[name], kind, centre, [6] * len(names))
        np.testing.assert_allclose(scale.mean(name).numpy(), mean_D, rtol=1e-6, atol=1e-6)
        assert float(scale.factor(name)) == pytest.approx(factor, rel=1e-6)


def test_the_mean_of_a_difference_is_that_of_the_uncast_values(make: Make) -> None:
    rng = np.random.default_rng(5)
    values = {name: (1 + rng.normal(size=(ROWS, 6)) / 64).astype(np.float32) for name in "ab"}  # no fp16 numbers
    store = make(sources={"a": 6, "b": 6}, values=values, factor={"a": 2.0**7})
    order = Order(kept_rows(store).kept_N, 8, 4, seed=0)
    exact_D = (values["a"].astype(np.float64) - values["b"].astype(np.float64))[order.kept_N].mean(0)
    cast_D = (rows(store, "a", order.kept_N) - rows(store, "b", order.kept_N)).mean(0)
    found_D = fit(store, ["a - b"], order, "rms", True).mean("a - b").numpy()
    np.testing.assert_allclose(found_D, exact_D, rtol=1e-6, atol=1e-9)
    assert np.abs(found_D - cast_D).max() > 1e-6


@pytest.mark.parametrize(("kind", "sampled"), [("rms", False), ("median_norm", True), ("none", True)])
def test_all_kept_rows_of_a_difference_are_read_only_where_its_spread_counts(
    twins: Store, kind: Any, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "MEDIAN_ROWS", 50)
    read, genuine = dict[str, int](), scales._read_moments
    monkeypatch.setattr(
        scales,
        "_read_moments",
        lambda store, name, wanted: (read.update({name: len(wanted)}), genuine(store, name, wanted))[1],
    )
    order = Order(kept_rows(twins).kept_N, 8, 4, seed=0)
    fit(twins, ["a - b"], order, kind, True)
    assert read["a - b"] == (50 if sampled else order.kept) and order.kept > 150


def test_sources_that_are_alike_have_no_difference(make: Make) -> None:
    x_ND = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
    store = make(sources={"a": 6, "b": 6}, values={"a": x_ND, "b": x_ND}, factor={})
    for kind, centre in itertools.product(("none", "rms", "median_norm"), (True, False)):
        with pytest.raises(StoreError, match="all rows of this source are alike: a - b"):
            fit(store, ["a", "a - b"], order_of(store, ["a", "b"]), kind, centre)


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1])  # 0.1 is no fp16 number
def test_a_source_whose_rows_are_all_alike_is_refused_by_name_whatever_the_scale(make: Make, value: float) -> None:
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=(ROWS, 6)).astype(np.float32), "b": np.full((ROWS, 4), value, np.float32)}
    store = make(values=values)
    for kind, centre in itertools.product(("none", "rms", "median_norm"), (True, False)):
        with pytest.raises(StoreError, match="all rows of this source are alike: b"):
            fit(store, ["a", "b"], order_of(store, ["a", "b"]), kind, centre)


def test_a_source_whose_median_row_is_zero_has_no_median_norm(make: Make) -> None:
    values = {"a": np.ones((ROWS, 6), np.float32), "b": np.zeros((ROWS, 4), np.float32)}
    values["b"][::4] = np.eye(4, dtype=np.float32)[0]
    store = make(values=values, faults={"b": np.zeros(ROWS, np.uint8)})
    with pytest.raises(StoreError, match="most rows of this source are alike: b"):
        fit(store, ["b"], order_of(store, ["b"]), "median_norm", False)


def test_raw_undoes_scaled_to_rounding() -> None:
    scale = Scale({"a": 3})
    scale.mean("a").copy_(torch.tensor([1.0, -2.0, 300.0]))
    scale.factor("a").fill_(0.37)
    x_BD = torch.tensor([[1.0, 2.0, 3.0], [-5.0, 0.1, 299.0]])
    assert scale.scaled("a", x_BD)[0].tolist() == pytest.approx([0.0, 4 * 0.37, -297 * 0.37])
    torch.testing.assert_close(scale.raw("a", scale.scaled("a", x_BD)), x_BD, rtol=1e-6, atol=3e-5)


def test_a_fresh_scale_changes_nothing() -> None:
    scale, x_BD = Scale({"a": 3}), torch.randn(4, 3)
    assert torch.equal(scale.scaled("a", x_BD), x_BD) and torch.equal(scale.raw("a", x_BD), x_BD)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    corner = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [5.0, 5.0]])
    assert geometric_median(corner).tolist() == pytest.approx([5.0, 5.0])  # on one of the rows
    x_ND = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() ** 3
    found_D = geometric_median(x_ND)
    least = torch.linalg.vector_norm(x_ND - found_D, dim=1).sum()
    for shift in torch.eye(3).double() * 1e-2:
        for moved_D in (found_D + shift, found_D - shift):
            assert torch.linalg.vector_norm(x_ND - moved_D, dim=1).sum() > least
    assert geometric_median(torch.tensor([[1.0, 2.0]])).tolist() == [1.0, 2.0]
    assert geometric_median(torch.full((4, 2), 3.0)).tolist() == [3.0, 3.0]  # rows that are all alike
    many_ND = torch.zeros(9, 2)
    many_ND[8] = 1000.0
    assert geometric_median(many_ND).tolist() == pytest.approx([0.0, 0.0], abs=1e-3)  # the mean is 111
