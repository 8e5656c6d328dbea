"""The toy model of pipelines/dfc_toy: its world is the paper's, and what is counted as found is found.

Letters: G concepts, L latents, B rows of a batch, D width of a model.
"""

import itertools
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from typer.testing import CliRunner

from pipelines.dfc_toy import toy
from pipelines.dfc_toy.toy import Toy, ToyConfig, Whole
from shared import config as configs
from tests import cases
from train import prepare
from train.config import TrainConfig
from train.dictionary import Dictionary, create
from train.scale import Scale
from train.wiring import build

HOME = Path(toy.__file__).parent
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"concepts": 96, "width": 48, "own": 0.05, "active": 3.0}


def world(seed: int = 0, **keys: Any) -> Toy:
    return Toy(ToyConfig(**{**SMALL, **keys}), seed, CPU)


@pytest.fixture(scope="module")
def full() -> Toy:
    return Toy(ToyConfig(), 0, CPU)


def test_the_papers_world_has_the_papers_numbers(full: Toy) -> None:
    """2,048 concepts, 51 of each model alone; p and lengths as an independent reading of the paper has them."""
    assert [int(full.only[name].sum()) for name in ("a", "b")] == [51, 51]
    assert int(full.shared_G.sum()) == 1946
    assert float(full.p_G.sum()) == pytest.approx(20.48, rel=1e-3)
    assert 1e-4 < float(full.p_G.min()) < 6e-4 and 0.03 < float(full.p_G.max()) < 0.07
    lengths = torch.linalg.vector_norm(full.vectors["b"], dim=1)
    assert float(lengths.median()) == pytest.approx(1, abs=1e-5)
    assert lengths.min() > 0.75 and lengths.max() < 1.3
    torch.testing.assert_close(torch.linalg.vector_norm(full.vectors["a"], dim=1), torch.ones(2048))


@pytest.mark.parametrize(("reading", "mean"), [("variance", 0.04), ("std", 0.14)])
def test_either_reading_of_the_map_between_models(reading: Any, mean: float) -> None:
    """The vector by which concepts move weighs more beside the smaller map."""
    unit_GD = normalize(Toy(ToyConfig(map=reading), 1, CPU).vectors["b"], dim=1)
    cosine = (unit_GD @ unit_GD.T)[~torch.eye(2048, dtype=torch.bool)]
    assert float(cosine.mean()) == pytest.approx(mean, rel=0.3)


def test_five_active_concepts_leave_some_rows_empty_and_either_way_out_fills_them() -> None:
    few = [ToyConfig(active=5, empty=way) for way in ("restart", "top")]  # type: ignore[arg-type]
    restart, top = (Toy(one, 0, CPU) for one in few)
    none = float((1 - restart.p_G.double()).log().sum().exp())
    assert 0.003 < none < 0.012 and float(restart.p_G.min()) == pytest.approx(1e-4)
    for made in (restart, top):
        size_BG = made._sizes(20_000, made.p_G)
        assert (size_BG > 0).any(1).all()
    strongest = top.p_G.topk(5).indices
    only_top = (size_BG > 0).sum(1) == (size_BG[:, strongest] > 0).sum(1)
    whole = only_top & ((size_BG > 0).sum(1) == 5)
    assert float(whole.float().mean()) == pytest.approx(none, rel=0.4)


def test_sizes_are_uniform_and_as_frequent_as_the_probabilities_say() -> None:
    made = world()
    size_BG = made._sizes(200_000, made.p_G)
    share_G = (size_BG > 0).double().mean(0)
    row = 1 - float((1 - made.p_G.double()).log().sum().exp())  # rows of no concept were drawn again
    error_G = (made.p_G / row * (1 - made.p_G) / 200_000).sqrt()
    assert ((share_G - made.p_G / row).abs() < 5 * error_G).all()
    sizes = size_BG[size_BG > 0].sort().values
    grid = torch.linspace(0, 1, len(sizes))
    assert float((sizes - grid).abs().max()) < 2 / math.sqrt(len(sizes))  # Kolmogorov and Smirnov


def test_rows_of_both_models_have_the_same_concepts_and_none_that_is_the_others_own() -> None:
    made = world(noise=0.0)
    [x] = itertools.islice(made.rows(400), 1)
    seen = {name: made.shared_G | made.only[name] for name in ("a", "b")}
    codes = {}
    for name in ("a", "b"):
        again = Toy(made.asked, 0, CPU)
        [same] = itertools.islice(again.rows(400), 1)
        assert torch.equal(same[name], x[name])  # the seed alone decides
    size_BG = _drawn(made.asked)
    for name in ("a", "b"):
        codes[name] = size_BG * seen[name]
        torch.testing.assert_close(x[name], codes[name] @ made.vectors[name])
    assert (codes["a"][:, made.shared_G] == codes["b"][:, made.shared_G]).all() and codes["a"][:, made.shared_G].any()


def _drawn(asked: ToyConfig) -> Tensor:
    made = Toy(asked, 0, CPU)
    return made._sizes(400, made.p_G)


def test_probabilities_are_drawn_for_every_batch_where_that_is_asked() -> None:
    """Concepts then go together: in some batches both of two are frequent, in others neither."""
    for redraw, moves in (("never", False), ("batch", True)):
        made = world(redraw=redraw, noise=0.0, concepts=40)  # fewer than the width: rows tell their concepts
        back_DG = torch.linalg.pinv(made.vectors["a"])
        often = torch.stack([(x["a"] @ back_DG > 1e-3).float().mean(0) for x in itertools.islice(made.rows(4000), 6)])
        spread_G = (often.std(0) / often.mean(0))[made.shared_G]
        assert (float(spread_G.mean()) > 0.4) == moves and float(spread_G.mean()) > 0.01


def perfect(made: Toy, wrong: bool = False) -> Dictionary:
    """A latent for each concept: own ones first and last. `wrong`: those of model a hold shared concepts."""
    own = int(made.only["a"].sum())
    wires = build("dedicated", dict.fromkeys(("a", "b"), 48), 96, own)
    dictionary = create(wires, cases.method("topk", k=20), Scale(wires.widths), "sum", 1)[0]
    order = torch.cat([torch.where(part)[0] for part in (made.only["a"], made.shared_G, made.only["b"])])
    order_of = {"a": order[:-own], "b": order[own:]}
    if wrong:
        order_of["a"] = torch.cat([order[own : 2 * own], order[own:-own]])
    with torch.no_grad():
        for name in ("a", "b"):
            dictionary.decoder[name].copy_(normalize(made.vectors[name], dim=1)[order_of[name]])
            dictionary.encoder[name].copy_(dictionary.decoder[name])
    return dictionary


def test_a_dictionary_of_all_concepts_has_found_them() -> None:
    made = world()
    told = toy.found(perfect(made), made)
    assert told.pop("mmcs") == pytest.approx(1) and told.pop("rarest_to_commonest") == [1.0] * 4
    assert told == {
        "own": 1.0, "own_any": 1.0, "shared": 1.0, "false": 0.0, "nothing": 0.0, "lost": 0.0, "classified": 10,
    }  # fmt: skip


def test_shared_concepts_in_a_models_own_latents_are_false() -> None:
    made = world()
    told = toy.found(perfect(made, wrong=True), made)
    assert told["own"] == told["own_any"] == 0.5 and told["false"] == 0.5 and told["nothing"] == 0.0
    noise = perfect(made)
    with torch.no_grad():
        noise.decoder["a"][:5] = torch.randn(5, 48, generator=torch.Generator().manual_seed(9))
    assert toy.found(noise, made)["nothing"] == 0.5


@pytest.mark.parametrize("kind", ["standard", "designated", "dedicated"])
def test_nothing_is_found_before_a_run(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary does not begin at the concepts of the world with its seed."""
    monkeypatch.setattr(toy, "ROWS", 2**14)
    asked = configs.parse(Whole, tomllib.loads((HOME / "reduced.toml").read_text()))
    for seed in range(3):
        made = Toy(asked.toy, seed, CPU)
        config = configs.parse(TrainConfig, toy.Run(kind, 256, seed).config(asked))
        shape = prepare.shape(config, {"a": 64, "b": 64})
        told = toy.found(prepare.initialised(shape, Scale(shape.wiring.widths)).dictionary, made)
        assert (told["own_any"], told["shared"], told["mmcs"] < 0.5) == (0, 0, True)


def test_where_no_latent_is_one_models_own_nothing_is_false() -> None:
    made = world()
    wires = build("crosscoder", dict.fromkeys(("a", "b"), 48), 96)
    dictionary = create(wires, cases.method("topk", k=20), Scale(wires.widths), "sum", 1)[0].initialise(0, 0.4)
    told = toy.found(dictionary, made)
    assert told["classified"] == 0 and told["false"] is None and told["own"] == 0.0


@pytest.mark.parametrize("name", ["reduced", "full"])
def test_every_run_of_a_config_is_one_that_can_be_trained(name: str) -> None:
    asked = configs.parse(Whole, tomllib.loads((HOME / f"{name}.toml").read_text()))
    runs = toy.all_runs(asked.runs)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        told = configs.parse(TrainConfig, run.config(asked))
        assert told.steps * told.batch >= (800e6 if name == "full" else 4e6)
    designated = next(run for run in runs if run.kind == "designated" and run.denser == 2.0)
    k = round(asked.toy.active or asked.toy.concepts / 100)
    assert designated.config(asked)["wiring"]["k"] == {"designated": round(0.2 * k)}


def said(tmp_path: Path, *settings: str) -> str:
    app = toy.typer.Typer()
    app.command()(toy.main)
    words = [str(HOME / "reduced.toml"), "--out", str(tmp_path / "toy")]
    done = CliRunner().invoke(app, [*words, *(word for one in settings for word in ("--set", one))])
    assert done.exit_code == 0, done.output
    return (tmp_path / "toy" / "table.md").read_text()


@pytest.mark.slow
def test_with_half_as_many_latents_as_concepts_a_dedicated_crosscoder_finds_more_own_ones(tmp_path: Path) -> None:
    asked = configs.parse(Whole, tomllib.loads((HOME / "reduced.toml").read_text()))
    found = {kind: toy.one(toy.Run(kind, 256, 0), asked, tmp_path) for kind in ("standard", "dedicated")}  # type: ignore[arg-type]
    assert found["dedicated"]["own"] > found["standard"]["own"] + 0.2
    assert found["dedicated"]["shared"] > 0.35 and found["dedicated"]["false"] < 0.5


FEW = ("runs.latents=[64]", "runs.denser=[2.0]", "runs.seeds=[0, 1]", "toy.concepts=128", "toy.width=32")


@pytest.mark.slow
def test_runs_become_a_table_and_a_picture_and_finished_ones_are_not_run_again(tmp_path: Path) -> None:
    moment = ("train.steps=12", "train.batch=64", "train.method.k_anneal=2", "train.log.measure_rows=64")
    first = said(tmp_path, *FEW, *moment)
    assert [line.split(" | ")[:2] for line in first.splitlines()[2:5]] == [
        ["| 64", "standard"], ["| 64", "designated, 2 x"], ["| 64", "dedicated"],
    ]  # fmt: skip
    assert "±" in first and (tmp_path / "toy" / "figure.svg").read_text().count("<svg") == 1
    found = tmp_path / "toy" / "dedicated-64-1" / "found.json"
    made = found.stat().st_mtime_ns
    (tmp_path / "toy" / "standard-64-0" / "found.json").unlink()
    assert said(tmp_path, *FEW, *moment) == first and found.stat().st_mtime_ns == made
