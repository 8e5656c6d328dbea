"""train import and train export, as a user calls them.

Letters: B rows, D width, L latents.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cases
from tests.train.interop import files
from tests.train.interop.test_saes import random_dictionary
from train.dictionary import Dictionary
from train.fit import fit
from train.interop import check


def train(*arguments: str | Path) -> Any:
    from typer.testing import CliRunner

    from train.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_a_crosscoder_of_another_library_becomes_one_to_show_and_measure(tmp_path: Path) -> None:
    path = files.crosscoder("E6", batch_topk=True, norm="SAE").write(tmp_path / "theirs", "model_final.pt")
    done = train("import", path.parent, "--out", tmp_path / "ours", "--sources", "base, chat")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"folder    {tmp_path / 'ours'}",
        "kind      BatchTopKCrossCoder, E6, SAE",
        f"latents   {files.L}",
        f"sources   base (width {files.D}), chat (width {files.D})",
        "note      rows are scaled as E6 does",
    ]
    shown = train("show", tmp_path / "ours")
    assert shown.exit_code == 0
    assert "k 5" in shown.stdout


def test_json_has_the_same(tmp_path: Path) -> None:
    path = files.autoencoder("BatchTopKSAE").write(tmp_path / "theirs", "ae.pt")
    done = train("import", path, "--out", tmp_path / "ours", "--json")
    told = json.loads(done.stdout)
    assert told == {
        "folder": str(tmp_path / "ours"), "kind": "BatchTopKSAE", "latents": files.L, "sources": {"x": files.D},
        "notes": [],
    }  # fmt: skip


def test_a_run_is_exported_with_its_model_and_site(tmp_path: Path) -> None:
    store = cases.small_store(tmp_path)
    config = {**cases.MOMENT, "wiring": {"kind": "autoencoder", "latents": 8, "sources": ["a"]}}
    run = fit(store, config, tmp_path / "run", quiet=True)
    done = train("export", run.folder, "--to", "sae_lens", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    source = store.source("a")
    assert metadata["model_name"] == store.header.models[source.model].path
    assert metadata["granary"]["sources"]["a"]["site"] == source.site
    again = train("import", tmp_path / "out", "--out", tmp_path / "again", "--sources", "a")
    assert again.exit_code == 0, again.output
    x = {"a": store.read(0, 20)["a"]}
    first, second = run.dictionary, Dictionary.load(tmp_path / "again")
    torch.testing.assert_close(
        second.decode(second.encode(x))["a"], first.decode(first.encode(x))["a"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "nowhere", "--out", "out"), "no such file or folder: nowhere"),
        (("import", "ours", "--out", "out"), "this is a dictionary of Granary: ours. Use Dictionary.load"),
        (("import", "theirs", "--out", "ours"), "this folder is there already: ours"),
        (("import", "theirs", "--out", "out", "--sources", "a,b"), "names of sources do not fit: a, b. It has 1"),
        (("export", "theirs", "--to", "hub", "--out", "out"), "no dictionary here: theirs"),
        (("export", "ours", "--to", "lens", "--out", "out"), "no library of this name: lens. Choose one of"),
        (("export", "ours", "--to", "sparsify", "--out", "out"), "sparsify has TopK alone"),
    ],
)
def test_a_mistake_is_told(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.autoencoder("AutoEncoder").write(tmp_path / "theirs", "ae.pt")
    random_dictionary("standard")[0].save(tmp_path / "ours")
    done = train(*arguments)
    assert str(done.exception).startswith(message), done.exception
    assert not (tmp_path / "out").exists()


def test_checks_are_told_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    done = train("check")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(line.startswith("ok      ") for line in lines)
    monkeypatch.setitem(check.CHECKS, "it has the tensors of the reference", lambda: False)
    done = train("check")
    assert done.stdout.splitlines()[0] == "failed  it has the tensors of the reference: it does not hold"
    assert str(done.exception).startswith("checks failed: 1 of 8.")
    assert json.loads(train("check", "--json").stdout)["a step of Adam leaves it so"] == ""
