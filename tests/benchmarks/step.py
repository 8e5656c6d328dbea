"""What a training step costs: over the bare product of its encoder, beside our dense reference, and in memory.

python -m tests.benchmarks.step [--kinds crosscoder] [--methods topk,batch_topk] [--widths 576] [--out step.json]

bare      the encoder's product alone: x W^T of every source, added up
step      all of Trainer.update: forward, backward, clip, Adam, statistics; with a share of dead latents, AuxK too
dense     the same with kernels = "dense": codes as whole matrices

All ways of a case take turns in one run. A ratio is that of a round; the median of all rounds and the least and largest
are shown. Memory is what a step takes at most beside weights, gradients and Adam's moments, over one matrix of rows by
latents in fp32. JumpReLU begins with the threshold above which k scores a row lie.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from shared import config as configs
from shared.device import device_of, peak_memory
from tests.benchmarks.pairs import machine
from train import prepare
from train.config import TrainConfig
from train.kernels import drop_spare
from train.scale import Scale
from train.trainer import Trainer

ROUNDS = 7
PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # of glibc: a MB or more is no part of the heap
AGES = 10**12  # rows since a latent fired that is dead
SPARSE = ("topk", "batch_topk", "matryoshka")  # what kernels = "dense" changes


@dataclass(frozen=True)
class Case:
    kind: str
    method: str
    width: int
    latents: int
    k: int
    batch: int
    dead: float

    @property
    def sources(self) -> list[str]:
        return ["a"] if self.kind == "autoencoder" else ["a", "b"]

    @property
    def label(self) -> str:
        shape = f"{len(self.sources)} x {self.width}, {self.latents:,}"
        return f"{self.kind:<12}{self.method:<11}{shape:<18}k {self.k:<4}{self.dead:>5.0%} dead"

    def trainer(self, device: str, kernels: str = "auto") -> Trainer:
        method: dict[str, Any] = {"name": self.method, **({"k": self.k} if self.method in SPARSE else {})}
        asked = {
            "wiring": {"kind": self.kind, "latents": self.latents, "sources": self.sources}, "method": method,
            "steps": 10**6, "batch": self.batch, "device": device, "kernels": kernels,
            "scale": {"kind": "none", "centre": False},
        }  # fmt: skip
        config = configs.parse(TrainConfig, asked)
        made = prepare.shape(config, dict.fromkeys(self.sources, self.width))
        trainer = prepare.initialised(made, Scale(made.wiring.widths))
        age = torch.zeros(self.latents, dtype=torch.int64)
        age[torch.randperm(self.latents)[: round(self.dead * self.latents)]] = AGES
        trainer.idle_L.copy_(age)
        return trainer

    def rows(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.randn(self.batch, self.width, device=device) for name in self.sources}


def bare(trainer: Trainer, x: Mapping[str, Tensor]) -> Callable[[], None]:
    weights = {name: W_SD.detach() for name, W_SD in trainer.dictionary.encoder.items()}

    def run() -> None:
        first, *others = weights
        h_BS = x[first] @ weights[first].T
        for name in others:
            if weights[name].shape[0] == h_BS.shape[1]:
                h_BS.addmm_(x[name], weights[name].T)
            else:  # exclusive latents
                x[name] @ weights[name].T

    return run


def step(trainer: Trainer, x: Mapping[str, Tensor]) -> Callable[[], None]:
    age_L = trainer.idle_L.clone()

    def run() -> None:
        trainer.idle_L.copy_(age_L)  # as many are dead at every step
        trainer.update(x)

    return run


@torch.no_grad()
def sparsify(trainer: Trainer, x: Mapping[str, Tensor], k: int) -> None:
    """Let about k latents of a row pass the thresholds of JumpReLU."""
    h_BL = trainer.dictionary.pre(x).h_BL
    border = h_BL.flatten().float().kthvalue(h_BL.numel() - k * len(h_BL)).values
    trainer.dictionary.activation.get_parameter("log_threshold_L").fill_(float(border.log()))


def timed(ways: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round; one before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                taken[name].append(time.perf_counter() - began)
    return taken


def memory(case: Case, device: torch.device) -> float | None:
    """What a step takes at most beside weights, gradients and moments, over one matrix of rows by latents in fp32."""
    x, trainer = case.rows(device), case.trainer(str(device))
    if case.method == "jumprelu":
        sparsify(trainer, x, case.k)
    way = step(trainer, x)
    way()
    drop_spare()
    with peak_memory(device) as peak:
        way()
        most = peak()
    gradients = sum(one.nbytes for one in trainer.parameters)
    return None if most is None else (most - gradients) / (4 * case.batch * case.latents)


def memory_alone(case: Case, device: torch.device) -> float | None:
    """The same in a process of its own, whose tensors have pages that go back with them."""
    command = [sys.executable, "-m", "tests.benchmarks.step", "--memory-of", json.dumps(asdict(case)), "--device"]
    told = subprocess.run([*command, str(device)], env={**os.environ, **PAGES}, stdout=subprocess.PIPE, check=True)
    found: float | None = json.loads(told.stdout)
    return found


def measured(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, ours = case.rows(device), case.trainer(str(device))
    trainers = {"step": ours} | ({"dense": case.trainer(str(device), "dense")} if case.method in SPARSE else {})
    if case.method == "jumprelu":
        sparsify(ours, x, case.k)
    ways = {"bare": bare(ours, x), **{name: step(trainer, x) for name, trainer in trainers.items()}}
    taken = timed(ways, rounds, device)
    told: dict[str, Any] = {**asdict(case), "bare_ms": 1e3 * statistics.median(taken["bare"])}
    for name in trainers:
        ratios = [one / base for one, base in zip(taken[name], taken["bare"], strict=True)]
        told[name] = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return told


def line(case: Case, told: Mapping[str, Any]) -> str:
    ours, dense = told["step"], told.get("dense")
    spread = f"{ours['ratio']:.2f} ({ours['least']:.2f} to {ours['largest']:.2f})"
    beside = "" if dense is None else f"{dense['ratio']:.2f}, {dense['ratio'] / ours['ratio']:.1f} x"
    return f"{case.label}   bare {told['bare_ms']:>6.0f} ms   step {spread:<22}dense {beside}".rstrip()


def words(text: str) -> list[str]:
    return text.split(",")


def cases(
    kinds: Sequence[str], methods: Sequence[str], widths: Sequence[str], latents: int, ks: Sequence[str],
    batch: int, dead: Sequence[str],
) -> list[Case]:  # fmt: skip
    """Every combination; latents die for AuxK alone."""
    every = product(kinds, methods, widths, ks, dead)
    found = [Case(kind, method, int(width), latents, int(k), batch, float(d)) for kind, method, width, k, d in every]
    return [one for one in found if not one.dead or one.method in SPARSE]


def main(
    kinds: Annotated[str, typer.Option(help="autoencoder, crosscoder, dedicated")] = "autoencoder,crosscoder,dedicated",
    methods: Annotated[str, typer.Option(help="training methods")] = "topk,batch_topk,jumprelu,standard",
    widths: Annotated[str, typer.Option(help="of every source")] = "576",
    latents: Annotated[int, typer.Option(help="of the dictionary")] = 8192,
    k: Annotated[str, typer.Option(help="latents of a row")] = "32",
    batch: Annotated[int, typer.Option(help="rows")] = 2048,
    dead: Annotated[str, typer.Option(help="shares of latents that are dead")] = "0,0.1",
    rounds: Annotated[int, typer.Option(help="of all ways of a case in turn")] = ROUNDS,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What a training step costs over the bare product of its encoder."""
    place, found = device_of(device), []
    if memory_of is not None:
        print(json.dumps(memory(Case(**json.loads(memory_of)), place)))
        return
    print(f"{machine()}; torch {torch.__version__}; {batch:,} rows, {rounds} rounds, on {place}\n")
    asked = cases(words(kinds), words(methods), words(widths), latents, words(k), batch, words(dead))
    for case in asked:
        found.append(measured(case, place, rounds))
        print(line(case, found[-1]), flush=True)
    print("\nmemory, over rows x latents in fp32")
    for case, told in zip(asked, found, strict=True):
        told["memory"] = memory_alone(case, place)
        print(f"{case.label}   {'unknown' if told['memory'] is None else format(told['memory'], '.2f')}", flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
