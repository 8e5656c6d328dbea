"""Two ranks that share latents: what they select, learn, keep and measure is what one process does.

Letters: B rows of a batch, L latents, S latents of one source, R ranks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError, WiringError
from shared.store import Store
from tests import cases
from tests.train.test_parallel import ASKED, RANKS, got, on_two, put, records, sweep_it, train_it
from train import checkpoint, parallel, shards
from train.dictionary import Dictionary
from train.fit import fit, resume, sweep
from train.kernels.select import top_of_batch, top_per_row
from train.methods.matryoshka import group_of
from train.trainer import Trainer

LATENTS = 80  # so that spans, and halves of them, can be shared by two
SHARED = {**ASKED, "wiring": {"kind": "dedicated", "latents": 80}, "parallel": "latents"}


def over_latents(work: Callable[..., None], *given: Any) -> None:
    with parallel.over("latents"):
        work(*given)


def on_both(folder: Path, work: Callable[..., None], *given: Any) -> list[Any]:
    """What `work` puts on two ranks that share latents."""
    assert on_two(over_latents, work, folder, *given) == [0, 0]
    return got(folder)


# --- what each has --------------------------------------------------------------------------------------------------


def take_apart(folder: Path) -> None:
    rank = parallel.rank()
    wiring = cases.wiring("dedicated", LATENTS)
    local = shards.local(wiring)
    assert [span.size for span in local.spans] == [8, 24, 8] and shards.joined(local) == wiring
    sizes = shards.sizes(local, "encoder.a")
    assert sizes == [8, 24] and shards.sizes(local, "decoder.b") == [24, 8]
    assert shards.sizes(local, "activation.bias_L") == [8, 24, 8] and shards.sizes(local, "activation.mean") is None
    assert shards.sizes(local, "bias.of_L") is None  # a source of that name
    whole = torch.arange(64.0)[:, None]
    own = shards.own(whole, sizes)
    assert own.flatten().tolist() == [*range(rank, 16, 2), *range(16 + rank, 64, 2)]
    again = shards.whole(own, sizes)
    assert again is own if rank else torch.equal(again, whole)
    assert shards.own(whole, None) is whole and shards.whole(whole, None) is whole
    with pytest.raises(WiringError, match="cannot be shared evenly: 9 of only_a over 2 ranks"):
        shards.local(cases.wiring("dedicated", 45))
    with pytest.raises(WiringError, match="group of latents cannot be shared evenly: the first 5 latents of all"):
        group_of(shards.local(cases.wiring("autoencoder", 10)), [0.5, 0.5])
    assert parallel.row_ranks() == 1 and parallel.share(7) == 7 and parallel.row_rank() == 0


def test_each_rank_has_every_second_latent_of_a_span(tmp_path: Path) -> None:
    assert on_two(over_latents, take_apart, tmp_path) == [0, 0]


def test_one_process_has_all(tmp_path: Path) -> None:
    with parallel.over("latents"):
        wiring, x = cases.wiring("dedicated"), torch.ones(3, requires_grad=True)
        assert shards.local(wiring) == wiring and shards.total(x) is x
        assert shards.own(x, [3]) is x and shards.whole(x, [3]) is x


# --- what they select -----------------------------------------------------------------------------------------------


def scores(case: int) -> tuple[Tensor, int]:
    """Scores [R, B, L] and k; many are equal, rank 1 has the larger ones, or none is a number."""
    generator = torch.Generator().manual_seed(case)
    score = torch.randn(RANKS, 6, 10, generator=generator, dtype=[torch.float32, torch.float64][case % 2])
    kinds = [score, (score * 2).round() / 2, score + torch.tensor([0.0, 9.0], dtype=score.dtype)[:, None, None],
             torch.zeros_like(score), -score.abs()]  # fmt: skip
    return kinds[case // 2 % 5], [1, 3, 10, 15, 20][case // 10]


def select(folder: Path) -> None:
    found = []
    for case in range(50):
        score, k = scores(case)
        for pick, count in ((top_per_row, k), (top_of_batch, 6 * k)):
            entries = pick(score[parallel.rank()].clone(), count)
            found.append((entries.row_K, entries.latent_K, entries.score_K))
    put(folder, found)


def test_the_largest_of_all_latents_are_selected_exactly_as_many_as_there_are_to_be(tmp_path: Path) -> None:
    both = on_both(tmp_path, select)
    for case in range(50):
        score, k = scores(case)
        whole = score.movedim(0, 1)  # B R L
        for number, of_row in enumerate((True, False)):
            kept = torch.zeros(whole.shape, dtype=torch.bool)
            for rank in range(RANKS):
                row_K, latent_K, score_K = both[rank][2 * case + number]
                assert (torch.diff(row_K * 10 + latent_K) > 0).all()
                assert torch.equal(score_K, score[rank][row_K, latent_K])
                kept[row_K, rank, latent_K] = True
            if of_row:
                assert (kept.sum((1, 2)) == k).all(), case
            parts = whole.flatten(1) if of_row else whole.flatten()[None]
            best = parts.topk(k if of_row else 6 * k, dim=1).values
            found = torch.stack([part[one] for part, one in zip(parts, kept.view(parts.shape), strict=True)])
            assert torch.equal(found.sort(1).values, best.sort(1).values), case


def select_what_is_no_number(folder: Path) -> None:
    score = torch.zeros(2, 4)
    score[1, 2] = -torch.nan if parallel.rank() else 1.0
    put(folder, [top_per_row(score, 1).score_K, top_of_batch(score, 1).score_K])


def test_what_is_not_a_number_is_kept_and_so_is_seen(tmp_path: Path) -> None:
    for of_row, of_batch in on_both(tmp_path, select_what_is_no_number)[1:]:
        assert of_row.isnan().any() and of_batch.isnan().all() and len(of_batch) == 1


# --- what they learn ------------------------------------------------------------------------------------------------


def steps(folder: Path, case: str, name: str, keys: dict[str, Any]) -> None:
    put(folder, trained(case, name, keys))


def trained(case: str, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Six updates: what this rank's latents did, what was told, and (on the first rank) the whole state."""
    given: dict[str, Any] = {"dead_rows": 100, "optimiser": {"lr": 1e-2, "warmup": 2, "ema": 0.5}}
    trainer = cases.trainer(case, name, **{**given, "wiring": {"latents": LATENTS}, **keys})
    kept, told = [], []
    for step in range(6):
        x = cases.random_rows(case, 64, seed=step)
        with torch.no_grad():
            kept.append(trainer.dictionary(x).code.dense() > 0)
        told.append({key: float(value) for key, value in trainer.update(x).items()})
    sizes = shards.of_all(trainer.dictionary.wiring)
    whole = [shards.whole(one.T, sizes).T for one in kept]
    state = trainer.state_dict()
    return {"kept": whole, "told": told, "state": state, "common": [one.detach() for one in trainer.common]}


def alike(one: Any, other: Any) -> None:
    """Two states, to rounding."""
    if isinstance(other, Tensor):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    elif isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in other.items():
            alike(one[key], value)


@pytest.mark.parametrize("codes", ["sparse", "dense"])
@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("case", ["autoencoder", "dedicated of 3"])
def test_two_ranks_that_share_latents_learn_what_one_process_does(
    tmp_path: Path, case: str, name: str, codes: str
) -> None:
    keys = {"kernels": codes}
    first, second = on_both(tmp_path, steps, case, name, keys)
    alone = trained(case, name, keys)
    for step in range(6):
        assert torch.equal(first["kept"][step], alone["kept"][step]), step
        for one in (first, second):
            assert one["told"][step] == pytest.approx(alone["told"][step], rel=1e-4, abs=1e-6)
    assert any(one["dead"] > 0 for one in alone["told"]) or name not in ("topk", "batch_topk")
    alike(first["state"], alone["state"])
    for one, other in zip(first["common"], second["common"], strict=True):
        assert torch.equal(one, other)  # to the bit


VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # case, method, its keys, those of the wiring
    "multi": ("crosscoder", "topk", {"multi": 0.125}, {}),
    "aux of the error": ("crosscoder", "batch_topk", {"aux_form": "error"}, {}),
    "aux of few of the dead": ("autoencoder", "topk", {"k_aux": 1, "aux": 1.0}, {}),
    "decoupled": ("crosscoder", "batch_topk", {}, {"norm": "decoupled"}),
    "skip": ("transcoder", "topk", {}, {"skip": True}),
    "ghost and entropy": ("dedicated", "standard", {"ghost": 1.0, "entropy": 0.1}, {}),
    "tanh and silent": ("crosscoder", "jumprelu", {"penalty": "tanh", "silent": 0.1}, {}),
    "in parts": ("crosscoder", "batch_topk", {}, {}),
    "rows in parts": ("crosscoder", "topk", {}, {}),
    "norm": ("crosscoder", "p_anneal", {"form": "lp", "recon": "norm"}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_it_is_with_every_term(tmp_path: Path, variant: str) -> None:
    case, name, keys, wiring = VARIANTS[variant]
    given: dict[str, Any] = {"method": cases.method(name, **keys), "wiring": {"latents": LATENTS, **wiring}}
    given |= {"micro_batch": 24} if "in parts" in variant else {}
    first, _ = on_both(tmp_path, steps, case, name, given)
    alone = trained(case, name, given)
    for one, other in zip(first["told"], alone["told"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    alike(first["state"], alone["state"])


def lopsided(folder: Path) -> None:
    """Only latents of the first rank, or of none, are dead; and AuxK that is not finite is left out on both."""
    found = []
    for dead in (0, 1, 5):
        trainer = cases.trainer("autoencoder", "topk", wiring={"latents": LATENTS})
        idle_L = torch.zeros(LATENTS, dtype=torch.int64)
        idle_L[: 2 * dead : 2] = trainer.config.dead_rows
        trainer.idle_L = shards.own(idle_L, shards.of_all(trainer.dictionary.wiring))
        told = trainer.update(cases.random_rows("autoencoder", 64))
        found.append({key: float(value) for key, value in told.items()})
    put(folder, found)


def test_a_rank_without_dead_latents_takes_part_in_auxk(tmp_path: Path) -> None:
    first, second = on_both(tmp_path, lopsided)
    lopsided(tmp_path)
    [alone] = [torch.load(tmp_path / "rank0.pt")]
    assert [one["dead"] for one in alone] == pytest.approx([0, 1 / 80, 5 / 80])
    assert alone[0]["aux"] == 0 < alone[1]["aux"] and alone[2]["aux"] > 0
    for one, other, expected in zip(first, second, alone, strict=True):
        assert one == pytest.approx(expected, rel=1e-4) and other == pytest.approx(one)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("shards"))


def test_a_run_is_that_of_one_process(store: Store, tmp_path: Path) -> None:
    assert on_two(train_it, tmp_path, store.path, SHARED) == [0, 0]
    alone = fit(store, SHARED, tmp_path / "alone", quiet=True)
    found = Dictionary.load(tmp_path / "run")
    assert found.config() == alone.dictionary.config()
    alike(dict(found.state_dict()), dict(alone.dictionary.state_dict()))
    keys = ("step", "epoch", "loss", "recon", "aux", "gradient", "l0", "dead", "fve/a", "l0/only_a", "dead/shared")
    for one, other in zip(records(tmp_path / "run", *keys), records(alone.folder, *keys), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert r"\n2 ranks share its latents" in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    both = got(tmp_path)
    assert both[0] == both[1] and both[0]["latents"] == 80
    assert both[0]["sources"]["a"]["fve"] == pytest.approx(alone.figures["sources"]["a"]["fve"], abs=1e-3)


def broken_off(folder: Path, store: Path) -> None:
    update = Trainer.update

    def failing(self: Trainer, x: Any) -> Any:
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self, x)

    Trainer.update = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(store, SHARED, folder / "run", quiet=True)
    Trainer.update = update  # type: ignore[method-assign]
    parallel.first(lambda: None)
    assert checkpoint.steps(folder / "run" / "checkpoints")[-1].name == "step_00000005"


def broken_off_and_resumed(folder: Path, store: Path) -> None:
    broken_off(folder, store)
    resume(folder / "run", store, quiet=True)


def test_it_goes_on_to_the_same_bits(store: Store, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    assert on_two(broken_off_and_resumed, tmp_path, store.path) == [0, 0]
    assert on_two(train_it, tmp_path / "whole", store.path, SHARED) == [0, 0]
    for name in ("dictionary/dictionary.safetensors", "measure.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def test_one_process_goes_on_where_two_ranks_were(store: Store, tmp_path: Path) -> None:
    assert on_two(broken_off, tmp_path, store.path) == [0, 0]
    gone_on = resume(tmp_path / "run", quiet=True).dictionary
    alike(dict(gone_on.state_dict()), dict(fit(store, SHARED, tmp_path / "alone", quiet=True).dictionary.state_dict()))


def diverge(folder: Path, store: Path) -> None:
    """The weights of the second rank alone are no numbers where a checkpoint is due: both refuse it."""
    update = Trainer.update

    def breaking(self: Trainer, x: Any) -> Any:
        told = update(self, x)
        if self.step == 5 and parallel.rank():
            self.dictionary.encoder["a"].data[0] = torch.nan
        return told

    Trainer.update = breaking  # type: ignore[method-assign]
    with pytest.raises(Exception, match="weights are not finite: after step 5"):
        fit(store, SHARED, folder / "run", quiet=True)
    Trainer.update = update  # type: ignore[method-assign]


def test_weights_that_are_not_finite_on_one_rank_end_the_run_on_both(store: Store, tmp_path: Path) -> None:
    assert on_two(diverge, tmp_path, store.path) == [0, 0]


def refused(folder: Path, store: Path) -> None:
    asked = {**SHARED, "resample": {"steps": [6]}}
    with pytest.raises(ConfigError, match="latents that ranks share are not resampled"):
        fit(store, asked, folder / "run", quiet=True)
    asked = {**SHARED, "wiring": {"kind": "crosscoder", "latents": 65}}
    with pytest.raises(WiringError, match="cannot be shared evenly: 65 of all over 2 ranks"):
        fit(store, asked, folder / "run", quiet=True)
    asked = {**SHARED, "sweep": {"runs": [{"seed": 0}, {"parallel": "rows"}]}}
    with pytest.raises(ConfigError, match="runs of a sweep differ in what ranks share: latents, rows"):
        sweep(store, asked, folder / "runs", quiet=True)
    assert not (folder / "run").exists() and not (folder / "runs").exists()
    odd = {**SHARED, "batch": 33, "steps": 1}  # all ranks read all rows
    fit(store, odd, folder / "odd", quiet=True)


def test_what_cannot_be_shared_is_refused_before_anything_is_written(store: Store, tmp_path: Path) -> None:
    assert on_two(refused, tmp_path, store.path) == [0, 0]


def test_a_sweep_shares_the_latents_of_every_run(store: Store, tmp_path: Path) -> None:
    assert on_two(sweep_it, tmp_path, store.path, SHARED) == [0, 0]
    both = got(tmp_path)
    assert both[0] == both[1] and len(both[0][0]) == 2 and both[0][1] == [str(tmp_path / "runs" / "1-lr=1e+30")]
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"][0].startswith("0-")
