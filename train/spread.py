"""Runs over several GPUs: a process for each, which goes on with its share of them; all map the same store.

The pages of the store are shared by the system's cache: it is read from the disk once.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from shared.errors import ConfigError, Stopped
from train import parallel, plan
from train.config import TrainConfig
from train.prepare import Ready

UNEVEN = 1.25  # of its share a device may have that much, rather than part runs that can share a pass
COMMAND = "from train.cli import main; main()"


def devices(gpus: Sequence[int], asked: Sequence[TrainConfig]) -> list[str]:
    """These GPUs of those that this process sees (none named: all), as CUDA_VISIBLE_DEVICES names them.

    Raises ConfigError for one that is not there, or where a run is to be trained elsewhere.
    """
    if elsewhere := [one.device for one in asked if one.device not in ("auto", "cuda")]:
        raise ConfigError("--gpus says where runs are trained", f"device {elsewhere[0]}", "Leave one of the two out")
    if parallel.ranks() > 1:
        raise ConfigError("--gpus starts processes of its own", "torchrun", "Leave one of the two out")
    count = torch.cuda.device_count()
    wanted = list(gpus) or list(range(count))
    if not wanted or len(set(wanted)) < len(wanted) or not all(0 <= one < count for one in wanted):
        value = ", ".join(map(str, wanted)) or "none"
        raise ConfigError(
            "these GPUs cannot be used", value, f"GPUs that this machine shows: {count}; the first is number 0"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [visible[one] for one in wanted]


def shares(runs: Sequence[Ready], count: int) -> list[list[int]]:
    """The numbers of the runs of each of `count` devices: the longest first, to the device with the least to do.

    Runs that can share a pass (plan.alike) stay on one device, unless they are much more than its share of all work.
    """
    work = [run.config.steps * run.config.batch * run.wiring.latents * sum(run.wiring.widths.values()) for run in runs]

    def load(some: Sequence[int]) -> int:
        return sum(work[n] for n in some)

    units = [
        unit
        for group in plan.alike(runs, [0] * len(runs))
        for unit in ([group] if load(group) * count <= UNEVEN * sum(work) else [[n] for n in group])
    ]
    parts: list[list[int]] = [[] for _ in range(count)]
    for unit in sorted(units, key=lambda unit: -load(unit)):
        min(parts, key=load).extend(unit)
    return [sorted(part) for part in parts if part]


def run(
    parts: Sequence[Sequence[Path]], stores: Sequence[Path], environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path], memory: int | None = None,
) -> None:  # fmt: skip
    """Go on with the runs in these folders, a process for each part, which may take `memory` bytes.

    Their output goes to the log files. Returns when all have ended; a stop is handed on to them.
    """
    with ExitStack() as stack:
        processes = []
        read = [word for store in stores for word in ("--store", str(store))]
        limit = [] if memory is None else ["--memory", str(memory / 1e9)]
        for folders, environment, log in zip(parts, environments, logs, strict=True):
            command = [sys.executable, "-c", COMMAND, "resume", *map(str, folders), *read, *limit]
            file = stack.enter_context(log.open("a"))
            whole = {**os.environ, **environment}
            # A session of its own: Ctrl-C reaches this process alone, which hands it on once. A second stop would end a
            # child before its checkpoint.
            process = subprocess.Popen(command, env=whole, stdout=file, stderr=file, start_new_session=True)
            processes.append(process)
        try:
            for one in processes:
                one.wait()
        except (Stopped, KeyboardInterrupt):
            for one in processes:
                one.terminate()
            for one in processes:
                one.wait()
            raise
