"""What the exclusive spans of a dedicated dictionary are, for two and three sources of different widths.

Always, bit for bit: their pre-activations see their own source alone, and they write to their own source alone.
Their codes see their own source alone where no budget is shared: methods with a threshold, at evaluation.
Their gradients see other sources in two ways only: through a shared budget, and through the error of their own source,
to which the shared latents contribute. (Behind the gradient, the clip by its norm over all weights couples everything.)

Letters: B rows of a batch, L latents.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.store import Store
from tests import cases
from tests.build import make_store
from tests.contracts.test_purity import rows, same
from train.dictionary import Dictionary
from train.fit import fit, resume
from train.method import find
from train.objective import Now
from train.reader import read
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
    changes = [torch.zeros_like, lambda t: torch.randn(t.shape, generator=generator).to(t.dtype), lambda t: 1e6 * t]
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


WHOLE: dict[str, Any] = {
    "steps": 200, "batch": 32, "threads": 1, "device": "cpu", "dead_rows": 400, "log": {"checkpoint": 100},
    "resample": {"steps": [50, 150], "rows": 100, "idle_rows": 64},
    "optimiser": {"lr": 1e-2, "warmup": 10, "weight_decay": 0.01},
}  # fmt: skip


DEADLY = {"l1": 8.0, "lp": 8.0, "price": 30.0}  # prices at which some latents die on random rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("whole") / "store.zarr", rows=300, documents=20, sources=cases.WIDTHS)


@every_method
def test_after_decay_resampling_a_break_and_every_kind_of_copy_an_exclusive_latent_sees_its_own_source_alone(
    name: str, store: Store, tmp_path: Path
) -> None:
    wires = {"kind": "dedicated", "latents": cases.LATENTS, "exclusive": 0.2}
    keys = {key: price for key, price in DEADLY.items() if key in find(name).model_fields}
    run = fit(store, {**WHOLE, "wiring": wires, "method": cases.method(name, **keys)}, tmp_path / "run", quiet=True)
    whole = run.dictionary
    for left in (run.folder / "checkpoints" / "step_00000200", run.folder / "report.html"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    events = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(sum(event["latents"].values()) for event in events if event["event"] == "resample")
    resumed = resume(run.folder, quiet=True).dictionary
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    resumed.save(tmp_path / "saved")
    rounded = copy.deepcopy(resumed).to(torch.bfloat16)
    [rows_] = read(store, store.header.sources, np.arange(100), 100)
    for dictionary in (resumed, copy.deepcopy(resumed), Dictionary.load(tmp_path / "saved"), resumed.fold(), rounded):
        x = {source: x_BD.to(dictionary.activation.bias_L.dtype) for source, x_BD in rows_.items()}
        for source, _, latents in exclusive(dictionary):
            h_BL, f_BL = dictionary.pre(x).h_BL, dictionary.encode(x)
            alone_BL = torch.zeros_like(h_BL)
            alone_BL[:, latents] = h_BL[:, latents].clamp_min(0)
            y_BD = dictionary.decode(alone_BL)[source]
            for changed in others_changed(x, source):
                other_BL = dictionary.pre(changed).h_BL
                assert torch.equal(other_BL[:, latents], h_BL[:, latents]) and not torch.equal(other_BL, h_BL)
                alone_BL[:, latents] = other_BL[:, latents].clamp_min(0)
                assert torch.equal(dictionary.decode(alone_BL)[source], y_BD)
                if False in WITHOUT_BUDGET[name]:  # at evaluation
                    assert torch.equal(dictionary.encode(changed)[:, latents], f_BL[:, latents])


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
