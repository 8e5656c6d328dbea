"""Crosscoders of every era give what their formula gives, in fp64 and numpy; what a file lacks is refused.

Letters: B rows, S sources, D width, L latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import CheckpointError
from tests.train.interop import files
from tests.train.interop.files import ALPHAS, ERAS, NORM_IDS, D, File, L, S
from train.dictionary import Dictionary
from train.interop import crosscoders_written, formats

BATCH_TOPK = (False, True)


def x_of(made: File, names: str = "ab") -> dict[str, Tensor]:
    return {name: torch.from_numpy(made.rows[:, s].astype(np.float32)) for s, name in enumerate(names)}


def near(found: Any, expected: np.ndarray) -> bool:
    """To 1e-6 of the largest value."""
    difference = np.abs(np.asarray(found, dtype=np.float64) - expected)
    return bool(difference.max() <= 1e-6 * max(1.0, np.abs(expected).max()))


def y_of(dictionary: Dictionary, made: File) -> np.ndarray:
    out = dictionary(x_of(made))
    return np.stack([dictionary.scale.raw(name, out.y[name]).numpy() for name in "ab"], 1)


def codes_of(dictionary: Dictionary, made: File) -> np.ndarray:
    """[B, L], or of every source where they select for themselves: [B, S, L]."""
    code = dictionary.code(x_of(made))
    if made.codes.ndim == 2:
        return code.dense().numpy()
    return np.stack([code.of[name].dense().numpy() for name in "ab"], 1)  # type: ignore[attr-defined]


def assert_gives(dictionary: Dictionary, made: File) -> None:
    assert (made.codes > 0).any(), "a test of nothing"
    assert near(codes_of(dictionary, made), made.codes)
    assert near(y_of(dictionary, made), made.y)


@pytest.mark.parametrize("batch_topk", BATCH_TOPK)
@pytest.mark.parametrize("norm", NORM_IDS)
@pytest.mark.parametrize("era", ERAS)
def test_every_era_gives_what_its_formula_gives(era: str, norm: str, batch_topk: bool, tmp_path: Path) -> None:
    if (era == "E1" and norm != "CROSSCODER") or (era == "E4" and not batch_topk):
        pytest.skip("that era has no such files")
    made = files.crosscoder(era, batch_topk, norm)
    if era == "E1":
        made.tables["config.json"] = {"activation_dim": D, "dict_class": "CrossCoder"}  # as the hub has it
    found = formats.load(made.write(tmp_path, "model_final.pt"))
    assert f"{'BatchTopKCrossCoder' if batch_topk else 'CrossCoder'}, {era}, {norm}" == found.kind
    assert_gives(found.dictionary, made)
    assert not any(parameter.requires_grad for parameter in found.dictionary.parameters())


@pytest.mark.parametrize("era", ["E4", "E5", "E6", "E7"])
def test_a_read_crosscoder_is_saved_and_loaded_as_one_of_ours(era: str, tmp_path: Path) -> None:
    made = files.crosscoder(era, batch_topk=True, norm="MIXED")
    formats.load(made.write(tmp_path, "model_final.pt")).dictionary.save(tmp_path / "ours")
    assert_gives(Dictionary.load(tmp_path / "ours"), made)


def test_a_normaliser_that_is_off_is_told_by_what_is_not_a_number(tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk=True, normalised=False)
    assert_gives(formats.load(made.write(tmp_path, "model_final.pt")).dictionary, made)


def test_names_from_before_torch_compile_are_read(tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk=True)
    made.state = {f"_orig_mod.{name}": value for name, value in made.state.items()}
    assert_gives(formats.load(made.write(tmp_path, "model_final.pt")).dictionary, made)


def test_a_hub_folder_is_read_and_its_weights_k_counts(tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk=True, norm="SAE")
    made.tables = {
        "config.json": {"dict_class": "BatchTopKCrossCoder", "k": 100, "code_normalization": "CROSSCODER"},
        "trainer_config.json": {"trainer": {"dict_class": "BatchTopKCrossCoder", "k": 2048}},
    }
    found = formats.load(made.write(tmp_path, "model.safetensors").parent, ["base", "chat"])
    assert found.kind == "BatchTopKCrossCoder, E7, SAE"
    assert found.dictionary.activation.form().k == (files.K,)
    assert list(found.dictionary.wiring.widths) == ["base", "chat"]


def test_what_a_file_does_not_tell_is_refused(tmp_path: Path) -> None:
    def refused(made: File, match: str, name: str = "model_final.pt") -> None:
        folder = tmp_path / match.replace(" ", "_")
        with pytest.raises(CheckpointError, match=match):
            formats.load(made.write(folder, name))

    mixed = files.crosscoder("E3", batch_topk=True, norm="MIXED")
    mixed.tables = {}
    refused(mixed, "two weights of MIXED")
    bare = files.crosscoder("E2", batch_topk=True)
    bare.tables = {}
    refused(bare, "decoder norm that ranks")
    e0 = files.crosscoder("E1", batch_topk=False)
    e0.state["encoder.bias"] = torch.zeros(S, L)
    refused(e0, "E0")
    some = files.crosscoder("E7", batch_topk=False)
    some.state["encoder.weight"] = some.state["encoder.weight"][:1]
    refused(some, "which ones is not in the weights")
    strange = files.crosscoder("E7", batch_topk=False)
    strange.state["gates"] = torch.zeros(3)
    refused(strange, "values that its kind does not")
    refused(files.crosscoder("E4", batch_topk=False), "scaled as in E4")
    broken = files.crosscoder("E7", batch_topk=False)
    broken.state["decoder.weight"][0, 0, 0] = torch.nan
    refused(broken, "not finite")
    split = files.crosscoder("E7", batch_topk=True, norm="DECOUPLED")
    split.state["code_normalization_id"] = torch.tensor(1)
    refused(split, "a threshold of each source")


def test_encoder_layers_of_a_table_say_which_sources_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    weights, rows = files.Weights.random(rng), files.rounded(files.B, S, D, rng=rng)
    weights.encoder[0] = 0
    made = files.of_weights(weights, rows, "E7", batch_topk=True, norm="NONE", normalised=False)
    made.state["encoder.weight"] = made.state["encoder.weight"][1:]
    made.tables = {"config.json": {"encoder_layers": [1], "dict_class": "BatchTopKCrossCoder"}}
    found = formats.load(made.write(tmp_path, "model.safetensors"))
    assert found.dictionary.wiring.readers == ("b",)
    assert near(found.dictionary.encode({"b": x_of(made)["b"]}), made.codes)


def test_mixed_with_a_weight_of_0_is_the_other_norm(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weights, rows = files.Weights.random(rng), files.rounded(files.B, S, D, rng=rng)
    made = files.of_weights(weights, rows, "E7", batch_topk=True, norm="CROSSCODER", normalised=False)
    made.state["code_normalization_id"] = torch.tensor(3)
    made.state["threshold"] = 0.5 * made.state["threshold"]
    table = {"code_normalization_alpha_sae": 0.0, "code_normalization_alpha_cc": 0.5}
    made.tables = {"config.json": {"trainer": table}}
    found = formats.load(made.write(tmp_path, "model_final.pt"))
    assert found.dictionary.norm == "sum"
    assert_gives(found.dictionary, made)


@pytest.mark.parametrize(("a", "b"), [(4, 4), (7, 3), (0, 5)])
def test_a_dedicated_crosscoder_has_no_storage_for_what_its_partition_forbids(a: int, b: int, tmp_path: Path) -> None:
    made = files.dedicated(a, b)
    found = formats.load(made.write(tmp_path, "model_final.pt"), ["a", "b"])
    sizes = {span.name: span.size for span in found.dictionary.wiring.spans}
    assert sizes == {name: n for name, n in [("only_a", a), ("shared", L - a - b), ("only_b", b)] if n}
    order = [*range(a), *range(a + b, L), *range(a, a + b)]
    made.codes = made.codes[:, order]
    assert_gives(found.dictionary, made)
    assert found.dictionary.encoder["a"].shape == (L - b, D)


def test_shares_of_a_partition_are_cut_off_as_their_writer_does(tmp_path: Path) -> None:
    made = files.dedicated(11, 3, {"model_a_exclusive_pct": 0.29, "model_b_exclusive_pct": 0.099})
    assert int(L * 0.29) == 11
    found = formats.load(made.write(tmp_path, "model_final.pt"))
    assert [span.size for span in found.dictionary.wiring.spans] == [11, L - 14, 3]


def test_a_partition_that_training_has_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"where its partition allows none: up to 0\.25 of"):
        formats.load(files.dedicated(4, 4, broken=0.25).write(tmp_path, "model_final.pt"))


def test_the_class_of_a_table_says_what_a_partition_is(tmp_path: Path) -> None:
    made = files.dedicated(4, 2)
    del made.state["_partition_config"]
    made.tables = {"config.json": {"trainer": {"dict_class": "DedicatedFeatureBatchTopKCrossCoder"}}}
    with pytest.raises(CheckpointError, match="which latents are dedicated"):
        formats.load(made.write(tmp_path, "model_final.pt"))
    made.tables["config.json"]["trainer"]["dict_class_kwargs"] = {
        "model_a_exclusive_pct": "0.1", "model_b_exclusive_pct": "0.05",
    }  # fmt: skip
    found = formats.load(made.write(tmp_path, "model_final.pt"))
    assert [span.size for span in found.dictionary.wiring.spans] == [4, L - 6, 2]


def test_kissanes_crosscoders_are_read(tmp_path: Path) -> None:
    made = files.crosscoder("E1", batch_topk=False)
    state = made.state
    made.state = {
        "W_enc": state["encoder.weight"], "b_enc": state["encoder.bias"], "b_dec": state["decoder.bias"],
        "W_dec": state["decoder.weight"].permute(1, 0, 2),
    }  # fmt: skip
    made.tables = {"cfg.json": {"d_in": D, "dict_size": L}}
    found = formats.load(made.write(tmp_path, "cc_weights.pt").parent)
    assert_gives(found.dictionary, made)
    assert "scaled by a number per model" in found.notes[0]


@pytest.mark.parametrize("batch_topk", BATCH_TOPK)
@pytest.mark.parametrize("norm", NORM_IDS)
@pytest.mark.parametrize("to", ["dictionary_learning", "hub"])
def test_what_is_written_is_read_again_as_it_was(to: str, norm: str, batch_topk: bool, tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk, norm)
    first = formats.load(made.write(tmp_path / "theirs", "model_final.pt")).dictionary
    formats.write(formats.export(first, to), tmp_path / "ours")
    again = formats.load(tmp_path / "ours")
    told = norm if batch_topk or norm != "DECOUPLED" else "CROSSCODER"
    assert again.kind == f"{'BatchTopKCrossCoder' if batch_topk else 'CrossCoder'}, E7, {told}"
    assert_gives(again.dictionary, made)
    assert {name: value.shape for name, value in again.dictionary.state_dict().items()} == {
        name: value.shape for name, value in first.state_dict().items()
    }


def test_the_alphas_of_mixed_are_written_beside_the_weights(tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk=True, norm="MIXED")
    first = formats.load(made.write(tmp_path, "model_final.pt")).dictionary
    assert first.alpha == pytest.approx(ALPHAS[1] / ALPHAS[0])
    table = formats.export(first, "dictionary_learning").tables["config.json"]["trainer"]
    assert (table["code_normalization_alpha_sae"], table["code_normalization_alpha_cc"]) == (1.0, first.alpha)


@pytest.mark.parametrize("to", ["dictionary_learning", "hub"])
@pytest.mark.parametrize(("a", "b"), [(4, 4), (11, 3)])
def test_a_partition_is_written_to_the_latent(to: str, a: int, b: int, tmp_path: Path) -> None:
    made = files.dedicated(a, b)
    first = formats.load(made.write(tmp_path / "theirs", "model_final.pt")).dictionary
    formats.write(formats.export(first, to), tmp_path / "ours")
    again = formats.load(tmp_path / "ours")
    assert again.kind.startswith("DedicatedFeatureBatchTopKCrossCoder")
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.dictionary.state_dict()[name]), name


def test_every_size_of_a_partition_survives_as_a_share() -> None:
    for latents in (7, 100, 1000, 131_072):
        for size in {1, 3, latents // 20, round(0.29 * latents), latents // 2}:
            shares = crosscoders_written._shares(latents, (size, size))
            assert int(latents * shares["model_a_exclusive_pct"]) == size
