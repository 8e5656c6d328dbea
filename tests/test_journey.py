"""The whole way on two tiny models with tokenizers of their own, by the commands and Python verbs that users type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from train import Dictionary, Store, fit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a config that pairs them."""
    folder = tmp_path_factory.mktemp("journey")
    tiny.save_model(folder / "llama", "llama", tiny.byte_level(), width=32)
    tiny.save_model(folder / "gemma", "gemma3", tiny.sentencepiece(), width=48)
    tiny.save_model(folder / "bert", "bert", tiny.wordpiece(), width=40)
    (folder / "pair.toml").write_text(
        """
        models.a = {path = "llama", sites = ["resid.1"]}
        models.b = {path = "gemma", sites = ["resid.1"]}
        rows = {count = 6000, context = 64, held_out = 0.3}
        store = {path = "pair.zarr", shard_bytes = 150_000, chunk_bytes = 32_768}
        """
    )
    (folder / "three.toml").write_text(
        """
        models.a = {path = "llama", sites = ["resid.1"]}
        models.b = {path = "gemma", sites = ["heads.1"]}
        models.c = {path = "bert", sites = ["resid.1"]}
        rows = {count = 4000, context = 64, held_out = 0.3}
        store = {path = "three.zarr", shard_bytes = 100_000, chunk_bytes = 32_768}
        """
    )
    return folder


def command(place: Path, *words: str) -> str:
    """Run one of the two commands as a shell would. Returns stdout."""
    stage, *rest = words
    program = f"import sys; from {stage}.cli import main; sys.argv[0] = '{stage}'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *rest], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_models_become_one_store_one_dictionary_and_one_report(place: Path) -> None:
    planned = json.loads(command(place, "harvest", "plan", "pair.toml", "--json"))
    made = json.loads(command(place, "harvest", "run", "pair.toml", "--json"))
    assert made["rows"] == planned["rows"] == 6000 and made["id"] == planned["id"] and made["shards"] > 1

    shown = command(place, "harvest", "inspect", "pair.zarr", "--rows", "10:13").splitlines()
    assert len(shown) == 4 and all(name in shown[0] for name in ("document", "a", "b", "|a|", "|b|"))

    trained = json.loads(
        command(
            place, "train", "run", "pair.zarr", "--wiring", "dedicated", "--latents", "256", "--steps", "150",
            "--batch", "256", "--set", "method.k=8", "--set", "optimiser.lr=0.003", "--method", "batch_topk",
            "--set", "log.every=10", "--out", "run", "--json",
        )
    )  # fmt: skip
    assert all(one["fve"] > 0.3 for one in trained["sources"].values())
    assert set(trained["spans"]) == {"only_a", "shared", "only_b"}

    measured = json.loads(command(place, "train", "measure", "run", "--json"))
    assert measured == {key: value for key, value in trained.items() if key != "folder"}
    page = (place / "run" / "report.html").read_text()
    assert f"{measured['sources']['a']['fve']:.4f}" in page and "Relative decoder norm" in page

    store = Store.open(place / "pair.zarr")
    dictionary = Dictionary.load(place / "run")
    x = store.read(100, 110)
    f_BL = dictionary.encode(x)
    assert f_BL.shape == (10, 256) and dictionary.decode(f_BL)["b"].shape == (10, 48)


@pytest.mark.slow
def test_three_models_of_three_tokenizers_become_a_dictionary_with_a_span_for_each(place: Path) -> None:
    made = json.loads(command(place, "harvest", "run", "three.toml", "--json"))
    assert made["alignment"] == "offsets" and made["rows"] == 4000
    tokenizers = {model.tokenizer for model in Store.open(place / "three.zarr").header.models.values()}
    assert len(tokenizers) == 3
    assert "sound" in command(place, "harvest", "verify", "three.zarr", "--full", "--deep", "200")

    trained = json.loads(
        command(
            place, "train", "run", "three.zarr", "--wiring", "dedicated", "--latents", "240", "--steps", "150",
            "--batch", "256", "--set", "method.k=8", "--set", "optimiser.lr=0.003", "--method", "batch_topk",
            "--set", "wiring.exclusive={a=16,b=24,c=32}", "--set", "wiring.norm=joint", "--out", "run3", "--json",
        )
    )  # fmt: skip
    assert all(one["fve"] > 0.2 for one in trained["sources"].values())

    dictionary, store = Dictionary.load(place / "run3"), Store.open(place / "three.zarr")
    spans = {span.name: (span.size, span.readers, span.writers) for span in dictionary.wiring.spans}
    everyone = ("a", "b", "c")
    assert spans == {
        "only_a": (16, ("a",), ("a",)), "shared": (168, everyone, everyone), "only_b": (24, ("b",), ("b",)),
        "only_c": (32, ("c",), ("c",)),
    }  # fmt: skip
    x = store.read(0, store.rows)
    f_BL = dictionary.encode(x)
    for source in everyone:
        own = dictionary.wiring.slices[f"only_{source}"]
        others = {name: x[name] if name == source else -3 * x[name].flip(0) for name in everyone}
        assert f_BL[:, own].count_nonzero() > 0
        assert dictionary.encode(others)[:, own].equal(f_BL[:, own])  # it reads its own source alone
        without = f_BL.clone()
        without[:, own] = 0
        whole, rest = dictionary.decode(f_BL), dictionary.decode(without)
        assert {name for name in everyone if not whole[name].equal(rest[name])} == {source}  # and writes to it alone


def test_the_four_verbs_train_a_transcoder_on_the_same_store(place: Path, tmp_path: Path) -> None:
    store = Store.open(place / "pair.zarr")
    config = {
        "wiring": {"kind": "transcoder", "latents": 64, "sources": ["a", "b"]}, "method": {"name": "topk", "k": 4},
        "steps": 30, "batch": 128,
    }  # fmt: skip
    run = fit(store, config, tmp_path / "transcoder", quiet=True)
    again = Dictionary.load(run.folder)
    x = store.read(0, 5)
    assert again.encode({"a": x["a"]}).equal(run.dictionary.encode(x))
    assert set(again.decode(again.encode(x))) == {"b"}
