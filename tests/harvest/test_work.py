"""Two tiny models with different tokenizers, harvested into a store: what it holds is what they compute.

Letters: T tokens of a segment, N rows, D width, G segments.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harvest import lock, plan
from harvest.job import prepare
from harvest.worker import Worker
from shared import files, models, verify
from shared.errors import SpaceError, StoreError, StoreMismatchError
from shared.log import Log
from shared.moments import CLASSES
from shared.store import Store
from tests.harvest.pair import classes, config, harvest, one, stored, tree
from tests.tiny import TEXTS, byte_level, save_model, sentencepiece
from train.loader import Loader
from train.order import Order

ROUNDING = 2.0**-11  # of fp16, relative
PADDING = 2e-5  # another length of padding sums fp32 in another order; values are about 1


def load(store: Store, name: str) -> nn.Module:
    model = store.header.models[name]
    return models.load(models.resolve(model.path), model.dtype, model.attention, "cpu")


def own_rows(store: Store, source: str) -> np.ndarray:
    """The same rows as the model itself gives them, segment after segment, without the hooks."""
    name, site = store.header.sources[source].model, store.header.sources[source].site
    kind, block = site.split(".")
    model = load(store, name)
    inner: list[Tensor] = []
    if kind == "mlp_out":
        model.get_submodule(f"layers.{block}.mlp").register_forward_hook(lambda _m, _a, out: inner.append(out))
    ids, segment = store.column(f"tokens/{name}/id"), store.column(f"tokens/{name}/segment")
    position, row = store.column(f"rows/{name}/position"), store.column("segments/row")
    found = []
    for g in range(len(segment) - 1):
        ids_T = torch.from_numpy(ids[segment[g] : segment[g + 1]].astype(np.int64))
        inner.clear()
        with torch.inference_mode():
            states = model(input_ids=ids_T[None], output_hidden_states=True).hidden_states
        x_TD = (inner[0] if inner else states[int(block) + 1])[0]
        found.append(x_TD[position[row[g] : row[g + 1]].tolist()].double().numpy())
    return np.concatenate(found)


# --- what is stored -------------------------------------------------------------------------------------------------


def test_the_store_has_what_was_asked_for(pair: Store) -> None:
    assert pair.sealed
    assert Store.open(pair.path).header == pair.header
    assert (pair.rows, pair.shards) == (300, 4)
    assert {name: (s.model, s.site, s.width) for name, s in pair.header.sources.items()} == {
        "early": ("llama", "resid.0", 32), "inner": ("llama", "mlp_out.1", 32), "gemma": ("gemma", "resid.1", 24),
    }  # fmt: skip
    assert pair.header.plan["alignment"] == "offsets"
    row = pair.column("segments/row")
    assert not set(range(pair.shard_rows, 300, pair.shard_rows)) <= set(row.tolist())  # borders inside segments


@pytest.mark.parametrize("source", ["early", "inner", "gemma"])
def test_un_scaled_rows_are_the_models_own_activations_to_fp16_rounding(pair: Store, source: str) -> None:
    own_ND = own_rows(pair, source)
    allowed_ND = np.abs(own_ND) * ROUNDING + pair.factor(source) * 2.0**-25 + PADDING
    assert (np.abs(stored(pair, source) - own_ND) <= allowed_ND).all()
    norms_N = np.concatenate([pair.map(f"norms/{source}", shard) for shard in range(pair.shards)])
    np.testing.assert_allclose(norms_N, np.linalg.norm(own_ND, axis=1), rtol=1e-5)


@pytest.mark.parametrize("source", ["early", "inner", "gemma"])
def test_moments_are_those_of_the_models_own_rows_per_class(pair: Store, source: str) -> None:
    own_ND, class_N = own_rows(pair, source), classes(pair, source)
    assert len(set(class_N)) >= 3
    for name in CLASSES:
        x_ND = own_ND[np.array(class_N) == name]
        moments = pair.moments(source, [name])
        assert moments.count == len(x_ND) == moments.norms_H.sum()
        if len(x_ND):
            np.testing.assert_allclose(moments.mean_D, x_ND.mean(0), atol=PADDING)
            np.testing.assert_allclose(moments.m2_D, ((x_ND - x_ND.mean(0)) ** 2).sum(0), rtol=1e-4, atol=1e-4)
            assert moments.largest == pytest.approx(np.abs(x_ND).max(), rel=1e-4)
    assert pair.moments(source, CLASSES).count == pair.rows


def test_decoding_both_token_prefixes_of_every_row_ends_at_the_same_character(home: Path, pair: Store) -> None:
    assert pair.header.plan["skipped"]["tokens_out_of_reach"] == 0
    tokenizers = {name: models.load_tokenizer(models.resolve(m.path)) for name, m in pair.header.models.items()}
    texts = {f"doc {number}": text for number, text in enumerate(TEXTS)}
    ids, checked = pair.document_ids(), 0
    for document, (start, stop) in enumerate(np.stack([pair.column("documents/row")[:-1],
                                                       pair.column("documents/row")[1:]], 1).tolist()):  # fmt: skip
        for row in range(start, stop):
            read = {name: prefix(pair, name, tokenizers[name], document, row) for name in tokenizers}
            assert read["llama"] == read["gemma"]
            assert texts[ids[document]].startswith(read["llama"])
            checked += 1
    assert checked == pair.rows


def prefix(store: Store, name: str, tokenizer: models.Tokenizer, document: int, row: int) -> str:
    """All that a model's tokens say of a document up to a row, special tokens left out."""
    ids, segment = store.column(f"tokens/{name}/id"), store.column(f"tokens/{name}/segment")
    first = segment[np.searchsorted(store.column("segments/document"), document)]
    read = ids[first : store.column(f"rows/{name}/token")[row] + 1]
    return str(tokenizer.decode(read[read != 1] if name == "gemma" else read, clean_up_tokenization_spaces=False))


def test_receipts_hold_what_decides_the_bytes(pair: Store) -> None:
    for shard in range(pair.shards):
        for model in ("llama", "gemma"):
            receipt = json.loads((pair.path / "receipts" / f"{shard:05d}.{model}.json").read_text())
            assert (receipt["id"], receipt["shard"], receipt["model"]) == (pair.header.id, shard, model)
            assert (receipt["device"], receipt["threads"]) == ("cpu", 1)
            assert receipt["versions"] == {
                "torch": torch.__version__, "transformers": models.version(), "numpy": np.__version__,
            }  # fmt: skip
    assert len(list((pair.path / "receipts").iterdir())) == 1 + 2 * pair.shards


def test_identical_models_share_every_token_the_special_ones_too(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama", sentencepiece(), seed=3)
    save_model(tmp_path / "chat", "llama", sentencepiece(), seed=4)
    asked = {name: {"path": str(tmp_path / name), "sites": ["resid.1"]} for name in ("base", "chat")}
    store = harvest(config(home, tmp_path / "x.zarr", models=asked, rows={"count": 100}))
    assert store.header.plan["alignment"] == "identical"
    assert np.array_equal(store.column("rows/base/token"), np.arange(100))
    for name in ("base", "chat"):
        own_ND = own_rows(store, name)
        assert (np.abs(stored(store, name) - own_ND) <= np.abs(own_ND) * ROUNDING + PADDING).all()
    assert not np.allclose(stored(store, "base"), stored(store, "chat"))


def test_a_segment_that_runs_alone_is_stored_bit_for_bit(home: Path, tmp_path: Path) -> None:
    store = harvest(one(home, tmp_path / "x.zarr", ["resid.1"], batch={"tokens": 1}, rows={"count": 60}, threads=None))
    own_ND = own_rows(store, "llama")
    expected_ND = (own_ND / store.factor("llama")).astype(np.float16).astype(np.float64) * store.factor("llama")
    assert np.array_equal(stored(store, "llama"), expected_ND)


def test_a_bf16_model_loses_nothing_in_fp16(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "bf16", "llama", byte_level(), seed=5, dtype=torch.bfloat16)
    asked = {"llama": {"path": str(tmp_path / "bf16"), "sites": ["resid.1"]}}
    store = harvest(
        config(home, tmp_path / "x.zarr", models=asked, batch={"tokens": 1}, rows={"count": 40}, threads=None)
    )
    assert store.header.models["llama"].dtype == "bfloat16"
    own_ND = own_rows(store, "llama")
    spanned_ND = np.abs(own_ND) >= store.factor("llama") * 2.0**-14
    assert spanned_ND.mean() > 0.99
    assert np.array_equal(stored(store, "llama")[spanned_ND], own_ND[spanned_ND])


def loud(home: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A model whose activations pass what fp16 holds."""
    shutil.copytree(home / "llama", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e6
    weights = {name: values.to(dtype) for name, values in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    asked = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**asked, "dtype": str(dtype).removeprefix("torch.")})
    return folder


def test_a_store_of_bfloat16_holds_a_loud_bf16_model_to_the_bit_without_scale_or_clip(
    home: Path, tmp_path: Path
) -> None:
    asked = {"llama": {"path": str(loud(home, tmp_path / "loud", torch.bfloat16)), "sites": ["resid.0"]}}
    tables = {"models": asked, "batch": {"tokens": 1}, "rows": {"count": 60}, "threads": None}
    store = harvest(config(home, tmp_path / "x.zarr", store={"dtype": "bfloat16"}, **tables))
    own_ND = own_rows(store, "llama")
    assert np.abs(own_ND).max() > 4e5 and store.factor("llama") == 1.0
    assert np.array_equal(stored(store, "llama"), own_ND)
    assert store.fault_counts("llama")["clipped"] == 0
    assert np.array_equal(store.read(0, store.rows)["llama"].numpy(), own_ND.astype(np.float32))
    assert np.array_equal(store.dask("llama").compute(), own_ND.astype(np.float32))
    declared = files.read_json(store.path / "activations/llama/zarr.json")
    assert declared["data_type"] == "uint16" and declared["attributes"]["dtype"] == "bfloat16"
    assert verify.full(store) == []
    kept_N = np.ones(store.rows, bool)
    with Loader(store, ["llama"], Order(kept_N, 4, 2, 0), 7, range(5), torch.device("cpu")) as loader:
        for rows in loader:
            assert np.array_equal(rows.x["llama"].numpy(), own_ND[rows.rows_B].astype(np.float32))


def test_activations_beyond_fp16_are_scaled_by_a_power_of_two(home: Path, tmp_path: Path) -> None:
    asked = {"llama": {"path": str(loud(home, tmp_path / "loud", torch.float32)), "sites": ["resid.0"]}}
    store = harvest(config(home, tmp_path / "x.zarr", models=asked, rows={"count": 80}))
    own_ND = own_rows(store, "llama")
    assert np.abs(own_ND).max() > 4e5
    factor = store.factor("llama")
    assert np.log2(factor).is_integer()
    assert factor >= 16
    assert store.fault_counts("llama") == {"clipped": 0, "masked": 0, "sink": 0}
    assert (np.abs(stored(store, "llama") - own_ND) <= np.abs(own_ND) * ROUNDING + factor * 2.0**-25 + 1).all()


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_the_same_harvest_twice_gives_the_same_bytes(home: Path, pair: Store, tmp_path: Path) -> None:
    assert tree(harvest(config(home, tmp_path / "again.zarr")).path) == tree(pair.path)


def test_the_id_and_the_values_do_not_depend_on_where_models_and_text_lie(
    home: Path, pair: Store, tmp_path: Path
) -> None:
    moved = shutil.copytree(home, tmp_path / "moved", ignore=shutil.ignore_patterns("*.zarr"))
    again = harvest(config(moved, tmp_path / "again.zarr"))
    assert again.header.id == pair.header.id
    differing = {name for name, data in tree(again.path).items() if tree(pair.path)[name] != data}
    assert differing == {"zarr.json", "sealed"}  # the one says where models were found, the other its checksum


def test_another_seed_stores_other_rows(home: Path, pair: Store, tmp_path: Path) -> None:
    other = harvest(config(home, tmp_path / "x.zarr", rows={"seed": 1}))
    assert other.header.id != pair.header.id
    assert other.document_ids() != pair.document_ids()


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("unit", [0, 3, 4, 7])
def test_a_run_that_died_in_a_unit_goes_on_to_the_same_bytes(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    genuine, calls = Store.put, iter(range(99))

    def put(self: Store, shard: int, model: str, *rest: Any) -> Any:
        if next(calls) == unit:
            torn = self.path / "norms" / "early" / "c" / "1.abc.partial"
            torn.parent.mkdir(exist_ok=True)
            torn.write_bytes(b"torn")
            raise Killed
        return genuine(self, shard, model, *rest)

    asked = config(home, tmp_path / "x.zarr")
    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(Killed):
        harvest(asked)
    monkeypatch.undo()
    half = Store(Path(asked.store.path), pair.header)
    assert not half.sealed
    assert len(half.missing()) == 8 - unit
    before = tree(half.path)
    assert tree(harvest(asked).path) == tree(pair.path)
    kept = [name for name in before if not name.endswith(".partial")]
    assert all(before[name] == tree(pair.path)[name] for name in kept)


@pytest.mark.parametrize("step", ["freeze", "seal", "scale"])
def test_a_run_that_died_between_its_steps_goes_on_to_the_same_bytes(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(Worker if step == "scale" else Store, step, die)
    with pytest.raises(Killed):
        harvest(config(home, tmp_path / "x.zarr"))
    monkeypatch.undo()
    assert tree(harvest(config(home, tmp_path / "x.zarr")).path) == tree(pair.path)


def test_a_unit_that_is_made_again_on_its_own_has_the_same_bytes(home: Path, pair: Store, tmp_path: Path) -> None:
    path = shutil.copytree(pair.path, tmp_path / "x.zarr")
    (path / "sealed").unlink()
    for name in ("receipts/00002.gemma.json", "activations/gemma/c/2/0", "receipts/00003.llama.json"):
        (path / name).unlink()
    assert tree(harvest(config(home, path)).path) == tree(pair.path)


def test_a_finished_store_is_returned_at_once(home: Path, pair: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(plan, "build", None)
    before = tree(pair.path)
    assert harvest(config(home, pair.path)).header == pair.header
    assert tree(pair.path) == before


# --- refusals before anything is spent ------------------------------------------------------------------------------


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)


@pytest.mark.parametrize(
    ("tables", "fields"),
    [
        ({"rows": {"seed": 3}}, "rows.seed: 0 -> 3"),
        ({"rows": {"context": 20, "count": 200}}, "rows.context: 24 -> 20; rows.count: 300 -> 200"),
        ({"store": {"nonfinite": "mask"}}, "store.nonfinite: 'fail' -> 'mask'"),
        ({"batch": {"tokens": 99}}, "batch.tokens: 100 -> 99"),
        ({"corpus": {"id": None}}, "corpus: "),
    ],
)
def test_another_configuration_at_the_same_path_is_refused_with_the_fields_that_differ(
    home: Path, pair: Store, no_forward: None, tables: dict[str, Any], fields: str
) -> None:
    before = tree(pair.path)
    with pytest.raises(StoreMismatchError) as caught:
        harvest(config(home, pair.path, **tables))
    for field in fields.split("; "):
        assert field in str(caught.value)
    assert str(caught.value).count(" -> ") == fields.count(";") + 2  # and one in the message itself
    assert "\n" not in str(caught.value)
    assert tree(pair.path) == before


def test_other_weights_at_the_same_path_are_refused(home: Path, pair: Store, tmp_path: Path, no_forward: None) -> None:
    moved = shutil.copytree(home, tmp_path / "moved", ignore=shutil.ignore_patterns("*.zarr"))
    save_model(moved / "gemma", "gemma3", sentencepiece(), seed=9, width=24)
    with pytest.raises(StoreMismatchError, match=r"models.gemma.weights: "):
        harvest(config(moved, pair.path))


def test_too_little_space_is_refused_before_any_forward_pass(
    home: Path, tmp_path: Path, no_forward: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(SpaceError, match=r"x.zarr needs .* GB, 0.00 GB are free"):
        harvest(config(home, tmp_path / "x.zarr"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.zarr.plan"]  # the plan serves when there is space


def test_too_little_space_for_the_rest_is_refused_before_any_forward_pass(
    home: Path, pair: Store, tmp_path: Path, no_forward: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(pair.path, tmp_path / "x.zarr")
    for name in ("sealed", *(f"receipts/{shard:05d}.llama.json" for shard in range(pair.shards))):
        (path / name).unlink()
    before, asked = tree(path), []
    monkeypatch.setattr(files, "require_space", lambda where, needed, way_out: asked.append((where, needed)))
    with pytest.raises(AssertionError, match=r"a model was loaded"):
        harvest(config(home, path))
    monkeypatch.undo()
    written = sum(len(data) for name, data in before.items() if "/early/c/" in name or "/inner/c/" in name)
    assert asked == [(path, pytest.approx(written, rel=0.05))]
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(SpaceError):
        harvest(config(home, path))
    assert tree(path) == before


def test_the_space_that_is_asked_for_is_what_the_store_takes(
    home: Path, pair: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(config(home, pair.path), Log(quiet=True))
    asked = sum(plan.stored_bytes(pair.header.plan, list(job.sources.values())).values())
    kinds = ("activations", "norms", "faults", "moments")
    data = sum(len(content) for name, content in tree(pair.path).items() if "/c/" in name and name.startswith(kinds))
    assert asked == pytest.approx(data, rel=0.05)


@pytest.mark.parametrize("what", ["a file", "a folder", "another group"])
def test_a_path_that_is_in_use_is_refused_and_left_alone(
    home: Path, tmp_path: Path, no_forward: None, what: str
) -> None:
    path = tmp_path / "x.zarr"
    if what == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / ("zarr.json" if what == "another group" else "mine")).write_text('{"attributes": {}}')
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"no Granary store here|in use and is no store"):
        harvest(config(home, path))
    assert tree(tmp_path) == before


def test_a_finished_store_is_let_go_of_for_one_that_was_killed(home: Path, tmp_path: Path) -> None:
    store = harvest(config(home, tmp_path / "x.zarr"))
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(store.path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    child.kill()
    child.wait()
    assert lock.folder_of(store.path).exists()
    harvest(config(home, store.path))
    assert not lock.folder_of(store.path).exists()


HOLD = """
import sys, time
from pathlib import Path
from harvest.lock import hold
with hold(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""
