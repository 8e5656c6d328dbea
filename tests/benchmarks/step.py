"""What a training step costs: over the bare product of its encoder, beside our dense reference, and in memory.

python -m tests.benchmarks.step [--kinds crosscoder] [--methods topk,batch_topk] [--widths 576] [--out step.json]

bare      the encoder's product alone: x W^T of every source, added up
step      all of Trainer.update: forward, backward, clip, Adam, statistics; with a share of dead latents, AuxK too
dense     the same with kernels = "dense": codes as whole matrices
peers     steps of other libraries: --peers FOLDER, with an environment for each: `python -m venv FOLDER/eai-sparsify`,
          `FOLDER/eai-sparsify/bin/pip install eai-sparsify==1.3.3`; dictionary-learning==0.1.0 (without the torchvision
          that comes along, where torch has no CUDA) and sae-lens too. They are given the same weights and batch, and
          must first reconstruct it with the same error

All ways of a case take turns in one run. A ratio is that of a round; the median of all rounds and the least and largest
are shown. Memory is what a step takes at most beside weights, gradients and Adam's moments, over one matrix of rows by
latents in fp32. About k latents fire on a row whatever the method is, as in the midst of a training: JumpReLU has such
a threshold, standard (ReLU) such a bias. The dense reference is what their steps cost while many latents fire.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from train.kernels.entries import drop_spare
from train.scale import Scale
from train.trainer import Trainer

ROUNDS = 7
PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # of glibc: a MB or more is no part of the heap
AGES = 10**12  # rows since a latent fired that is dead
Step = Callable[[], float | None]
PEER = Path(__file__).with_name("peers.py")
PEERS = {  # the methods that each of them has
    "dictionary-learning": ("topk", "batch_topk", "jumprelu", "standard"), "eai-sparsify": ("topk",),
    "sae-lens": ("topk", "batch_topk", "jumprelu", "standard"),
}  # fmt: skip
ALIKE = 1e-4  # of errors
SELECTS = ("topk", "batch_topk", "matryoshka")  # k latents


@dataclass(frozen=True)
class Case:
    kind: str
    method: str
    width: int
    latents: int
    k: int
    batch: int
    dead: float
    precision: str = "fp32"

    @property
    def sources(self) -> list[str]:
        return ["a"] if self.kind == "autoencoder" else ["a", "b"]

    @property
    def label(self) -> str:
        shape = f"{len(self.sources)} x {self.width}, {self.latents:,}"
        return f"{self.kind:<12}{self.method:<11}{shape:<18}k {self.k:<4}{self.dead:>5.0%} dead  {self.precision}"

    def trainer(self, device: str, kernels: str = "auto") -> Trainer:
        method: dict[str, Any] = {"name": self.method, **({"k": self.k} if self.method in SELECTS else {})}
        tables = {
            "wiring": {"kind": self.kind, "latents": self.latents, "sources": self.sources}, "method": method,
            "steps": 10**6, "batch": self.batch, "device": device, "kernels": kernels, "precision": self.precision,
            "scale": {"kind": "none", "centre": False},
        }  # fmt: skip
        config = configs.parse(TrainConfig, tables)
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
def begun(case: Case, x: Mapping[str, Tensor], device: str, kernels: str = "auto") -> Trainer:
    """A trainer on whose rows about k latents fire."""
    trainer = case.trainer(device, kernels)
    if case.method not in SELECTS:
        h_BL = trainer.dictionary.pre(x).h_BL
        border = h_BL.flatten().float().kthvalue(h_BL.numel() - case.k * len(h_BL)).values
        if case.method == "jumprelu":
            trainer.dictionary.activation.get_parameter("log_threshold_L").fill_(float(border.log()))
        else:
            trainer.dictionary.activation.bias_L.sub_(border)
    return trainer


@contextmanager
def other_steps(case: Case, trainer: Trainer, x: Mapping[str, Tensor], place: Path | None) -> Iterator[dict[str, Step]]:
    """A step of every other library that has an environment in this folder, and has the case: {library: step}.

    They have the same weights and the same batch. Raises AssertionError where one reconstructs rows worse or better.
    """
    if place is None or case.kind != "autoencoder" or case.dead:
        yield {}
        return
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.pt"
        dictionary = trainer.dictionary
        saved = {"encoder": dictionary.encoder["a"], "decoder": dictionary.decoder["a"], "x": x["a"]}
        saved["bias"] = dictionary.activation.bias_L
        if case.method == "jumprelu":
            saved["threshold"] = dictionary.activation.get_parameter("log_threshold_L").exp()
        torch.save({name: one.detach().clone() for name, one in saved.items()}, file)
        error = float((dictionary(x).y["a"].detach() - x["a"]).square().sum(1).mean())
        found: dict[str, Step] = {}
        for library, methods in PEERS.items():
            python = place / library / "bin" / "python"
            if case.method in methods and python.exists():
                words = [str(python), "-P", str(PEER), library, case.method, str(case.k), str(file)]
                run = stack.enter_context(
                    subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
                theirs = json.loads(answer(run))
                assert abs(theirs / error - 1) < ALIKE, f"{library}: {theirs} is not our {error}"
                found[library] = partial(step_of, run)
        yield found


def answer(run: "subprocess.Popen[str]") -> str:
    assert run.stdout is not None
    return run.stdout.readline()


def step_of(run: "subprocess.Popen[str]") -> float:
    """The seconds of a step, as that process took them."""
    assert run.stdin is not None
    run.stdin.write("\n")
    run.stdin.flush()
    return float(json.loads(answer(run)))


def timed(ways: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round, by its own clock where it gives them; one round before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            told = way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                taken[name].append(time.perf_counter() - began if told is None else told)
    return taken


def memory(case: Case, device: torch.device) -> float | None:
    """What a step takes at most beside weights, gradients and moments, over one matrix of rows by latents in fp32."""
    x = case.rows(device)
    trainer = begun(case, x, str(device))
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


def measured(case: Case, device: torch.device, rounds: int, others: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    x = case.rows(device)
    trainers = {"step": begun(case, x, str(device)), "dense": begun(case, x, str(device), "dense")}
    with other_steps(case, trainers["step"], x, others) as theirs:
        ways = {
            "bare": bare(trainers["step"], x),
            **{name: step(trainer, x) for name, trainer in trainers.items()},
            **theirs,
        }
        taken = timed(ways, rounds, device)
    told: dict[str, Any] = {**asdict(case), "bare_ms": 1e3 * statistics.median(taken["bare"])}
    for name in [*trainers, *theirs]:
        ratios = [one / base for one, base in zip(taken[name], taken["bare"], strict=True)]
        told[name] = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return told


def line(case: Case, told: Mapping[str, Any]) -> str:
    ours, dense = told["step"], told["dense"]
    spread = f"{ours['ratio']:.2f} ({ours['least']:.2f} to {ours['largest']:.2f})"
    beside = f"{dense['ratio']:.2f}, {dense['ratio'] / ours['ratio']:.1f} x"
    others = "".join(f"   {name} {told[name]['ratio']:.2f}" for name in PEERS if name in told)
    return f"{case.label}   bare {told['bare_ms']:>6.0f} ms   step {spread:<22}dense {beside:<14}{others}".rstrip()


def words(text: str) -> list[str]:
    return text.split(",")


def cases(
    kinds: Sequence[str], methods: Sequence[str], widths: Sequence[str], latents: int, ks: Sequence[str],
    batch: int, dead: Sequence[str], precisions: Sequence[str],
) -> list[Case]:  # fmt: skip
    """Every combination; latents die for AuxK alone."""
    every = product(kinds, methods, widths, ks, dead, precisions)
    found = [
        Case(kind, method, int(width), latents, int(k), batch, float(d), p) for kind, method, width, k, d, p in every
    ]
    return [one for one in found if not one.dead or one.method in SELECTS]


def main(
    kinds: Annotated[str, typer.Option(help="autoencoder, crosscoder, dedicated")] = "autoencoder,crosscoder,dedicated",
    methods: Annotated[str, typer.Option(help="training methods")] = "topk,batch_topk,jumprelu,standard",
    widths: Annotated[str, typer.Option(help="of every source")] = "576",
    latents: Annotated[int, typer.Option(help="of the dictionary")] = 8192,
    k: Annotated[str, typer.Option(help="latents of a row")] = "32",
    batch: Annotated[int, typer.Option(help="rows")] = 2048,
    dead: Annotated[str, typer.Option(help="shares of latents that are dead")] = "0,0.1",
    precision: Annotated[str, typer.Option(help="of our products: fp32, bf16; the bare one is fp32")] = "fp32",
    rounds: Annotated[int, typer.Option(help="of all ways of a case in turn")] = ROUNDS,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
    peers: Annotated[Path | None, typer.Option(help="a folder with environments of other libraries")] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What a training step costs over the bare product of its encoder."""
    place, found = device_of(device), []
    if memory_of is not None:
        print(json.dumps(memory(Case(**json.loads(memory_of)), place)))
        return
    print(f"{machine()}; torch {torch.__version__}; {batch:,} rows, {rounds} rounds, on {place}\n")
    asked = cases(words(kinds), words(methods), words(widths), latents, words(k), batch, words(dead), words(precision))
    for case in asked:
        found.append(measured(case, place, rounds, peers))
        print(line(case, found[-1]), flush=True)
    print("\nmemory, over rows x latents in fp32")
    for case, told in zip(asked, found, strict=True):
        told["memory"] = memory_alone(case, place)
        print(f"{case.label}   {'unknown' if told['memory'] is None else format(told['memory'], '.2f')}", flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
