"""train crosscoder, as a user of crosscoder_learning's script calls it.

Letters: B rows, S sources, D width.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ConfigError, StoreError
from tests.build import make_store
from tests.train.interop.reference_cache import write_cache
from train.interop.dictionary_learning import (
    BatchTopKCrossCoder,
    CrossCoder,
    PairedActivationCache,
    evaluate,
    load_dictionary,
)
from train.interop.dictionary_learning.pairs import found

D, ROWS = 8, 1200
FLAGS = ("--expansion-factor", 4, "--batch-size", 64, "--lr", "3e-3", "--device", "cpu")


def train(*arguments: Any) -> Any:
    from typer.testing import CliRunner

    from train.cli import app

    return CliRunner().invoke(app, ["crosscoder", *map(str, arguments)])


def rows(seed: int) -> torch.Tensor:
    """Of two models that share their features, [N, 2, D]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, 2, D, generator=torch.Generator().manual_seed(0))
    codes = (torch.rand(ROWS, 12, generator=generator) < 0.15) * torch.rand(ROWS, 12, generator=generator)
    return torch.einsum("bg,gsd->bsd", codes, directions)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """activations/<model>/<dataset>/layer_13_out of two models and two datasets, one of them below a split."""
    place = tmp_path_factory.mktemp("cache") / "activations"
    for dataset, below, seed in [("fineweb", "fineweb", 1), ("lmsys_chat", "lmsys_chat/train", 2)]:
        x_B2D, tokens = rows(seed), torch.arange(ROWS)
        for number, model in enumerate(["gemma", "gemma-it"]):
            folder = place / model / below / "layer_13_out"
            folder.parent.mkdir(parents=True)
            write_cache(folder, x_B2D[:, number].half(), [500, 700], tokens, list(range(0, ROWS + 1, 40)))
        assert (place / "gemma" / dataset).is_dir()
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x_B2D = rows(1)
    values = {"base": x_B2D[:, 0].numpy(), "chat": x_B2D[:, 1].numpy()}
    place = tmp_path_factory.mktemp("store") / "pair.zarr"
    return make_store(place, rows=ROWS, chunk_rows=16, sources={"base": D, "chat": D}, documents=40, values=values).path


def test_a_crosscoder_is_trained_on_folders_of_the_reference(folders: Path, tmp_path: Path) -> None:
    done = train(
        "--activation-store-dir", folders, "--base-model", "org/gemma", "--instruct-model", "org/gemma-it", "--layer",
        13, "--mu", "1e-2", *FLAGS, "--max-steps", 150, "--validate-every-n-steps", 100, "--save-dir", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    folder = tmp_path / "gemma-L13-mu1.0e-02-lr3e-03"
    assert (told["folder"], told["dict_class"], told["dict_size"]) == (str(folder), "CrossCoder", 4 * D)
    assert {"num_tokens", "val/l0", "val/num_specific_latents_l0"} - {"num_tokens"} <= set(told)
    made, table = load_dictionary(folder)
    assert isinstance(made, CrossCoder) and table["trainer"]["l1_penalty"] == 0.01
    assert evaluate(made, [rows(9)])["frac_variance_explained"] > 0.5


def test_a_crosscoder_is_trained_on_a_store(store: Path, tmp_path: Path) -> None:
    done = train(
        "--activation-store-dir", store, "--base-model", "base", "--instruct-model", "chat", *FLAGS, "--type",
        "batch-top-k", "--k", 4, "--k-max", 8, "--k-annealing-steps", 20, "--code-normalization", "decoupled",
        "--normalize", "--max-steps", 200, "--run-name", "mine", "--save-dir", tmp_path,
        "--validate-every-n-steps", 150,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    made, table = load_dictionary(tmp_path / "mine")
    assert isinstance(made, BatchTopKCrossCoder) and made.has_activation_normalizer
    assert (int(made.k), made.code_normalization.name) == (4, "DECOUPLED")
    assert table["trainer"]["steps"] == 200 and (tmp_path / "mine" / "eval_logs_150.pt").exists()
    assert evaluate(made, [rows(9)])["frac_variance_explained"] > 0.5


def test_a_crosscoder_goes_on_where_another_one_was(store: Path, tmp_path: Path) -> None:
    common = ("--activation-store-dir", store, "--base-model", "base", "--instruct-model", "chat", *FLAGS, "--save-dir")
    assert train(*common, tmp_path, "--max-steps", 5, "--run-name", "a").exit_code == 0
    done = train(
        *common, tmp_path, "--max-steps", 1, "--run-name", "b", "--pretrained", tmp_path / "a", "--lr", "1e-12"
    )
    assert done.exit_code == 0, done.output
    x = rows(3)
    first, second = (CrossCoder.from_pretrained(tmp_path / name) for name in "ab")
    torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-4)
    for option, message in {
        ("--code-normalization", "none"): "these weights have another code normalisation: CROSSCODER, not NONE",
        ("--encoder-layers", 0): "an option of fresh weights beside --pretrained: --encoder-layers",
        ("--no-init-with-transpose",): "an option of fresh weights beside --pretrained: --no-init-with-transpose",
        ("--expansion-factor", 31): "--pretrained has another size: ",
    }.items():
        done = train(*common, tmp_path, "--run-name", "c", "--pretrained", tmp_path / "a", *option)
        assert str(done.exception).startswith(message), (done.exception, done.output)


def test_a_crosscoder_that_has_died_is_told(store: Path, tmp_path: Path) -> None:
    common = ("--activation-store-dir", store, "--base-model", "base", "--instruct-model", "chat", *FLAGS)
    done = train(*common, "--mu", 1e4, "--max-steps", 60, "--save-dir", tmp_path)
    assert done.exit_code == 0 and "no latent fires any more" in done.stderr


def test_every_row_is_learnt_from_once_an_epoch_and_the_last_sequences_are_held_out(folders: Path) -> None:
    pairs = found(folders, "gemma", "gemma-it", 13, None)
    held = int(pairs.held_N.sum())
    assert len(pairs.train_N) == 2 * ROWS and held == 2 * 40  # 5 % are 60 rows: one whole sequence of 40
    assert not (pairs.train_N & pairs.held_N).any()
    kept = int(pairs.train_N.sum())
    served = torch.cat(list(pairs.shuffled(40, seed=1, steps=kept // 40)))
    expected = torch.cat([rows(1)[: ROWS - 40], rows(2)[: ROWS - 40]]).half().float()
    assert torch.equal(served.flatten(1).sort(0).values, expected.flatten(1).sort(0).values)
    assert torch.equal(torch.cat(list(pairs.held_out(30))), torch.cat([rows(1)[-40:], rows(2)[-40:]]).half().float())
    mean, std = pairs.spread()
    torch.testing.assert_close(mean.float(), expected.double().mean(0).float())
    torch.testing.assert_close(std.float(), expected.double().std(0).float())


def test_a_store_holds_out_its_documents_and_leaves_special_tokens_out(store: Path) -> None:
    pairs = found(store, "base", "chat", None, None)
    pair = PairedActivationCache(store / "base", store / "chat")
    assert len(pair) == ROWS and 0 < pairs.held_N.sum() < pairs.train_N.sum() < ROWS
    assert torch.equal(next(iter(pairs.held_out(10_000))), pair[pairs.held_N])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--type", "jumprelu"), "wrong value for --type: jumprelu"),
        (("--base-model", "other"), "no store, and no caches of this model"),
        (("--layer", 14), "no single cache of this model and dataset"),
        (("--dataset", "pile"), "no single cache of this model and dataset"),
        (("--code-normalization", "joint"), "an unknown code normalisation: joint"),
        (("--batch-size", 10**6), "the batch is larger than the rows there are"),
    ],
)
def test_a_mistake_is_told(arguments: tuple[Any, ...], message: str, folders: Path, tmp_path: Path) -> None:
    common = ("--activation-store-dir", folders, "--base-model", "gemma", "--instruct-model", "gemma-it", "--layer", 13)
    done = train(*common, *FLAGS, "--max-steps", 2, "--save-dir", tmp_path, *arguments)
    assert str(done.exception).startswith(message), (done.exception, done.output)


def test_a_run_is_not_written_over_another(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    common = ("--activation-store-dir", folders, "--base-model", "gemma", "--instruct-model", "gemma-it", "--layer", 13)
    done = train(*common, "--run-name", "mine", "--save-dir", tmp_path)
    assert isinstance(done.exception, ConfigError) and "there already" in str(done.exception)


def test_a_model_is_named_by_its_source_or_by_its_own_name(store: Path) -> None:
    with pytest.raises(StoreError, match=r"no single source of this store is this model's: llama at resid.3"):
        found(store, "llama", "chat", 3, None)
    assert len(found(store, "model_base", "model_chat", None, None).train_N) == ROWS
