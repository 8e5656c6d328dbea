"""A worker holds one model at a time, and measures on the plan's own batches what the scale needs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harvest import bench
from harvest.bench import Bench
from harvest.worker import Worker
from shared import models
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config, harvest, stored

LOG = Log(quiet=True)


def worker_of(store: Store) -> Worker:
    return Worker(store, Bench(bench.find(store.header, {}, print), "cpu", 1), LOG)


def test_a_model_is_loaded_once_for_all_its_units_and_one_is_held_at_a_time(
    pair: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, genuine = [], models.load

    def load(*given: Any) -> torch.nn.Module:
        loaded.append(given[0].path.rsplit("/", 1)[-1])
        return genuine(*given)

    monkeypatch.setattr(models, "load", load)
    with worker_of(pair) as worker:
        for unit in ((0, "llama"), (3, "llama"), (1, "gemma"), (0, "gemma"), (2, "llama")):
            parts = worker.make(unit, int)
            assert worker.holds == unit[1]
            for source, part in parts.items():
                assert (part.activations_ND == pair.map(f"activations/{source}", unit[0])).all()
    assert loaded == ["llama", "gemma", "llama"]


def test_a_worker_that_has_ended_begins_again_with_the_model_that_it_holds(pair: Store) -> None:
    worker = worker_of(pair)
    made = []
    for _ in range(2):
        with worker:
            made.append(worker.make((1, "gemma"), int)["gemma"].activations_ND)
        assert worker.holds == "gemma"
    assert (made[0] == made[1]).all()


def test_the_scale_is_that_of_the_stored_rows_when_all_batches_are_read(home: Path, tmp_path: Path) -> None:
    store = harvest(config(home, tmp_path / "x.zarr", batch={"calibration": 1000}))
    with worker_of(store) as worker:
        scale = worker.scale()
    assert scale == store.header.scale
    for source, values in scale.items():
        rows_ND = stored(store, source)
        assert values["largest"] == pytest.approx(abs(rows_ND).max(), rel=2**-11)
        norms_N = torch.from_numpy(store.column(f"norms/{source}"))
        assert float((norms_N < values["median_norm"]).double().mean()) == pytest.approx(0.5, abs=0.05)
        assert values["sink_norm"] == pytest.approx(10 * values["median_norm"])


def test_the_tolerance_covers_what_another_shape_of_a_batch_changes(home: Path, tmp_path: Path) -> None:
    exact = harvest(config(home, tmp_path / "x.zarr"))
    assert exact.header.scale is not None
    assert {values["tolerance"] for values in exact.header.scale.values()} == {
        2**-9
    }  # fp32: what fp16 rounds, fourfold
    rough = {"llama": {"path": str(home / "llama"), "sites": ["resid.1"], "dtype": "bfloat16"}}
    coarse = harvest(config(home, tmp_path / "y.zarr", models=rough)).header.scale
    assert coarse is not None
    assert 2**-9 <= coarse["llama"]["tolerance"] < 0.5


def test_a_receipt_says_what_made_the_unit(pair: Store) -> None:
    made_with = worker_of(pair).made_with
    assert (made_with["device"], made_with["threads"]) == ("cpu", torch.get_num_threads())
    assert made_with["versions"]["torch"] == str(torch.__version__)
