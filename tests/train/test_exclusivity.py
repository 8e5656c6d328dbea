"""What is exclusive about a span: nothing leaks into it, what a budget couples, and whether another source has it, too.

Letters: B rows of a batch, N rows, L latents.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import Planted
from train import exclusivity
from train.dictionary import Dictionary, create
from train.exclusivity import Exclusivity, shadows
from train.measure import Measure, evaluating
from train.pre import Pre
from train.scale import Scale
from train.trainer import Trainer
from train.wiring import with_k

SHARES_A_BUDGET = ("topk",)  # at evaluation


def add(to: Exclusivity, x: dict[str, Tensor]) -> None:
    to.add(x, to.dictionary.code(x))


def measured(dictionary: Dictionary, x: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    found = Exclusivity(dictionary)
    with evaluating(dictionary):
        for start in range(0, len(x["a"]), 64):
            add(found, {name: x_ND[start : start + 64] for name, x_ND in x.items()})
    return found.result()


def trained(case: str, name: str, x: Any, steps: int = 10, **keys: Any) -> Trainer:
    trainer = cases.trainer(case, name, steps, **keys)
    for step in range(steps):
        trainer.update(x(step))
    return trainer


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("case", ["dedicated", "dedicated of 3"])
def test_nothing_leaks_and_codes_are_coupled_only_where_a_budget_is_shared(case: str, name: str) -> None:
    planted = cases.planted(case)
    dictionary = trained(case, name, lambda step: planted.rows(64, seed=step)).dictionary
    found = measured(dictionary, planted.rows(200, seed=99))
    assert list(found) == [span.name for span in dictionary.wiring.spans if len(span.readers) == 1]
    for one in found.values():
        assert one["integrity"] == 0.0
        assert one["coupling"] > 0.01 if name in SHARES_A_BUDGET else one["coupling"] == 0.0


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = cases.trainer("dedicated", "standard").dictionary
    genuine = Dictionary.pre

    def leaking(self: Dictionary, x: dict[str, Tensor]) -> Pre:
        pre = genuine(self, x)
        pre.h_BL[:, 0] += 1e-3 * x["b"][:, 0]
        return pre

    monkeypatch.setattr(Dictionary, "pre", leaking)
    found = measured(dictionary, cases.random_rows("dedicated", 100))
    assert found["only_a"]["integrity"] > 1e-4 and found["only_b"]["integrity"] == 0


@pytest.mark.parametrize("case", ["autoencoder", "transcoder", "crosscoder", "crosscoder of 3"])
def test_where_every_span_reads_every_source_there_is_nothing_to_tell(case: str) -> None:
    dictionary = cases.trainer(case, "standard").dictionary
    assert measured(dictionary, cases.random_rows(case, 100)) == {}


def test_no_more_rows_are_read_than_asked_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusivity, "ROWS", 100)
    monkeypatch.setattr(exclusivity, "MOVED", 70)
    monkeypatch.setattr(exclusivity, "PIECE", 30)
    dictionary, x = cases.trainer("dedicated", "topk").dictionary, cases.random_rows("dedicated", 300)
    found = Exclusivity(dictionary)
    with evaluating(dictionary):
        for start in range(0, 300, 64):
            add(found, {name: x_ND[start : start + 64] for name, x_ND in x.items()})
        whole = Exclusivity(dictionary)
        add(whole, x)
    assert found.rows == whole.rows == 100
    for name, one in found.result().items():
        for key, value in whole.result()[name].items():
            assert one[key] == pytest.approx(value, rel=1e-5) if value else one[key] == value


def test_shadows_are_the_largest_correlations_of_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    f_NL = torch.rand(500, 200, generator=generator) * (torch.rand(500, 200, generator=generator) < 0.1)
    f_NL[:, 150] = 2 * f_NL[:, 3]  # a copy
    f_NL[:, 151] = f_NL[:, 5] + 0.3 * f_NL[:, 160]
    f_NL[:, 7] = 0
    f_NL[:9, 8], f_NL[9:, 8] = 1.0, 0.0  # fires on 9 rows: too few
    own, others = torch.arange(100), torch.arange(120, 200)
    found = shadows(f_NL.to_sparse().coalesce(), own, others)
    right = np.corrcoef(f_NL[:, [*range(7), *range(9, 100), *others.tolist()]].double().numpy().T)
    kept = [*range(7), *range(9, 100)]
    assert np.isnan(found[[7, 8]]).all()
    np.testing.assert_allclose(found[kept], right[:98, 98:].max(1), rtol=1e-6)
    assert found[3] == pytest.approx(1) and 0.9 < found[5] < 1 and np.median(found[kept]) < 0.3


# --- the null test: exclusive latents of a model and its copy are spurious -------------------------------------------

STEPS = 500


def shadow_of(planted: Planted, seed: int) -> dict[str, dict[str, Any]]:
    """Of a dictionary whose exclusive spans keep one latent a row by themselves, and so must be used."""
    wires = with_k(cases.wiring("dedicated"), {"only_a": 1, "only_b": 1})
    asked = cases.config("dedicated", "batch_topk", STEPS, method=cases.method("batch_topk", k=2))
    made, terms = create(wires, asked.method, Scale(wires.widths), "sum", STEPS)
    trainer = Trainer(made.initialise(seed, 0.4), list(terms), asked)
    for step in range(STEPS):
        trainer.update(planted.rows(128, seed=step))
    return measured(trainer.dictionary, planted.rows(4000, seed=10**6))


@pytest.mark.parametrize("seed", [1])
def test_a_shadow_exposes_exclusive_latents_where_both_sources_have_the_same_features(seed: int) -> None:
    """A model and its rotated copy: what a dedicated span has, the other source has, too. Measured: 0.65 or more."""
    for one in shadow_of(cases.planted("dedicated", shared=20, own=0), seed).values():
        assert one["shadow"] > 0.6 and one["shadowed"] >= 2


@pytest.mark.parametrize("seed", [1])
def test_planted_exclusive_features_cast_no_shadow(seed: int) -> None:
    """9 features of each source for 10 exclusive latents. Measured: 0.22 or less."""
    for one in shadow_of(cases.planted("dedicated", shared=12, own=9), seed).values():
        assert one["shadow"] < 0.3 and one["shadowed"] == 0


def test_figures_of_spans_have_what_is_told_here() -> None:
    dictionary = cases.trainer("dedicated", "topk").dictionary
    total = Measure(dictionary)
    with evaluating(dictionary):
        total.add(cases.random_rows("dedicated", 100))
    spans = total.result()["spans"]
    assert (
        spans["only_a"]["integrity"] == 0.0 and spans["only_b"]["shadowed"] >= 0 and "integrity" not in spans["shared"]
    )
