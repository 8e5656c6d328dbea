"""Wirings, small training runs and planted rows that several tests share.

Letters: B rows of a batch, D width of a source, G planted features, L latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import config as configs
from shared.store import Store
from tests.build import make_store
from train import dictionary as dictionaries
from train import method as methods
from train import prepare, shards
from train import wiring as wirings
from train.config import TrainConfig
from train.prepare import Ready
from train.scale import Scale
from train.trainer import Trainer
from train.wiring import Wiring, default_decoder_norm

WIDTHS = {"a": 20, "b": 16, "c": 12}  # three sources of different widths; a case takes the first few
CASES = {
    "autoencoder": ("autoencoder", 1),
    "transcoder": ("transcoder", 2),
    "crosscoder": ("crosscoder", 2),
    "dedicated": ("dedicated", 2),
    "crosscoder of 3": ("crosscoder", 3),
    "dedicated of 3": ("dedicated", 3),
}
LATENTS = 48
# A run of a moment, as its tables.
MOMENT: dict[str, Any] = {
    "wiring": {"latents": 8}, "method": {"name": "topk", "k": 3}, "steps": 4, "batch": 16, "device": "cpu",
    "threads": 1,
}  # fmt: skip
# The latents of a planted row that a method may keep, or the price of one; a method that is not named here takes its
# own defaults with k = 3, where it has a k.
KEYS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.6, "l1_warmup": 100},
    "matryoshka": {"groups": [0.5, 0.5]},
    "jumprelu": {
        "penalty": "target", "target": 3, "price": 5.0, "price_warmup": 100, "bandwidth": 1.0, "threshold": 0.5,
    },
}  # fmt: skip


def small_store(folder: Path) -> Store:
    """300 rows of a and b in 20 documents."""
    return make_store(folder / "pair.zarr", rows=300, chunk_rows=16, documents=20)


def ready(store: Store, *changes: Mapping[str, Any]) -> list[Ready]:
    """Runs that can begin: MOMENT, with other tables each."""
    return prepare.ready(store, [configs.parse(TrainConfig, {**MOMENT, **one}) for one in changes])


def names() -> list[str]:
    return methods.names()


def wiring(case: str, latents: int = LATENTS, exclusive: float = 0.2) -> Wiring:
    kind, count = CASES[case]
    return wirings.build(kind, dict(list(WIDTHS.items())[:count]), latents, exclusive)


def method(name: str, **keys: Any) -> methods.MethodConfig:
    known = methods.find(name).model_fields
    own = {key: value for key, value in {"k": 3, "k_aux": 4}.items() if key in known}
    return methods.parse({"name": name, **own, **KEYS.get(name, {}), **keys})


def config(case: str, name: str, steps: int, **keys: Any) -> TrainConfig:
    asked = {
        "wiring": {"kind": CASES[case][0], "latents": LATENTS}, "method": method(name), "steps": steps, "batch": 128,
        "dead_rows": 2000, "optimiser": {"lr": 3e-3, "warmup": 10}, **keys,
    }  # fmt: skip
    return configs.parse(TrainConfig, asked)


def trainer(case: str, name: str, steps: int = 100, seed: int = 0, **keys: Any) -> Trainer:
    """A fresh trainer on rows that need no scale."""
    asked = config(case, name, steps, **keys)
    wires = shards.local(replace(wiring(case, asked.wiring.latents), skip=asked.wiring.skip))
    made, terms = dictionaries.create(wires, asked.method, Scale(wires.widths), asked.wiring.norm, steps)
    made.initialise(seed, asked.wiring.decoder_norm or default_decoder_norm(wires))
    return Trainer(made, list(terms), asked)


@dataclass(frozen=True)
class Planted:
    """x = sum over features g of code_g x direction_g + noise, the same codes for every source.

    Features are shared by all sources, or (where a wiring can tell) own to one: their direction elsewhere is 0.
    """

    directions: dict[str, Tensor]  # [G, D], of length 1 or 0
    noise: float = 0.01
    frequency: float = 0.1  # share of rows on which a feature is active

    def rows(self, count: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = len(next(iter(self.directions.values())))
        on_BG = torch.rand(count, features, generator=generator) < self.frequency
        code_BG = on_BG * (0.75 + 0.5 * torch.rand(count, features, generator=generator)) * 3
        return {
            name: code_BG @ d_GD + self.noise * torch.randn(count, d_GD.shape[1], generator=generator)
            for name, d_GD in self.directions.items()
        }


def planted(case: str, shared: int = 12, own: int = 4) -> Planted:
    sources = list(wiring(case).widths)
    own = 0 if case == "transcoder" else own  # what a cannot see, no transcoder learns
    generator = torch.Generator().manual_seed(7)
    directions = {}
    for index, name in enumerate(sources):
        d_GD = torch.randn(shared + own * len(sources), WIDTHS[name], generator=generator)
        d_GD /= torch.linalg.vector_norm(d_GD, dim=1, keepdim=True)
        for other in range(len(sources)):
            if other != index:
                d_GD[shared + own * other : shared + own * (other + 1)] = 0
        directions[name] = d_GD
    return Planted(directions)


@torch.no_grad()
def randomise(made: dictionaries.Dictionary, seed: int) -> None:
    """Give it random weights, and another scale for each source."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    for index, (source, width) in enumerate(made.wiring.widths.items()):
        made.scale.mean(source).copy_(torch.randn(width, generator=generator))
        made.scale.factor(source).fill_(0.5 + index)


def random_rows(case: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, width, generator=generator) for name, width in wiring(case).widths.items()}
