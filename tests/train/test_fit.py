"""A run from store to report: its folder, its sameness, and what it refuses before any work."""

import json
import shutil
import signal
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import config as configs
from shared import layout
from shared.codec import CODECS, Packing
from shared.errors import CheckpointError, ConfigError, Stopped, StoreError, TrainingError, WiringError, one_line
from shared.mapped import MappedShards
from shared.mixture import open_mixture
from shared.store import Store
from tests import cases
from tests.build import make_store
from train import checkpoint, difference, prepare, report
from train import measure as measures
from train.config import TrainConfig
from train.dictionary import Dictionary
from train.filter import kept_rows
from train.fit import Run, fit, resume
from train.measure import measure
from train.method import TopKConfig, find
from train.trainer import Trainer
from train.weights import shares

ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 32, "exclusive": 4}, "method": {"name": "batch_topk", "k": 3},
    "steps": 12, "batch": 16, "threads": 1, "log": {"every": 5, "checkpoint": 4, "keep": 2}, "device": "cpu",
    "optimiser": {"lr": 1e-2, "warmup": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("fit") / "pair.zarr"
    return make_store(path, rows=300, shard_rows=256, chunk_rows=16, factor={"a": 2.0}, documents=20)


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(store, ASKED, tmp_path_factory.mktemp("runs") / "one", quiet=True)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "dictionary" / "dictionary.safetensors").read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_on_a_packed_store_equals_the_run_on_the_original_to_the_bit(
    run: Run, codec: str, tmp_path: Path
) -> None:
    packing = Packing(codec, CODECS[codec].default, {"a": 8, "b": 4})
    packed = make_store(
        tmp_path / "cold.zarr",
        rows=300,
        shard_rows=256,
        chunk_rows=16,
        factor={"a": 2.0},
        documents=20,
        packing=packing,
    )
    again = fit(packed, ASKED, tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(run.folder)
    assert (again.folder / "measure.json").read_bytes() == (run.folder / "measure.json").read_bytes()
    timed = {"time", "rows_s", "waited_s", "message"}
    records = [[{k: v for k, v in one.items() if k not in timed} for one in events(r.folder)] for r in (run, again)]
    assert records[0] == records[1]


def test_a_run_that_reads_without_maps_is_the_same_to_the_bit(
    run: Run, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedShards, "_map", lambda *_: pytest.fail("rows were mapped"))
    again = fit(store, {**ASKED, "read": {"io": "pread"}}, tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(run.folder)
    assert (again.folder / "measure.json").read_bytes() == (run.folder / "measure.json").read_bytes()


@pytest.mark.parametrize("where", ["device", "memory", "no"])
def test_wherever_the_rows_of_a_run_stay_it_is_the_same_to_the_bit_and_its_log_says_where(
    run: Run, store: Store, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.resident.place", lambda *_: where)
    again = fit(store, ASKED, tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(run.folder)
    assert events(again.folder)[0]["resident"] == where
    never = fit(store, {**ASKED, "read": {"resident": "never"}}, tmp_path / "never", quiet=True)
    assert events(never.folder)[0]["resident"] == "no" and weights(never.folder) == weights(run.folder)


def test_blocks_are_those_of_the_original_and_whole_chunks_of_a_packed_store() -> None:
    for widths in ({"a": 576, "b": 4096}, {"b": 4096}, {"a": 576}, {"a": 640, "b": 577, "c": 65_536}):
        chunk_rows = {name: layout.block_rows(1024, 2 * width) for name, width in widths.items()}
        block_rows = layout.block_rows(1024, 2 * min(widths.values()))
        assert all(block_rows % rows == 0 for rows in chunk_rows.values())
        assert block_rows == max(chunk_rows.values())


def test_a_run_folder_holds_all_that_the_docstring_says(run: Run) -> None:
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "checkpoints", "config.toml", "dictionary", "measure.json", "metrics.jsonl", "report.html", "store.json",
    ]  # fmt: skip
    assert [path.name for path in checkpoint.steps(run.folder / "checkpoints")] == ["step_00000008", "step_00000012"]


def test_the_config_in_the_folder_is_the_whole_one_and_repeats_the_run(run: Run, store: Store, tmp_path: Path) -> None:
    data = tomllib.loads((run.folder / "config.toml").read_text())
    assert configs.parse(TrainConfig, data) == configs.parse(TrainConfig, ASKED)
    assert data["optimiser"]["beta2"] == 0.999 and data["method"]["aux"] == 1 / 32
    assert weights(fit(store, data, tmp_path / "again", quiet=True).folder) == weights(run.folder)


def test_the_store_is_named_by_id_and_by_a_path_that_holds_from_any_folder(run: Run, store: Store) -> None:
    named = json.loads((run.folder / "store.json").read_text())
    [path] = map(Path, named["paths"])
    assert named["id"] == store.header.id and path.is_absolute() and path.samefile(store.path)


def test_a_store_given_by_a_relative_path_is_named_absolutely(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    fit(Store.open(store.path.name), {**ASKED, "steps": 1}, tmp_path / "run", quiet=True)
    assert Path(json.loads((tmp_path / "run" / "store.json").read_text())["paths"][0]).is_absolute()


def test_metrics_are_lines_of_json_at_the_asked_steps_and_the_last(run: Run) -> None:
    lines = events(run.folder)
    assert [line["event"] for line in lines] == ["start", "way", "step", "step", "step", "measure"]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [5, 10, 12]
    for line in steps:
        assert {"loss", "recon", "aux", "gradient", "l0", "dead", "fve/a", "fve/b", "epoch", "rows_s"} <= line.keys()
        assert all(np.isfinite(value) for key, value in line.items() if key != "event")
    kept = lines[0]["kept"]
    assert kept + sum(lines[0]["dropped"].values()) == 300
    assert steps[-1]["epoch"] == 12 * 16 // kept


def test_figures_are_those_of_the_saved_dictionary_on_the_store(run: Run, store: Store) -> None:
    assert json.loads((run.folder / "measure.json").read_text()) == run.figures
    assert measure(Dictionary.load(run.folder), store, quiet=True) == run.figures
    assert events(run.folder)[-1]["figures"] == run.figures
    assert not run.dictionary.training


def test_the_last_checkpoint_holds_the_weights_of_the_dictionary(run: Run, store: Store) -> None:
    config = configs.parse(TrainConfig, ASKED)
    told = config.model_dump(mode="json", exclude={"read"})
    identity = {"store": store.header.id, "seals": store.seals, "config": told}
    trainer = prepare.blank(prepare.ready(store, [config])[0])
    checkpoint.load(trainer, run.folder / "checkpoints" / "step_00000012", identity)
    state = run.dictionary.state_dict()
    assert trainer.step == 12
    assert all(torch.equal(value, state[key]) for key, value in trainer.dictionary.state_dict().items())


@pytest.mark.parametrize("method", ["standard", "topk", "batch_topk"])
def test_the_same_seed_and_threads_give_the_same_weights_and_another_seed_others(
    store: Store, tmp_path: Path, method: str
) -> None:
    asked = {**ASKED, "method": {"name": method} | ({} if method == "standard" else {"k": 3})}
    first, again, other = (
        fit(store, {**asked, "seed": seed}, tmp_path / name / "run", quiet=True)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    for name in ("config.toml", "measure.json", "store.json", "report.html", "dictionary/config.json"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    assert weights(first.folder) == weights(again.folder) != weights(other.folder)


def test_the_state_of_the_global_generator_is_no_part_of_a_run(store: Store, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    np.random.seed(7)
    before = torch.get_rng_state()
    again = fit(store, ASKED, tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(run.folder) and torch.equal(torch.get_rng_state(), before)


def test_how_often_a_run_looks_at_itself_changes_no_bit(store: Store, run: Run, tmp_path: Path) -> None:
    often = fit(store, {**ASKED, "log": {"every": 1, "checkpoint": 1, "measure_rows": 5}}, tmp_path / "run", quiet=True)
    assert weights(often.folder) == weights(run.folder)


def test_sources_may_be_fewer_than_the_store_has_and_in_another_order(store: Store, tmp_path: Path) -> None:
    asked = {**ASKED, "wiring": {"kind": "transcoder", "latents": 16, "sources": ["b", "a"]}, "steps": 2}
    wiring = fit(store, asked, tmp_path / "t", quiet=True).dictionary.wiring
    assert (wiring.readers, wiring.writers) == (("b",), ("a",))
    asked = {**ASKED, "wiring": {"kind": "autoencoder", "latents": 16, "sources": ["b"]}, "steps": 2}
    assert fit(store, asked, tmp_path / "a", quiet=True).dictionary.wiring.widths == {"b": 4}


def test_a_run_without_a_folder_gets_a_new_one_below_runs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [fit(store, {**ASKED, "steps": 1}, quiet=True).folder for _ in range(2)]
    assert [str(name) for name in names] == ["runs/dedicated-batch_topk-32", "runs/dedicated-batch_topk-32-2"]


def test_the_folder_of_a_run_and_a_file_are_refused_and_left_alone(run: Run, store: Store, tmp_path: Path) -> None:
    before = weights(run.folder)
    with pytest.raises(CheckpointError, match="this folder holds a run already"):
        fit(store, {**ASKED, "seed": 5}, run.folder, quiet=True)
    assert weights(run.folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="this is a file"):
        fit(store, ASKED, tmp_path / "file", quiet=True)
    assert (tmp_path / "file").read_text() == "mine"
    before = sorted(store.path.iterdir())
    with pytest.raises(CheckpointError, match="this folder is in use and holds no run"):
        fit(store, ASKED, store.path, quiet=True)
    assert sorted(store.path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert fit(store, {**ASKED, "steps": 1}, tmp_path / "empty", quiet=True).folder == tmp_path / "empty"


def test_a_store_can_be_given_by_its_path(store: Store, tmp_path: Path, run: Run) -> None:
    assert weights(fit(str(store.path), ASKED, tmp_path / "run", quiet=True).folder) == weights(run.folder)


def test_a_store_in_which_no_document_is_held_out_is_refused_before_the_first_step(tmp_path: Path) -> None:
    none = make_store(tmp_path / "none.zarr", rows=50, documents=3, held_out=0.0)
    with pytest.raises(StoreError, match=r"no held-out row to measure on: .*none.zarr holds out 0 documents. Loosen"):
        fit(none, ASKED, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_runs_that_begin_at_once_have_folders_of_their_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are past every check before either has made its folder."""
    monkeypatch.chdir(tmp_path)
    both = threading.Barrier(2)
    genuine = prepare.ready

    def ready(*given: Any) -> Any:
        made = genuine(*given)
        both.wait(60)
        return made

    monkeypatch.setattr(prepare, "ready", ready)
    path = store.path.absolute()

    def run(seed: int, folder: str | None) -> Path | str:
        try:
            return fit(Store.open(path), {**ASKED, "steps": 2, "seed": seed}, folder, quiet=True).folder
        except CheckpointError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (1, 2), (None, None)))
        assert sorted(map(str, found)) == ["runs/dedicated-batch_topk-32", "runs/dedicated-batch_topk-32-2"]
        for seed, folder in zip((1, 2), found, strict=True):
            assert f"seed = {seed}\n" in (Path(folder) / "config.toml").read_text()
        mine, other = sorted(map(str, pool.map(run, (3, 4), ("mine", "mine"))))
    assert (mine, other) == (
        "mine",
        "this folder holds a run already: mine. Give another folder (--out), or: train resume mine",
    )


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"wiring": {"latents": 16, "sources": ["a", "z"]}}, StoreError, r"this store has no source: z\. It has: a, b"),
        ({"wiring": {"latents": 16, "sources": ["a", "a"]}}, ConfigError, "a source is named twice: a, a"),
        ({"wiring": {"latents": 16, "sources": ["a", "a - a"]}}, ConfigError, "a source less itself is 0: 'a - a'"),
        ({"wiring": {"latents": 16, "sources": ["a", "a - b"]}}, StoreError, "of one width: a has 6, b has 4"),
        ({"rows": {"weights": {"pair": 1.0}}}, ConfigError, r"rows\.weights are of several stores, and this is one"),
        ({"rows": {"weights": {"pair": 0}}}, ConfigError, r"wrong value for rows\.weights: .*Give every store"),
        ({"rows": {"sources": ["a - b"]}}, StoreError, r"this store has no source: a - b\. It has: a, b"),
        ({"wiring": {"latents": 16, "kind": "autoencoder"}}, WiringError, r"autoencoder needs 1 source\(s\): a, b"),
        ({"wiring": {"latents": 2, "kind": "crosscoder"}}, WiringError, "k is larger than the latents: 3 > 2"),
        ({"wiring": {"latents": 16, "kind": "dedicated", "exclusive": {"a": 1}}}, WiringError, "names every source"),
        ({"device": "gpu"}, ConfigError, "this device cannot be used: gpu"),
        ({"method": {"name": "topk", "k": 3, "k_start": 6, "k_anneal": 99}}, ConfigError, "longer than the run: 99 > "),
        ({"method": {"name": "standard", "l1_warmup": 99}}, ConfigError, "longer than the run: 99 > "),
        ({"method": "standard", "wiring": {"latents": 16, "norm": "none"}}, ConfigError,
         r"codes would shrink out of their penalty while decoders grow: wiring\.norm none"),
        ({"wiring": {"latents": 16, "decoder": "unit", "decoder_norm": 0.3}}, ConfigError,
         r"decoders of length 1 have no other: wiring\.decoder_norm"),
        ({"method": {"name": "topk", "k": 3, "aux_form": "error"}, "wiring": {"latents": 16, "kind": "transcoder"}},
         WiringError, "AuxK cannot encode an error that there is not: a is read and not written"),
        ({"method": {"name": "matryoshka", "k": 3}, "wiring": {"latents": 8}}, WiringError,
         "a group of latents is empty: group 0 of 8"),
        ({"method": {"name": "matryoshka", "groups": [0.5, 0.4]}}, ConfigError, "shares above 0 whose sum is 1"),
        ({"method": {"name": "p_anneal", "p_first": 0.5, "p_last": 0.4}}, ConfigError, "p_first is behind p_last"),
        ({"wiring": {"latents": 16, "spans": [{"name": "x"}]}}, ConfigError,
         r"wiring\.spans are of the kind spans: wiring\.kind crosscoder"),
        ({"wiring": {"latents": 16, "kind": "spans"}}, WiringError, "the sizes of spans do not add up to 16"),
        ({"wiring": {"latents": 16, "kind": "spans", "spans": [{"name": "x", "tied": True}]}}, WiringError,
         "span x cannot write one vector to these widths: a 6, b 4"),
        ({"wiring": {"latents": 16, "k": {"al": 3}}}, WiringError, "wiring.k names an unknown span: al. Spans: all"),
        ({"wiring": {"latents": 16, "k": {"all": 3}}, "method": "standard"}, ConfigError,
         r"this method keeps no k latents: standard, wiring\.k"),
        ({"wiring": {"latents": 16, "kind": "spans", "spans": [{"name": "x", "size": 0}, {"name": "y"}]}}, WiringError,
         "a span needs at least one latent: x has 0"),
        ({"wiring": {"latents": 16, "kind": "spans", "spans": [{"name": "x", "size": 9}, {"name": "y", "size": 8}]}},
         WiringError, "the sizes of spans do not add up to 16: x 9, y 8"),
        ({"wiring": {"latents": 16, "kind": "dedicated", "exclusive": 0.01}}, WiringError, "only_a has 0"),
        ({"wiring": {"latents": 16, "kind": "dedicated", "exclusive": 0}}, WiringError, "exclusive is not above 0"),
        ({"wiring": {"latents": 16, "kind": "dedicated", "exclusive": 8}}, WiringError, "no latent is left to share"),
        ({"wiring": {"latents": 16, "norm": "decoupled"}, "method": "gated"}, WiringError,
         r"this method selects no latents, for one source or for all: wiring\.norm decoupled"),
        ({"wiring": {"latents": 16, "skip": True}}, WiringError, "a skip connection would copy a source: a, b is both"),
        ({"wiring": {"latents": 16, "kind": "dedicated", "exclusive": 4, "k": {"only_a": 5}}}, WiringError,
         "a span cannot keep so many: 5 of 4 in only_a"),
        ({"method": {"name": "standard", "recon": "norm", "ghost": 1.0}}, ConfigError,
         "ghost gradients are scaled to a squared reconstruction error"),
        ({"optimiser": {"weight_decay": -1}}, ConfigError, r"wrong value for optimiser\.weight_decay"),
        ({"resample": {"steps": [2, 999]}}, ConfigError, "cannot be resampled outside of the run: step 999 of "),
        ({"micro_batch": 8, "method": {"name": "standard"}}, ConfigError,
         "a batch cannot be computed in parts: standard, which does not keep k latents"),
        ({"micro_batch": 8, "kernels": "dense"}, ConfigError, "in parts: kernels dense, whose codes are matrices"),
        ({"micro_batch": 8, "wiring": {"latents": 64, "norm": "decoupled"}}, ConfigError, "parts: wiring.norm decoup"),
        ({"resample": {"steps": [0]}}, ConfigError, "cannot be resampled outside of the run: step 0 of "),
        ({"batch": 301}, ConfigError, r"the batch is larger than the rows that are kept: 301 > \d+\. Lower batch"),
        ({"seed": 2**63}, ConfigError, "wrong value for seed"),
        ({"method": {"name": "topk", "kk": 3}}, ConfigError, r"unknown key: method\.kk"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_a_folder_is_made(
    store: Store, tmp_path: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(store, {**ASKED, **keys}, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("log", [{"every": 1}, {"every": 1000, "checkpoint": 4}, {"every": 1000, "checkpoint": 1000}])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_weights_are_kept(
    store: Store, tmp_path: Path, log: dict[str, int]
) -> None:
    asked = {**ASKED, "optimiser": {"lr": 1e30, "warmup": 0}, "log": log}
    with pytest.raises(TrainingError, match=r"the loss is not finite: (inf|nan) at step \d+\. Lower optimiser\.lr"):
        fit(store, asked, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "dictionary").exists() and not (tmp_path / "run" / "report.html").exists()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_the_store_is_left_as_it_was(store: Store, run: Run, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in store.path.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = state()
    fit(store, ASKED, tmp_path / "run", quiet=True)
    assert state() == before


def test_the_report_is_made_again_from_the_folder_alone(run: Run) -> None:
    page = (run.folder / "report.html").read_bytes()
    (run.folder / "report.html").unlink()
    report.write(run.folder)
    assert (run.folder / "report.html").read_bytes() == page


# --- differences -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("tuned") / "pair.zarr"
    widths, factor = {"base": 6, "chat": 6, "small": 4}, {"base": 2.0, "chat": 0.5}
    return make_store(path, rows=300, shard_rows=256, chunk_rows=16, sources=widths, factor=factor, documents=20)


DIFFERENCES = {
    "autoencoder": [difference("chat", "base")], "transcoder": ["base", "chat - base"],
    "crosscoder": ["base", "chat - base"], "dedicated": ["small", "chat - base", "chat"],
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_run_on_a_difference_is_saved_loaded_measured_and_gone_on_with(
    tuned: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    names = DIFFERENCES[kind]
    asked = {**ASKED, "wiring": {"kind": kind, "latents": 32, "sources": names}}
    whole = fit(tuned, asked, tmp_path / "whole", quiet=True)
    loaded, x = Dictionary.load(whole.folder), tuned.read(0, 20)
    assert list(loaded.wiring.widths) == names and "chat - base" in loaded.config()["sources"]
    assert torch.equal(loaded.encode(x), loaded.encode({**x, "chat - base": x["chat"] - x["base"]}))
    assert measure(loaded, tuned, quiet=True) == whole.figures
    told = json.loads((whole.folder / "store.json").read_text())["sources"]
    assert list(told) == names and told["chat - base"]["model"] == "/models/model_chat - /models/model_base"
    assert "<td>resid.1 - resid.1</td>" in (whole.folder / "report.html").read_text()
    with monkeypatch.context() as patch, pytest.raises(Stopped), one_line():
        stop_at(7, patch)
        fit(tuned, asked, tmp_path / "run", quiet=True)
    assert weights(resume(tmp_path / "run", quiet=True).folder) == weights(whole.folder)


def test_a_run_on_a_difference_equals_updates_on_the_rows_of_fp64(tuned: Store, tmp_path: Path) -> None:
    x = {name: x_ND.double() for name, x_ND in tuned.read(0, tuned.rows).items()}
    kept = kept_rows(tuned).kept_N
    mean_D = (x["chat"] - x["base"])[torch.from_numpy(kept)].mean(0).float()
    asked = {**ASKED, "wiring": {"kind": "autoencoder", "latents": 32, "sources": ["chat - base"]}, "steps": 3}
    run = fit(tuned, asked, tmp_path / "run", quiet=True)
    torch.testing.assert_close(run.dictionary.scale.mean("chat - base"), mean_D, rtol=0, atol=2e-3)  # stored: fp16
    [ready] = prepare.ready(tuned, [configs.parse(TrainConfig, asked)])
    order, trainer = ready.order, prepare.fresh(tuned, ready, {})
    for step in range(3):
        rows_B = torch.from_numpy(np.sort(order.step(step, 16)))
        trainer.update({"chat - base": (x["chat"] - x["base"])[rows_B].float()})
    state = run.dictionary.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trainer.dictionary.state_dict().items())


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    for n, name in enumerate(("pair", "more", "rest")):
        make_store(
            folder / f"{name}.zarr", rows=200 + 50 * n, shard_rows=64 * (n + 1), chunk_rows=16, factor={"a": 2.0},
            documents=12, corpus=f"{name}/", seed=n,
        )  # fmt: skip
    return [folder / f"{name}.zarr" for name in ("pair", "more", "rest")]


WEIGHED = {**ASKED, "rows": {"weights": {"pair": 0.6, "more": 0.3, "rest": 0.1}}}


@pytest.mark.parametrize("asked", [ASKED, WEIGHED], ids=["all rows", "weighed"])
def test_a_run_on_a_mixture_that_was_stopped_goes_on_to_the_same_bits(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    whole = fit(three, asked, tmp_path / "whole", quiet=True)
    told = json.loads((whole.folder / "store.json").read_text())
    assert told["paths"] == [str(path) for path in three] and len(told["members"]) == len(told["seals"]) == 3
    with monkeypatch.context() as patch, pytest.raises(Stopped), one_line():
        stop_at(7, patch)
        fit([Store.open(path) for path in three], asked, tmp_path / "run", quiet=True)
    again = resume(tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(whole.folder) and again.figures == whole.figures
    assert untimed(again.folder) == untimed(whole.folder)
    assert (again.folder / "store.json").read_bytes() == (whole.folder / "store.json").read_bytes()
    assert "Store pair.zarr, more.zarr, rest.zarr, 750 rows" in (whole.folder / "report.html").read_text()


def test_the_rows_of_a_weighed_run_have_its_shares_and_the_log_says_what_was_dropped(
    three: list[Path], tmp_path: Path
) -> None:
    run = fit(three, {**WEIGHED, "steps": 1}, tmp_path / "run", quiet=True)
    asked = configs.parse(TrainConfig, tomllib.loads((run.folder / "config.toml").read_text()))
    assert asked.rows.weights == {"pair": 0.6, "more": 0.3, "rest": 0.1}
    kept_N = prepare.ready(open_mixture(three), [asked])[0].order.kept_N
    alone = [int(kept_rows(Store.open(path)).kept_N.sum()) for path in three]
    counts = [int(part.sum()) for part in np.split(kept_N, [200, 450])]
    assert counts == shares(alone, [0.6, 0.3, 0.1]) and sum(counts) < sum(alone)
    start = events(run.folder)[0]
    assert (start["kept"], start["dropped"]["weights"]) == (sum(counts), sum(alone) - sum(counts))


def test_a_run_on_a_mixture_does_not_go_on_with_another_one(three: list[Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped), one_line():
        stop_at(7, patch)
        fit(three, WEIGHED, tmp_path / "run", quiet=True)
    for others in (three[::-1], three[:2], three[0]):
        with pytest.raises(StoreError, match=r"not the store that the run began on: .*\. Give these as") as error:
            resume(tmp_path / "run", others, quiet=True)
        assert f"in this order: {', '.join(map(str, three))}" in str(error.value)
    moved = [Path(shutil.copytree(path, tmp_path / path.name)) for path in three]
    other = tmp_path / "run2"
    shutil.copytree(tmp_path / "run", other)
    assert weights(resume(other, moved, quiet=True).folder) == weights(resume(tmp_path / "run", quiet=True).folder)


def test_a_mixture_in_which_a_weighed_store_holds_nothing_out_is_refused_with_its_counts(
    three: list[Path], tmp_path: Path
) -> None:
    none = make_store(tmp_path / "none.zarr", rows=50, chunk_rows=16, factor={"a": 2.0}, held_out=0.0, corpus="n/")
    asked = {**ASKED, "rows": {"weights": {"pair": 1, "none": 1}}}
    told = r".*pair\.zarr holds out [1-9]\d* documents, .*none\.zarr holds out 0 documents\. Loosen"
    with pytest.raises(StoreError, match=f"no held-out row to measure on: {told}"):
        fit([three[0], none], asked, tmp_path / "run", quiet=True)


# --- going on --------------------------------------------------------------------------------------------------------


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that a break must not change."""
    timed = {"time", "rows_s", "waited_s", "message"}
    told = [one for one in events(folder) if one["event"] not in ("resume", "stop")]
    return [{key: value for key, value in one.items() if key not in timed} for one in told]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A signal comes in the middle of this step."""
    genuine = Trainer.update

    def update(self: Trainer, x: Any) -> Any:
        if self.step + 1 == step:
            signal.raise_signal(number)
        return genuine(self, x)

    monkeypatch.setattr(Trainer, "update", update)


METHODS: dict[str, dict[str, Any]] = {
    name: {"k": 3, "k_start": 6, "k_anneal": 9} if issubclass(find(name), TopKConfig) else {} for name in cases.names()
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wiring", ["dedicated", "transcoder"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, wiring: str
) -> None:
    asked = {**ASKED, "method": {"name": method, **METHODS[method]}, "wiring": {"kind": wiring, "latents": 32}}
    whole = fit(store, asked, tmp_path / "whole", quiet=True)
    for step in (3, 7):  # between checkpoints; again behind the first break
        with monkeypatch.context() as patch, pytest.raises(Stopped), one_line():
            stop_at(step, patch)
            if step == 3:
                fit(store, asked, tmp_path / "run", quiet=True)
            resume(tmp_path / "run", quiet=True)
        kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
        assert kept[-1].name == f"step_{step:08d}"  # the step was taken, and kept
    again = resume(tmp_path / "run", store, quiet=True)
    assert weights(again.folder) == weights(whole.folder) and again.figures == whole.figures
    assert untimed(again.folder) == untimed(whole.folder)
    for name in ("config.toml", "store.json", "measure.json", "dictionary/config.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    names = [sorted(path.name for path in run.folder.rglob("*")) for run in (whole, again)]
    assert names[0] == names[1]


@pytest.mark.parametrize("moment", ["before the first step", "behind the last", "while it is measured", "at the page"])
def test_a_run_goes_on_from_any_of_its_stages(
    store: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class KilledError(BaseException):
        """Nothing runs behind it but the system's own work."""

    def killed(*given: Any, **named: Any) -> None:
        raise KilledError

    places = {
        "before the first step": (Trainer, "update"), "behind the last": (Dictionary, "save"),
        "while it is measured": (measures, "measure_all"), "at the page": (report, "write"),
    }  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(*places[moment], killed)
        fit(store, ASKED, tmp_path / "run", quiet=True)
    again = resume(tmp_path / "run", quiet=True)
    assert weights(again.folder) == weights(run.folder) and again.figures == run.figures
    assert untimed(again.folder) == untimed(run.folder)


def test_a_finished_run_is_returned_as_it_is(store: Store, tmp_path: Path, run: Run) -> None:
    mine = Path(shutil.copytree(run.folder, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    again = resume(mine, tmp_path / "no store is needed.zarr", quiet=True)
    assert again.figures == run.figures and before == {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    state = run.dictionary.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.dictionary.state_dict().items())


@pytest.fixture
def stopped(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(6, patch, signal.SIGINT)
            fit(store, ASKED, tmp_path / "stopped", quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    return tmp_path / "stopped"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "not minded"])
def test_a_signal_that_nobody_minds_stops_no_run(
    store: Store, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        stop_at(6, monkeypatch, signal.SIGINT)
        again = fit(store, ASKED, tmp_path / "run", quiet=True)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert weights(again.folder) == weights(run.folder) and again.figures == run.figures


def test_a_run_does_not_go_on_with_another_store_or_config(store: Store, stopped: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", rows=300, shard_rows=128, chunk_rows=16, documents=20)
    with pytest.raises(StoreError, match=r"not the store that the run began on: .*Give the store whose id begins with"):
        resume(stopped, other, quiet=True)
    seed = make_store(
        tmp_path / "seed.zarr", rows=300, shard_rows=256, chunk_rows=16, factor={"a": 2.0}, documents=20, seed=5
    )
    assert seed.header.id == store.header.id  # other rows under the same id
    with pytest.raises(StoreError, match="not the store that the run began on"):
        resume(stopped, seed, quiet=True)
    moved = Path(shutil.copytree(store.path, tmp_path / "moved.zarr"))
    text = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(text.replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(
        CheckpointError, match=r"these differ: config\.optimiser\.lr: 0\.01 -> 0\.02\. Put config\.toml back"
    ):
        resume(stopped, moved, quiet=True)
    (stopped / "config.toml").write_text(text)
    assert resume(stopped, moved, quiet=True).folder == stopped


def test_a_run_goes_on_where_its_rows_are_read_in_another_way(store: Store, stopped: Path, run: Run) -> None:
    text, changes = (stopped / "config.toml").read_text(), {'io = "map"': 'io = "pread"', '"auto"\n\n': '"never"\n\n'}
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    (stopped / "config.toml").write_text(text)
    assert weights(resume(stopped, quiet=True).folder) == weights(run.folder)
    told = [line["resident"] for line in events(stopped) if "resident" in line]
    assert told == ["memory", "no"]


def test_what_is_no_run_does_not_go_on(tmp_path: Path, stopped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run here: .*nowhere"):
        resume(tmp_path / "nowhere", quiet=True)
    (stopped / "store.json").unlink()
    with pytest.raises(CheckpointError, match=r"this run was stopped before it began: .*Remove the folder"):
        resume(stopped, quiet=True)
    (stopped / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match=r"no run here: .*missing key: wiring"):
        resume(stopped, quiet=True)


def test_a_batch_of_one_row_has_no_fve_in_the_log_and_the_report_is_written(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr")
    asked = {**ASKED, "steps": 3, "batch": 1, "log": {"every": 1}}
    run = fit(store, asked, tmp_path / "run", quiet=True)

    def refused(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    steps = [
        event for event in (json.loads(line, parse_constant=refused) for line in lines) if event["event"] == "step"
    ]
    assert len(steps) == 3 and all("loss" in one and "fve/a" not in one for one in steps)


def test_a_store_that_has_gone_is_asked_for_by_its_option(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr")
    run = fit(store, {**ASKED, "steps": 2}, tmp_path / "run", quiet=True)
    (run.folder / "report.html").unlink()
    store.path.rename(tmp_path / "moved.zarr")
    with pytest.raises(StoreError, match=r"is not where it was: .*pair\.zarr\. Say where it lies now: --store"):
        resume(run.folder, quiet=True)
    assert resume(run.folder, tmp_path / "moved.zarr", quiet=True).figures == run.figures


def test_what_is_saved_is_as_open_as_its_folder(tmp_path: Path) -> None:
    run = fit(make_store(tmp_path / "pair.zarr"), {**ASKED, "steps": 2}, tmp_path / "run", quiet=True)
    saved = list(run.folder.rglob("*.safetensors"))
    assert len(saved) == 2
    for path in saved:
        assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666


def test_a_run_on_listed_spans_is_trained_measured_and_read_again(store: Store, tmp_path: Path) -> None:
    spans = [
        {"name": "only_a", "size": 6, "readers": ["a"], "writers": ["a"]},
        {"name": "from_a", "size": 0.25, "readers": ["a"]},
        {"name": "both", "weight": 0.5},
    ]
    wiring = {"kind": "spans", "latents": 32, "spans": spans, "k": {"only_a": 1}, "norm": "mixed", "alpha": 0.5}
    run = fit(store, {**ASKED, "wiring": wiring, "method": {"name": "topk", "k": 3}}, tmp_path / "run", quiet=True)
    assert {name: one["latents"] for name, one in run.figures["spans"].items()} == {
        "only_a": 6,
        "from_a": 8,
        "both": 18,
    }
    assert run.figures["spans"]["only_a"]["l0"] <= 1.0 + 1e-9
    again = Dictionary.load(run.folder)
    assert [(span.k, span.weight) for span in again.wiring.spans] == [(1, 1.0), (None, 1.0), (None, 0.5)]
    assert again.alpha == 0.5
    x = store.read(0, 8)
    assert torch.equal(again.encode(x), run.dictionary.encode(x))
