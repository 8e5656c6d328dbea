"""What runs on one store have in common is made once, and what they serve does not depend on what they learn."""

from typing import Any

import numpy as np
import pytest
import torch

from shared.store import Store
from tests import cases
from train import prepare, scale
from train.prepare import fresh, initialised
from train.scale import Scale


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("prepare"))


def test_runs_on_other_sources_of_a_store_serve_the_same_rows_in_the_same_order(store: Store) -> None:
    both, single = cases.ready(
        store, {}, {"seed": 1, "wiring": {"latents": 8, "kind": "autoencoder", "sources": ["b"]}}
    )
    assert both.order is single.order and single.sources == ["b"]
    alone = cases.ready(store, {"wiring": {"latents": 8, "kind": "autoencoder", "sources": ["b"]}})[0]
    assert np.array_equal(both.order.rows(0, 900), alone.order.rows(0, 900))


def test_runs_of_other_batches_or_rows_have_orders_of_their_own_and_share_the_rows(store: Store) -> None:
    one, larger, other = cases.ready(store, {}, {"batch": 32}, {"rows": {"seed": 1}})
    assert one.order is not larger.order and one.order.kept_N is larger.order.kept_N
    assert not np.array_equal(one.order.rows(0, 99), other.order.rows(0, 99))


def test_a_scale_is_found_once_for_runs_that_have_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, calls = scale.fit, list[Any]()

    def fit(*given: Any) -> Scale:
        calls.append(given)
        return genuine(*given)

    monkeypatch.setattr(prepare.scale, "fit", fit)
    known: dict[str, Scale] = {}
    runs = cases.ready(store, {}, {"seed": 1}, {"batch": 32}, {"scale": {"kind": "rms"}}, {"rows": {"positions": "2:"}})
    trainers = [fresh(store, one, known) for one in runs]
    assert len(calls) == 3
    states = [trainer.dictionary.scale.state_dict() for trainer in trainers]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and value.data_ptr() != states[1][name].data_ptr()


def test_a_seed_decides_the_weights_alone(store: Store) -> None:
    one, same, other = cases.ready(store, {}, {"optimiser": {"lr": 1.0}}, {"seed": 1})
    weights = [initialised(run, Scale(run.wiring.widths)).dictionary.state_dict() for run in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["decoder.a"], weights[2]["decoder.a"])
