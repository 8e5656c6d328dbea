"""Planted concepts of two models, some of them one model's own: which kind of crosscoder finds those.

The toy model of the paper on Dedicated Feature Crosscoders (arXiv 2602.11729, appendix B.2), after Sharkey et al. 2022.
Batches are made as they are needed.

    python pipelines/dfc_toy/toy.py pipelines/dfc_toy/reduced.toml --out runs/dfc_toy

Letters: G concepts, L latents, B rows of a batch, D width of a model, N rows.
"""

import json
import math
import multiprocessing
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from shared import config as configs
from shared import files
from shared.config import Config
from shared.device import device_of
from shared.errors import ConfigError, GranaryError
from train import Dictionary, fit
from train.chance import keyed
from train.compare import mmcs
from train.config import TrainConfig
from train.dictionary import relative_norms
from train.measure import Firings

Reading = Literal["variance", "std"]
Kind = Literal["standard", "designated", "dedicated"]
MODELS = ("a", "b")
FOUND = 0.8  # cosine above which a latent is a concept's: 12 sigma from random at width 256
OWN = 0.8  # R above which a latent counts as one model's own
WORLD = 1  # the purpose of its random numbers
ROWS, BATCH = 2**18, 1024  # on which a latent must fire once to be alive; and how many of them at once
DESIGNATED = 0.1  # share of the latents, in the method of Mishra-Sharma et al. 2025
COLUMNS = {
    "own": "own concepts found by a latent of that model's own",
    "own_any": "own concepts found by any latent",
    "shared": "shared concepts found in both models by one latent",
    "false": "of the live latents of one model's own: those of a shared concept",
    "nothing": "of the same: those of no concept",
    "lost": "of all other live latents: those of a concept that one model has alone",
    "fve": "fraction of variance explained, mean of both models",
}


class ToyConfig(Config):
    """Where the paper says two things, both can be had."""

    concepts: int = Field(2048, ge=8)
    width: int = Field(256, ge=2)  # of both models
    own: float = Field(0.025, gt=0, lt=0.5)  # share of the concepts that each model has alone
    active: float | None = Field(None, gt=0)  # mean concepts of a row; none: 1 % of them (table 6; the text: 5)
    rank: int = Field(10, ge=1)  # of the correlations between concepts
    shift: float = Field(0.1, ge=0)  # std of the vector by which a concept moves from model a to b
    decay: float = Field(0.001, ge=0)  # of probabilities over a random order of the concepts
    least: float = Field(1e-4, gt=0)  # probability of a concept
    diagonal: float = Field(1.0, ge=0)  # variance of a concept's own part
    noise: float = Field(0.01, ge=0)  # std
    map: Reading = "variance"  # what the 0.25 is in N(0, 0.25), of the map from a to b
    factor: Reading = "std"  # what the 0.5 / sqrt(rank) is, of the correlations
    redraw: Literal["never", "batch"] = "never"  # when probabilities are drawn: with the world, or for every batch
    empty: Literal["restart", "top"] = "restart"  # a row of no concept: drawn again, or has the most probable ones

    @model_validator(mode="after")
    def _has_own(self) -> "ToyConfig":
        if not round(self.own * self.concepts):
            raise ValueError("of so few concepts no model has one alone: raise toy.own or toy.concepts")
        return self


class Runs(Config):
    """Every kind with every number of latents and every seed."""

    kinds: list[Kind] = Field(["standard", "designated", "dedicated"], min_length=1)
    latents: list[int] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)  # of the world and of the weights
    denser: list[float] = Field([2.0], min_length=1)  # designated latents: how many times their share of k they keep
    processes: int = Field(1, ge=1)  # runs at once


class Whole(Config):
    toy: ToyConfig
    runs: Runs
    train: dict[str, Any]  # the tables of `train run`; wiring, k and seed follow from the rest


class Toy:
    """A world: concept vectors of both models, and how often each concept is active."""

    def __init__(self, asked: ToyConfig, seed: int, device: torch.device) -> None:
        self.asked = asked
        # Not the numbers that a dictionary of the same seed begins with: its vectors would be the concepts.
        self._random = torch.Generator(device).manual_seed(keyed(WORLD, seed) >> 1)
        count, width = asked.concepts, asked.width
        own = round(asked.own * count)
        number_G = torch.arange(count, device=device)
        self.only = {"a": number_G < own, "b": (number_G >= own) & (number_G < 2 * own)}  # bool G
        self.shared_G = number_G >= 2 * own
        c_GD = normalize(self._normal(count, width), dim=1)
        moved_GD = c_GD @ self._normal(width, width).T * _std(0.25, asked.map) + asked.shift * self._normal(1, width)
        sizes = [torch.linalg.vector_norm(one, dim=1).median() for one in (c_GD, moved_GD)]
        self.vectors = {"a": c_GD, "b": moved_GD * (sizes[0] / sizes[1])}  # [G, D]
        self._factor_GR = self._normal(count, asked.rank) * _std(0.5 / math.sqrt(asked.rank), asked.factor)
        place_G = torch.randperm(count, generator=self._random, device=device)
        self._decay_G = torch.exp(-asked.decay * place_G)
        self.active = asked.active or count / 100
        self.p_G = self._probabilities()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._random.device)

    def _probabilities(self) -> Tensor:
        own_G = math.sqrt(self.asked.diagonal) * self._normal(self.asked.concepts)
        p_G = torch.sigmoid(self._factor_GR @ self._normal(self.asked.rank) + own_G) * self._decay_G
        return (p_G * self.active / p_G.sum()).clamp(self.asked.least, 1.0)

    def rows(self, batch: int) -> Iterator[dict[str, Tensor]]:
        """Batches {model: [B, D]} without end. The same concepts, with the same sizes, are in both models' rows."""
        visible = {name: (self.shared_G | self.only[name])[:, None] * self.vectors[name] for name in MODELS}
        while True:
            p_G = self._probabilities() if self.asked.redraw == "batch" else self.p_G
            size_BG = self._sizes(batch, p_G)
            yield {
                n: size_BG @ c_GD + self.asked.noise * self._normal(batch, c_GD.shape[1]) for n, c_GD in visible.items()
            }

    def _uniform(self, rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=self._random, device=self._random.device)

    def _sizes(self, rows: int, p_G: Tensor) -> Tensor:
        """The sizes of active concepts, uniform in [0, 1), and 0 elsewhere; no row is empty."""
        size_BG, empty = torch.zeros(rows, len(p_G), device=p_G.device), torch.arange(rows, device=p_G.device)
        while len(empty):
            u_BG = self._uniform(len(empty), len(p_G))
            size_BG[empty] = torch.where(u_BG < p_G, u_BG / p_G, 0.0)  # u / p where u < p is uniform again
            empty = empty[~(size_BG[empty] > 0).any(1)]
            if self.asked.empty == "top":
                top = p_G.topk(max(1, round(self.active))).indices
                size_BG[empty[:, None], top] = self._uniform(len(empty), len(top))
                break
        return size_BG


def _std(value: float, reading: Reading) -> float:
    return math.sqrt(value) if reading == "variance" else value


@torch.no_grad()
def found(dictionary: Dictionary, toy: Toy) -> dict[str, Any]:
    """How much of the world a dictionary has found (COLUMNS); None where no latent is one model's own."""
    dictionary.eval()
    firings = Firings(dictionary)
    for x in islice(toy.rows(BATCH), ROWS // BATCH):
        firings.add(x)
    alive_L = (firings.fires_L > 0).to(toy.p_G.device)
    has = {name: _cosines(dictionary, toy, name) > FOUND for name in MODELS}  # [G, L]
    own = _own(dictionary, alive_L)
    right = {name: has[name][toy.only[name]] & alive_L for name in MODELS}
    recall = sum(int((right[name] & own[name]).any(1).sum()) for name in MODELS)
    concepts = sum(int(toy.only[name].sum()) for name in MODELS)
    classified = sum(int(own[name].sum()) for name in MODELS)
    false = sum(int((has[name][toy.shared_G].any(0) & own[name]).sum()) for name in MODELS)
    nothing = sum(int((~has[name].any(0) & own[name]).sum()) for name in MODELS)
    others_L = alive_L & ~own["a"] & ~own["b"]
    lost = sum((right[name].any(0) & others_L).sum() for name in MODELS)
    return {
        "own": recall / concepts,
        "own_any": sum(int(one.any(1).sum()) for one in right.values()) / concepts,
        "shared": float((has["a"] & has["b"] & alive_L)[toy.shared_G].any(1).float().mean()),
        "false": false / classified if classified else None,
        "nothing": nothing / classified if classified else None,
        "lost": float(lost) / max(1, int(others_L.sum())),
        "classified": classified,
        "mmcs": sum(mmcs(toy.vectors[name][_seen(toy, name)], dictionary.decoder[name]) for name in MODELS) / 2,
        "rarest_to_commonest": _by_frequency(toy, has, alive_L),
    }


def _seen(toy: Toy, model: str) -> Tensor:
    return toy.shared_G | toy.only[model]


def _by_frequency(toy: Toy, has: Mapping[str, Tensor], alive_L: Tensor) -> list[float]:
    """The share of the concepts that any latent has in any model that knows them, by quarters of their probability."""
    known_G = torch.stack([(has[name] & alive_L).any(1) & _seen(toy, name) for name in MODELS]).any(0)
    return [float(known_G[part].float().mean()) for part in toy.p_G.argsort().chunk(4)]


def _cosines(dictionary: Dictionary, toy: Toy, model: str) -> Tensor:
    """Of every concept with every latent's decoder vector of a model, [G, L]; 0 where it writes nothing there."""
    d_LD = dictionary.writes[model].spread(dictionary.decoder[model])
    return normalize(toy.vectors[model], dim=1) @ normalize(d_LD, dim=1).T


def _own(dictionary: Dictionary, alive_L: Tensor) -> dict[str, Tensor]:
    """Live latents that count as one model's own, by the shares of their decoder norms; no designated one. bool L"""
    tied_L = torch.cat([torch.full((span.size,), span.tied) for span in dictionary.wiring.spans]).to(alive_L.device)
    share_WL = relative_norms(dictionary.decoder_norms())
    return {name: (share_WL[number] > OWN) & alive_L & ~tied_L for number, name in enumerate(MODELS)}


@dataclass(frozen=True)
class Run:
    kind: Kind
    latents: int
    seed: int
    denser: float = 1.0

    @property
    def label(self) -> str:
        return f"designated, {self.denser:g} x" if self.kind == "designated" else self.kind

    @property
    def name(self) -> str:
        return f"{self.label.replace(', ', '-').replace(' x', '')}-{self.latents}-{self.seed}"

    def config(self, asked: Whole) -> dict[str, Any]:
        """The tables of `train run`."""
        k = max(1, round(asked.toy.active or asked.toy.concepts / 100))
        wiring: dict[str, Any] = {"latents": self.latents, "kind": "crosscoder"}
        if self.kind == "dedicated":
            wiring |= {"kind": "dedicated"}
        elif self.kind == "designated":
            few = min(max(1, round(self.denser * DESIGNATED * k)), round(DESIGNATED * self.latents))
            wiring |= {
                "kind": "spans", "spans": [{"name": "designated", "size": DESIGNATED, "tied": True}, {"name": "free"}],
                "k": {"designated": few},
            }  # fmt: skip
            k = max(1, round((1 - DESIGNATED) * k))
        tables = asked.train
        given = tables.get("method", "batch_topk")
        given = {"name": given} if isinstance(given, str) else given
        method = {"k": k, **({"k_start": 5 * k} if "k_anneal" in given else {}), **given}
        scale = {"kind": "none", "centre": False}
        wiring = {**tables.get("wiring", {}), **wiring}
        return {**tables, "wiring": wiring, "method": method, "scale": scale, "seed": self.seed}


def one(run: Run, asked: Whole, out: Path) -> dict[str, Any]:
    """Train and look, or read what was found before."""
    folder, config = out / run.name, configs.parse(TrainConfig, run.config(asked))
    of = {"toy": asked.toy.model_dump(mode="json"), "train": config.model_dump(mode="json")}
    if (folder / "found.json").exists():
        before = files.read_json(folder / "found.json")
        if before["of"] != of:
            value = f"{folder}: {', '.join(configs.differences(before['of'], of))}"
            raise ConfigError("this run was made of another config", value, "Give another --out")
        return dict(before["found"])
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its batches are not to be had again
    toy = Toy(asked.toy, run.seed, device_of(config.device))
    done = fit(toy.rows(config.batch), config, folder, quiet=True)
    fve = [source["fve"] for source in done.figures["sources"].values()]
    told = {**found(done.dictionary, toy), "fve": sum(fve) / len(fve)}
    files.write_json(folder / "found.json", {"of": of, "found": told})
    return told


def all_runs(asked: Runs) -> list[Run]:
    if len(set(asked.denser)) < len(asked.denser):
        raise ConfigError("a density is named twice", asked.denser, "Name each once in runs.denser")
    kinds = [(kind, times) for kind in asked.kinds for times in (asked.denser if kind == "designated" else [1.0])]
    return [Run(kind, size, seed, times) for size in asked.latents for seed in asked.seeds for kind, times in kinds]


def table(results: Mapping[Run, Mapping[str, Any]]) -> list[list[str]]:
    """Means over seeds, and their standard errors."""
    rows = [["latents", "crosscoder", *COLUMNS]]
    for size, label in dict.fromkeys((run.latents, run.label) for run in results):
        seeds = [told for run, told in results.items() if (run.latents, run.label) == (size, label)]
        rows.append([f"{size:,}", label, *(_mean(seeds, column) for column in COLUMNS)])
    return rows


def _mean(seeds: list[Mapping[str, Any]], column: str) -> str:
    values = np.array([told[column] for told in seeds if told[column] is not None])
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return "-" if not len(values) else f"{values.mean():.3f}" + ("" if error is None else f" ± {error:.3f}")


def draw(results: Mapping[Run, Mapping[str, Any]], concepts: int, path: Path) -> None:
    """Each column over the size of the dictionary."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.8), layout="constrained")
    axes = figure.subplots(1, 4)
    for column, place in zip(("own", "shared", "false", "fve"), axes, strict=True):
        for label in dict.fromkeys(run.label for run in results):
            sizes = sorted({run.latents for run in results})
            points = []
            for size in sizes:
                of = [found for run, found in results.items() if (run.latents, run.label) == (size, label)]
                here = np.array([found[column] for found in of if found[column] is not None])
                if len(here):
                    error = here.std(ddof=1) / math.sqrt(len(here)) if len(here) > 1 else 0.0
                    points.append((size / concepts, here.mean(), error))
            if points:
                x, y, errors = zip(*points, strict=True)
                place.errorbar(x, y, errors, label=label, marker="o", capsize=3)
        title = re.sub(r"( by |: |, )", r"\1\n", COLUMNS[column], count=1)
        place.set(title=title, xlabel="latents / concepts")
        place.set_ylim(0, 1)
    axes[0].legend()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "granary"}):
        figure.savefig(path, metadata={"Date": None})


def main(
    config: Annotated[Path, typer.Argument(help="a TOML file with [toy], [runs] and [train]")],
    out: Annotated[Path, typer.Option(help="where runs, table.md and figure.svg go; finished runs stay as they are")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as in `train run`")] = None,
) -> None:
    """Train every run, and write a table and a picture of what was found."""
    asked = configs.parse(Whole, configs.override(configs.read_toml(config), set_ or []))
    runs = all_runs(asked.runs)
    for run in runs:
        configs.parse(TrainConfig, run.config(asked))  # before any work
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    with ProcessPoolExecutor(asked.runs.processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {run: pool.submit(one, run, asked, out) for run in runs}
        for number, (run, result) in enumerate(waiting.items(), 1):
            results[run] = result.result()
            typer.echo(f"{number}/{len(runs)} {run.name}: {json.dumps(results[run])}", err=True)
    lines = [" | ".join(row) for row in table(results)]
    text = "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * (2 + len(COLUMNS))), *lines[1:]])
    legend = "\n".join(f"- `{column}`: {meaning}" for column, meaning in COLUMNS.items())
    (out / "table.md").write_text(f"{text}\n\n{legend}\n", encoding="utf-8")
    draw(results, asked.toy.concepts, out / "figure.svg")
    typer.echo(text)


if __name__ == "__main__":
    try:
        typer.run(main)
    except GranaryError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
