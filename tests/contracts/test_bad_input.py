"""What is hardly ever meant gives an error, or the right answer, with every method.

Letters: B rows of a batch, N rows, L latents, D width of a source.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, StoreError
from shared.store import Store
from tests import cases
from tests.build import make_store
from train.dictionary import Dictionary
from train.filter import RowsConfig, kept_rows
from train.fit import fit
from train.measure import Measure
from train.method import find

ROWS = 200
ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 40, "exclusive": 4}, "steps": 12, "batch": 8, "threads": 1,
    "device": "cpu", "optimiser": {"lr": 1e-2, "warmup": 2}, "dead_rows": 32,
}  # fmt: skip
NOW = {"l1_warmup": 0, "price_warmup": 0}  # not over more steps than there are
every_method = pytest.mark.parametrize("name", cases.names())


def values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(ROWS, 6)), "b": rng.normal(size=(ROWS, 4))}


def method(name: str) -> Any:
    return cases.method(name, **{key: steps for key, steps in NOW.items() if key in find(name).model_fields})


def stored(folder: Path, x: dict[str, np.ndarray], **keys: Any) -> Store:
    return make_store(folder / "store.zarr", rows=ROWS, documents=20, special=0.0, values=x, **keys)


def all_finite(figures: Any) -> bool:
    """Of nested tables; None is a figure that no row defines."""
    inner = figures.values() if isinstance(figures, dict) else figures if isinstance(figures, list) else None
    return all(map(all_finite, inner)) if inner is not None else figures is None or isinstance(figures, str) or bool(
        np.isfinite(figures)
    )  # fmt: skip


@every_method
def test_rows_that_are_not_finite_are_left_out_and_told(name: str, tmp_path: Path) -> None:
    x = values()
    x["b"][20:30, 1], x["a"][40, 2] = np.nan, np.inf
    store = stored(tmp_path, x)
    kept = kept_rows(store, RowsConfig())
    assert not kept.kept_N[[*range(20, 30), 40]].any() and kept.dropped["masked"] > 0
    run = fit(store, {**ASKED, "method": method(name)}, tmp_path / "run", quiet=True)
    assert all_finite(run.figures) and run.figures["sources"]["b"]["fve"] is not None
    assert all(bool(value.isfinite().all()) for value in run.dictionary.state_dict().values())


@every_method
def test_a_source_that_is_constant_is_named(name: str, tmp_path: Path) -> None:
    store = stored(tmp_path, {**values(), "b": np.full((ROWS, 4), 2.5)})
    with pytest.raises(StoreError, match=r"all rows of this source are alike: b\. Leave it out"):
        fit(store, {**ASKED, "method": method(name)}, tmp_path / "run", quiet=True)
    alone = {**ASKED, "wiring": {"kind": "autoencoder", "sources": ["a"], "latents": 40}, "method": method(name)}
    assert all_finite(fit(store, alone, tmp_path / "alone", quiet=True).figures)


@every_method
def test_a_source_with_constant_components_trains(name: str, tmp_path: Path) -> None:
    x = values()
    x["a"][:, 3] = 7.0
    x["b"][:, 1:] = 0.0
    run = fit(stored(tmp_path, x), {**ASKED, "method": method(name)}, tmp_path / "run", quiet=True)
    assert all_finite(run.figures)


def test_one_row_has_no_spread_and_is_refused(tmp_path: Path) -> None:
    split = np.ones(20, np.uint8)
    store = stored(tmp_path, values(), split=split)
    first = int(np.flatnonzero(np.bincount(store.column("rows/document"), minlength=20) > 1)[0])
    split[first] = 0
    one = stored(tmp_path / "one", values(), split=split)
    asked = {**ASKED, "method": "topk", "rows": {"positions": "1:2"}}
    assert kept_rows(one, RowsConfig(positions="1:2")).kept_N.sum() == 1
    with pytest.raises(ConfigError, match=r"the batch is larger than the rows that are kept: 8 > 1"):
        fit(one, asked, tmp_path / "run", quiet=True)
    with pytest.raises(StoreError, match="all rows of this source are alike: a"):
        fit(one, {**asked, "batch": 1}, tmp_path / "run", quiet=True)


@every_method
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_encoded_decoded_and_measured(name: str, rows: int) -> None:
    for case in ("autoencoder", "transcoder", "dedicated of 3"):
        trainer, x = cases.trainer(case, name, dead_rows=64), cases.random_rows(case, 64)
        trainer.update(x)
        few = {source: x_BD[:rows] for source, x_BD in x.items()}
        for training in (True, False):
            dictionary = trainer.dictionary.train(training)
            f_BL, y = dictionary.encode(few), dictionary(few).y
            assert f_BL.shape == (rows, cases.LATENTS) and all(y_BD.shape[0] == rows for y_BD in y.values())
            assert all(bool(y_BD.isfinite().all()) for y_BD in dictionary.decode(f_BL).values())
    whole, single = dictionary.encode(x)[:rows], f_BL
    torch.testing.assert_close(single, whole)  # at evaluation a row's codes are its own
    if rows:
        total = Measure(dictionary)
        total.add(few)
        figures = total.result()
        assert all_finite(figures) and figures["sources"]["a"]["fve"] is None  # one row has no variance


@pytest.mark.parametrize("name", [name for name in cases.names() if "k" in find(name).model_fields])
def test_batches_smaller_than_k_keep_k_a_row(name: str, tmp_path: Path) -> None:
    """2 rows and k = 30 of 40 latents: 60 of 80 codes, as far as they are positive."""
    keys = {"groups": [0.5, 0.5]} if name == "matryoshka" else {}
    asked = {**ASKED, "batch": 2, "method": {"name": name, "k": 30, **keys}}
    run = fit(stored(tmp_path, values()), asked, tmp_path / "run", quiet=True)
    assert all_finite(run.figures)
    dictionary: Dictionary = run.dictionary.train()
    x = {source: torch.from_numpy(rows[:2]).float() for source, rows in values(1).items()}
    positive = dictionary.pre(x).h_BL > 0
    f_BL = dictionary.encode(x)
    if name == "topk":
        assert ((f_BL > 0).sum(1) == positive.sum(1).clamp_max(30)).all()
    else:
        assert int((f_BL > 0).sum()) == min(60, int(positive.sum()))
