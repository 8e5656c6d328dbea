"""Other libraries, in environments of their own, read what we write and write what we read: codes and rows are alike.

GRANARY_PEERS names a folder with an environment for each, as tests/peers.sh makes them; without it these tests are
skipped. Letters: B rows, D width, L latents.
"""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harvest import adopt
from harvest.config import RowsConfig, StoreConfig
from shared.log import Log
from tests import cases
from tests.hub import served
from tests.peers import python_of
from tests.tiny import byte_level
from tests.train.interop.test_saes import random_dictionary
from train.dictionary import Dictionary
from train.interop import formats

pytestmark = pytest.mark.peers
SCRIPT = Path(__file__).with_name("peers.py")
LIBRARIES = ("dictionary-learning", "sae-lens", "eai-sparsify")
TARGETS = {"dictionary-learning": "dictionary_learning", "sae-lens": "sae_lens", "eai-sparsify": "sparsify"}
TRANSCODERS = {"transcoder": False, "skip_transcoder": True}
WRITTEN = {  # what each of them wrote, and which kind we find it to be
    "dictionary-learning": {
        "AutoEncoder": "AutoEncoder", "AutoEncoderNew": "AutoEncoderNew", "GatedAutoEncoder": "GatedAutoEncoder",
        "JumpReluAutoEncoder": "JumpReluAutoEncoder", "AutoEncoderTopK": "AutoEncoderTopK",
        "BatchTopKSAE": "BatchTopKSAE", "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE",
    },
    "sae-lens": {
        "standard": "SAELens, standard", "gated": "SAELens, gated", "jumprelu": "SAELens, jumprelu",
        "topk": "SAELens, topk", "transcoder": "SAELens, transcoder", "skip_transcoder": "SAELens, skip_transcoder",
        "jumprelu_transcoder": "SAELens, jumprelu_transcoder", "batchtopk": "SAELens, batchtopk",
        "batchtopk_inference": "SAELens, jumprelu",
    },
    "eai-sparsify": {"sae": "sparsify, autoencoder", "transcoder": "sparsify, transcoder"},
}  # fmt: skip


def run(library: str, way: str, folder: Path) -> None:
    started(library, folder, SCRIPT, library, way, folder)


def started(library: str, folder: Path, *words: object, **more: str) -> None:
    """The Python of a library, with these arguments; `more`: of its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    called = [str(python_of(library)), *map(str, words)]
    done = subprocess.run(called, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@dataclass(frozen=True)
class Answer:
    """A dictionary of ours with rows of its sources, and what a library made of the files that we wrote for it."""

    dictionary: Dictionary
    x: dict[str, Tensor]
    f_BL: Tensor
    y_BD: Tensor
    notes: tuple[str, ...]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Answer]]:
    """{case: answer} of a library, which reads all of them in one process."""

    @cache
    def asked(library: str) -> dict[str, Answer]:
        python_of(library)
        folder = tmp_path_factory.mktemp(library)
        given, notes = dictionaries(library), {}
        for name, (made, x) in given.items():
            written = formats.export(made, TARGETS[library], {"a": formats.Origin("org/model", "resid.3")})
            notes[name] = written.notes
            (folder / name).mkdir()
            formats.write(written, folder / name / "exported")
            torch.save(x["a"], folder / name / "x.pt")
        run(library, "read", folder)
        return {
            name: Answer(made, x, torch.load(folder / name / "f.pt"), torch.load(folder / name / "y.pt"), notes[name])
            for name, (made, x) in given.items()
        }

    return asked


def dictionaries(library: str) -> dict[str, tuple[Dictionary, dict[str, Tensor]]]:
    """One of every method that a library has, and of SAELens transcoders, too."""
    if library == "eai-sparsify":
        return {"topk": random_dictionary("topk")}
    found = {name: random_dictionary(name) for name in cases.names()}
    if library == "sae-lens":
        found |= {name: random_dictionary("batch_topk", "transcoder", skip=skip) for name, skip in TRANSCODERS.items()}
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_gets_the_same_codes_and_rows_of_our_files(
    library: str, answers: Callable[[str], dict[str, Answer]]
) -> None:
    for name, one in answers(library).items():
        expected_BL = one.dictionary.encode(one.x)
        assert torch.equal(one.f_BL > 0, expected_BL > 0), name
        assert (expected_BL > 0).any(), name
        if any("times the length" in note for note in one.notes):
            ratio_BL = torch.where(expected_BL > 0, one.f_BL / expected_BL, torch.nan)
            length_L = ratio_BL.nanmean(0)  # of each latent's decoder vector: the same on every row
            near(torch.where(expected_BL > 0, length_L * expected_BL, 0), one.f_BL)
        else:
            near(one.f_BL, expected_BL)
        [writer] = one.dictionary.wiring.writers
        near(one.y_BD, one.dictionary.decode(expected_BL, one.x)[writer])


def test_the_codes_of_every_method_but_topk_are_those_of_ours_in_sae_lens(
    answers: Callable[[str], dict[str, Answer]],
) -> None:
    longer = {n for n, one in answers("sae-lens").items() if any("times the length" in note for note in one.notes)}
    assert longer == {"topk"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_we_get_the_same_codes_and_rows_of_its_files(library: str, tmp_path: Path) -> None:
    run(library, "write", tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(WRITTEN[library])
    for name, kind in WRITTEN[library].items():
        found = formats.load(tmp_path / name)
        assert found.kind == kind
        x, f, y = (torch.load(tmp_path / name / file) for file in ("x.pt", "f.pt", "y.pt"))
        f_BL = found.dictionary.encode({"x": x})
        assert (f > 0).any(), name
        near(f_BL, f)
        [writer] = found.dictionary.wiring.writers
        near(found.dictionary.decode(f_BL, {"x": x})[writer], y)


def test_an_sae_of_the_registry_of_sae_lens_is_read_by_its_names(tmp_path: Path) -> None:
    """The registry is that of SAELens; the repository that it names lies on a hub of ours."""
    release, sae_id = "gpt2-small-res-jb", "blocks.0.hook_resid_pre"
    made, x = random_dictionary("standard")
    formats.put(formats.export(made, "sae_lens"), tmp_path / "sae")
    [x_BD] = x.values()
    torch.save(x_BD, tmp_path / "x.pt")
    with served() as hub:
        files = {f"{sae_id}/{path.name}": path.read_bytes() for path in (tmp_path / "sae").iterdir()}
        hub.repositories["jbloom/GPT2-Small-SAEs-Reformatted"] = files
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        script = SCRIPT.with_name("registry.py")
        started("sae-lens", tmp_path, script, release, sae_id, tmp_path, **settings, PYTHONPATH=str(SCRIPT.parents[3]))
    near(torch.load(tmp_path / "f.pt"), made.encode(x).detach())


def test_a_cache_of_sae_lens_becomes_a_store(tmp_path: Path) -> None:
    tokenizer = byte_level().save(tmp_path / "tokenizer")
    started("sae-lens", tmp_path, SCRIPT.with_name("sae_lens_cache.py"), tokenizer, tmp_path)
    found = adopt.find(tmp_path / "cache")
    assert found.site == "resid.1"
    asked = StoreConfig(path=str(tmp_path / "a.zarr"))
    store = adopt.adopt(adopt.gathered({"a": found}), asked, RowsConfig(), Log(quiet=True))
    x_ND = torch.load(tmp_path / "rows.pt")
    assert store.rows == len(x_ND) == 256
    torch.testing.assert_close(store.read(0, 256)["a"], x_ND, rtol=1e-3, atol=1e-4)
    assert store.column("tokens/a/id").tolist() == torch.load(tmp_path / "tokens.pt").tolist()
