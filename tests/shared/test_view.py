"""What every view reads alike, a store on its own and a family."""

from pathlib import Path

import numpy as np
import pytest

from shared.errors import StoreError
from shared.moments import CLASSES
from tests.build import make_store


def test_rows_are_read_in_the_models_own_units_as_python_slices(tmp_path: Path) -> None:
    values = {"a": np.arange(600, dtype=np.float32).reshape(100, 6), "b": np.ones((100, 4), np.float32)}
    store = make_store(tmp_path / "x.zarr", values=values, factor={"a": 4.0})
    assert np.array_equal(store.read(30, 35)["a"].numpy(), values["a"][30:35])
    assert np.array_equal(store.read(-3, 1000)["b"].numpy(), values["b"][-3:])
    assert store.read(5, 5)["a"].shape == (0, 6)
    assert np.array_equal(store.dask("a", block_rows=7).compute(), values["a"])
    assert store.moments("a", CLASSES).count == 100


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr")
    with pytest.raises(StoreError, match=r"this store has no source: c. It has: a, b"):
        store.source("c")
    assert store.members == [store.header.id] and repr(store).startswith("Store(")
