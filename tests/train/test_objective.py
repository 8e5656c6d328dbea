"""Each term equals its formula in fp64, values and gradients.

Letters: B rows of a batch, D width of a source, L latents.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import CASES
from tests.train.dense import Dense, kept, places, top_mask
from train.code import Forward
from train.dictionary import Dictionary
from train.objective import L1, AuxK, Now, Reconstruction, Term
from train.schedule import constant

every_case = pytest.mark.parametrize("case", CASES)
METHODS = ("standard", "topk", "batch_topk")
ROWS, K, K_AUX = 6, 3, 4


def dictionary(case: str, name: str, norm: str = "sum") -> Dictionary:
    made = cases.trainer(case, name, wiring={"kind": CASES[case][0], "latents": 48, "norm": norm}).dictionary
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def half_dead(latents: int) -> Tensor:
    return torch.arange(latents) % 2 == 0


def aux(dense: Dense, x: dict[str, Tensor], y: dict[str, Tensor], dead_L: Tensor, k_aux: int) -> Tensor:
    """AuxK as Gao et al. write it, from dense matrices: e = x - y as given, e_hat from the top dead pre-activations."""
    h_BL = dense.h(x)
    dead_only_BL = h_BL.detach().masked_fill(~dead_L, -torch.inf)
    chosen_BL = top_mask(dead_only_BL, min(k_aux, int(dead_L.sum()))) & dead_L
    guess = dense.y(h_BL.clamp_min(0) * chosen_BL, bias=False)
    errors = {name: (x[name].double() - y[name]).detach() for name in y}
    return torch.stack([(errors[name] - guess[name]).square().sum(1).mean() for name in y]).sum()


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


@every_case
@pytest.mark.parametrize("norm", ["sum", "joint", "mean", "none"])
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
