"""Two ways of doing one thing, timed in turn: what a comparison needs on a machine that others use too."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PAIRS = 7  # at least


@dataclass(frozen=True)
class Times:
    """Seconds of one way, a run each: of the clock, and of the processor in all threads."""

    name: str
    seconds: Sequence[float]
    busy: Sequence[float]

    def line(self, amount: float, unit: str) -> str:
        rates = sorted(amount / one for one in self.seconds)
        spread = f"{rates[0]:,.4g} to {rates[-1]:,.4g}"
        return f"{self.name:<24}{statistics.median(rates):>10,.4g} {unit}/s   {spread}"


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], names: tuple[str, str],
    between: Callable[[], object] = int, pairs: int = PAIRS,
) -> tuple[Times, Times]:  # fmt: skip
    """Run both, one after the other, the first of a pair in turn. `between` is called before each, and is not timed.

    Both run once before, which is not counted.
    """
    assert pairs >= PAIRS
    for way in (ours, theirs):
        between()
        way()
    taken: tuple[list[float], list[float]] = ([], [])
    worked: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            between()
            begun, busy = time.perf_counter(), time.process_time()
            (ours, theirs)[which]()
            taken[which].append(time.perf_counter() - begun)
            worked[which].append(time.process_time() - busy)
    return Times(names[0], taken[0], worked[0]), Times(names[1], taken[1], worked[1])


def report(title: str, ours: Times, theirs: Times, amount: float, unit: str, limit: float) -> None:
    """Rates with their spread, and the ratio of the rates: median over the pairs, and its quartiles."""
    print(f"{title}\n{machine()}\n{len(ours.seconds)} interleaved pairs; median and spread\n")
    print(ours.line(amount, unit))
    print(theirs.line(amount, unit))
    median = _ratio("ratio", ours.seconds, theirs.seconds)
    _ratio("ratio of processor time", ours.busy, theirs.busy)  # what others at work here disturb least
    print(f"limit {limit}: {'holds' if median >= limit else 'MISSED'}")


def _ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> float:
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    spread = f"quartiles {low:.3f} to {high:.3f}, all {min(ratios):.3f} to {max(ratios):.3f}"
    print(f"{name:<24}{median:>10.3f}     {spread}; of the fastest {min(theirs) / min(ours):.3f}")
    return median


def machine() -> str:
    """Cores, CPU, accelerator and torch's threads."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {cpu}{device}; {torch.get_num_threads()} torch threads"
