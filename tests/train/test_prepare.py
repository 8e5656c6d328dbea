"""What runs on one store have in common is made once, and what they serve does not depend on what they learn."""

from typing import Any

import numpy as np
import pytest
import torch

from shared.store import Store
from tests import cases
from train import prepare, scale
from train.prepare import fresh, initialised
from train.reader import read
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


@pytest.mark.parametrize("bias", ["mean", "median", "row"])
@pytest.mark.parametrize("kind", ["crosscoder", "transcoder"])
def test_a_bias_begins_where_the_rows_are_and_latents_see_rows_less_it(store: Store, bias: str, kind: str) -> None:
    asked = {"wiring": {"kind": kind, "latents": 8}, "scale": {"centre": False}, "init": {"bias": bias, "rows": 100}}
    [run] = cases.ready(store, asked)
    [other] = cases.ready(store, {**asked, "init": {}})
    made, plain = (fresh(store, one, {}).dictionary for one in (run, other))
    rows = run.order.sample(1 if bias == "row" else 100, seed=0)
    x = {n: torch.cat([part[n] for part in read(store, run.wiring.widths, rows, 50)]) for n in run.wiring.widths}
    for name in run.wiring.writers:
        scaled_ND = made.scale.scaled(name, x[name]).double()
        right = scale.geometric_median(scaled_ND) if bias == "median" else scaled_ND.mean(0)
        torch.testing.assert_close(made.bias[name].double(), right, rtol=1e-5, atol=1e-6)
        assert made.bias[name].abs().max() > 0.01
    both = [name for name in run.wiring.readers if name in run.wiring.writers]
    less = x | {n: plain.scale.raw(n, made.scale.scaled(n, x[n]) - made.bias[n]) for n in both}
    torch.testing.assert_close(made.pre(x).h_BL, plain.pre(less).h_BL, rtol=1e-4, atol=1e-4)


def test_encoders_begin_apart_from_decoders_where_they_are_not_tied(store: Store) -> None:
    tied, free = (fresh(store, *cases.ready(store, {"init": {"tied": tied}}), {}).dictionary for tied in (True, False))
    assert torch.allclose(tied.encoder["a"] * 2, tied.decoder["a"])
    assert torch.equal(tied.decoder["a"], free.decoder["a"])
    cosine = torch.cosine_similarity(free.encoder["a"], free.decoder["a"], dim=1)
    assert cosine.abs().max() < 0.999 and torch.allclose(free.encoder["a"].norm(dim=1), tied.encoder["a"].norm(dim=1))


def test_averages_of_the_weights_begin_at_the_first_weights(store: Store) -> None:
    [run] = cases.ready(store, {"optimiser": {"ema": 0.75, "warmup": 0}})
    trainer = fresh(store, run, {})
    before = [one.detach().clone() for one in trainer.parameters]
    [x] = read(store, run.sources, np.sort(run.order.step(0, 16)), 16)
    trainer.update(x)
    for average, old, new in zip(trainer.averages, before, trainer.parameters, strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new.detach())
