"""States of stores, read from receipts and headers."""

import json
import shutil
from pathlib import Path

import pytest

from harvest import lock, overview
from shared.errors import StoreError
from shared.store import Store


def test_a_finished_store_shows_all_it_has(pair: Store) -> None:
    found = overview.status(pair.path)
    assert (found["id"], found["state"], found["rows"]) == (pair.header.id, "finished", 300)
    assert found["units"] == {"llama": [4, 4], "gemma": [4, 4]}
    rows = {
        name: {k: n for k, n in one.items() if k != "subnormal_components"} for name, one in found["faults"].items()
    }
    assert rows == {name: pair.fault_counts(name) for name in pair.header.sources}
    data = ("activations", "norms", "faults", "moments")
    sizes = [file.stat().st_size for kind in data for file in (pair.path / kind).rglob("c/**/*") if file.is_file()]
    assert found["bytes"] == sum(sizes)
    assert [one["threads"] for one in found["made_with"]] == [1]
    assert found["damage"] == found["held_by"] == []


def test_an_unfinished_store_shows_how_far_it_is_and_who_is_at_it(pair: Store, tmp_path: Path) -> None:
    path = shutil.copytree(pair.path, tmp_path / "x.zarr")
    for name in ("sealed", "receipts/00001.llama.json", "receipts/00003.llama.json"):
        (path / name).unlink()
    with lock.hold(path, print):
        found = overview.status(path)
    assert (found["state"], found["units"]) == ("unfinished", {"llama": [2, 4], "gemma": [4, 4]})
    assert found["held_by"][0].startswith("process ")
    Store.at(path).condemn(["a file is missing"], [(0, "llama")])
    assert overview.status(path)["state"] == "damaged"
    assert overview.status(path)["damage"] == ["a file is missing"]


def test_a_store_that_is_being_planned_is_seen_by_its_lock(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no Granary store here"):
        overview.status(tmp_path / "x.zarr")
    with lock.hold(tmp_path / "x.zarr", print):
        assert overview.status(tmp_path / "x.zarr")["state"] == "planning"


def test_ls_finds_every_store_and_the_runs_that_name_its_id(pair: Store, tmp_path: Path) -> None:
    first = shutil.copytree(pair.path, tmp_path / "caches" / "deep" / "a.zarr")
    shutil.copytree(pair.path, tmp_path / "caches" / "b.zarr")
    (tmp_path / "caches" / "other.zarr").mkdir()
    (tmp_path / "caches" / "other.zarr" / "zarr.json").write_text('{"attributes": {}}')
    for name, id_ in (("one", pair.header.id), ("two", "another")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "store.json").write_text(json.dumps({"id": id_}))
    found = overview.ls(tmp_path / "caches", tmp_path / "runs")
    assert [Path(one["store"]).name for one in found] == ["b.zarr", "a.zarr"]
    assert found[1]["runs"] == [str(tmp_path / "runs" / "one")]
    assert found[1]["bytes"] == sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    assert list(found[1]["sources"]) == ["early", "inner", "gemma"]
    shown = overview.lines(found)
    assert shown[0].startswith(f"{tmp_path}/caches/b.zarr  finished  300 rows  ")
    assert any(line.strip() == f"used by {tmp_path}/runs/one" for line in shown)
    with pytest.raises(StoreError, match="no store below this folder"):
        overview.ls(tmp_path / "runs", tmp_path / "runs")
