"""Stores at a URL: in an object store, such as s3://bucket/pair.zarr, or in a dataset repository of the hub, such as
hf://datasets/ORG/pair. What lies there is read by name, and is what its size and checksum say.
"""

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import ClassVar

import google_crc32c

from shared import files
from shared.errors import ConfigError, StoreDamagedError
from shared.layout import DAMAGED, GROUP, SEALED, crc32c
from shared.log import bar

CONNECTIONS = 8
PIECE = 2**22  # bytes that are held at once of a file that is copied
HUB, RECEIPTS = "hf://", "receipts/"
Tick = Callable[[int], object]


def is_url(path: str) -> bool:
    return "://" in path


def local(path: str, way_out: str) -> Path:
    """A path on this machine. Raises ConfigError for a URL."""
    if is_url(path):
        raise ConfigError("a path on this machine is needed here, not a URL", path, way_out)
    return Path(path)


def place(url: str, below: str | Path) -> Path:
    """The folder for the store at a URL: named by its last part and its hash."""
    url = url.rstrip("/")
    return Path(below).expanduser() / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def name_of(path: Path) -> str:
    """What a store is called: its folder's name, of a copy (`place`) the last part of the URL, without .zarr."""
    return re.sub(r"\.zarr(-[0-9a-f]{12})?$", "", path.absolute().name)


class Remote(ABC):
    """The files below a URL, each under its name in the store. Errors of the network are RemoteErrors."""

    way_out: ClassVar[str] = "harvest repair {url} --full finds every file of this kind, and makes it again"

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file; none where there is no such file."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """{name: bytes} of every file."""

    @abstractmethod
    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """A file of this size, in pieces. Raises StoreDamagedError where it is missing, shorter or longer."""

    @abstractmethod
    def send(self, batch: Mapping[str, Path | bytes], message: str, tick: Tick = int) -> None:
        """Write these files. `tick` is called with bytes as they are there; `message` is for a history that is kept."""

    def fetch(self, name: str, path: Path, size: int, crc: int, tick: Tick = int) -> None:
        """Copy an object to `path`, whole or not at all. `tick` is called with bytes as they arrive.

        Raises StoreDamagedError where it is missing, shorter or longer, or (twice) of another checksum.
        """
        try:
            files.write_atomic(path, self._pieces(name, size, crc, tick))
        except StoreDamagedError:
            files.write_atomic(path, self._pieces(name, size, crc, tick))

    def holds(self, name: str, size: int, crc: int) -> bool:
        """Whether an object is what it should be: it is read, twice where the first time it was not, and not kept."""
        for _ in range(2):
            with suppress(StoreDamagedError):
                for _ in self._pieces(name, size, crc, int):
                    pass
                return True
        return False

    def _pieces(self, name: str, size: int, crc: int, tick: Tick) -> Iterator[bytes]:
        """The bytes of an object; raises at its end where they are not those of `size` and `crc`."""
        found, done = 0, 0
        for piece in self.stream(name, size):
            found, done = google_crc32c.extend(found, piece), done + len(piece)
            tick(len(piece))
            yield piece
        if found != crc:
            tick(-done)
            raise self.damaged(name, "has another checksum")

    def damaged(self, name: str, what: str) -> StoreDamagedError:
        return StoreDamagedError(f"a file at {self.url} {what}", name, self.way_out.format(url=self.url))


# --- from and to it -------------------------------------------------------------------------------------------------


def outline(remote: Remote, folder: Path, sizes: Mapping[str, int]) -> None:
    """Copy what tells how far a store is: every zarr.json, the receipts, and what was written last."""
    names = [name for name in sizes if name.endswith(GROUP) or name.startswith(RECEIPTS) or name in (SEALED, DAMAGED)]
    read(remote, folder, names)


def read(remote: Remote, folder: Path, names: Sequence[str]) -> None:
    """Copy these small objects. One that is gone by now is left out."""
    with ThreadPoolExecutor(CONNECTIONS, "fetch") as pool:
        for name, data in zip(names, pool.map(remote.read, names), strict=True):
            if data is not None:
                files.write_atomic(folder / name, data)


def fetch(remote: Remote, path: Path, wanted: Mapping[str, tuple[int, int]], what: str, quiet: bool) -> None:
    """Have these files {name: (bytes, crc32c)} below `path`. Raises StoreDamagedError, naming it, where one is not so.

    What lies there already is read, and kept if it is right.
    """
    for name in wanted:
        if not inside(name):
            raise remote.damaged(name, "leads out of the store")
    total = sum(size for size, _ in wanted.values())
    with bar(what, "bytes", total, quiet=quiet) as progress, Several(progress.update) as several:
        several.all(lambda tick, name: _settle(remote, path / name, name, *wanted[name], tick), list(wanted))


def inside(name: str) -> bool:
    return bool(PurePosixPath(name).parts) and not {"..", "/"} & set(PurePosixPath(name).parts)


def _settle(remote: Remote, path: Path, name: str, size: int, crc: int, tick: Tick) -> None:
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as file:
            if crc32c(iter(lambda: file.read(PIECE), b"")) == crc:
                tick(size)
                return
    remote.fetch(name, path, size, crc, tick)


class Several:
    """Runs a task per name on several threads; the first error, or a stop, ends all of them at their next tick."""

    def __init__(self, tick: Tick) -> None:
        self._tick, self._lock, self._over = tick, threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, "stage")

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._pool.shutdown(cancel_futures=True)

    def all(self, task: Callable[[Tick, str], None], names: Sequence[str]) -> None:
        for done in as_completed([self._pool.submit(task, self.tick, name) for name in names]):
            done.result()

    def tick(self, count: int) -> None:
        if self._over.is_set():
            raise InterruptedError
        with self._lock:
            self._tick(count)
