"""Datasets as SAELens' CacheActivationsRunner writes them are read, and become stores.

Against the runner itself: tests/train/interop/test_peers.py.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from harvest import adopt
from harvest.cached import Cached
from shared import verify
from shared.collected import Collected
from shared.errors import StoreDamagedError, StoreError
from shared.flags import FIRST
from shared.store import Store
from tests.harvest.command import Harvest, assert_one_line
from tests.train.interop.reference_cache import write_cache

CONTEXTS, C, D = 25, 8, 6
HOOK = "blocks.3.hook_resid_post"


def write(place: Path, hook: str = HOOK, dtype: str = "float32", seed: int = 0, tokens: bool = True) -> np.ndarray:
    """Two files of contexts, as the runner makes them. Returns the rows."""
    rng = np.random.default_rng(seed)
    x = (20 * rng.standard_normal((CONTEXTS, C, D))).astype(dtype)
    columns: dict[str, Any] = {hook: x}
    features: dict[str, Any] = {hook: datasets.Array2D(shape=(C, D), dtype=dtype)}
    if tokens:
        columns["token_ids"] = np.arange(CONTEXTS * C, dtype=np.int32).reshape(CONTEXTS, C) % 50
        features["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=C)
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(str(place), num_shards=2)
    return x.reshape(-1, D)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_in_any_order(tmp_path: Path, dtype: str) -> None:
    x_ND = write(tmp_path / "a", dtype=dtype)
    found = adopt.find(tmp_path / "a")
    assert isinstance(found, Cached)
    assert (found.count, found.width, found.site, str(found.dtype)) == (CONTEXTS * C, D, "resid.3", f"torch.{dtype}")
    rows_B = np.array([199, 0, 7, 8, 100, 100, 13 * C - 1, 13 * C])  # both files, edges of contexts
    assert np.array_equal(found.take(rows_B).numpy(), x_ND[rows_B])
    assert np.array_equal(found.take(np.arange(200)).numpy(), x_ND)
    assert found.take(np.arange(0)).shape == (0, D)
    assert found.tokens is not None and found.tokens.tolist() == [number % 50 for number in range(200)]
    assert found.ranges.tolist() == list(range(0, 201, C))


def test_the_fingerprint_is_of_the_rows(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write(tmp_path / name, seed=seed)
    a, b, c = (Cached(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c


def test_a_store_is_made_of_them_and_of_caches_of_dictionary_learning(harvest: Harvest, tmp_path: Path) -> None:
    x_ND = write(tmp_path / "base", "blocks.2.hook_mlp_out")
    y_ND = torch.randn(200, 4)
    write_cache(tmp_path / "layer_7_out", y_ND, [200], torch.arange(200) % 50, list(range(0, 201, C)))
    out = tmp_path / "pair.zarr"
    done = harvest("import", f"base={tmp_path}/base", f"chat={tmp_path}/layer_7_out", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["sources"] == {"base": "mlp_out.2, width 6", "chat": "resid.7, width 4"}
    store = Store.open(out)
    assert store.rows == 200 and store.header.plan["documents"] == CONTEXTS and not verify.full(store)
    rows = store.read(0, 200)
    torch.testing.assert_close(rows["base"], torch.from_numpy(x_ND), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rows["chat"], y_ND, rtol=1e-3, atol=1e-4)
    assert np.flatnonzero(store.column("rows/base/flags") & FIRST).tolist() == list(range(0, 200, C))
    assert harvest("import", f"base={tmp_path}/base", f"chat={tmp_path}/layer_7_out", "--out", out).code == 0


def test_what_cannot_be_read_is_one_line(harvest: Harvest, tmp_path: Path) -> None:
    def told(folder: Path) -> Any:
        return harvest("import", f"a={folder}", "--out", tmp_path / "no.zarr")

    write(tmp_path / "old", tokens=False)
    assert_one_line(told(tmp_path / "old"), 2, "error: this cache has no tokens, by which rows are told to be pairs: ")
    write(tmp_path / "torn")
    file = tmp_path / "torn" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-2000])
    assert_one_line(told(tmp_path / "torn"), 1, f"error: this dataset cannot be read: {tmp_path}/torn. ")
    file.unlink()
    assert_one_line(told(tmp_path / "torn"), 1, f"error: this dataset cannot be read: {tmp_path}/torn. ")
    assert not (tmp_path / "no.zarr").exists()


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(StoreError, match="0 columns of activations"):
        adopt.find(tmp_path / "text")
    made = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(StoreError, match=f"with splits: .* Name one: {tmp_path}/splits/train"):
        adopt.find(tmp_path / "splits")
    write(tmp_path / "a")
    state = tmp_path / "a" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": "nothing.arrow"}]}))
    with pytest.raises(StoreDamagedError, match="Cache it again"):
        adopt.find(tmp_path / "a")


def test_a_folder_of_dictionary_learning_is_found_as_such(tmp_path: Path) -> None:
    found = adopt.find(write_cache(tmp_path / "layer_1_in", torch.randn(20, 4), [20]))
    assert isinstance(found, Collected) and found.site == "resid_in.1"
