"""The figures equal numpy in fp64, over all rows at once, whatever the batches.

Letters: B rows of a batch, N rows, D width of a source, L latents.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import StoreError
from shared.store import Store
from tests import cases
from tests.build import make_store
from tests.contracts.test_purity import tensors
from train.dictionary import Dictionary, create
from train.filter import RowsConfig, kept_rows
from train.measure import Measure, evaluating, measure, normalised_difference
from train.scale import Scale
from train.wiring import Wiring, build

WIDTHS = {"a": 6, "b": 4}


def zeros(wiring: Wiring) -> Dictionary:
    return create(wiring, cases.method("standard"), Scale(wiring.widths), "sum", 1)[0].eval()


def random(wiring: Wiring, name: str = "topk", seed: int = 0) -> Dictionary:
    made = create(wiring, cases.method(name), Scale(wiring.widths), "sum", 1)[0].initialise(seed, 0.6).eval()
    generator = torch.Generator().manual_seed(seed)
    for source, width in wiring.widths.items():
        made.scale.mean(source).copy_(torch.randn(width, generator=generator))
        made.scale.factor(source).fill_(0.25)
    return made


def rows(count: int = 101, widths: dict[str, int] = WIDTHS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 3 + 2 * torch.randn(count, width, generator=generator) for name, width in widths.items()}


def measured(dictionary: Dictionary, x: dict[str, Tensor], batch: int = 1000) -> Measure:
    total = Measure(dictionary)
    for start in range(0, len(next(iter(x.values()))), batch):
        total.add({name: x_ND[start : start + batch] for name, x_ND in x.items()})
    return total


def test_predicting_the_mean_explains_nothing_and_a_perfect_copy_everything() -> None:
    x = rows(widths={"a": 6})
    made = zeros(build("autoencoder", {"a": 6}, 12))
    with torch.no_grad():
        made.bias["a"].copy_(x["a"].mean(0))
    assert measured(made, x).result()["sources"]["a"]["fve"] == pytest.approx(0, abs=1e-6)
    made.scale.mean("a").copy_(x["a"].mean(0))
    with torch.no_grad():
        made.bias["a"].zero_()
    assert measured(made, x).result()["sources"]["a"]["fve"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        both_ways = torch.cat([torch.eye(6), -torch.eye(6)])
        made.encoder["a"].copy_(both_ways), made.decoder["a"].copy_(both_ways)
    figures = measured(made, x).result()["sources"]["a"]
    assert figures["fve"] == pytest.approx(1, abs=1e-12) and figures["mse"] == pytest.approx(0, abs=1e-10)
    assert figures["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("name", cases.names())
def test_figures_do_not_depend_on_the_batches(name: str) -> None:
    made, x = random(build("dedicated", WIDTHS, 20, 4), name), rows()
    whole = measured(made, x).result()
    for batch in (1, 7, 50):
        parts = measured(made, x, batch).result()
        found, expected = tensors(parts), tensors(whole)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("centred", [True, False])
def test_figures_equal_numpy_in_fp64(centred: bool) -> None:
    wiring = build("dedicated", WIDTHS, 20, 4)
    made, x = random(wiring), rows()
    if not centred:
        for source in WIDTHS:
            made.scale.mean(source).zero_()
    figures = measured(made, x, 17).result()
    with torch.no_grad():
        f_NL = made.encode(x).numpy().astype(np.float64)
        y = {name: y_ND.numpy().astype(np.float64) for name, y_ND in made.decode(made.encode(x)).items()}
    for name, wrote_L in (("a", np.r_[0:16]), ("b", np.r_[4:20])):
        x_ND, found = x[name].numpy().astype(np.float64), figures["sources"][name]
        error = ((x_ND - y[name]) ** 2).sum()
        assert found["fve"] == pytest.approx(1 - error / ((x_ND - x_ND.mean(0)) ** 2).sum(), rel=1e-5)
        assert found["mse"] == pytest.approx(error / len(x_ND), rel=1e-5)
        mean_D = made.scale.mean(name).numpy()
        left, right = x_ND - mean_D, y[name] - mean_D
        cosine = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
        assert found["cosine"] == pytest.approx(cosine.mean(), rel=1e-5)
        assert found["l0"] == pytest.approx((f_NL[:, wrote_L] > 0).sum(1).mean())
        ratio = np.linalg.norm(right, axis=1) / np.linalg.norm(left, axis=1)
        assert found["l2_ratio"] == pytest.approx(ratio.mean(), rel=1e-5)
        assert found["gamma"] == pytest.approx((right**2).sum() / (left * right).sum(), rel=1e-4)
    fires_L = (f_NL > 0).mean(0)
    assert figures["l0"] == pytest.approx((f_NL > 0).sum(1).mean())
    assert figures["dead"] == pytest.approx((fires_L == 0).mean())
    assert figures["dense"] == pytest.approx((fires_L > 0.1).mean())
    assert figures["density"]["never"] == (fires_L == 0).sum()
    counts = np.histogram(np.log10(fires_L[fires_L > 0]), np.array(figures["density"]["log10_edges"]))[0]
    assert figures["density"]["counts"] == counts.tolist() and sum(counts) == (fires_L > 0).sum()
    for name, one in (("only_a", slice(0, 4)), ("shared", slice(4, 16)), ("only_b", slice(16, 20))):
        alive = int((fires_L[one] > 0).sum())
        expected = {"latents": one.stop - one.start, "alive": alive, "l0": fires_L[one].sum(),
                    "dense": (fires_L[one] > 0.1).mean(), "dead": 1 - alive / (one.stop - one.start)}  # fmt: skip
        assert {key: figures["spans"][name][key] for key in expected} == pytest.approx(expected)
        silent_NL = f_NL.copy()
        silent_NL[:, one] = 0
        for source, gained in figures["spans"][name]["fve"].items():
            x_ND = x[source].numpy().astype(np.float64)
            left = made.decode(torch.from_numpy(silent_NL).float())[source].detach().numpy()
            fve = 1 - ((x_ND - left) ** 2).sum() / ((x_ND - x_ND.mean(0)) ** 2).sum()
            assert gained == pytest.approx(figures["sources"][source]["fve"] - fve, rel=1e-3, abs=1e-5)
    assert {name: list(one["fve"]) for name, one in figures["spans"].items()} == {
        "only_a": ["a"], "shared": ["a", "b"], "only_b": ["b"],
    }  # fmt: skip


def hand_made() -> Dictionary:
    """A crosscoder of 5 latents; latent l fires where component l of a is positive. Lengths in a and b:

    0: (1, 0)   1: (9, 1)   2: (8, 2)   3: (1, 1)   4: (1, 9)
    """
    made = zeros(build("crosscoder", {"a": 6, "b": 4}, 5))
    with torch.no_grad():
        made.encoder["a"].copy_(torch.eye(6)[:5])
        made.decoder["a"][:, 5] = torch.tensor([1.0, 9.0, 8.0, 1.0, 1.0])
        made.decoder["b"][:, 0] = torch.tensor([0.0, 1.0, 2.0, 1.0, 9.0])
    return made


def test_exclusive_dense_and_dead_latents_of_a_hand_made_dictionary() -> None:
    x = {"a": -torch.ones(20, 6), "b": torch.zeros(20, 4)}
    x["a"][:2, 0] = 1.0  # on 10 % of the rows: not above
    x["a"][:3, 1] = 1.0
    x["a"][:20, 2] = 1.0
    x["a"][0, 3] = 1.0
    figures = measured(hand_made(), x).result()
    assert figures["l0"] == pytest.approx((2 + 3 + 20 + 1) / 20)
    assert figures["dead"] == pytest.approx(1 / 5)
    assert figures["dense"] == pytest.approx(2 / 5)
    assert figures["sources"]["a"]["exclusive"] == 2  # R = 1 and 0.9, and not 0.8
    assert figures["sources"]["b"]["exclusive"] == 0  # latent 4 has R = 0.9 and never fires
    assert figures["sources"]["a"]["only"] == 2  # the difference is 1 of (1, 0), 17/18 of (9, 1), 7/8 of (8, 2)
    assert figures["density"]["never"] == 1
    r = figures["r"]
    assert len(r["edges"]) == 21
    filled = {name: {i: n for i, n in enumerate(counts) if n} for name, counts in r["counts"].items()}
    assert filled == {"a": {19: 1, 18: 1, 16: 1, 10: 1}, "b": {0: 1, 2: 1, 4: 1, 10: 1}}

    other = Measure(hand_made())
    loud = {"a": -torch.ones(1, 6), "b": torch.zeros(1, 4)}
    loud["a"][0, 4] = 1.0
    other.add(loud)
    both = measured(hand_made(), x).result(other.fires_L)
    assert both["dead"] == 0 and both["sources"]["b"]["exclusive"] == 1
    assert both["l0"] == figures["l0"] and both["density"] == figures["density"]  # of the measured rows alone


def test_a_single_writer_has_no_exclusive_latents_and_no_r() -> None:
    for kind, widths in (("autoencoder", {"a": 6}), ("transcoder", WIDTHS)):
        figures = measured(random(build(kind, widths, 20)), rows()).result()
        assert figures["r"] == {} and [one["exclusive"] for one in figures["sources"].values()] == [None]


def test_dedicated_latents_are_exclusive_and_stand_at_the_ends_of_r() -> None:
    figures = measured(random(build("dedicated", WIDTHS, 20, 4), "standard"), rows()).result()
    for source, only in (("a", "only_a"), ("b", "only_b")):
        alive = figures["spans"][only]["alive"]
        assert figures["sources"][source]["exclusive"] >= alive > 0
        assert figures["r"]["counts"][source][-1] >= alive


def test_rows_without_spread_have_no_fve() -> None:
    figures = measured(zeros(build("autoencoder", {"a": 6}, 2)), {"a": torch.ones(4, 6)}).result()
    assert figures["sources"]["a"]["fve"] is None


def test_evaluation_mode_ends_with_its_block_also_by_an_error() -> None:
    made = random(build("autoencoder", {"a": 6}, 4))
    for training in (True, False):
        made.train(training)
        with pytest.raises(KeyError), evaluating(made):
            assert not made.training
            raise KeyError
        assert made.training is made.activation.training is training


# --- on a store -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("measure") / "small.zarr"
    return make_store(path, rows=300, shard_rows=256, chunk_rows=16, factor={"a": 2.0}, documents=20)


def split_rows(store: Store, split: str) -> dict[str, Tensor]:
    kept_N = kept_rows(store, RowsConfig(split=split)).kept_N
    return {
        name: torch.from_numpy(store.column(f"activations/{name}")[kept_N].astype(np.float32) * store.factor(name))
        for name in WIDTHS
    }


def test_figures_are_of_all_kept_held_out_rows_and_dead_latents_of_training_rows_too(store: Store) -> None:
    made = random(build("dedicated", WIDTHS, 60, 9))
    held_out, training = measured(made, split_rows(store, "held_out")), measured(made, split_rows(store, "train"))
    figures = measure(made, store, quiet=True)
    assert figures.pop("training_rows") == training.rows > held_out.rows > 0
    assert figures == held_out.result(training.fires_L)
    assert 0 < figures["dead"] < held_out.result()["dead"]


def test_no_more_rows_than_asked_are_read_from_either_split(store: Store) -> None:
    made = random(build("crosscoder", WIDTHS, 20))
    figures = measure(made, store, most=9, quiet=True)
    assert (figures["rows"], figures["training_rows"]) == (9, 9)
    assert figures == measure(made, store, most=9, quiet=True)


def test_measuring_leaves_the_mode_as_it_was(store: Store) -> None:
    made = random(build("crosscoder", WIDTHS, 20)).train()
    state = {key: value.clone() for key, value in made.state_dict().items()}
    measure(made, store, quiet=True)
    assert made.training and all(torch.equal(value, state[key]) for key, value in made.state_dict().items())


def test_a_store_for_evaluation_alone_is_measured(tmp_path: Path) -> None:
    only = make_store(tmp_path / "only.zarr", rows=40, shard_rows=32, documents=3, held_out=1.0)
    figures = measure(random(build("crosscoder", WIDTHS, 20)), only, quiet=True)
    assert figures["rows"] > 0 and figures["training_rows"] == 0


def test_a_store_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    none = make_store(tmp_path / "none.zarr", rows=20, shard_rows=32, documents=2, held_out=0.0)
    with pytest.raises(StoreError, match=r"no held-out row to measure on: .*rows\.held_out"):
        measure(random(build("crosscoder", WIDTHS, 20)), none, quiet=True)


def test_a_store_without_the_source_or_with_another_width_is_refused_by_name(store: Store) -> None:
    with pytest.raises(StoreError, match=r"this store has no source: z\. It has: a, b"):
        measure(random(build("autoencoder", {"z": 6}, 20)), store, quiet=True)
    with pytest.raises(StoreError, match="another width of rows than the dictionary's: b has 4, the dictionary 5"):
        measure(random(build("crosscoder", {"a": 6, "b": 5}, 20)), store, quiet=True)


def test_the_normalised_difference_of_two_sources_is_that_of_minder_and_dumas() -> None:
    norms = torch.tensor([[1.0, 0.0, 2.0, 9.0, 1.0], [0.0, 3.0, 2.0, 1.0, 4.0]])
    found = normalised_difference(norms / norms.sum(0))
    right = ((norms - norms.flip(0)) / norms.max(0).values + 1) / 2
    torch.testing.assert_close(found, right)
    assert normalised_difference(torch.tensor([[0.5], [0.25], [0.25]]))[:, 0].tolist() == pytest.approx(
        [0.5, 1 / 6, 1 / 6]
    )
