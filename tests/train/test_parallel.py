"""Two ranks over Gloo: what they select and learn is what one process does, and what one of them meets ends both.

Letters: B rows of a batch, D width of a source, L latents, K kept entries.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ConfigError, GranaryError, Stopped, TrainingError, one_line
from shared.store import Store
from tests import cases
from tests.build import make_store
from train import checkpoint, parallel
from train.fit import fit, resume, resume_sweep, sweep
from train.kernels.select import top_of_batch
from train.trainer import Trainer

RANKS = 2
ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 64}, "method": {"name": "batch_topk", "k": 4}, "steps": 12, "batch": 32,
    "device": "cpu", "threads": 1, "log": {"every": 1, "checkpoint": 5}, "optimiser": {"lr": 1e-2, "warmup": 2},
    "dead_rows": 100,
}  # fmt: skip


TWO = {**ASKED, "sweep": {"runs": [{"seed": 0}, {"method": {"name": "topk"}}]}}


def rank_of(number: int, port: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    with parallel.joined("cpu"):
        work(*given)


def on_two(work: Callable[..., None], *given: Any) -> list[int | None]:
    """Run `work` on two ranks. Returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_parallel"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=rank_of, args=(n, port, work, given)) for n in range(RANKS)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(120)
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    return codes


def put(folder: Path, value: Any) -> None:
    torch.save(value, folder / f"rank{parallel.rank()}.pt")


def got(folder: Path) -> list[Any]:
    return [torch.load(folder / f"rank{n}.pt") for n in range(RANKS)]


# --- what the ranks agree on ----------------------------------------------------------------------------------------


def agree(folder: Path) -> None:
    rank = parallel.rank()
    assert parallel.share(6) == 3
    with pytest.raises(ConfigError, match="7 rows over 2 ranks"):
        parallel.share(7)
    sums = parallel.summed([torch.tensor([rank, 10]), torch.tensor(0.5), torch.empty(0)])
    assert [one.tolist() for one in sums] == [[1, 20], 1.0, []] and sums[0].dtype == torch.int64
    assert parallel.least(torch.tensor(float(rank))) == 0.0
    assert parallel.any_rank(rank == 1, torch.device("cpu")) and not parallel.any_rank(False, torch.device("cpu"))
    told = parallel.first(lambda: Path("of") / str(parallel.rank()))
    assert told == Path("of/0")
    with pytest.raises(GranaryError, match="a fault: 3"):
        parallel.first(lambda: (_ for _ in ()).throw(ConfigError("a fault", 3, "Way out")))
    weight = torch.ones(2, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    (weight * (1.0 + rank)).sum().backward()
    parallel.average([weight, other])
    assert weight.grad is not None and weight.grad.tolist() == [1.5, 1.5]
    assert other.grad is not None and other.grad.tolist() == [0.0, 0.0, 0.0]


def test_the_ranks_agree(tmp_path: Path) -> None:
    assert on_two(agree, tmp_path) == [0, 0]


def test_a_rank_that_is_gone_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(parallel.dist, name, lambda *given, **named: None)
    with pytest.raises(TrainingError, match=r"another rank has ended: .* reset by peer"), parallel.joined("cpu"):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), parallel.joined("cpu"):
        raise RuntimeError("shapes differ")


def test_one_process_is_one_rank() -> None:
    x = torch.arange(3)
    assert parallel.ranks() == 1 and parallel.rank() == 0 and parallel.share(7) == 7
    assert parallel.summed([x])[0] is x and parallel.least(x) is x and parallel.first(lambda: 5) == 5


def scores(case: int) -> tuple[torch.Tensor, int]:
    """The scores of both ranks, [2, B, L], and how many each keeps on average."""
    generator = torch.Generator().manual_seed(case)
    score = torch.rand(RANKS, 4, 6, generator=generator)
    score = [score, (score * 4).round() / 4, score * (score > 0.8), score * torch.tensor([1.0, 9.0])[:, None, None],
             torch.zeros_like(score)][case % 5]  # fmt: skip
    return score, [1, 5, 12, 23, 24][case // 5]


def select(folder: Path) -> None:
    found = []
    for case in range(25):
        score, count = scores(case)
        entries = top_of_batch(score[parallel.rank()], count)
        found.append((entries.row_K, entries.latent_K))
    put(folder, found)


def test_the_largest_of_all_ranks_are_selected_exactly_as_many_as_there_are_to_be(tmp_path: Path) -> None:
    assert on_two(select, tmp_path) == [0, 0]
    for case, both in enumerate(zip(*got(tmp_path), strict=True)):
        score, count = scores(case)
        kept = torch.cat([score[n, rows, latents] for n, (rows, latents) in enumerate(both)])
        assert len(kept) == RANKS * count
        best = score.flatten().topk(RANKS * count).values
        assert torch.equal(kept.sort().values, best.sort().values), case
        for rows, latents in both:
            flat = rows * 6 + latents
            assert (flat.diff() > 0).all()


# --- training -------------------------------------------------------------------------------------------------------


def steps(folder: Path, case: str, name: str, micro: int | None) -> None:
    given = {"optimiser": {"lr": 1e-2, "warmup": 2}, "micro_batch": micro}
    put(folder, trained(cases.trainer(case, name, dead_rows=300, **given), case))


def trained(trainer: Trainer, case: str) -> dict[str, Any]:
    """Six updates on this rank's share of the rows: what was selected, what was told, and the state at the end.

    The encoder begins longer than the decoder: where they are alike, a latent that is alone on its row has a gradient
    of 0 but for rounding, and Adam makes steps of the rounding.
    """
    with torch.no_grad():
        for name, weight in trainer.dictionary.named_parameters():
            if name.startswith("encoder"):
                weight *= 1.3
    kept, told = [], []
    for step in range(6):
        size = 64 // parallel.row_ranks()
        start = parallel.rank() * size
        x = {name: x_BD[start : start + size] for name, x_BD in cases.random_rows(case, 64, seed=step).items()}
        with torch.no_grad():
            kept.append(trainer.dictionary(x).code.dense() > 0)
        told.append({key: float(value) for key, value in trainer.update(x).items()})
    return {"kept": kept, "told": told, "state": trainer.dictionary.state_dict(), "idle": trainer.idle_L}


@pytest.mark.parametrize(
    ("name", "micro"), [*((name, None) for name in cases.names()), ("topk", 10), ("batch_topk", 10)]
)
@pytest.mark.parametrize("case", ["autoencoder", "dedicated of 3"])
def test_two_ranks_select_and_learn_what_one_process_does(
    tmp_path: Path, case: str, name: str, micro: int | None
) -> None:
    assert on_two(steps, tmp_path, case, name, micro) == [0, 0]
    alone = trained(cases.trainer(case, name, dead_rows=300, optimiser={"lr": 1e-2, "warmup": 2}), case)
    both = got(tmp_path)
    for step in range(6):
        assert torch.equal(torch.cat([one["kept"][step] for one in both]), alone["kept"][step]), step
        for one in both:
            assert one["told"][step] == pytest.approx(alone["told"][step], rel=1e-4, abs=1e-6)
    for one in both:
        assert torch.equal(one["idle"], alone["idle"])
        for key, value in alone["state"].items():
            torch.testing.assert_close(one["state"][key], value, rtol=1e-4, atol=1e-5)
    for key, value in both[0]["state"].items():
        assert torch.equal(value, both[1]["state"][key]), key  # to the bit


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("parallel") / "pair.zarr"
    return make_store(path, rows=300, chunk_rows=16, documents=20, masked=0.0)


def train_it(folder: Path, store: Path, asked: dict[str, Any]) -> None:
    put(folder, fit(store, asked, folder / "run", quiet=True).figures)


def records(folder: Path, *keys: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys} for line in lines if line["event"] == "step"]


def test_a_run_on_two_ranks_is_that_of_one_process_in_one_folder(store: Store, tmp_path: Path) -> None:
    assert on_two(train_it, tmp_path, store.path, ASKED) == [0, 0]
    alone = fit(store, ASKED, tmp_path / "alone", quiet=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        path.name for path in alone.folder.iterdir()
    )
    keys = ("step", "epoch", "loss", "recon", "aux", "gradient", "l0", "dead", "fve/a", "fve/b")
    for one, other in zip(records(tmp_path / "run", *keys), records(alone.folder, *keys), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    both = got(tmp_path)
    assert both[0] == both[1] and both[0]["sources"]["a"]["fve"] == pytest.approx(
        alone.figures["sources"]["a"]["fve"], abs=1e-3
    )


def test_latents_are_resampled_alike_on_all_ranks(store: Store, tmp_path: Path) -> None:
    asked = {**ASKED, "resample": {"steps": [6], "rows": 100, "idle_rows": 64}}
    assert on_two(train_it, tmp_path, store.path, asked) == [0, 0]
    assert '"event": "resample"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    alone = fit(store, asked, tmp_path / "alone", quiet=True)
    both = got(tmp_path)
    assert both[0] == both[1]
    for source in ("a", "b"):
        assert both[0]["sources"][source]["fve"] == pytest.approx(alone.figures["sources"][source]["fve"], abs=1e-3)


def stop(folder: Path, store: Path) -> None:
    """Rank 1 alone is told to stop, in its eighth step."""
    update = Trainer.update

    def stopping(self: Trainer, x: Any) -> Any:
        if self.step == 7 and parallel.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(self, x)

    Trainer.update = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped), one_line():
        fit(store, ASKED, folder / "run", quiet=True)
    Trainer.update = update  # type: ignore[method-assign]


def stop_and_go_on(folder: Path, store: Path) -> None:
    stop(folder, store)
    parallel.first(lambda: None)  # the first rank has written its checkpoint
    kept = [path.name for path in checkpoint.steps(folder / "run" / "checkpoints")]
    assert kept[-1] == "step_00000008", kept
    put(folder, resume(folder / "run", store, quiet=True).figures)


def test_a_stop_of_one_rank_stops_all_at_one_step_and_they_go_on_to_the_same_bits(store: Store, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    assert on_two(stop_and_go_on, tmp_path, store.path) == [0, 0]
    assert on_two(train_it, tmp_path / "whole", store.path, ASKED) == [0, 0]
    for name in ("dictionary/dictionary.safetensors", "measure.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def test_going_on_with_other_ranks_is_told(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_two(stop, tmp_path, store.path) == [0, 0]
    resume(tmp_path / "run")
    assert "at step 8 of 12 on 1 ranks, before on 2: the sums of a batch round in another order" in (
        capsys.readouterr().err
    )


def sweep_it(folder: Path, store: Path, base: dict[str, Any]) -> None:
    asked = {**base, "sweep": {"runs": [{"seed": 0}, {"optimiser.lr": 1e30}, {"method": {"name": "topk"}}]}}
    found = sweep(store, asked, folder / "runs", quiet=True)
    put(folder, ([run.figures for run in found.runs], [str(path) for path in found.failed]))


def test_a_sweep_on_two_ranks_ends_a_run_that_fails_on_both(store: Store, tmp_path: Path) -> None:
    assert on_two(sweep_it, tmp_path, store.path, ASKED) == [0, 0]
    both = got(tmp_path)
    assert both[0] == both[1] and len(both[0][0]) == 2 and both[0][1] == [str(tmp_path / "runs" / "1-lr=1e+30")]


def lose(folder: Path, store: Path, rank: int, how: str) -> None:
    """At step 7 of a sweep's second run one rank is killed, or has too little memory."""
    update, steps = Trainer.update, []

    def losing(self: Trainer, x: Any) -> Any:
        steps.append(self.step)
        if steps.count(7) == 2 and parallel.rank() == rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("no memory")
        return update(self, x)

    Trainer.update = losing  # type: ignore[method-assign]
    sweep(store, TWO, folder / "runs", quiet=True)


def go_on(folder: Path, store: Path) -> None:
    assert len(resume_sweep(folder / "runs", store, quiet=True).runs) == 2


def begin(folder: Path, store: Path) -> None:
    sweep(store, TWO, folder / "runs", quiet=True)


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep on two ranks without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert on_two(begin, folder, store.path) == [0, 0]
    return folder


WITH_TIME = [pytest.param(*one, marks=pytest.mark.slow) for one in ((1, "killed"), (0, "memory"))]


@pytest.mark.parametrize(("rank", "how"), [(0, "killed"), (1, "memory"), *WITH_TIME])
def test_where_one_rank_is_lost_no_other_waits_and_all_go_on_to_the_same_bits(
    store: Store, whole: Path, tmp_path: Path, rank: int, how: str
) -> None:
    codes = on_two(lose, tmp_path, store.path, rank, how)
    assert codes[rank] == (-signal.SIGKILL if how == "killed" else 1) and codes[1 - rank] == 1
    assert on_two(go_on, tmp_path, store.path) == [0, 0]
    for run in ("0", "1"):
        for name in ("dictionary/dictionary.safetensors", "measure.json"):
            [found], [expected] = ((at / "runs").glob(f"{run}-*/{name}") for at in (tmp_path, whole))
            assert found.read_bytes() == expected.read_bytes(), (run, name)


def refused(folder: Path, store: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be shared evenly: 33 rows over 2 ranks"):
        fit(store, {**ASKED, "batch": 33}, folder / "run", quiet=True)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.toml").touch()
    with pytest.raises(GranaryError, match="holds a run already"):
        fit(store, ASKED, folder / "run", quiet=True)


def test_what_one_rank_refuses_all_refuse(store: Store, tmp_path: Path) -> None:
    assert on_two(refused, tmp_path, store.path) == [0, 0]


def test_torchrun_starts_train_run(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
        str(Path(sys.executable).with_name("train")), "run", str(store.path), "--method", "topk", "--latents", "32",
        "--steps", "4", "--batch", "16", "--device", "cpu", "--set", "method.k=3", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"report      {out / 'report.html'}") == 1  # the first rank tells
