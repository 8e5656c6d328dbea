"""What the exclusive spans of a dedicated dictionary are, for two and three sources of different widths.

Always, bit for bit: their pre-activations see their own source alone, and they write to their own source alone.
Their codes see their own source alone where no budget is shared: methods with a threshold, at evaluation.
Their gradients see other sources in two ways only: through a shared budget, and through the error of their own source,
to which the shared latents contribute. (Behind the gradient, the clip by its norm over all weights couples everything.)

Letters: B rows of a batch, L latents.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.contracts.test_purity import rows
from train.dictionary import Dictionary
from train.method import find
from train.objective import Now
from train.trainer import Trainer
from train.wiring import Span

SHARES = {"topk": (True, False), "batch_topk": (True,), "matryoshka": (True,)}  # a budget, while training or not
WITHOUT_BUDGET = {
    name: tuple(mode for mode in (True, False) if mode not in SHARES.get(name, ())) for name in cases.names()
}
every_case = pytest.mark.parametrize("case", ["dedicated", "dedicated of 3"])
every_method = pytest.mark.parametrize("name", cases.names())


def trained(case: str, name: str) -> Trainer:
    trainer = cases.trainer(case, name, dead_rows=64)
    planted = cases.planted(case)
    for step in range(10):
        trainer.update(planted.rows(64, seed=step))
    return trainer


def exclusive(dictionary: Dictionary) -> list[tuple[str, Span, slice]]:
    """(source, span, its latents) of every exclusive span."""
    wiring = dictionary.wiring
    found = [(span.readers[0], span, wiring.slices[span.name]) for span in wiring.spans if len(span.readers) == 1]
    assert [source for source, _, _ in found] == list(wiring.widths)
    return found


def others_changed(x: dict[str, Tensor], source: str) -> list[dict[str, Tensor]]:
    """The same rows of `source`, with zeros, noise, and huge values in place of all others."""
    generator = torch.Generator().manual_seed(5)
    changes = [torch.zeros_like, lambda t: torch.randn(t.shape, generator=generator), lambda t: 1e6 * t]
    return [{name: t if name == source else change(t) for name, t in x.items()} for change in changes]


@every_case
@every_method
def test_forbidden_weights_do_not_exist_and_nothing_brings_them_back(case: str, name: str, tmp_path: Path) -> None:
    trainer = trained(case, name)
    wiring = trainer.dictionary.wiring
    moved = copy.deepcopy(trainer.dictionary).to(torch.float64).to(torch.float32)
    trainer.dictionary.save(tmp_path / "d")
    for dictionary in (trainer.dictionary, moved, Dictionary.load(tmp_path / "d")):
        for source, width in wiring.widths.items():
            allowed = wiring.latents - sum(span.size for span in wiring.spans if source not in span.readers)
            assert tuple(dictionary.encoder[source].shape) == (allowed, width)
            assert tuple(dictionary.decoder[source].shape) == (allowed, width)
    shapes = sorted(tuple(parameter.shape) for parameter in trainer.dictionary.parameters())
    moments = trainer.optimiser.state_dict()["state"].values()
    assert sorted(tuple(moment["exp_avg_sq"].shape) for moment in moments) == shapes


@every_case
@every_method
def test_pre_activations_of_an_exclusive_span_see_their_own_source_alone(case: str, name: str) -> None:
    dictionary, x = trained(case, name).dictionary, rows(case, 50)
    for training in (True, False):
        dictionary.train(training)
        for source, _, latents in exclusive(dictionary):
            pre = dictionary.pre(x)
            for changed in others_changed(x, source):
                other = dictionary.pre(changed)
                assert torch.equal(other.h_BL[:, latents], pre.h_BL[:, latents])
                assert torch.equal(other.dense_BL[:, latents], pre.dense_BL[:, latents])
                assert not torch.equal(other.h_BL, pre.h_BL)


@every_case
@every_method
def test_an_exclusive_span_writes_to_its_own_source_alone(case: str, name: str) -> None:
    dictionary, x = trained(case, name).dictionary.eval(), rows(case, 50)
    f_BL = dictionary.encode(x).detach()
    for source, _, latents in exclusive(dictionary):
        loud_BL = f_BL.clone()
        loud_BL[:, latents] += 1e6
        before, after = dictionary.decode(f_BL), dictionary.decode(loud_BL)
        for name_ in dictionary.wiring.widths:
            assert torch.equal(after[name_], before[name_]) == (name_ != source)


@every_case
@every_method
def test_what_an_exclusive_span_would_write_on_its_own_sees_its_own_source_alone(case: str, name: str) -> None:
    dictionary, x = trained(case, name).dictionary, rows(case, 50)
    for source, _, latents in exclusive(dictionary):

        def written(x: dict[str, Tensor], source: str = source, latents: slice = latents) -> Tensor:
            f_BL = torch.zeros(len(x[source]), dictionary.latents)
            f_BL[:, latents] = dictionary.pre(x).h_BL[:, latents].clamp_min(0)
            return dictionary.decode(f_BL)[source]

        assert all(torch.equal(written(changed), written(x)) for changed in others_changed(x, source))


@every_case
@pytest.mark.parametrize("name", [name for name, modes in WITHOUT_BUDGET.items() if modes])
def test_codes_of_an_exclusive_span_see_their_own_source_alone_where_no_budget_is_shared(case: str, name: str) -> None:
    dictionary, x = trained(case, name).dictionary, rows(case, 50)
    for training in WITHOUT_BUDGET[name]:
        dictionary.train(training)
        f_BL = dictionary.encode(x)
        for source, _, latents in exclusive(dictionary):
            assert (f_BL[:, latents] > 0).any()
            for changed in others_changed(x, source):
                assert torch.equal(dictionary.encode(changed)[:, latents], f_BL[:, latents])


@every_case
@pytest.mark.parametrize("name", SHARES)
def test_codes_of_an_exclusive_span_see_other_sources_through_a_shared_budget(case: str, name: str) -> None:
    dictionary, x = trained(case, name).dictionary, rows(case, 50)
    for training in SHARES[name]:
        dictionary.train(training)
        f_BL = dictionary.encode(x)
        for source, _, latents in exclusive(dictionary):
            loud = {name_: t if name_ == source else 100 * t for name_, t in x.items()}
            changed_BL = dictionary.encode(loud)[:, latents]
            both_BL = (changed_BL > 0) & (f_BL[:, latents] > 0)
            assert (changed_BL > 0).sum() < (f_BL[:, latents] > 0).sum()  # the others take the budget
            assert torch.equal(changed_BL[both_BL], f_BL[:, latents][both_BL])  # what is kept keeps its value


def own_parameters(trainer: Trainer, source: str, span: Span, latents: slice) -> dict[str, Tensor]:
    """The gradients of a span's own weights and biases."""
    dictionary = trainer.dictionary
    first = sum(s.size for s in dictionary.wiring.spans[: dictionary.wiring.spans.index(span)] if source in s.readers)
    rows_S = slice(first, first + span.size)
    grads = {
        "encoder": dictionary.encoder[source].grad, "decoder": dictionary.decoder[source].grad,
        "bias": dictionary.activation.bias_L.grad,
    }  # fmt: skip
    places = {"encoder": rows_S, "decoder": rows_S, "bias": latents}
    return {key: torch.zeros(1) if grad is None else grad[places[key]].clone() for key, grad in grads.items()}


def gradients(trainer: Trainer, x: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Of the whole loss, per exclusive span."""
    dictionary = trainer.dictionary.train()
    dictionary.zero_grad()
    now = Now(trainer.step, torch.zeros(dictionary.latents, dtype=torch.bool))
    out = dictionary(x)
    torch.stack([term.weight(trainer.step) * term(dictionary, out, now) for term in trainer.terms]).sum().backward()
    return {span.name: own_parameters(trainer, source, span, one) for source, span, one in exclusive(dictionary)}


@every_case
@every_method
def test_the_error_of_other_sources_teaches_an_exclusive_span_nothing(case: str, name: str) -> None:
    trainer = trained(case, name)
    dictionary, x = trainer.dictionary.train(), rows(case, 50)
    for source, span, latents in exclusive(dictionary):
        dictionary.zero_grad()
        out = dictionary(x)
        others = [(out.target[n] - out.y[n]).square().sum() for n in dictionary.wiring.writers if n != source]
        torch.stack(others).sum().backward()
        assert not any(grad.any() for grad in own_parameters(trainer, source, span, latents).values())


@every_case
@every_method
def test_gradients_of_an_exclusive_span_see_its_own_source_alone_where_budget_and_shared_latents_are_silent(
    case: str, name: str
) -> None:
    latents = cases.LATENTS
    keys = {"k": latents} if "k" in find(name).model_fields else {}
    trainer = cases.trainer(case, name, method=cases.method(name, **keys), dead_rows=10**9)
    with torch.no_grad():
        trainer.dictionary.activation.bias_L[trainer.dictionary.wiring.slices["shared"]] = -1e9
    x = rows(case, 50)
    found = gradients(trainer, x)
    for source, span, _ in exclusive(trainer.dictionary):
        assert all(grad.any() for grad in found[span.name].values())
        for changed in others_changed(x, source):
            after = gradients(trainer, changed)[span.name]
            assert all(torch.equal(after[key], grad) for key, grad in found[span.name].items())


@every_case
@every_method
def test_gradients_of_an_exclusive_span_see_other_sources_through_the_error_that_shared_latents_leave(
    case: str, name: str
) -> None:
    keys = {"k": cases.LATENTS} if "k" in find(name).model_fields else {}
    trainer = cases.trainer(case, name, method=cases.method(name, **keys), dead_rows=10**9)
    x = rows(case, 50)
    found = gradients(trainer, x)
    for source, span, _ in exclusive(trainer.dictionary):
        after = gradients(trainer, others_changed(x, source)[1])[span.name]
        assert not torch.equal(after["encoder"], found[span.name]["encoder"])
