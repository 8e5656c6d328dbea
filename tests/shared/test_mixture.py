"""Several stores are read as one where they fit each other; where two do not, both are named with what differs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import files
from shared.errors import ConfigError, StoreError
from shared.flags import HELD_OUT, TRAIN
from shared.header import Header
from shared.mixture import open_mixture
from shared.moments import CLASSES, Moments
from shared.source import Model
from shared.store import Store
from tests.build import make_store
from tests.shared.test_family import extend

Change = Callable[[Header], Header]


def changed(store: Store, change: Change) -> Store:
    """The same store with another header. Its size is written into `sealed`, whose other entries stay."""
    group = files.read_json(store.path / "zarr.json")
    files.write_json(store.path / "zarr.json", {**group, "attributes": change(store.header).attributes()})
    for receipt in (store.path / "receipts").iterdir():
        files.write_json(receipt, {**files.read_json(receipt), "id": change(store.header).id})
    (store.path / "sealed").unlink()
    Store.at(store.path).seal()
    return Store.open(store.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores a, b and c of one kind, of 40, 50 and 60 rows; d is more rows of c."""
    folder = tmp_path_factory.mktemp("mixture")
    for n, name in enumerate("abc"):
        make_store(folder / f"{name}.zarr", rows=40 + 10 * n, seed=n, corpus=f"{name}/", factor={"a": 2.0})
    more = make_store(folder / "d.zarr", rows=30, seed=9, corpus="d/", factor={"a": 2.0})
    extend(more, Store.open(folder / "c.zarr"), "rows")
    return folder


def test_rows_stand_in_the_order_in_which_the_stores_are_named(folder: Path) -> None:
    a, b, c = (Store.open(folder / f"{name}.zarr") for name in "abc")
    whole = open_mixture([folder / "b.zarr", str(folder / "a.zarr"), c])
    assert whole.rows == 150 and [one.path for one in whole.stores] == [b.path, a.path, c.path]
    assert whole.members == [b.header.id, a.header.id, c.header.id] and whole.seals == [*b.seals, *a.seals, *c.seals]
    expected = np.concatenate([one.stored("a", np.arange(one.rows)) for one in (b, a, c)])
    assert np.array_equal(whole.stored("a", np.arange(150)), expected, equal_nan=True)
    assert whole.factor("a") == 2.0 and np.array_equal(whole.read(50, 60)["a"], a.read(0, 10)["a"], equal_nan=True)
    assert whole.place == f"{b.path}, {a.path}, {c.path}" and str(a.path) in repr(whole)


def test_the_id_says_which_stores_stand_in_which_order(folder: Path) -> None:
    def id_of(*names: str) -> str:
        return open_mixture([folder / f"{name}.zarr" for name in names]).header.id

    assert id_of("a", "b") == id_of("a", "b") and id_of("a") == Store.open(folder / "a.zarr").header.id
    assert len({id_of("a", "b"), id_of("b", "a"), id_of("a", "b", "c"), id_of("a"), id_of("b", "d"), id_of("d")}) == 6


def test_a_family_is_one_store_of_a_mixture_and_a_mixture_all_of_its_own(folder: Path) -> None:
    mixed = open_mixture([folder / "a.zarr", folder / "d.zarr"])
    assert (mixed.rows, len(mixed.members)) == (40 + 60 + 30, 3) and [one.rows for one in mixed.stores] == [40, 90]
    more = open_mixture([mixed, folder / "b.zarr"])
    assert [one.rows for one in more.stores] == [40, 90, 50]
    flat = open_mixture([folder / f"{name}.zarr" for name in ("a", "d", "b")])
    assert more.header.id == flat.header.id and more.seals == flat.seals


def test_one_store_alone_is_itself(folder: Path) -> None:
    store = Store.open(folder / "a.zarr")
    assert open_mixture(store) is store and open_mixture([store]) is store and store.stores == [store]
    assert open_mixture(str(store.path)).header.id == open_mixture((store.path,)).header.id == store.header.id
    with pytest.raises(ConfigError, match="no store is named"):
        open_mixture([])


def test_moments_of_a_mixture_are_those_of_all_its_rows(folder: Path) -> None:
    whole = open_mixture([folder / "a.zarr", folder / "b.zarr"])
    found, total = whole.moments("b", CLASSES), Moments.empty(4)
    for store in whole.stores:
        total = total.merge(store.moments("b", CLASSES))
    assert found.count == total.count and found.largest == total.largest
    np.testing.assert_allclose(found.mean_D, total.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.m2_D, total.m2_D, rtol=1e-12)


def test_the_scale_of_a_mixture_has_no_median_of_its_own(folder: Path) -> None:
    a, b = (Store.open(folder / f"{name}.zarr") for name in "ab")
    scale = open_mixture([a, b]).header.scale
    assert scale is not None and a.header.scale is not None and b.header.scale is not None
    largest = max(one["a"]["largest"] for one in (a.header.scale, b.header.scale))
    assert scale["a"] == {"factor": 2.0, "largest": largest}
    assert [one.header.scale for one in open_mixture([a, b]).stores] == [a.header.scale, b.header.scale]


# --- what does not fit ----------------------------------------------------------------------------------------------


def with_model(**keys: Any) -> Change:
    def change(header: Header) -> Header:
        return replace(header, models={**header.models, "model_b": replace(header.models["model_b"], **keys)})

    return change


def with_source(**keys: Any) -> Change:
    def change(header: Header) -> Header:
        return replace(header, sources={**header.sources, "b": replace(header.sources["b"], **keys)})

    return change


def same(header: Header) -> Header:
    return header


WRONG: dict[str, tuple[dict[str, Any], Change, str]] = {
    "sources": ({"sources": {"a": 6, "c": 4}}, same, "the same sources: {0} has a, b, {1} has a, c. Harvest both"),
    "width": ({"sources": {"a": 6, "b": 5}}, same, "the same width of b: {0} has 4, {1} has 5. Harvest both"),
    "site": ({}, with_source(site="resid.2"), "the same site of b: {0} has resid.1, {1} has resid.2. Harvest both"),
    "weights": (
        {}, with_model(weights="tuned"), "the same weights of b: {0} has weights-model_b, {1} has tuned. Harvest both",
    ),
    "tokenizer": (
        {}, with_model(tokenizer="other"), "the same tokenizer of b: {0} has tokenizer, {1} has other. Harvest both",
    ),
    "model": (
        {"models": {"a": "model_a", "b": "m"}}, same,
        "the same name of the model of b: {0} has model_b, {1} has m. Harvest both",
    ),
    "dtype": (
        {}, lambda header: replace(header, plan={**header.plan, "dtype": "bfloat16"}),
        "the same store.dtype: {0} has float16, {1} has bfloat16. Harvest one of them again",
    ),
    "chunk": ({"chunk_rows": 16}, same, "the same rows in a chunk: {0} has 8, {1} has 16. Harvest one of them again"),
    "factor": (
        {"factor": {"a": 2.0, "b": 4.0}}, same,
        "the same scale factor of b: {0} has 1.0, {1} has 4.0. "
        "Harvest both corpora into one store, or more rows of one by harvest run --extends, which keeps the scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_stores_that_differ_in_what_a_row_is_are_refused_with_both_values(
    folder: Path, tmp_path: Path, what: str
) -> None:
    keys, change, told = WRONG[what]
    path = tmp_path / "x.zarr"
    wrong = changed(make_store(path, rows=30, **{"factor": {"a": 2.0}, "corpus": "x/", **keys}), change)
    first = folder / "a.zarr"
    with pytest.raises(StoreError) as error:
        open_mixture([first, folder / "b.zarr", wrong])  # not only the neighbour
    message = "stores of a mixture must have the same " + told.removeprefix("the same ").format(first, path)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "twice", "whose"),
    [("aa", "aa", "a"), ("aba", "aa", "a"), ("cd", "cd", "c"), ("dac", "dc", "c")],
)
def test_no_store_stands_twice_in_a_mixture(folder: Path, names: str, twice: str, whose: str) -> None:
    one, other = (folder / f"{name}.zarr" for name in twice)
    id = Store.open(folder / f"{whose}.zarr").header.id
    with pytest.raises(StoreError) as error:
        open_mixture([folder / f"{name}.zarr" for name in names])
    assert str(error.value) == (
        f"a store stands twice in a mixture: {one} and {other} both read the one whose id begins with {id[:12]}. "
        "Name each once: it brings those that it extends"
    )


def test_a_document_is_not_held_out_in_one_store_and_trained_on_in_another(tmp_path: Path) -> None:
    splits = {"one": [TRAIN, HELD_OUT, TRAIN], "two": [TRAIN, HELD_OUT, HELD_OUT], "three": [HELD_OUT, TRAIN, TRAIN]}
    corpora = {"one": "x/", "two": "x/", "three": "y/"}
    stores = [
        make_store(tmp_path / name, rows=30 + n, documents=3, split=np.array(split), corpus=corpora[name])
        for n, (name, split) in enumerate(splits.items())
    ]
    for order in (stores, stores[::-1]):
        with pytest.raises(StoreError) as error:
            open_mixture(order)
        assert str(error.value) == (
            f"a document is held out by one store of a mixture and not by another: x/document-2, by {tmp_path / 'two'} "
            f"and not by {tmp_path / 'one'}. Harvest both with the same rows.seed and rows.held_out"
        )
    assert open_mixture([stores[0], stores[2]]).header.plan["documents_held_out"] == 2


def test_a_document_may_stand_in_two_stores_with_one_split(tmp_path: Path) -> None:
    split = np.array([TRAIN, HELD_OUT, TRAIN])
    stores = [make_store(tmp_path / str(n), rows=30 + n, documents=3, split=split) for n in range(2)]
    assert open_mixture(stores).document_ids() == ["document-0", "document-1", "document-2"] * 2


def test_where_models_were_found_and_what_they_run_in_may_differ(folder: Path, tmp_path: Path) -> None:
    made = make_store(tmp_path / "x.zarr", rows=30, corpus="x/", factor={"a": 2.0})
    moved = {name: Model(**{**vars(one), "path": "elsewhere"}) for name, one in made.header.models.items()}
    assert open_mixture([folder / "a.zarr", changed(made, lambda header: replace(header, models=moved))]).rows == 70
