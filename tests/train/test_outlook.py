"""What is told of runs before they begin is what they then do."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.store import Store
from tests import cases
from train.fit import fit
from train.outlook import outlook, text
from train.sweep import expand

ASKED: dict[str, Any] = {**cases.MOMENT, "steps": 20, "optimiser": {"warmup": 2}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("outlook"))


def test_rows_and_epochs_are_those_of_the_run_that_follows(store: Store, tmp_path: Path) -> None:
    asked = {**ASKED, "wiring": {"latents": 4096}}  # else names and headers are most of a file
    told = outlook(store, expand(asked), None, tmp_path)
    run = fit(store, asked, tmp_path / "run", quiet=True)
    start, *_, last = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()][:-1]
    [order] = told["orders"]
    assert (order["kept"], order["dropped"], order["own_block"]) == (
        start["kept"],
        start["dropped"],
        start["own_block"],
    )
    assert order["held_out"] == run.figures["rows"] and sum(order["dropped"].values()) + order["kept"] == 300
    assert int(told["runs"][0]["epochs"]) == last["epoch"]
    assert order["window_bytes"] == order["window_rows"] * 2 * (6 + 4)
    size = sum(path.stat().st_size for path in (run.folder / "checkpoints").rglob("*.safetensors"))
    kept = len(list((run.folder / "checkpoints").iterdir()))
    assert told["disk_bytes"] == pytest.approx(size / kept * (1 + 1 / 3), rel=0.15)


def test_an_outlook_writes_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outlook(store, expand(ASKED), None, Path("runs"))
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_told_with_its_passes_and_why(store: Store, tmp_path: Path) -> None:
    asked = {**ASKED, "sweep": {"grid": {"method.k": [2, 3], "batch": [16, 32]}}}
    told = outlook(store, expand(asked), None, tmp_path)
    assert told["passes"] == [["0-k=2-batch=16", "2-k=3-batch=16"], ["1-k=2-batch=32", "3-k=3-batch=32"]]
    shown = text(told)
    assert "at once  2 + 2 runs, since they differ in batch" in shown
    assert shown.count("of its own document") == 2 and "0-k=2-batch=16     20" in shown
    assert max(map(len, shown.splitlines())) < 120


def test_one_run_is_told_in_few_lines(store: Store, tmp_path: Path) -> None:
    shown = text(outlook(store, expand(ASKED), None, tmp_path)).splitlines()
    heads = ["store", "rows", "order", "windows", "mixing", "", "run", "run", "", "memory", "time", "disk"]
    assert [line.partition(" ")[0] for line in shown] == heads


def test_a_warm_up_as_long_as_the_run_is_told(store: Store, tmp_path: Path) -> None:
    told = outlook(store, expand({**ASKED, "optimiser": {"warmup": 20}}), None, tmp_path)
    assert told["runs"][0]["notes"] and "learning rate never reaches its peak" in text(told)
    brief = outlook(store, expand({**ASKED, "optimiser": {"warmup": 19}}), None, tmp_path)
    assert not brief["runs"][0]["notes"] and "note" not in text(brief)


def test_what_the_system_does_not_tell_is_not_made_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, text: str, *given: Any, **named: Any) -> int:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refused)
    told = outlook(store, expand(ASKED), None, tmp_path)
    assert told["runs"][0]["step_bytes"] is None and not told["memory_measured"]
    assert "and what a step takes, which this system does not tell" in text(told)
