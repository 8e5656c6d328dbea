"""The device and the threads that a user names, its free memory, and copies that do not keep the device waiting."""

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from shared.errors import ConfigError, TrainingError


def device_of(name: str) -> torch.device:
    """A device by its name; auto is cuda where there is one. Raises ConfigError where it cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for this kind of device
        reason = str(error).partition("\n")[0].partition(". ")[0].partition("Expected one of")[0].strip()
        way_out = "Use cpu, cuda or auto" + (f" ({reason})" if reason else "")
        raise ConfigError("this device cannot be used", name, way_out) from None


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch runs on `count` threads of the CPU (none: as it was) while the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alone() -> None:
    """Torch computes on the calling thread alone in all that it does there; elsewhere as before.

    Else the thread would have a team of its own, beside that of the thread that trains: OpenMP lets teams sleep between
    two sums where they are more threads than cores, and a step on two cores takes an eighth longer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of all that begin from now on
    again = threading.Thread(target=torch.set_num_threads, args=(before,))
    again.start()
    again.join()


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take there.

    cuda       what the driver has left, and what torch holds and does not use
    any other  what the system can give without swapping, as far as every control group that this process is in lets it
    """
    if device.type == "cuda":
        left, _ = torch.cuda.mem_get_info(device)
        return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available: int = psutil.virtual_memory().available
    return min(available, *free_in_groups())


@contextmanager
def memory_minded(at: str) -> Iterator[None]:
    """Too little memory is told in a line, with the part of the work (`at`: "at step 3"). Raises TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch says of the CPU's memory only in words that it is short
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        way_out = "Lower batch or wiring.latents"
        raise TrainingError("out of memory", f"{str(error).partition(chr(10))[0]} {at}", way_out) from None


@dataclass(frozen=True)
class _Memory:
    """The files of a control group that tell of its memory, and what memory.stat calls pages that it can take back."""

    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]


_GROUPS = {  # by the type of their file system: versions 1 and 2
    "cgroup": _Memory(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
    "cgroup2": _Memory(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that each of the control groups that this process is in, and those around them, lets it take.

    Pages of files count as free: they are given back where others need them. Linux alone has such groups.
    """
    found: list[int] = []
    with suppress(FileNotFoundError):
        ours = dict(_own_groups((root / "proc/self/cgroup").read_text()))
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, rest = line.partition(" - ")
            (_, _, _, top, point, *_), (kind, _, options, *_) = mount.split(), rest.split()
            if kind in ours and (kind == "cgroup2" or "memory" in options.split(",")):
                found += _free_around(root / point.lstrip("/"), Path(top), Path(ours[kind]), _GROUPS[kind])
    return found


def _own_groups(text: str) -> Iterator[tuple[str, str]]:
    """(type of its file system, path) of the control groups that count this process's memory."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _free_around(point: Path, top: Path, group: Path, files: _Memory) -> Iterator[int]:
    """Of a group and those around it that can be seen: `point` shows the group `top`."""
    # Where the mount does not show the group, a container hides where it is.
    inside = point / group.relative_to(top) if group.is_relative_to(top) else point
    for folder in (inside, *inside.parents):
        if not folder.is_relative_to(point):
            return
        with suppress(OSError):  # the outermost one has no such files
            limits = [text for name in files.limits if (text := _text(folder / name)) not in ("max", "")]
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / files.used).read_text()) - sum(int(stat.get(name, 0)) for name in files.cache)
            yield from (max(int(limit) - used, 0) for limit in limits)


def _text(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on the device. To a GPU it goes through pinned memory, and nothing waits for it."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


class Later:
    """Numbers on the device, asked for now and waited for when they are read; what it was given meanwhile goes on."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Any:
        """A number, or lists of numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Outward:
    """Copies to the CPU beside what a GPU computes next, on a stream of their own; on the CPU there is nothing to copy.

    The pinned memory of a copy goes back to torch's pool with its last tensor: as much of it is held as is on its way.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def begin(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start the copies; what is returned waits for them, and gives them."""
        if self._stream is None:
            return lambda: list(tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            for x, copy in zip(tensors, copies, strict=True):
                copy.copy_(x, non_blocking=True)
                x.record_stream(self._stream)  # its memory is not used again before it was read
            arrived = self._stream.record_event()

        def wait() -> list[Tensor]:
            arrived.synchronize()
            return copies

        return wait


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Callable[[], int | None]]:
    """Gives a function that tells how many more bytes than at the beginning this process has taken at most.

    Of a GPU those of torch's tensors; on the CPU those of the whole process. None where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now (proc(5))
    except OSError:  # no Linux, or one that does not let us
        yield lambda: None
        return
    resident = _status("VmRSS")
    yield lambda: _status("VmHWM") - resident


def _trim() -> None:
    """Give the system back what malloc keeps of what was freed: else it is taken again and not seen."""
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
