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
from train import parallel
from train.prepare import Ready

COMMAND = "from train.cli import main; main()"


def devices(gpus: Sequence[int]) -> list[str]:
    """These GPUs of those that this process sees (none named: all), as CUDA_VISIBLE_DEVICES names them.

    Raises ConfigError for one that is not there.
    """
    if parallel.world() > 1:
        raise ConfigError("--gpus starts processes of its own", "torchrun", "Leave one of the two out")
    count = torch.cuda.device_count()
    wanted = list(gpus) or list(range(count))
    if not wanted or len(set(wanted)) < len(wanted) or not all(0 <= one < count for one in wanted):
        value = ", ".join(map(str, wanted)) or "none"
        raise ConfigError("these GPUs cannot be used", value, f"This machine shows {count}; number them from 0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [visible[one] for one in wanted]


def shares(runs: Sequence[Ready], count: int) -> list[list[int]]:
    """The numbers of the runs of each of `count` devices: the longest first, to the device with the least to do."""
    work = [run.config.steps * run.config.batch * run.wiring.latents * sum(run.wiring.widths.values()) for run in runs]
    parts: list[list[int]] = [[] for _ in range(count)]
    for n in sorted(range(len(runs)), key=lambda n: -work[n]):
        min(parts, key=lambda part: sum(work[one] for one in part)).append(n)
    return [sorted(part) for part in parts if part]


def run(
    parts: Sequence[Sequence[Path]], stores: Sequence[Path], environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path],
) -> None:  # fmt: skip
    """Go on with the runs in these folders, a process for each part. Their output goes to the log files.

    Returns when all have ended; a stop is handed on to them.
    """
    with ExitStack() as stack:
        processes = []
        read = [word for store in stores for word in ("--store", str(store))]
        for folders, environment, log in zip(parts, environments, logs, strict=True):
            command = [sys.executable, "-c", COMMAND, "resume", *map(str, folders), *read]
            file = stack.enter_context(log.open("a"))
            processes.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file))
        try:
            for one in processes:
                one.wait()
        except (Stopped, KeyboardInterrupt):
            for one in processes:
                one.terminate()
            for one in processes:
                one.wait()
            raise
