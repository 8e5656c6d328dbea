"""Files that are whole or absent: temporary name, fsync, rename. Free space. The user's cache folder."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shared.errors import SpaceError

TEMPORARY = ".partial"  # suffix of every name that is not yet whole


def write_atomic(path: Path, parts: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `parts` one after another to `path`: after a crash the file is the old one, the new one, or absent."""
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            for part in [parts] if isinstance(parts, bytes) else parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk does not say what it had no room for
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    for folder in [path.parent, *(folder.parent for folder in new)]:
        sync_folder(folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in the order they have."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, old content included, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            sync_file(entry)
        replaced = temporary.with_suffix(".old" + TEMPORARY)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, as a whole or not at all: what a kill leaves is swept."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.old{TEMPORARY}")
    folder.rename(gone)
    shutil.rmtree(gone)


def open_like_folder(file: Path) -> None:
    """Let those read and write a file who may do so in its folder; safetensors makes files for their owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a rename is durable once its folder is


def sweep(folder: Path) -> int:
    """Remove what killed writers left inside `folder` and of itself; the number of names removed.

    Call it where nobody else is writing.
    """
    own = re.compile(rf"{re.escape(folder.name)}\.[0-9a-f]{{32}}(\.old)?{re.escape(TEMPORARY)}")  # not x.zarr's, of x
    beside = [path for path in folder.parent.glob(f"*{TEMPORARY}") if own.fullmatch(path.name)]
    leftovers = [*beside, *folder.rglob(f"*{TEMPORARY}")]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return len(leftovers)


@contextmanager
def alone(path: Path, waits: Callable[[], object]) -> Iterator[None]:
    """One process at a time for `path`, by a lock file beside it that the system lets go when its holder ends.

    `waits` is called where another one holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as file:
        if not locked(file):
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def locked(file: IO[Any]) -> bool:
    """Take the lock of an open file, which the system lets go when its holder ends; false where another has it.

    Raises OSError, with the file's name, where there are no locks, as on some network disks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (locking a file)", file.name) from None
    return True


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or the nearest folder above it that exists."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


ROOM = "Free some space, choose another path, or store fewer rows (rows.count)"


def require_space(path: Path, needed: int, way_out: str = ROOM) -> None:
    """Raise SpaceError where fewer than `needed` bytes are free for `path`."""
    free = free_bytes(path)
    if free < needed:
        raise SpaceError(
            "no space left for this store",
            f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            way_out,
        )


def cache_folder() -> Path:
    """Where converted models lie: $GRANARY_CACHE, else granary below $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("GRANARY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granary"
