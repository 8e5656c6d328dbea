"""The loss of every method, and its gradient by every parameter, equal the paper's formula in fp64.

The formulas stand here in full, on dense matrices; weights have dead latents, latents that are alike to the bit (ties),
latents that write nothing, and there are rows of zeros.

Letters: B rows of a batch, L latents.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import CASES
from tests.train.dense import Dense, aux, full, gradients, places, squared, top_mask, top_mask_of_batch
from train.kernels.choice import Codes, Kernels
from train.objective import Now
from train.trainer import Trainer

ROWS, STEP, STEPS, K, K_AUX = 7, 60, 100, 4, 5
Rows = Mapping[str, Tensor]
Formula = Callable[[Dense, Rows, Tensor, Tensor], Tensor]  # (weights, rows, dead L, norm L) -> loss


def lengths(x: Rows, y: Rows) -> Tensor:
    """The mean over rows of |x - y|, summed over sources; of an error of 0 its gradient is 0."""
    total = torch.zeros((), dtype=torch.float64)
    for name in y:
        errors = (x[name].double() - y[name]).square().sum(1)
        total = total + torch.stack([one.sqrt() if one > 0 else 0 * one for one in errors]).mean()
    return total


def l1(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor, error: Any = squared) -> Tensor:
    """|x - y|^2 + 0.7 sum f |d|"""
    f_BL = dense.h(x).clamp_min(0)
    return error(x, dense.y(f_BL)) + 0.7 * (f_BL * norm_L).sum(1).mean()


def entropy(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor) -> Tensor:
    """... + 0.3 mean over rows of - sum q log q, q = f |d| / sum f |d|"""
    rows = []
    for score_L in dense.h(x).clamp_min(0) * norm_L:
        q = score_L[score_L > 0] / score_L.sum()
        rows.append(-(q * q.log()).sum())
    return l1(dense, x, dead_L, norm_L) + 0.3 * torch.stack(rows).mean()


def ghost(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor) -> Tensor:
    """... + 0.5 |e - g|^2 x |e|^2 / |e - g|^2 (the last factor as given), g: exp(h) of the dead, half as long as e"""
    y = dense.y(dense.h(x).clamp_min(0))
    error = {name: (x[name].double() - y[name]).detach() for name in y}
    made = dense.y(dense.h(x).exp() * dead_L, bias=False)
    long_B1, made_B1 = (torch.cat(list(some.values()), 1).norm(dim=1, keepdim=True).detach() for some in (error, made))
    value = squared(error, {name: made[name] * long_B1 / made_B1 / 2 for name in made})
    size = squared(error, {name: torch.zeros_like(e) for name, e in error.items()})
    return l1(dense, x, dead_L, norm_L) + 0.5 * value * (size / value).detach()


def topk(
    dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor, form: str = "input", multi: float = 0, error: Any = squared
) -> Tensor:
    """|x - y|^2 + AuxK / 32 (+ |x - y of 4 k|^2 / 8)"""
    f_BL = dense.h(x).clamp_min(0)
    y = dense.y(dense.chosen(f_BL, norm_L, lambda score_BL: top_mask(score_BL, K)))
    more = multi * error(x, dense.y(dense.chosen(f_BL, norm_L, lambda score_BL: top_mask(score_BL, 4 * K))))
    return error(x, y) + aux(dense, x, y, dead_L, K_AUX, form) / 32 + more


def batch_topk(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor) -> Tensor:
    f_BL = dense.h(x).clamp_min(0)
    y = dense.y(dense.chosen(f_BL, norm_L, lambda score_BL: top_mask_of_batch(score_BL, K * ROWS)))
    return squared(x, y) + aux(dense, x, y, dead_L, K_AUX) / 32


def matryoshka(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor, error: Any = squared) -> Tensor:
    """The mean over prefixes (a quarter, then all, of every span) of |x - y of the prefix|^2, + AuxK / 32"""
    f_BL = dense.h(x).clamp_min(0)
    codes = dense.chosen(f_BL, norm_L, lambda score_BL: top_mask_of_batch(score_BL, K * ROWS))
    early_L = torch.cat([torch.arange(span.size) < round(span.size / 4) for span in dense.wiring.spans])
    early = codes * early_L if isinstance(codes, Tensor) else {name: f_BL * early_L for name, f_BL in codes.items()}
    prefixes = [error(x, dense.y(early)), error(x, dense.y(codes))]
    return sum(prefixes) / 2 + aux(dense, x, dense.y(codes), dead_L, K_AUX) / 32


def gate(dense: Dense, x: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(f, relu(pi), what a frozen decoder makes of relu(pi)), pi = W x + b, f = 1[pi > 0] relu(exp(r) W x + m)"""
    inner_BL = dense.h(x) - dense.bias_L
    pi_BL = inner_BL + dense.bias_L
    size_BL = (dense.own["rescale_L"].exp() * inner_BL + dense.own["magnitude_L"]).clamp_min(0)
    decoder, bias, skip = ({n: v.detach() for n, v in t.items()} for t in (dense.decoder, dense.bias, dense.skip))
    frozen = Dense(dense.wiring, dense.encoder, decoder, bias, dense.bias_L, {}, skip, x)
    return (pi_BL > 0) * size_BL, pi_BL.clamp_min(0), squared(x, frozen.y(pi_BL.clamp_min(0)))


def gated(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor) -> Tensor:
    f_BL, gate_BL, frozen = gate(dense, x)
    return squared(x, dense.y(f_BL)) + 0.7 * (gate_BL * norm_L).sum(1).mean() + frozen


def p_now() -> float:
    """Ten values from 1 to 0.2, at steps spaced evenly from 10 to 90 of 100."""
    passed = [n for n in range(10) if int(10 + 80 * n / 9) <= STEP]
    return 1 - 0.8 * passed[-1] / 9


def powers(score_BL: Tensor, form: str) -> Tensor:
    p, sums = p_now(), []
    for score_L in score_BL:
        total = (score_L[score_L > 0] ** p).sum()
        sums.append(total if form == "lp_p" else total ** (1 / p) if total > 0 else 0 * total)
    return torch.stack(sums).mean()


def p_anneal(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor, form: str = "lp_p") -> Tensor:
    f_BL = dense.h(x).clamp_min(0)
    return squared(x, dense.y(f_BL)) + 0.4 * powers(f_BL * norm_L, form)


def gated_anneal(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor) -> Tensor:
    f_BL, gate_BL, frozen = gate(dense, x)
    return squared(x, dense.y(f_BL)) + 0.4 * powers(gate_BL * norm_L, "lp_p") + frozen


def jumprelu(dense: Dense, x: Rows, dead_L: Tensor, norm_L: Tensor, penalty: str = "l0") -> Tensor:
    """h 1[h > t] and 1[h > t], with - t/e K and - 1/e K as their derivatives by t."""
    h_BL, t_L, e = dense.h(x), dense.own["log_threshold_L"].exp(), 0.4
    on_BL, fixed_L = (h_BL > t_L).double(), t_L.detach()
    k_BL = (((h_BL - t_L) / e).abs() < 0.5).double()
    assert 5 < k_BL.sum() < k_BL.numel() / 2
    f_BL = h_BL * on_BL - fixed_L / e * k_BL * (t_L - fixed_L)
    step_BL = on_BL - k_BL / e * (t_L - fixed_L)
    price = {
        "l0": lambda: step_BL.sum(1).mean(),
        "target": lambda: (step_BL.sum(1).mean() / 9 - 1) ** 2,
        "tanh": lambda: (
            torch.tanh(4 * f_BL * norm_L).sum(1).mean() + 0.2 / 0.6 * ((t_L - h_BL).clamp_min(0) * norm_L).sum(1).mean()
        ),
    }
    return squared(x, dense.y(f_BL)) + 0.6 * price[penalty]()


FEW: dict[str, Any] = {"k": K, "k_aux": K_AUX}
VARIANTS: dict[str, tuple[dict[str, Any], Formula]] = {
    "standard": ({"name": "standard", "l1": 0.7}, l1),
    "standard with entropy": ({"name": "standard", "l1": 0.7, "entropy": 0.3}, entropy),
    "standard with ghosts": ({"name": "standard", "l1": 0.7, "ghost": 0.5}, ghost),
    "topk": ({"name": "topk", **FEW}, topk),
    "topk with the error's AuxK": ({"name": "topk", **FEW, "aux_form": "error"}, lambda *g: topk(*g, form="error")),
    "multi-topk": ({"name": "topk", **FEW, "multi": 0.125}, lambda *g: topk(*g, multi=1 / 8)),
    "batch_topk": ({"name": "batch_topk", **FEW}, batch_topk),
    "standard by lengths": ({"name": "standard", "l1": 0.7, "recon": "norm"}, lambda *g: l1(*g, error=lengths)),
    "multi-topk by lengths": (
        {"name": "topk", **FEW, "multi": 0.125, "recon": "norm"}, lambda *g: topk(*g, multi=1 / 8, error=lengths),
    ),
    "matryoshka by lengths": (
        {"name": "matryoshka", **FEW, "groups": [0.25, 0.75], "recon": "norm"},
        lambda *g: matryoshka(*g, error=lengths),
    ),
    "matryoshka": ({"name": "matryoshka", **FEW, "groups": [0.25, 0.75]}, matryoshka),
    "gated": ({"name": "gated", "l1": 0.7}, gated),
    "p_anneal": ({"name": "p_anneal", "lp": 0.4}, p_anneal),
    "p_anneal of roots": ({"name": "p_anneal", "lp": 0.4, "form": "lp"}, lambda *g: p_anneal(*g, form="lp")),
    "gated_anneal": ({"name": "gated_anneal", "lp": 0.4}, gated_anneal),
    **{
        f"jumprelu, {penalty}": (
            {"name": "jumprelu", "price": 0.6, "penalty": penalty, "bandwidth": 0.4, "threshold": 0.3, "target": 9,
             "silent": 0.2 if penalty == "tanh" else 0},
            lambda *g, penalty=penalty: jumprelu(*g, penalty=penalty),
        ) for penalty in ("l0", "target", "tanh")
    },
}  # fmt: skip


def made(case: str, table: dict[str, Any], norm: str, skip: bool = False, kernels: Codes = "auto") -> Trainer:
    """Weights as in the head of this file."""
    wires = {"kind": CASES[case][0], "latents": cases.LATENTS, "norm": norm, "skip": skip}
    trainer = cases.trainer(case, table["name"], STEPS, method=table, wiring=wires)
    dictionary = trainer.dictionary.double()
    dictionary.kernels = Kernels(kernels)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        dictionary.activation.bias_L[12:18] = -1e3  # never fire
        for table, side in ((dictionary.encoder, "readers"), (dictionary.decoder, "writers")):
            for name, weights_SD in table.items():
                own = torch.cumsum(places(dictionary.wiring, name, side), 0) - 1  # the row of each latent
                weights_SD[own[21:24]] = weights_SD[own[24:27]]
        for value in dictionary.activation.parameters():
            value[21:24] = value[24:27].clone()
        for _, weights_SD in dictionary.decoder.items():
            weights_SD[2] = 0
    return trainer


def rows(case: str) -> dict[str, Tensor]:
    x = {name: x_BD.double() for name, x_BD in cases.random_rows(case, ROWS).items()}
    for x_BD in x.values():
        x_BD[1] = 0
    return x


def untied(key: str, grad: Tensor, dense: Dense) -> Tensor:
    """A gradient per latent, [L, ...], those of two latents that are alike as their sum: either may be kept."""
    table, _, source = key.partition(".")
    if table in ("bias", "skip"):
        return grad
    if table in ("encoder", "decoder"):
        grad = full(grad, places(dense.wiring, source, "readers" if table == "encoder" else "writers"))
    return torch.cat([grad[:21], grad[21:24] + grad[24:27], grad[27:]])


def agree(case: str, variant: str, norm: str, skip: bool = False, kernels: Codes = "auto") -> None:
    """The loss, and every gradient, of this variant are those of its formula."""
    table, formula = VARIANTS[variant]
    trainer, x = made(case, table, norm, skip, kernels), rows(case)
    dictionary, dead_L = trainer.dictionary, torch.arange(cases.LATENTS) % 2 == 0
    out, now = dictionary(x), Now(STEP, dead_L)
    value = torch.stack([term.weight(STEP) * term(dictionary, out, now) for term in trainer.terms]).sum()
    dense = Dense.of(dictionary, x)
    wanted = formula(dense, x, dead_L, dense.norm(norm))
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    parameters = dict(dictionary.named_parameters())
    found, right = gradients(value, parameters), gradients(wanted, dense.leaves())
    assert found.keys() == right.keys()
    for key, grad in found.items():
        same = [untied(key, one, dense) for one in (grad, right[key])]
        torch.testing.assert_close(*same, rtol=1e-9, atol=1e-11, msg=key)
    assert all(found[key].any() for key in ("activation.bias_L", *(f"decoder.{name}" for name in dictionary.decoder)))
    assert not skip or found["skip.a to b"].any()


@pytest.mark.parametrize("norm", ["sum", "joint"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_every_gradient_equal_the_formula(case: str, variant: str, norm: str) -> None:
    if case == "transcoder" and VARIANTS[variant][0].get("aux_form") == "error":
        pytest.skip("refused: there is no error of what is only read")
    agree(case, variant, norm)


@pytest.mark.parametrize("variant", ["topk", "topk with the error's AuxK", "multi-topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("case", ["crosscoder", "dedicated", "dedicated of 3"])
def test_of_decoupled_sources_each_selects_by_its_own_decoder_norms(case: str, variant: str) -> None:
    agree(case, variant, "decoupled")


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "error" not in variant])
def test_a_skip_connection_is_learned_beside_the_latents(variant: str) -> None:
    agree("transcoder", variant, "sum", skip=True)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_kept_entries_and_whole_matrices_are_one_formula(case: str, variant: str, kernels: Codes) -> None:
    if case == "transcoder" and VARIANTS[variant][0].get("aux_form") == "error":
        pytest.skip("refused: there is no error of what is only read")
    agree(case, variant, "sum", kernels=kernels)


def test_every_method_has_its_formula_here() -> None:
    assert {table["name"] for table, _ in VARIANTS.values()} == set(cases.names())
