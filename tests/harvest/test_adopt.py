"""A store that is made of caches of dictionary_learning has their rows, and is one as any other.

Letters: N rows, D width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest import adopt
from harvest.config import RowsConfig, StoreConfig
from shared import verify
from shared.collected import Collected
from shared.errors import StoreMismatchError
from shared.flags import FIRST, HELD_OUT, MASKED
from shared.log import Log
from shared.moments import CLASSES
from shared.store import Store
from tests.harvest.command import Harvest
from tests.train.interop.reference_cache import write_cache
from train.fit import fit
from train.interop.dictionary_learning import PairedActivationCache

ROWS, D = 400, 6
STARTS = [0, 30, 30, 90, 150, 200, 260, 330, 400]  # a sequence of which nothing was kept among them


def caches(place: Path, change: Callable[[torch.Tensor], None] | None = None) -> dict[str, Path]:
    """Of two models, fp16 and bfloat16; the second one has a sequence less."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, rows, dtype in [("base", ROWS, torch.float16), ("chat", 330, torch.bfloat16)]:
        x_ND = 20 * torch.randn(rows, D, generator=generator)
        if change is not None:
            change(x_ND)
        folder = place / name / "fineweb" / "layer_13_out"
        folder.parent.mkdir(parents=True)
        tokens = torch.arange(rows) % 50
        found[name] = write_cache(folder, x_ND.to(dtype), [120, rows - 120], tokens, [s for s in STARTS if s <= rows])
    return found


def adopted(place: Path, folders: dict[str, Path], **keys: Any) -> Store:
    asked = StoreConfig.model_validate({"path": str(place), "shard_bytes": 1500, "chunk_bytes": 200, **keys})
    found = adopt.gathered({name: Collected(path) for name, path in folders.items()})
    return adopt.adopt(found, asked, RowsConfig(held_out=0.3, seed=2), Log(quiet=True))


def test_rows_are_those_of_the_caches_as_far_as_all_go(tmp_path: Path) -> None:
    folders = caches(tmp_path)
    store = adopted(tmp_path / "pair.zarr", folders)
    assert store.rows == 330 and store.shards > 2
    pair = PairedActivationCache(*folders.values())
    rows = store.read(0, 330)
    assert torch.equal(rows["base"], pair[:][:, 0].float())  # fp16 as it was
    torch.testing.assert_close(rows["chat"], pair[:][:, 1].float(), rtol=1e-3, atol=0)  # of bfloat16
    of_store = PairedActivationCache(store.path / "base", store.path / "chat")
    assert torch.equal(of_store.tokens[0], pair.tokens[0])
    assert of_store.sequence_ranges is not None
    assert of_store.sequence_ranges.tolist() == [0, 30, 90, 150, 200, 260, 330]


def test_it_is_sound_and_has_the_tables_of_any_store(tmp_path: Path) -> None:
    store = adopted(tmp_path / "pair.zarr", caches(tmp_path))
    assert not verify.full(store)
    flags = store.column("rows/base/flags")
    assert np.flatnonzero(flags & FIRST).tolist() == [0, 30, 90, 150, 200, 260]
    split = store.column("documents/split")
    assert 0 < (split == HELD_OUT).sum() < len(split) == 6
    total = store.moments("base", CLASSES)
    x = store.read(0, 330)["base"].double().numpy()
    assert total.count == 330
    np.testing.assert_allclose(total.mean_D, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.m2_D / 330, x.var(0), rtol=1e-9)
    held = store.moments("base", [name for name in CLASSES if name.endswith("held_out")])
    inside = (split == HELD_OUT)[store.column("rows/document")]
    np.testing.assert_allclose(held.mean_D, x[inside].mean(0), rtol=1e-9)
    assert store.header.sources["base"].site == "resid.13"


def test_the_bytes_do_not_depend_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = caches(tmp_path)
    whole = adopted(tmp_path / "whole.zarr", folders)
    put, count = Store.put, [0]

    def stopping(self: Store, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return put(self, *arguments)

    monkeypatch.setattr(Store, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        adopted(tmp_path / "part.zarr", folders)
    monkeypatch.undo()
    again = adopted(tmp_path / "part.zarr", folders)
    assert again.seals == whole.seals
    assert adopted(tmp_path / "part.zarr", folders).seals == whole.seals
    with pytest.raises(StoreMismatchError, match="dtype"):
        adopted(tmp_path / "part.zarr", folders, dtype="bfloat16")


def test_values_beyond_fp16_are_scaled_and_what_is_not_finite_is_refused_or_masked(tmp_path: Path) -> None:
    def large(x_ND: torch.Tensor) -> None:
        x_ND *= 500
        x_ND[7, 2] = 60_000.0

    folders = caches(tmp_path / "a", large)
    store = adopted(tmp_path / "a.zarr", folders)
    assert store.factor("base") == 4.0
    assert store.read(7, 8)["base"][0, 2] == 60_000

    def broken(x_ND: torch.Tensor) -> None:
        x_ND[9, 1] = torch.inf

    folders = caches(tmp_path / "b", broken)
    with pytest.raises(Exception, match="base has values that are not finite: row 9"):
        adopted(tmp_path / "b.zarr", folders)
    store = adopted(tmp_path / "c.zarr", folders, nonfinite="mask")
    assert store.column("faults/base")[9] & MASKED and not store.read(9, 10)["base"].any()
    assert store.moments("base", CLASSES).count == 329


def test_a_crosscoder_is_trained_on_it(tmp_path: Path) -> None:
    store = adopted(tmp_path / "pair.zarr", caches(tmp_path))
    config = {"wiring": {"latents": 16}, "method": {"name": "topk", "k": 3}, "steps": 5, "batch": 32, "device": "cpu"}
    run = fit(store, config, tmp_path / "run", quiet=True)
    assert set(run.figures["sources"]) == {"base", "chat"}


def test_the_command_makes_it_and_tells(tmp_path: Path, harvest: Harvest) -> None:
    folders = caches(tmp_path)
    given = [f"{name}={path}" for name, path in folders.items()]
    done = harvest("import", *given, "--out", tmp_path / "pair.zarr", "--held-out", "0.3", "--json")
    assert done.code == 0, done.err
    assert '"rows": 330' in done.out and '"base": "resid.13, width 6"' in done.out
    assert Store.open(tmp_path / "pair.zarr").rows == 330


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folders: (folders["chat"].parent / "tokens.pt").unlink(), "this cache has no tokens"),
        (
            lambda folders: torch.save(torch.arange(330) % 49, folders["chat"].parent / "tokens.pt"),
            "these caches are of other tokens: row 49: base 49, chat 0",
        ),
        (
            lambda folders: [(one.parent / "sequence_ranges.pt").unlink() for one in folders.values()],
            "no cache tells where sequences begin",
        ),
        (lambda folders: (folders["base"] / "shard_1.memmap").write_bytes(b""), "a shard is torn"),
    ],
)
def test_caches_that_are_no_pair_are_refused(
    spoil: Callable[[dict[str, Path]], Any], message: str, tmp_path: Path, harvest: Harvest
) -> None:
    folders = caches(tmp_path)
    spoil(folders)
    done = harvest("import", *(f"{name}={path}" for name, path in folders.items()), "--out", tmp_path / "pair.zarr")
    assert done.code in (1, 2) and done.err.splitlines()[-1].startswith(f"error: {message}"), done.err
    assert not (tmp_path / "pair.zarr").exists()


def test_a_cache_is_given_with_a_name(tmp_path: Path, harvest: Harvest) -> None:
    done = harvest("import", tmp_path, "--out", tmp_path / "pair.zarr")
    assert done.code == 2 and "a cache is given as SOURCE=FOLDER" in done.err
