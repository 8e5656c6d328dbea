"""Values that must not be stored as they are: not finite, or beyond the headroom."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harvest import check, unit, worker
from harvest.bench import Bench, find
from harvest.forward import Batch
from shared import models
from shared.errors import ActivationError
from shared.flags import CLIPPED, MASKED, SINK
from shared.log import Log
from shared.moments import CLASSES
from shared.store import Store
from tests.device import every_device
from tests.harvest.pair import classes, config, harvest, stored, tree


def inject(monkeypatch: pytest.MonkeyPatch, source: str, row: int, value: float, when: Callable[[], bool]) -> None:
    """Let the model's own value at one row of one source be another."""
    genuine = unit.rows

    def rows(run: Any, batch: Batch, names: Any, device: str) -> dict[str, Tensor]:
        found = genuine(run, batch, names, device)
        if source in found and when():
            found[source] = found[source].clone()
            found[source][torch.from_numpy(batch.row_N == row), 3] = value
        return found

    monkeypatch.setattr(unit, "rows", rows)  # of the units
    monkeypatch.setattr(worker, "rows", rows)  # of the calibration


def always() -> bool:
    return True


@pytest.fixture
def after_calibration(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether the scale is frozen by now."""
    frozen, genuine = [], Store.freeze

    def freeze(self: Store, scale: Any) -> Store:
        frozen.append(scale)
        return genuine(self, scale)

    monkeypatch.setattr(Store, "freeze", freeze)
    return lambda: bool(frozen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_fails_its_unit_and_names_document_token_and_site(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float,
    after_calibration: Callable[[], bool],
) -> None:  # fmt: skip
    row = 2 * pair.shard_rows + 2
    inject(monkeypatch, "inner", row, value, after_calibration)
    with pytest.raises(ActivationError) as caught:
        harvest(config(home, tmp_path / "x.zarr"))
    message = str(caught.value)
    token = pair.column("tokens/llama/id")[pair.column("rows/llama/token")[row]]
    text = models.load_tokenizer(models.resolve(str(home / "llama"))).decode([int(token)])
    document = pair.document_ids()[pair.column("rows/document")[row]]
    assert message.startswith(f"inner (mlp_out.1) is not finite: document {document!r}, token {text!r}, row {row}. ")
    assert 'set store.nonfinite to "mask"' in message
    assert "\n" not in message
    store = Store(tmp_path / "x.zarr", pair.header)
    assert not store.sealed
    assert not store.has(2, "llama")
    monkeypatch.undo()
    assert tree(harvest(config(home, tmp_path / "x.zarr")).path) == tree(pair.path)


def test_masking_stores_zeros_flags_the_row_and_leaves_it_out_of_the_moments(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, "inner", 77, float("nan"), always)
    store = harvest(config(home, tmp_path / "x.zarr", store={"nonfinite": "mask"}))
    assert store.header.id != pair.header.id
    assert {name: store.fault_counts(name)["masked"] for name in store.header.sources} == {
        "early": 0, "inner": 1, "gemma": 0,
    }  # fmt: skip
    assert store.column("faults/inner")[77] == MASKED
    clean_ND, masked_ND = stored(pair, "inner"), stored(store, "inner")
    assert not masked_ND[77].any()
    assert clean_ND[77].any()
    assert np.array_equal(np.delete(masked_ND, 77, 0), np.delete(clean_ND, 77, 0))
    assert np.array_equal(stored(store, "early"), stored(pair, "early"))
    assert store.moments("inner", CLASSES).count == 299
    kind = classes(pair, "inner")[77]
    assert store.moments("inner", [kind]).count == pair.moments("inner", [kind]).count - 1


def test_a_model_that_overflows_on_a_token_is_masked_where_it_does(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "llama", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    bad = int(models.load_tokenizer(models.resolve(str(folder)))("1").input_ids[0])
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    asked = {"llama": {"path": str(folder), "sites": ["resid.0"]}}
    with pytest.raises(ActivationError, match=r"llama \(resid.0\) is not finite: document"):
        harvest(config(home, tmp_path / "x.zarr", models=asked))
    store = harvest(config(home, tmp_path / "y.zarr", models=asked, store={"nonfinite": "mask"}))
    masked_N = store.column("faults/llama") & MASKED > 0
    assert 0 < masked_N.sum() < store.rows
    ids, segment = store.column("tokens/llama/id"), store.column("tokens/llama/segment")
    row = store.column("segments/row")
    for g in range(len(row) - 1):
        assert bad in ids[segment[g] : segment[g + 1]] or not masked_N[row[g] : row[g + 1]].any()
    assert masked_N[ids[store.column("rows/llama/token")] == bad].all()


def test_what_passes_the_headroom_is_clipped_flagged_and_counted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_calibration: Callable[[], bool]
) -> None:
    inject(monkeypatch, "early", 123, -7e5, after_calibration)
    said = tmp_path / "log.jsonl"
    with Log(said, quiet=True) as log:
        store = harvest(config(home, tmp_path / "x.zarr"), log=log)
    assert store.factor("early") == 1.0
    assert store.fault_counts("early") == {"clipped": 1, "masked": 0, "sink": 1}
    assert store.column("faults/early")[123] == CLIPPED | SINK
    assert stored(store, "early")[123, 3] == -65_504
    norms_N = np.concatenate([store.map("norms/early", shard) for shard in range(store.shards)])
    assert norms_N[123] == pytest.approx(7e5)
    assert store.moments("early", CLASSES).largest == pytest.approx(7e5)
    messages = [json.loads(line).get("message", "") for line in said.read_text().splitlines()]
    assert any(f"shard {123 // store.shard_rows}: clipped or masked rows:" in message for message in messages)


@every_device
def test_units_are_sound_on_the_device_that_made_them(home: Path, tmp_path: Path, device: torch.device) -> None:
    """Rows come back from a GPU while it computes the next batch: none may be of another batch, or half a one."""
    store = harvest(config(home, tmp_path / "x.zarr", device=str(device)))
    bench = Bench(find(store.header, {}, print), str(device), 1)
    assert check.contents(store, bench, store.rows, 0, Log(quiet=True)) == []


def test_what_is_begun_ahead_comes_in_order() -> None:
    begun: list[int] = []
    came = [(item, len(begun)) for item in unit._behind((begun.append(n) or n for n in range(5)), 2)]
    assert came == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
    assert list(unit._behind([], 2)) == []


def test_units_read_the_tables_of_tokens_and_rows_piece_by_piece(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole they would grow with the rows, in every process of a harvest."""
    genuine, whole = Store.column, set()

    def column(self: Store, name: str) -> np.ndarray:
        whole.add(name)
        return genuine(self, name)

    monkeypatch.setattr(Store, "column", column)
    assert tree(harvest(config(home, tmp_path / "x.zarr")).path) == tree(pair.path)
    of_models = {f"{table}" for model in ("llama", "gemma") for table in (
        f"tokens/{model}/segment", *(f"batches/{model}/{name}" for name in ("segment", "end", "shard")),
    )}  # fmt: skip
    assert whole == {"segments/row", "documents/split", *of_models}
