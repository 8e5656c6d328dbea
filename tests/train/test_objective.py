"""Each term equals its formula in fp64, values and gradients.

Letters: B rows of a batch, D width of a source, L latents.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import CASES
from tests.train.dense import Dense, aux, gradients, kept, places
from train import pre
from train.code import DenseCode, Forward
from train.dictionary import Dictionary
from train.kernels.choice import Codes, Kernels
from train.objective import L1, AuxForm, AuxK, Entropy, Ghost, Now, Power, PowerForm, Reconstruction, Term
from train.schedule import constant

every_case = pytest.mark.parametrize("case", CASES)
METHODS = ("standard", "topk", "batch_topk")
ROWS, K, K_AUX = 6, 3, 4
NONE: Any = None  # where a term does not look at the dictionary


def dictionary(case: str, name: str, norm: str = "sum") -> Dictionary:
    made = cases.trainer(case, name, wiring={"kind": CASES[case][0], "latents": 48, "norm": norm}).dictionary
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def half_dead(latents: int) -> Tensor:
    return torch.arange(latents) % 2 == 0


@every_case
@pytest.mark.parametrize("norm", ["sum", "joint", "mixed", "mean", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_and_every_gradient_equal_the_formula_in_fp64(case: str, name: str, norm: str) -> None:
    made = dictionary(case, name, norm)
    x, dead_L = cases.random_rows(case, ROWS), half_dead(made.latents)
    terms: list[Term] = [Reconstruction("recon", constant(1)), L1("l1", constant(1)), AuxK("aux", constant(1), K_AUX)]
    out = made(x)
    values = [term(made, out, Now(0, dead_L)) for term in terms]

    dense = Dense.of(made)
    f_BL = kept(name, dense.h(x), dense.norm(norm), K)
    y = dense.y(f_BL)
    expected = [
        torch.stack([(x[source].double() - y[source]).square().sum(1).mean() for source in y]).sum(),
        (f_BL * dense.norm(norm)).sum(1).mean(),
        aux(dense, x, y, dead_L, K_AUX),
    ]
    parameters = dict(made.named_parameters())
    assert parameters.keys() == dense.leaves().keys()
    for value, wanted in zip(values, expected, strict=True):
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted.item() > 0
        found, right = gradients(value, parameters), gradients(wanted, dense.leaves())
        for key, grad in found.items():
            size = max(1.0, float(right[key].abs().max()))
            assert float((grad - right[key]).abs().max()) < 1e-5 * size, key


@pytest.mark.parametrize("form", ["input", "error"])
@pytest.mark.parametrize("codes", ["sparse", "dense"])
@pytest.mark.parametrize("case", ["crosscoder", "dedicated of 3"])
def test_auxk_of_the_rows_part_by_part_is_that_of_all(
    monkeypatch: pytest.MonkeyPatch, case: str, codes: Codes, form: AuxForm
) -> None:
    made = dictionary(case, "topk")
    made.kernels = Kernels(codes)
    now, found = Now(0, half_dead(made.latents)), []
    for at_once in (10**9, 100, 1):
        monkeypatch.setitem(pre.COLUMNS, "cpu", at_once)
        value = AuxK("aux", constant(1), K_AUX, form)(made, made(cases.random_rows(case, ROWS)), now)
        found.append([value, *gradients(value, dict(made.named_parameters())).values()])
    for parts in found[1:]:
        for one, other in zip(parts, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_case
def test_auxk_is_zero_while_no_latent_is_dead(case: str) -> None:
    made = dictionary(case, "topk")
    out = made(cases.random_rows(case, ROWS))
    value = AuxK("aux", constant(1), K_AUX)(made, out, Now(0, torch.zeros(made.latents, dtype=torch.bool)))
    assert float(value) == 0 and not value.requires_grad


@every_case
def test_auxk_takes_all_dead_latents_where_there_are_fewer_than_k_aux(case: str) -> None:
    made = dictionary(case, "topk")
    x, dead_L = cases.random_rows(case, ROWS), torch.arange(made.latents) < 2
    out, dense = made(x), Dense.of(made)
    y = {name: value.double() for name, value in out.y.items()}
    value = AuxK("aux", constant(1), 100)(made, out, Now(0, dead_L))
    assert value.item() == pytest.approx(aux(dense, x, y, dead_L, 2).item(), rel=1e-5)


@every_case
def test_auxk_teaches_dead_latents_alone_and_only_towards_the_sources_they_write_to(case: str) -> None:
    made = dictionary(case, "topk")
    dead_L = half_dead(made.latents)
    value = AuxK("aux", constant(1), 100)(made, made(cases.random_rows(case, ROWS)), Now(0, dead_L))
    value.backward()
    for table, side in ((made.encoder, "readers"), (made.decoder, "writers")):
        for source in table:
            dead_S = dead_L[places(made.wiring, source, side)]
            grad = table[source].grad
            assert grad is not None and grad.any(1)[dead_S].any() and not grad[~dead_S].any()
    assert all(made.bias[source].grad is None for source in made.bias)  # the error is taken as given
    grad_L = made.activation.bias_L.grad
    assert grad_L is not None and not grad_L[~dead_L].any()


def test_auxk_of_dead_exclusive_latents_follows_the_error_of_their_own_source_only() -> None:
    made = dictionary("dedicated", "topk")
    dead_L = torch.arange(made.latents) < made.wiring.spans[0].size  # all of only_a
    out = made(cases.random_rows("dedicated", ROWS))
    term = AuxK("aux", constant(1), K_AUX)

    def grad_of(forward: Forward) -> Tensor:
        made.zero_grad()
        term(made, forward, Now(0, dead_L)).backward(retain_graph=True)
        grad = made.encoder["a"].grad
        assert grad is not None
        return grad.clone()

    before = grad_of(out)
    assert torch.equal(grad_of(replace(out, target={**out.target, "b": out.target["b"] + 100})), before)
    assert not torch.equal(grad_of(replace(out, target={**out.target, "a": out.target["a"] + 100})), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_auxk_is_zero_and_teaches_nothing_where_it_is_not_finite(bad: float) -> None:
    made = dictionary("crosscoder", "topk")
    out = made(cases.random_rows("crosscoder", ROWS))
    out = replace(out, target={**out.target, "a": out.target["a"] * bad})
    value = AuxK("aux", constant(1), K_AUX)(made, out, Now(0, half_dead(made.latents)))
    assert float(value) == 0
    loss = value + sum(parameter.sum() for parameter in made.parameters())
    loss.backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in made.parameters() if p.grad is not None)


def test_terms_of_a_hand_made_batch() -> None:
    """One source of width 20, rows 2e_0 and 0; latent 0 of length 0.5 fires with 3 on the first: y = 1.5e_0."""
    made = cases.trainer("autoencoder", "standard").dictionary
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.encoder["a"][0, 0], made.decoder["a"][0, 0] = 1.5, 0.5
    x_BD = torch.zeros(2, 20)
    x_BD[0, 0] = 2.0
    out, now = made({"a": x_BD}), Now(0, torch.zeros(made.latents, dtype=torch.bool))
    assert Reconstruction("recon", constant(1))(made, out, now).item() == 0.125  # (0.5^2 + 0) / 2
    assert L1("l1", constant(1))(made, out, now).item() == 0.75  # 3 x 0.5 / 2
    lengths = Reconstruction("recon", constant(1), "norm")(made, out, now)
    assert lengths.item() == 0.25  # (0.5 + 0) / 2
    lengths.backward()
    grad = made.bias["a"].grad
    assert (
        grad is not None and grad[0] == -0.5 and not grad[1:].any()
    )  # the row without an error gives none, and no NaN


def of_codes(rows: list[list[float]]) -> Forward:
    """A forward pass of which a penalty sees these codes."""
    f_BL = torch.tensor(rows, requires_grad=True)
    ones_L = torch.ones(f_BL.shape[1])
    made: Any = SimpleNamespace(code=DenseCode(f_BL), norm_L=ones_L, weight_L=ones_L)
    return made


def power(form: PowerForm, **keys: Any) -> Power:
    return Power("lp", constant(1), form, **{"end": 0.5, "first": 2, "last": 6, "updates": 3, **keys})


def test_p_falls_in_equal_steps_at_even_distances() -> None:
    term = power("lp_p")
    assert [term.power(step) for step in range(9)] == [1, 1, 1, 1, 0.75, 0.75, 0.5, 0.5, 0.5]
    few = power("lp_p", first=1, last=2, updates=5)  # of a short run some values are passed over
    assert [few.power(step) for step in range(4)] == [1, 0.625, 0.5, 0.5]


@pytest.mark.parametrize("form", ["lp_p", "lp"])
def test_a_penalty_keeps_its_size_where_p_changes(form: PowerForm) -> None:
    """Batches that are alike: whatever p is, the value stays what it was at p = 1."""
    term, none = power(form), torch.zeros(3, dtype=torch.bool)
    out = of_codes([[4.0, 1.0, 0.0]])
    for step in range(9):
        assert term(NONE, out, Now(step, none)).item() == pytest.approx(5.0, rel=1e-6)
        with torch.no_grad():
            term.observe(out, Now(step, none))
    assert float(term.gain) == pytest.approx(5 / (2 + 1) if form == "lp_p" else 5 / 9)  # at p = 0.5: 2 + 1, squared 9


def test_the_gain_is_of_the_last_ten_batches_behind_a_change() -> None:
    term, none = power("lp_p", first=0, last=30, updates=2), torch.zeros(1, dtype=torch.bool)
    with torch.no_grad():
        for step in range(29):
            term.observe(of_codes([[1000.0 if step < 20 else 4.0]]), Now(step, none))
        assert term.gain == 1
        term.observe(of_codes([[16.0]]), Now(29, none))
    assert float(term.gain) == pytest.approx((9 * 4 + 16) / (9 * 2 + 4))


def test_a_penalty_of_codes_that_are_all_0_stays_as_it_is() -> None:
    term, none = power("lp"), torch.zeros(2, dtype=torch.bool)
    out = of_codes([[0.0, 0.0]])
    for step in range(9):
        value = term(NONE, out, Now(step, none))
        assert float(value) == 0
        [grad] = torch.autograd.grad(value, [out.code.dense()])
        assert torch.equal(grad, torch.zeros_like(grad))
        with torch.no_grad():
            term.observe(out, Now(step, none))
    assert term.gain == 1


def test_entropy_is_that_of_the_shares_of_a_row() -> None:
    term = Entropy("entropy", constant(1))
    for rows, expected in (([[2.0, 2.0, 0.0, 0.0]], math.log(2)), ([[3.0] * 4], math.log(4)), ([[5.0, 0, 0, 0]], 0)):
        assert float(term(NONE, of_codes(rows), Now(0, torch.zeros(4)))) == pytest.approx(expected, abs=1e-6)
    silent = of_codes([[0.0, 0.0], [1.0, 1.0]])
    value = term(NONE, silent, Now(0, torch.zeros(2)))
    assert float(value) == pytest.approx(math.log(2) / 2)
    assert torch.isfinite(torch.autograd.grad(value, [silent.code.dense()])[0]).all()


@every_case
def test_ghosts_teach_dead_latents_alone_and_are_none_without_them(case: str) -> None:
    made = dictionary(case, "standard")
    out, dead_L = made(cases.random_rows(case, ROWS)), half_dead(made.latents)
    term = Ghost("ghost", constant(1))
    assert not term(made, out, Now(0, torch.zeros_like(dead_L))).requires_grad
    value = term(made, out, Now(0, dead_L))
    assert value.item() == pytest.approx(Reconstruction("recon", constant(1))(made, out, Now(0, dead_L)).item())
    value.backward()
    grad_L = made.activation.bias_L.grad
    assert grad_L is not None and grad_L[dead_L].all() and not grad_L[~dead_L].any()
    with torch.no_grad():
        made.activation.bias_L[0] = 1e3  # exp of it is infinite
    assert float(term(made, made(cases.random_rows(case, ROWS)), Now(0, dead_L))) == 0
