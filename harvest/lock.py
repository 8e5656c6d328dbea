"""One harvest of a store at a time: who holds it, and whether they still live.

A store is safe without: units are whole or absent, and the same whoever makes them. The lock saves work twice done.
"""

import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from shared import files
from shared.errors import LockError

BEAT_S = 10.0  # between two signs of life
SILENT_S = 120.0  # without one, a process on another machine counts as gone
WHOLE = "whole"  # the slot of a harvest that makes every unit; parts have slots such as 2-of-8
BEGIN = "begin"  # a second slot of the part that plans, calibrates or seals
POLL_S = 1.0


@dataclass(frozen=True)
class Holder:
    """A process that holds a slot of a store. `machine` tells apart boots and containers of one host name."""

    slot: str
    host: str
    machine: str
    pid: int
    started: float  # seconds since the epoch; a process number is used again
    token: str

    @classmethod
    def me(cls, slot: str) -> "Holder":
        process = psutil.Process()
        return cls(slot, platform.node(), _machine(), process.pid, process.create_time(), uuid.uuid4().hex)

    def excludes(self, slot: str) -> bool:
        """Different parts of one whole stand beside each other, and one of them may begin; all else is alone."""
        if self.slot == slot or WHOLE in (self.slot, slot):
            return True
        return BEGIN not in (self.slot, slot) and self.slot.split("-of-")[1] != slot.split("-of-")[1]

    def gone(self, silent_s: float) -> bool:
        """Whether the process has ended: known on its own machine, elsewhere a matter of its silence."""
        if self.machine != _machine():
            return silent_s > SILENT_S
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def folder_of(store: Path) -> Path:
    """Beside the store: it is held before the store exists."""
    store = Path(os.path.abspath(store))  # noqa: PTH100 (`.` has no name; resolve() would follow a link)
    return store.with_name(f"{store.name}.lock")


def holders(store: Path) -> list[tuple[Holder, float]]:
    """Who holds the store, each with the seconds since its last sign of life, by the clock of the disk."""
    return [(holder, silent_s) for _, holder, silent_s in _marks(store) if holder is not None]


@contextmanager
def hold(store: Path, say: Callable[[str], None], slot: str = WHOLE) -> Iterator[None]:
    """Hold a slot while the block runs. `say` is told of holders that have died.

    Raises LockError where a living one excludes it.
    """
    me, mine = Holder.me(slot), folder_of(store) / f"{slot}.json"
    mine.parent.mkdir(parents=True, exist_ok=True)
    _evict(store, me, say)
    try:
        file = mine.open("x", encoding="utf-8")
    except FileExistsError:
        raise LockError("another harvest has just begun here", store, "See harvest status") from None
    with file:
        try:
            json.dump(asdict(me), file)
            file.flush()
            _evict(store, me, say)  # again: one of another slot may have come between
            with _beating(file):
                yield
        finally:
            if _read(mine) == me:
                mine.unlink()
            files.sweep(mine.parent)
            with suppress(OSError):  # others are in it
                mine.parent.rmdir()


@contextmanager
def wait(store: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold BEGIN while the block runs, as soon as no other part does."""
    told = False
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(store, say, BEGIN))
            except LockError as error:
                if not told:
                    say(f"waiting for another part: {error.value}")
                told = True
                time.sleep(POLL_S)
                continue
            yield
            return


def sweep(store: Path, say: Callable[[str], None]) -> None:
    """Remove the marks of holders that have ended, as of one that was killed behind its last step."""
    with suppress(OSError):  # others are in it, or it may not be written
        for mark, holder, silent_s in _marks(store):
            if holder is not None and holder.gone(silent_s):
                _take(mark, holder)
                say(f"{holder} has ended without letting go")
        files.sweep(folder_of(store))
        folder_of(store).rmdir()


def _evict(store: Path, me: Holder, say: Callable[[str], None]) -> None:
    """Remove the marks of processes that have ended. Raises LockError for one that has not and excludes `me`."""
    for mark, holder, silent_s in _marks(store):
        if holder is None:
            if silent_s > SILENT_S:  # its writer died between two system calls
                mark.unlink(missing_ok=True)
        elif holder != me and holder.excludes(me.slot):
            if not holder.gone(silent_s):
                value = f"{store} by {holder}, last heard of {max(silent_s, 0):.0f} s ago"
                raise LockError("another harvest holds this store", value, "Wait for it, or stop it")
            _take(mark, holder)
            say(f"taking over from {holder}, which has ended")


def _take(mark: Path, holder: Holder) -> None:
    """Remove the mark of a dead holder, and no other: somebody may have been faster."""
    taken = mark.with_suffix(f".{uuid.uuid4().hex}{files.TEMPORARY}")
    with suppress(FileNotFoundError):
        mark.rename(taken)
        if _read(taken) != holder:
            taken.rename(mark)
        taken.unlink(missing_ok=True)


def _marks(store: Path) -> list[tuple[Path, Holder | None, float]]:
    """Every mark, its holder (none: not written yet), and the seconds since it was touched."""
    found = []
    for mark in sorted(folder_of(store).glob("*.json")):
        with suppress(FileNotFoundError):
            found.append((mark, _read(mark), _disk_time(mark.parent) - mark.stat().st_mtime))
    return found


def _read(mark: Path) -> Holder | None:
    try:
        return Holder(**files.read_json(mark))
    except (OSError, ValueError, TypeError):
        return None


def _disk_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of a folder; over a network it is not this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


@contextmanager
def _beating(mark: IO[str]) -> Iterator[None]:
    """Touch the mark every BEAT_S. By its descriptor: the name may be another's by now."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            os.utime(mark.fileno())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@cache
def _machine() -> str:
    """This boot of this machine, and this container's processes."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        return f"{boot.read_text().strip()} {processes.readlink()}"
    return f"{uuid.getnode():x} {psutil.boot_time():.0f}"
