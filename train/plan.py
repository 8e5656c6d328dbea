"""What runs take, and which of them are trained at once.

Bytes are those of the device that trains. Letters: L latents, B rows of a batch.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared import config as configs
from shared.device import free_memory, memory_minded, peak_memory, torch_threads
from shared.errors import ConfigError
from train import parallel, prepare
from train.kernels.entries import drop_spare
from train.loader import SLOTS
from train.prepare import Ready, Shape
from train.scale import Scale
from train.trainer import Trainer

SHARE = 0.9  # of the free memory that runs may take
SHAPE = {"method", "wiring", "batch", "micro_batch", "kernels", "precision", "threads", "scale"}
TRIAL = 3  # steps of a trial; the first is slow
FLOAT, ADAM = 4, 3  # bytes of a number; copies of a weight between steps: itself and two moments


@dataclass(frozen=True)
class Cost:
    """What a run takes, found by a few steps on random rows."""

    state_bytes: int  # weights and moments: as long as its pass lasts
    step_bytes: int | None  # more while it takes a step; none: this system does not tell
    step_s: float
    weights_bytes: int  # of its dictionary
    parameters: int


def costs(runs: Sequence[Ready]) -> list[Cost]:
    """What each run takes. Those of one shape are tried once.

    Raises ConfigError where one fits into no memory, TrainingError where its trial takes more than there is.
    """
    tried: dict[str, Cost] = {}
    for one in runs:
        require_memory(one)
        if (key := _shape(one)) not in tried:
            with memory_minded(f"in a trial of {one.name}"):
                if not tried:
                    trial(one)  # the first of all takes what later ones find
                tried[key] = trial(one)
    return [tried[_shape(one)] for one in runs]


def _shape(run: Ready) -> str:
    """All that its cost depends on."""
    asked = run.config.model_dump(mode="json", include=SHAPE)
    return configs.canonical([asked, str(run.device), run.wiring.widths])


def trial(run: Ready) -> Cost:
    """A run's cost, from a few steps of a trainer of its shape."""
    generator = torch.Generator().manual_seed(0)
    rows = parallel.share(run.config.batch)
    shapes = {name: (rows, width) for name, width in run.wiring.widths.items()}
    x = {name: torch.randn(shape, generator=generator).to(run.device) for name, shape in shapes.items()}
    drop_spare()
    with torch_threads(run.config.threads), peak_memory(run.device) as peak:
        trainer = prepare.initialised(run, Scale(run.wiring.widths))
        taken = [_timed(trainer, x) for _ in range(TRIAL)]
        state = _bytes(trainer.own_state())
        most = peak()
    weights = _bytes(trainer.dictionary.state_dict())
    more = None if most is None else max(most - state, 0)
    return Cost(state, more, min(taken[1:]), weights, sum(p.numel() for p in trainer.parameters))


def disk_bytes(run: Ready, cost: Cost) -> int:
    """Of a run's checkpoints, and of its dictionary. One more is written before the oldest goes."""
    log = run.config.log
    kept = min(log.keep + 1, -(-run.config.steps // log.checkpoint))
    return (kept * cost.state_bytes + cost.weights_bytes) * parallel.latent_ranks()


def _timed(trainer: Trainer, x: Mapping[str, torch.Tensor]) -> float:
    began = time.perf_counter()
    float(trainer.update(x)["loss"])  # waits for the device
    return time.perf_counter() - began


def _bytes(state: Any) -> int:
    """Of all tensors in nested tables."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    inner: Iterable[Any] = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
    return sum(_bytes(one) for one in inner)


def require_memory(run: Shape) -> None:
    """Raises ConfigError where weights, moments and gradients alone are more than the free memory."""
    spans, widths = run.wiring.spans, run.wiring.widths
    numbers = sum(span.size * widths[name] for span in spans for name in (*span.readers, *span.writers))
    if run.wiring.skip:
        numbers += sum(widths[r] * widths[w] for r in run.wiring.readers for w in run.wiring.writers)
    least, free = (ADAM + 1) * FLOAT * numbers // parallel.latent_ranks(), free_memory(run.device)
    if least > free:
        value = f"{gb(least)} of {gb(free)} on {run.device}"
        raise ConfigError("the run does not fit into memory", value, "Lower wiring.latents, or use a larger device")


def passes(runs: Sequence[Ready], found: Sequence[Cost], begun: Sequence[int], memory: int | None) -> list[list[int]]:
    """Which runs are trained at once: their numbers, pass by pass.

    Runs share a pass that serve the same batches from the same step on, by the same device and threads, as long as
    they fit into `memory` bytes (none: 0.9 of what is free on their device). Raises ConfigError for one that does not
    fit alone.
    """
    return [fitting for group in alike(runs, begun) for fitting in _fitting(group, runs, found, memory)]


def alike(runs: Sequence[Ready], begun: Sequence[int]) -> list[list[int]]:
    """The numbers of the runs that could share a pass, group by group."""
    groups: dict[str, list[int]] = {}
    for n, one in enumerate(runs):
        groups.setdefault(configs.canonical(shared(one, begun[n])), []).append(n)
    return list(groups.values())


def shared(run: Ready, begun: int) -> dict[str, Any]:
    """What runs of a pass have in common."""
    asked = run.config
    rows = {f"rows.{key}": value for key, value in asked.rows.model_dump(mode="json").items()}
    read = {f"read.{key}": value for key, value in asked.read.model_dump(mode="json").items()}
    alone = {"device": str(run.device), "threads": asked.threads, "first step": begun}
    return {"batch": asked.batch, **rows, **read, **alone}


def _fitting(group: Sequence[int], runs: Sequence[Ready], found: Sequence[Cost], memory: int | None) -> list[list[int]]:
    free = int(SHARE * free_memory(runs[group[0]].device)) if memory is None else memory
    result: list[list[int]] = [[]]
    for n in group:
        if result[-1] and taken([*result[-1], n], runs, found) > free:
            result.append([])
        if (least := taken([n], runs, found)) > free:
            value = f"{gb(least)} of {gb(free)} for {runs[n].name}"
            raise ConfigError(
                "the run does not fit into memory", value, "Lower batch or wiring.latents, or raise --memory"
            )
        result[-1].append(n)
    return result


def taken(group: Sequence[int], runs: Sequence[Ready], found: Sequence[Cost]) -> int:
    """Bytes that these runs take at once: their states, one step at a time, and what the loader has on their device."""
    batch = parallel.share(runs[group[0]].config.batch)
    widths = {name: width for n in group for name, width in runs[n].wiring.widths.items()}
    steps = max(found[n].step_bytes or 0 for n in group)
    rows = SLOTS * batch * sum(widths.values()) * FLOAT
    windows = windows_bytes([runs[n] for n in group]) if runs[group[0]].device.type == "cpu" else 0
    return sum(found[n].state_bytes for n in group) + steps + rows + windows


def windows_bytes(runs: Sequence[Ready]) -> int:
    """What lies in memory of the process's own (not the GPU's) of rows that are not mapped: two windows."""
    order, owned = runs[0].order, {part: size for one in runs for part, size in one.owned.items()}
    return min(2 * order.window_rows, len(order.kept_N)) * sum(owned.values())


def parted(runs: Sequence[Ready], begun: Sequence[int], planned: Sequence[Sequence[int]]) -> str:
    """Why these runs take more than one pass: the keys in which they differ, and memory. Empty for a single pass."""
    firsts = [shared(runs[group[0]], begun[group[0]]) for group in planned]
    why = [key for key in firsts[0] if len({configs.canonical(one[key]) for one in firsts}) > 1]
    again = len({configs.canonical(one) for one in firsts}) < len(firsts)
    return ", ".join([*why, *(["memory"] if again else [])])


def gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
