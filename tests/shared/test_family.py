"""Siblings read as one store: every row once, every source, and nothing that only one of them means."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest import overview
from shared import files
from shared.errors import StoreError
from shared.family import Wider, open_family
from shared.header import Extends
from shared.joined import Joined
from shared.moments import CLASSES
from shared.store import Store
from tests.build import make_store
from train import Dictionary, fit
from train.filter import kept_rows
from train.order import Order
from train.reader import Reader

RUN = {"wiring": {"kind": "crosscoder", "latents": 64}, "method": {"name": "topk", "k": 4}, "steps": 12, "batch": 32}


def extend(store: Store, parent: Store, kind: str) -> Store:
    """The finished store `store`, as a sibling."""
    extends = Extends(kind, parent.header.id, parent.path.name)
    group = files.read_json(store.path / "zarr.json")
    attributes = replace(store.header, spec={**store.header.spec, "extends": [kind]}, extends=extends).attributes()
    files.write_json(store.path / "zarr.json", {**group, "attributes": attributes})
    for receipt in (store.path / "receipts").iterdir():
        files.write_json(receipt, {**files.read_json(receipt), "id": attributes["granary"]["id"]})
    (store.path / "sealed").unlink()
    Store.at(store.path).seal()
    return Store.open(store.path)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("family") / "first.zarr", rows=101, seed=1)


@pytest.fixture(scope="module")
def more(first: Store) -> Store:
    return extend(make_store(first.path.with_name("more.zarr"), rows=70, seed=2), first, "rows")


@pytest.fixture(scope="module")
def wide(first: Store) -> Store:
    made = make_store(first.path.with_name("wide.zarr"), rows=101, sources={"c": 5}, models={"c": "model_c"}, seed=1)
    return extend(made, first, "sources")


def stored(store: Store, name: str) -> np.ndarray:
    return store.stored(name, np.arange(store.rows))


def test_more_rows_stand_behind_the_others(first: Store, more: Store) -> None:
    whole = open_family(more.path)
    assert isinstance(whole, Joined) and whole.rows == 171 and whole.members == [first.header.id, more.header.id]
    for name in ("a", "b"):
        assert np.array_equal(
            whole.stored(name, np.arange(171)), np.concatenate([stored(first, name), stored(more, name)])
        )
        one, two, joined = (store.moments(name, CLASSES) for store in (first, more, whole))
        assert joined.count == one.count + two.count and joined.largest == max(one.largest, two.largest)
    assert whole.document_ids() == [*first.document_ids(), *more.document_ids()]
    documents = whole.column("rows/document")
    assert np.array_equal(documents, np.concatenate([whole.map("rows/document", s) for s in range(whole.shards)]))
    row_n = whole.column("documents/row")
    assert np.array_equal(np.repeat(np.arange(len(row_n) - 1), np.diff(row_n)), documents)
    assert [row for shard in range(whole.shards) for row in whole.rows_of(shard)] == list(range(171))
    with pytest.raises(StoreError, match=r"this table is not joined over several stores: tokens/model_a/id. Open one"):
        whole.column("tokens/model_a/id")


def test_rows_are_read_in_any_order(more: Store) -> None:
    whole = open_family(more.path)
    rows_B = np.array([170, 3, 99, 98, 3, 0, 100, 169])
    assert np.array_equal(whole.stored("a", rows_B), stored(whole, "a")[rows_B], equal_nan=True)


def test_what_is_kept_and_served_of_a_family_is_what_is_of_each(first: Store, more: Store) -> None:
    whole = open_family(more.path)
    both = [kept_rows(store) for store in (first, more)]
    kept = kept_rows(whole)
    assert np.array_equal(kept.kept_N, np.concatenate([one.kept_N for one in both]))
    assert kept.dropped == {rule: both[0].dropped[rule] + both[1].dropped[rule] for rule in kept.dropped}
    rows = {name: np.concatenate([stored(first, name), stored(more, name)]) for name in ("a", "b")}
    order = Order(np.ones(171, bool), 4, 9, seed=1)
    with Reader(whole, ["a", "b"]) as reader:
        for step in range(12):
            rows_B = np.sort(order.step(step, 32))
            out = {name: np.empty((32, reader.widths[name]), np.float16) for name in reader.widths}
            reader.will_need(rows_B, 3)
            reader.gather(rows_B, out)
            reader.forget(rows_B, 3)
            assert all(np.array_equal(out[name], rows[name][rows_B], equal_nan=True) for name in out)


def test_more_sources_stand_beside_the_others(first: Store, wide: Store) -> None:
    whole = open_family(wide.path)
    assert isinstance(whole, Wider) and list(whole.header.sources) == ["a", "b", "c"]
    read = whole.read(10, 90)
    for store in (first, wide):
        for name in store.header.sources:
            assert torch.equal(read[name], store.read(10, 90)[name]) and whole.factor(name) == store.factor(name)
    assert np.array_equal(whole.column("rows/model_c/flags"), wide.column("rows/model_c/flags"))
    assert np.array_equal(whole.column("documents/split"), first.column("documents/split"))
    assert whole.beside("a") == ["model_a", "model_b"] and whole.beside("c") == ["model_c"]


def test_a_store_that_extends_nothing_is_itself(first: Store) -> None:
    assert isinstance(open_family(first.path), Store)


def test_a_family_that_moves_together_is_found_and_one_that_is_torn_apart_is_told(
    first: Store, more: Store, tmp_path: Path
) -> None:
    for store, name in ((first, "renamed.zarr"), (more, "more.zarr")):
        shutil.copytree(store.path, tmp_path / "here" / name)
    assert open_family(tmp_path / "here/more.zarr").rows == 171
    shutil.copytree(more.path, tmp_path / "alone" / "more.zarr")
    with pytest.raises(
        StoreError, match=r"the store that this one extends is not there: .* extends first.zarr. Put it"
    ):
        open_family(tmp_path / "alone/more.zarr")
    assert Store.open(tmp_path / "alone/more.zarr").rows == 70


def test_a_run_on_a_family_uses_all_of_it_and_ls_shows_it(
    first: Store, more: Store, wide: Store, tmp_path: Path
) -> None:
    run = fit(more.path, RUN, tmp_path / "run", quiet=True)
    told = json.loads((run.folder / "store.json").read_text())
    assert told["rows"] == 171 and told["members"] == [first.header.id, more.header.id]
    both = {**RUN, "wiring": {**RUN["wiring"], "sources": ["a", "c"]}}  # type: ignore[dict-item]
    fit(wide.path, both, tmp_path / "wide", quiet=True)
    assert set(Dictionary.load(tmp_path / "wide").wiring.widths) == {"a", "c"}
    found = {Path(one["store"]).name: one for one in overview.ls(first.path.parent, tmp_path)}
    assert found["first.zarr"]["runs"] == [str(tmp_path / "run"), str(tmp_path / "wide")]
    assert found["more.zarr"]["extends"]["kind"] == "rows" and found["more.zarr"]["runs"] == [str(tmp_path / "run")]
    assert f"  more sources of first.zarr, id {first.header.id[:12]}" in overview.lines(list(found.values()))
