"""Folders of an ActivationCache: rows across shards, what they are known by, and files that are none of theirs.

Their indexing, dtypes and tears are in tests/test_cache.py. Letters: N rows, D width.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.collected import Collected
from shared.errors import StoreDamagedError
from tests.train.interop.reference_cache import write_cache


def test_rows_come_in_the_order_asked_for_across_shards(tmp_path: Path) -> None:
    x_ND = torch.arange(60).view(20, 3).half()
    folder = Collected(write_cache(tmp_path / "layer_1_out", x_ND, [7, 1, 12]))
    rows = np.array([19, 0, 7, 7, 6, 8])
    assert torch.equal(folder.take(rows), x_ND[rows])
    assert folder.take(np.zeros(0, np.int64)).shape == (0, 3)


def test_a_fingerprint_is_that_of_the_rows_and_not_of_the_shards(tmp_path: Path) -> None:
    x_ND = torch.randn(20, 3)
    one, two = (Collected(write_cache(tmp_path / name, x_ND, parts)) for name, parts in [("a", [20]), ("b", [3, 17])])
    assert one.fingerprint() == two.fingerprint()
    x_ND[11, 2] += 1e-6
    assert Collected(write_cache(tmp_path / "c", x_ND, [20])).fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("shard_0.meta", "{", "this file cannot be read"),
        ("shard_0.meta", "[]", "this file holds no table"),
        ("shard_0.meta", '{"shape": [20, 3], "dtype": "torch.int32"}', "a shard of an unknown kind: torch.int32"),
        ("shard_0.meta", '{"shape": [20]}', "a shard of an unknown kind"),
        ("config.json", "nothing", "this file cannot be read"),
    ],
)
def test_a_table_that_is_none_is_told(name: str, text: str, message: str, tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "layer_1_out", torch.randn(20, 3), [20])
    (folder / name).write_text(text)
    with pytest.raises(StoreDamagedError, match=message):
        Collected(folder)
