"""Autoencoders of dictionary_learning give what their formulas give, and are written as they can be read there.

Letters: B rows, D width, L latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import CheckpointError, ConfigError, WiringError
from tests import cases
from tests.train.interop import files
from tests.train.interop.files import D, File, K, L, number
from tests.train.interop.test_crosscoders import near
from train.dictionary import Dictionary
from train.interop import formats
from train.interop.saes import READERS

KINDS = list(READERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(made: File, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.from_numpy(made.rows.astype(np.float32))}


def assert_gives(dictionary: Dictionary, made: File) -> None:
    assert (made.codes > 0).any(), "a test of nothing"
    f_BL = dictionary.encode(rows(made))
    assert near(f_BL, made.codes)
    assert near(dictionary.decode(f_BL)["x"], made.y)


def random_dictionary(name: str, case: str = "autoencoder", **wiring: Any) -> tuple[Dictionary, dict[str, Tensor]]:
    """Of random weights, scale and thresholds; with rows of its sources."""
    table = {"kind": cases.CASES[case][0], "latents": cases.LATENTS, **wiring}
    made = cases.trainer(case, name, wiring=table).dictionary.eval()
    cases.randomise(made, seed=1)
    if made.activation.form().kind == "batch_topk":
        made.activation.set_threshold(torch.tensor([0.7]))  # type: ignore[operator]
    made.requires_grad_(False)
    return made, cases.random_rows(case, 50, 2)


@every_kind
def test_a_file_gives_what_its_formula_gives(kind: str, tmp_path: Path) -> None:
    made = files.autoencoder(kind)
    found = formats.load(made.write(tmp_path, "ae.pt"))
    assert found.kind == kind
    assert_gives(found.dictionary, made)


@every_kind
def test_what_is_written_is_read_again_as_it_was(kind: str, tmp_path: Path) -> None:
    made = files.autoencoder(kind)
    first = formats.load(made.write(tmp_path / "theirs", "ae.pt")).dictionary
    for to, name in [("dictionary_learning", "ae.pt"), ("hub", "model.safetensors")]:
        formats.write(formats.export(first, to), tmp_path / to)
        again = formats.load(tmp_path / to / name)
        # load_dictionary divides the decoder of an AutoEncoder by its norms: it is written as the class that it leaves.
        assert again.kind == ("AutoEncoderNew" if kind == "AutoEncoder" else kind)
        assert_gives(again.dictionary, made)


def test_files_of_two_classes_with_the_same_names_are_refused_without_a_table(tmp_path: Path) -> None:
    made = files.autoencoder("BatchTopKSAE")
    made.tables = {}
    path = made.write(tmp_path, "ae.pt")
    with pytest.raises(CheckpointError, match="AutoEncoderTopK or BatchTopKSAE"):
        formats.load(path)
    assert_gives(formats.load(path, kind="BatchTopKSAE").dictionary, made)


def test_a_class_is_told_by_a_table_as_its_name_or_as_python_prints_it(tmp_path: Path) -> None:
    made = files.autoencoder("BatchTopKSAE")
    made.tables["config.json"]["trainer"]["dict_class"] = "<class 'dictionary_learning.trainers.BatchTopKSAE'>"
    assert formats.load(made.write(tmp_path, "ae.pt")).kind == "BatchTopKSAE"


def test_topk_of_crosscoder_learning_has_its_k_in_the_table_alone(tmp_path: Path) -> None:
    made = files.autoencoder("AutoEncoderTopK")
    del made.state["k"], made.state["threshold"]
    assert_gives(formats.load(made.write(tmp_path / "a", "ae.pt")).dictionary, made)
    made.tables = {}
    with pytest.raises(CheckpointError, match="k is in neither"):
        formats.load(made.write(tmp_path / "b", "ae.pt"))


def test_the_weights_own_k_counts(tmp_path: Path) -> None:
    made = files.autoencoder("AutoEncoderTopK")
    made.tables["config.json"]["trainer"]["k"] = 100
    assert_gives(formats.load(made.write(tmp_path, "ae.pt")).dictionary, made)


def test_a_backup_of_a_run_is_read_with_the_factor_of_its_rows(tmp_path: Path) -> None:
    made = files.autoencoder("AutoEncoder")
    made.state = {"step": 3, "ae": made.state, "optimizer": {}, "config": {}, "norm_factor": 4.0}
    found = formats.load(made.write(tmp_path, "ae.pt"))
    made.rows, made.y = 4 * made.rows, 4 * made.y
    assert_gives(found.dictionary, made)
    assert "divided by 4" in found.notes[-1]


def test_a_checkpoint_finds_its_table_above(tmp_path: Path) -> None:
    made = files.autoencoder("BatchTopKSAE")
    tables, made.tables = made.tables, {}
    path = made.write(tmp_path / "checkpoints", "ae_100.pt")
    File({}, tables).write(tmp_path, "unused.pt")
    assert formats.load(path).kind == "BatchTopKSAE"


@pytest.mark.parametrize("era", ["E5", "E6"])
def test_rows_are_scaled_as_the_file_says(tmp_path: Path, era: str) -> None:
    made = files.autoencoder("BatchTopKSAE")
    mean, scale = np.full(D, 0.5), 0.25
    std = torch.full((D,), 4.0)
    later = {"target_rms": number(1.0), "activation_global_scale": number(scale)}
    made.state |= {"activation_mean": torch.from_numpy(mean).float(), "activation_std": std}
    made.state |= later if era == "E6" else {}
    made.rows, made.y = made.rows / scale + mean, made.y / scale + mean
    found = formats.load(made.write(tmp_path, "ae.pt"))
    assert_gives(found.dictionary, made)
    assert ("folded" in found.notes[0]) == (era == "E5")
    assert float(found.dictionary.scale.factor("x")) == (1.0 if era == "E5" else scale)
    exported = formats.export(found.dictionary, "dictionary_learning").states["ae.pt"]
    assert "activation_mean" not in exported  # folded, as saprmarks' class has it


def test_a_threshold_that_was_never_set_lets_every_positive_one_pass(tmp_path: Path) -> None:
    made = files.autoencoder("BatchTopKSAE")
    made.state["threshold"] = torch.tensor(-1.0)
    found = formats.load(made.write(tmp_path, "ae.pt"))
    assert "never set" in found.notes[0]
    f_BL = found.dictionary.encode(rows(made))
    assert (f_BL > 0).sum() > (torch.from_numpy(made.codes) > 0).sum()
    assert formats.export(found.dictionary, "dictionary_learning").states["ae.pt"]["k"] == K


def test_a_file_that_runs_code_when_it_is_read_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "trapped",)

    torch.save({"encoder.weight": Trap()}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        formats.load(tmp_path / "ae.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"PK\x03\x04 and no zip"])
def test_a_broken_file_is_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    for name in ("ae.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            formats.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_tensor_of_another_shape_is_told(tmp_path: Path) -> None:
    made = files.autoencoder("AutoEncoder")
    made.state["encoder.bias"] = torch.zeros(L + 1)
    with pytest.raises(CheckpointError, match=rf"encoder.bias: \({L + 1},\). Not \({L}\)"):
        formats.load(made.write(tmp_path, "ae.pt"))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        formats.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no dictionary of another library here"):
        formats.load(tmp_path)
    random_dictionary("topk")[0].save(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="dictionary of Granary"):
        formats.load(tmp_path / "ours")


@pytest.mark.parametrize("norm", ["sum", "none", "mixed"])
@pytest.mark.parametrize("name", cases.names())
def test_every_method_keeps_its_reconstructions(name: str, norm: str, tmp_path: Path) -> None:
    made, x = random_dictionary(name, norm=norm)
    formats.write(formats.export(made, "dictionary_learning"), tmp_path / "out")
    again = formats.load(tmp_path / "out", ["a"]).dictionary
    f_BL, again_BL = made.encode(x), again.encode(x)
    assert torch.equal(f_BL > 0, again_BL > 0)
    torch.testing.assert_close(again.decode(again_BL)["a"], made.decode(f_BL)["a"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_codes_are_told_to_be_longer_where_norms_go_into_them(name: str) -> None:
    made, _ = random_dictionary(name)
    found = formats.export(made, "dictionary_learning")
    assert found.notes == ("codes are those of the dictionary times the length of its decoder vectors",)
    made.normalise_decoders()
    assert formats.export(made, "dictionary_learning").notes == ()


def test_what_has_no_class_there_is_refused() -> None:
    made, _ = random_dictionary("topk", "transcoder")
    with pytest.raises(CheckpointError, match="dictionary_learning has no transcoders"):
        formats.export(made, "dictionary_learning")
    made, _ = random_dictionary("topk", "crosscoder")
    with pytest.raises(CheckpointError, match="ReLU and BatchTopK"):
        formats.export(made, "dictionary_learning")
    with pytest.raises(WiringError, match="SAELens holds dictionaries of one source"):
        formats.export(made, "sae_lens")
    made, _ = random_dictionary("batch_topk", "crosscoder")
    with pytest.raises(CheckpointError, match="one width"):
        formats.export(made, "hub")
    with pytest.raises(ConfigError, match="no library of this name"):
        formats.export(made, "lens")


def test_a_model_card_says_what_rows_are_of_and_how_they_are_scaled() -> None:
    made, _ = random_dictionary("standard")
    card = formats.export(made, "hub", {"a": formats.Origin("org/model", "resid.13")}).texts["README.md"]
    assert "| a | org/model | resid.13 | 20 | 0.5 |" in card
    assert card.startswith("---\nlibrary_name: dictionary_learning\n")
