"""One process that makes units of a store, with one model in memory at a time."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest.bench import Bench
from harvest.cast import calibrated, cast, difference
from harvest.forward import Batches, reshaped, rows
from harvest.unit import UnitMaker
from shared import hooks, models
from shared.device import device_of
from shared.layout import Unit
from shared.log import Log, bar
from shared.store import Part, Store

Scale = dict[str, dict[str, float]]  # {source: attributes.granary.scale}


class Worker:
    """Loads models as they are asked for, and makes units. `store` may be replaced by the same one with its scale."""

    def __init__(self, store: Store, bench: Bench, log: Log) -> None:
        self.store, self._bench, self._log = store, bench, log
        self._device = str(device_of(bench.device))
        self.holds: str | None = None
        self._model: nn.Module | None = None
        self._maker: UnitMaker | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._maker = None  # its hooks are gone

    @property
    def made_with(self) -> dict[str, Any]:
        """What decides the bytes of a unit beside the plan, for its receipt."""
        versions = {"torch": str(torch.__version__), "transformers": models.version(), "numpy": str(np.__version__)}
        return {"device": torch.device(self._device).type, "threads": torch.get_num_threads(), "versions": versions}

    def make(self, unit: Unit, tick: Any) -> dict[str, Part]:
        """The parts of one unit. `tick` is called with rows made."""
        return self.maker(unit[1]).make(unit[0], tick)

    def maker(self, name: str) -> UnitMaker:
        if self._maker is None or self._maker.name != name:
            self._hooks.close()
            model = self._load(name)
            captured = self._hooks.enter_context(self._capturing(model))
            checkpoint = self._bench.checkpoints[name]
            self._maker = UnitMaker(self.store, name, captured, checkpoint, self._device)
        return self._maker

    def scale(self) -> Scale:
        """Calibrate every source on some of the plan's batches."""
        scale: Scale = {}
        for name in self.store.header.models:
            scale |= self._calibrate(name)
        return scale

    def _calibrate(self, name: str) -> Scale:
        """Check the hooks against the model's own hidden states, and choose the scale of each of its sources."""
        batches = list(Batches(self.store, name).spread(self.store.header.spec["batch"]["calibration"]))
        sites = {source.site: source.name for source in self.store.sources_of(name)}
        model, device, first = self._load(name), self._device, batches[-1]  # the shortest segments
        hooks.self_check(model, list(sites), first.ids_BT[:2].to(device), first.mask_BT[:2].to(device))
        norms: dict[str, list[Tensor]] = {source: [] for source in sites.values()}
        largest = dict.fromkeys(sites.values(), 0.0)
        with (
            self._capturing(model) as captured,
            bar(f"{name}: scale", "batches", len(batches), quiet=self._log.quiet) as progress,
        ):
            for batch in batches:
                for source, x_ND in rows(captured, batch, sites, device).items():
                    one = cast(x_ND, 1.0, math.inf)
                    norms[source].append(one.norms_N.cpu())
                    largest[source] = max(largest[source], float(one.x_ND.abs().max()))
                progress.update()
            once, again = (rows(captured, one, sites, device) for one in (first, reshaped(first)))
        rounding = {
            name: float(difference(once[name][: len(x_ND)].float(), x_ND.float()).nan_to_num(0.0).max())
            for name, x_ND in again.items()
        }
        dtype = self.store.dtype
        return {source: calibrated(norms[source], largest[source], rounding[source], dtype) for source in norms}

    def _load(self, name: str) -> nn.Module:
        if self._model is None or self.holds != name:
            self._model = self._maker = None  # let the last one go before the next is read
            model = self.store.header.models[name]
            self._log.event("load", f"loading {name} ({model.dtype}, {model.attention} attention, {self._device})")
            self._model = models.load(self._bench.checkpoints[name], model.dtype, model.attention, self._device)
            self.holds = name
        return self._model

    @contextmanager
    def _capturing(self, model: nn.Module) -> Iterator[hooks.Run]:
        assert self.holds is not None
        sites = [hooks.find(model, source.site) for source in self.store.sources_of(self.holds)]
        with torch.inference_mode(), hooks.capture(model, sites) as captured:
            yield captured
