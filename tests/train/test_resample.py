"""Dead latents begin again by the six published steps, each span from what it may see.

Letters: N rows, D width of a source, L latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.store import Store
from tests import cases
from tests.build import make_store
from train.fit import fit, resume
from train.prepare import fresh
from train.reader import read
from train.resample import resample, row_losses
from train.trainer import Trainer
from train.wiring import Span

LATENTS = 40
KINDS = {"autoencoder": ["a"], "transcoder": ["a", "b"], "crosscoder": ["a", "b"], "dedicated": ["a", "b"]}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("resample"))


def begun(store: Store, kind: str, name: str = "topk", **keys: Any) -> tuple[Trainer, Any]:
    """A run after some steps, with its order; every third latent is dead."""
    asked = {
        "wiring": {"kind": kind, "latents": LATENTS, "sources": KINDS[kind], "exclusive": 0.25},
        "method": cases.method(name, **({"groups": [0.5, 0.5]} if name == "matryoshka" else {})),
        "dead_rows": 500, "steps": 200, "resample": {"rows": 120, "steps": [100]}, **keys,
    }  # fmt: skip
    [run] = cases.ready(store, asked)
    trainer = fresh(store, run, {})
    for step in range(4):
        rows = np.sort(run.order.step(step, 16))
        [x] = read(store, run.sources, rows, len(rows))
        trainer.update(x)
    trainer.idle_L[:] = 0
    trainer.idle_L[::3] = 500
    return trainer, run.order


def joint(trainer: Trainer, span: Span, side: str) -> Tensor:
    """The encoder rows or decoder vectors of a span over its sources together, [latents, D + D + ..]."""
    dictionary, wiring = trainer.dictionary, trainer.dictionary.wiring
    table, ports = {
        "readers": (dictionary.encoder, dictionary.reads), "writers": (dictionary.decoder, dictionary.writes),
    }[side]  # fmt: skip
    latents = torch.arange(LATENTS)[wiring.slices[span.name]]
    return torch.cat([table[name][ports[name].local_L[latents]].detach() for name in getattr(span, side)], 1)


@every_kind
def test_dead_latents_take_their_directions_from_rows_at_the_published_lengths(store: Store, kind: str) -> None:
    trainer, order = begun(store, kind)
    wiring, scale = trainer.dictionary.wiring, trainer.dictionary.scale
    before = {(s.name, side): joint(trainer, s, side) for s in wiring.spans for side in ("readers", "writers")}
    dead_L = trainer.dead_L
    assert resample(trainer, store, order) == {s.name: int(dead_L[wiring.slices[s.name]].sum()) for s in wiring.spans}
    rows = order.sample(120, seed=trainer.step)
    [x] = read(store, wiring.widths, rows, len(rows))
    for span in wiring.spans:
        dead = dead_L[wiring.slices[span.name]]
        taken = []
        for side, length in (("readers", 0.2), ("writers", 1.0)):
            old, new = before[span.name, side], joint(trainer, span, side)
            assert torch.equal(new[~dead], old[~dead])
            mean = old[~dead].norm(dim=1).mean()
            torch.testing.assert_close(new[dead].norm(dim=1), torch.full((int(dead.sum()),), float(mean) * length))
            x_ND = torch.cat([scale.scaled(name, x[name]) for name in getattr(span, side)], 1)
            cosine = torch.cosine_similarity(new[dead][:, None], x_ND[None], dim=2)
            torch.testing.assert_close(cosine.max(1).values, torch.ones(int(dead.sum())))
            taken.append(cosine.argmax(1))
        assert torch.equal(taken[0], taken[1])  # both of one row
        assert len(set(taken[0].tolist())) == len(taken[0])  # which no other latent of the span has
    assert not trainer.idle_L[dead_L].any() and not trainer.dead_L.any()


@every_kind
@pytest.mark.parametrize("name", cases.names())
def test_only_what_belongs_to_dead_latents_changes_moments_included(store: Store, kind: str, name: str) -> None:
    trainer, order = begun(store, kind, name)
    dictionary, dead_L = trainer.dictionary, trainer.dead_L
    places = {id(dictionary.encoder[s]): dictionary.reads[s].own(dead_L) for s in dictionary.encoder}
    places |= {id(dictionary.decoder[s]): dictionary.writes[s].own(dead_L) for s in dictionary.decoder}
    places |= {id(one): dead_L for one in dictionary.activation.parameters()}
    before = {id(p): (p.detach().clone(), {k: v.clone() for k, v in trainer.optimiser.state[p].items()})
              for p in trainer.parameters}  # fmt: skip
    resample(trainer, store, order)
    for p in trainer.parameters:
        value, moments = before[id(p)]
        dead = places.get(id(p), torch.zeros(len(p), dtype=torch.bool))
        assert torch.equal(p[~dead], value[~dead])
        for key, old in moments.items():
            new = trainer.optimiser.state[p][key]
            if key == "step":
                assert torch.equal(new, old)
            else:
                assert torch.equal(new[~dead], old[~dead]) and not new[dead].any()
    for key, value in dictionary.activation.begins.items():
        assert torch.allclose(dictionary.activation.get_parameter(key)[dead_L], torch.tensor(value))
    for step in range(3):
        rows = np.sort(order.step(step, 16))
        [x] = read(store, dictionary.wiring.widths, rows, len(rows))
        assert all(torch.isfinite(value) for value in trainer.update(x).values())


def test_rows_are_drawn_by_the_square_of_the_loss_on_what_the_span_writes(store: Store) -> None:
    """Of many runs with other seeds: only_a's draws follow a's loss alone."""
    counts_N, wanted_N = np.zeros(120), np.zeros(120)
    for seed in range(60):
        trainer, order = begun(store, "dedicated", seed=seed)
        rows = order.sample(120, seed=trainer.step)
        loss_N = row_losses(trainer, store, rows)["a"].detach().numpy()
        resample(trainer, store, order)
        [x] = read(store, ["a"], rows, len(rows))
        scaled_ND = trainer.dictionary.scale.scaled("a", x["a"])
        new = joint(trainer, trainer.dictionary.wiring.spans[0], "writers")[::3]
        counts_N[torch.cosine_similarity(new[:, None], scaled_ND[None], dim=2).argmax(1)] += 1
        wanted_N += loss_N**2 / (loss_N**2).sum() * len(new)
    high = wanted_N > np.quantile(wanted_N, 0.75)
    assert counts_N[high].sum() > 1.6 * counts_N[~high].sum()
    assert abs(counts_N[high].sum() / counts_N.sum() - wanted_N[high].sum() / wanted_N.sum()) < 0.1


def test_the_loss_of_a_row_is_that_of_the_dictionary_at_evaluation(store: Store) -> None:
    trainer, order = begun(store, "dedicated", "batch_topk")
    rows = order.sample(30, seed=1)
    [x] = read(store, ["a", "b"], rows, 30)
    losses = row_losses(trainer, store, rows)
    assert trainer.dictionary.training
    out = trainer.dictionary.eval()(x)
    for name, loss_N in losses.items():
        torch.testing.assert_close(loss_N.float(), (out.target[name] - out.y[name]).square().sum(1).detach())


def test_without_dead_latents_nothing_happens(store: Store) -> None:
    trainer, order = begun(store, "dedicated")
    trainer.idle_L[:] = 0
    before = {name: value.clone() for name, value in trainer.dictionary.state_dict().items()}
    assert resample(trainer, store, order) == {"only_a": 0, "shared": 0, "only_b": 0}
    assert all(torch.equal(value, before[name]) for name, value in trainer.dictionary.state_dict().items())


def test_a_span_without_a_live_latent_takes_its_lengths_from_the_others(store: Store) -> None:
    trainer, order = begun(store, "dedicated")
    trainer.idle_L[:10] = 500
    resample(trainer, store, order)
    assert joint(trainer, trainer.dictionary.wiring.spans[0], "writers").norm(dim=1).min() > 0.1
    trainer.idle_L[:] = 500  # no latent lives at all
    resample(trainer, store, order)
    assert all(bool(p.isfinite().all()) for p in trainer.parameters)


def test_a_run_that_resamples_and_is_stopped_goes_on_to_the_same_bits(store: Store, tmp_path: Path) -> None:
    asked = {
        **cases.MOMENT, "wiring": {"kind": "dedicated", "latents": LATENTS}, "steps": 12, "dead_rows": 32,
        "resample": {"steps": [4, 8], "rows": 100}, "log": {"every": 1, "checkpoint": 4},
        "optimiser": {"ema": 0.9, "warmup": 2},
    }  # fmt: skip
    whole = fit(store, asked, tmp_path / "whole", quiet=True)
    log = (whole.folder / "metrics.jsonl").read_text()
    assert log.count('"event": "resample"') == 2 and '"only_a"' in log
    part = fit(store, asked, tmp_path / "part", quiet=True)
    for name in ("report.html", "measure.json"):
        (part.folder / name).unlink()
    for path in (part.folder / "checkpoints").glob("step_00000012"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again = resume(part.folder, store, quiet=True)  # from step 8, which resamples again
    name = "dictionary/dictionary.safetensors"
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert (again.folder / "metrics.jsonl").read_text().count('"event": "resample"') == 2


def test_designated_shared_latents_begin_again_with_one_vector(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr", rows=300, sources={"a": 6, "b": 6}, chunk_rows=16, documents=20)
    spans = [{"name": "designated", "size": 0.5, "tied": True}, {"name": "free"}]
    trainer, order = begun(store, "crosscoder", wiring={"kind": "spans", "latents": LATENTS, "spans": spans})
    assert resample(trainer, store, order)["designated"] > 0
    a_SD, b_SD = trainer.dictionary.decoder["a"], trainer.dictionary.decoder["b"]
    assert torch.equal(a_SD[:20], b_SD[:20]) and not torch.equal(a_SD[20:], b_SD[20:])
