"""Thresholds that keep a budget over all rows of a store, whatever they were before.

Letters: N rows, L latents.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.store import Store
from tests import cases
from train.calibrate import calibrate, calibrate_on
from train.dictionary import Dictionary
from train.filter import RowsConfig, kept_rows
from train.fit import fit
from train.reader import read

ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 32, "exclusive": 4}, "method": {"name": "batch_topk", "k": 3},
    "steps": 20, "batch": 16, "threads": 1, "device": "cpu", "optimiser": {"lr": 1e-2, "warmup": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("calibrate"))


def changed(table: str, **keys: Any) -> dict[str, Any]:
    return {**ASKED, table: {**ASKED[table], **keys}}


def kept(store: Store) -> np.ndarray:
    return np.flatnonzero(kept_rows(store, RowsConfig()).kept_N)


def scores(dictionary: Dictionary, store: Store) -> Tensor:
    """relu(h) x norm of all kept rows, [writers or 1, N, L]."""
    [x] = read(store, dictionary.wiring.readers, kept(store), 10**6)
    f_NL, norm_L = dictionary.pre(x).h_BL.clamp_min(0), dictionary.norms()
    return torch.stack([f_NL * own_L for own_L in norm_L.view(-1, norm_L.shape[-1])])


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
@pytest.mark.parametrize(
    "wiring",
    [{}, {"norm": "joint"}, {"norm": "decoupled"}, {"k": {"only_a": 1}}, {"norm": "decoupled", "k": {"shared": 2}}],
)
def test_each_threshold_lies_below_as_many_scores_as_its_budget_asks_for(
    name: str, wiring: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    groups = {"groups": [0.5, 0.5]} if name == "matryoshka" else {}
    asked = changed("wiring", **wiring) | {"method": {"name": name, "k": 3, "calibrate": True, **groups}}
    dictionary = fit(store, asked, tmp_path / "run", quiet=True).dictionary
    activation: Any = dictionary.activation
    found, rows = activation.threshold.view(-1, len(activation.budgets.ks)), len(kept(store))
    assert len(found) == (2 if wiring.get("norm") == "decoupled" else 1)
    for own, score_NL in zip(found, scores(dictionary, store), strict=True):
        for number, k in enumerate(activation.budgets.counts(10**9)):
            score = score_NL[:, activation.budgets.group_L == number].flatten().sort(descending=True).values
            above = int((score > own[number]).sum())
            wanted = min(k * rows, int((score > 0).sum()))
            assert abs(above - wanted) <= 2  # scores within 1/8192 of each other are kept or left together


def test_what_was_before_does_not_count(store: Store, tmp_path: Path) -> None:
    dictionary = fit(store, ASKED, tmp_path / "run", quiet=True).dictionary
    other = copy.deepcopy(dictionary)
    activations: list[Any] = [one.activation for one in (dictionary, other)]
    trailing = activations[0].threshold.clone()
    activations[1].set_threshold(torch.tensor([123.0]))
    for one in (dictionary, other):
        calibrate(one, store, kept(store), quiet=True)
    assert torch.equal(*(one.threshold for one in activations)) and not torch.equal(activations[0].threshold, trailing)
    fires = float((dictionary.encode(next(read(store, ["a", "b"], kept(store), 10**6))) > 0).sum() / len(kept(store)))
    assert fires == pytest.approx(3, abs=0.02)


def test_only_thresholds_change(store: Store, tmp_path: Path) -> None:
    one = fit(store, ASKED, tmp_path / "one", quiet=True).dictionary.state_dict()
    two = fit(store, changed("method", calibrate=True), tmp_path / "two", quiet=True).dictionary.state_dict()
    differ = {key for key in one if not torch.equal(one[key], two[key])}
    assert differ == {"activation.mean", "activation.mass"}


def flat(k: int) -> Dictionary:
    """Codes that are the components of a row of 6."""
    made = cases.trainer(
        "autoencoder",
        "batch_topk",
        wiring={"kind": "autoencoder", "latents": 20},
        method={"name": "batch_topk", "k": k},
    ).dictionary.eval()
    with torch.no_grad():
        made.encoder["a"].copy_(torch.eye(20))
        made.decoder["a"].copy_(torch.eye(20))
    return made


@given(seed=st.integers(0, 999), k=st.integers(1, 20), rows=st.integers(1, 40), positive=st.floats(0, 1))
def test_the_mean_number_of_codes_is_k_or_all_that_are_positive(seed: int, k: int, rows: int, positive: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = flat(k)
    x_ND = torch.rand(rows, 20, generator=generator).pow(3) * 10 ** (6 * torch.rand(1, generator=generator) - 3) + 1e-4
    x_ND = x_ND * torch.where(torch.rand(rows, 20, generator=generator) < positive, 1.0, -1.0)
    calibrate_on(made, [{"a": part} for part in x_ND.split(7)])
    codes = int((made.encode({"a": x_ND}) > 0).sum())
    wanted = min(k * rows, int((x_ND > 0).sum()))
    assert abs(codes - wanted) <= 2  # scores within 1/8192 of each other are kept or left together


def test_of_scores_that_are_all_alike_all_pass() -> None:
    """More than twice as many as were asked for: none would be nearer, and would silence the dictionary."""
    made = flat(3)
    calibrate_on(made, [{"a": torch.full((5, 20), 2.0)}])
    assert (made.encode({"a": torch.full((1, 20), 2.0)}) > 0).all()


def test_rows_without_a_positive_score_leave_a_threshold_of_0() -> None:
    made = flat(3)
    calibrate_on(made, [{"a": -torch.ones(5, 20)}])
    activation: Any = made.activation
    assert activation.threshold.tolist() == [0.0]
    assert (made.encode({"a": torch.ones(1, 20)}) > 0).all()
