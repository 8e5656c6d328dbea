"""Stores at a URL, such as s3://bucket/pair.zarr: the only file that knows obstore, which takes credentials from the
environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT and so on).
"""

import hashlib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c

from shared import files
from shared.errors import ConfigError, RemoteError, StoreDamagedError, StoreError, StoreUnfinishedError
from shared.layout import DAMAGED, GROUP, SEALED, crc32c
from shared.log import Log, bar

CONNECTIONS = 8
PIECE = 2**22  # bytes of one request, which a slow line must move within obstore's 30 s (AWS_TIMEOUT=2m: longer)
PART = 5 * 2**20  # bytes of one request that writes; S3 takes no smaller ones and 10,000 of them
FIRST_TRIES = 3  # of the first request: a wrong URL is known within seconds; later ones try for three minutes
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your cloud has instead) in the environment"
METADATA = "/latest/api/token"  # where obstore looks for credentials when the environment has none
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


class Remote:
    """The objects below a URL, each under its name in the store. Errors of the network are RemoteErrors."""

    def __init__(self, url: str, tries: int | None = None) -> None:
        """`tries`: of each request; none: as obstore does. Nothing is asked of the network yet."""
        self.url = url.rstrip("/")
        options: dict[str, Any] = {} if tries is None else {"retry_config": {"max_retries": tries}}
        if url.startswith("http:"):
            options["client_options"] = {"allow_http": True}
        try:
            import obstore
            from obstore import exceptions
        except ModuleNotFoundError:
            way_out = "Install it: pip install 'granary-sae[s3]'"
            raise RemoteError("a store at a URL needs the package obstore", url, way_out) from None
        self._ob, self._exceptions = obstore, exceptions
        try:
            self._store = obstore.store.from_url(self.url, **({} if url.startswith("file:") else options))
        except (exceptions.BaseError, ValueError, OSError) as error:
            way_out = f"Give one such as s3://bucket/pair.zarr ({_first(error)})"
            raise RemoteError("cannot use this URL", url, way_out) from None

    def read(self, name: str) -> bytes | None:
        """A small object; none where there is no such object."""
        with self._explained(name):
            try:
                return bytes(self._ob.get(self._store, name).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of every object."""
        with self._explained(""):
            return {one["path"]: one["size"] for page in self._ob.list(self._store) for one in page}

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, whole or not at all. A file goes in pieces, several at a time."""
        with self._explained(name):
            self._ob.put(self._store, name, data, chunk_size=PART, max_concurrency=CONNECTIONS)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; whether it was written."""
        with self._explained(name):
            try:
                self._ob.put(self._store, name, data, mode="create")
            except self._exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Write an object if it still is `old`; whether it was. (file:// cannot make sure, and just writes.)"""
        with self._explained(name):
            found = self._ob.get(self._store, name)
            if bytes(found.bytes()) != old:
                return False
            version: Any = {key: found.meta.get(key) for key in ("e_tag", "version") if found.meta.get(key)}
            try:
                self._ob.put(self._store, name, new, mode=version)
            except self._exceptions.PreconditionError:
                return False
            except NotImplementedError:
                self._ob.put(self._store, name, new)
            return True

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._explained(name):
                try:
                    self._ob.delete(self._store, name)
                except FileNotFoundError:
                    continue

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
        for start in range(0, size, PIECE):
            piece = self._piece(name, start, min(start + PIECE, size), size)
            found, done = google_crc32c.extend(found, piece), done + len(piece)
            tick(len(piece))
            yield piece
        if found != crc:
            tick(-done)
            raise self.damaged(name, "has another checksum")

    def _piece(self, name: str, start: int, stop: int, size: int) -> bytes:
        with self._explained(name):
            try:
                whole = stop - start == size
                found = self._ob.get(self._store, name, options=None if whole else {"range": (start, stop)})
            except FileNotFoundError:
                raise self.damaged(name, "is missing") from None
            if found.meta["size"] != size:
                raise self.damaged(name, f"has {found.meta['size']} bytes, not {size}")
            return bytes(found.bytes())

    def damaged(self, name: str, what: str) -> StoreDamagedError:
        way_out = f"harvest repair {self.url} --full finds every file of this kind, and makes it again"
        return StoreDamagedError(f"a file at {self.url} {what}", name, way_out)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """What obstore raises, in one line."""
        try:
            yield
        except (self._exceptions.BaseError, OSError, NotImplementedError) as error:
            denied = isinstance(error, PermissionError | self._exceptions.UnauthenticatedError)
            where, reason = f"{self.url}/{name}" if name else self.url, _first(error)
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                what, way_out = "no such bucket", "Check the URL, or create the bucket"
            elif METADATA in str(error):
                what, way_out = "no credentials for this URL", f"Set {KEYS}, or AWS_SKIP_SIGNATURE=true if it is public"
            elif denied or " 403 " in reason:
                what, way_out = "access is denied", f"Check {KEYS} ({reason})"
            else:
                what, way_out = (
                    "this URL does not answer",
                    f"Check the network and AWS_ENDPOINT, and try again ({reason})",
                )
            raise RemoteError(what, where, way_out) from None


def _first(error: BaseException) -> str:
    """The reason in what obstore says: it tells the request, the reply's body and its own sources too."""
    line = str(error).partition("\n")[0]
    return line.rpartition(" - ")[2].partition("<?xml")[0].strip(" :")


# --- from and to it -------------------------------------------------------------------------------------------------


def source(url: str) -> Remote:
    """What lies at a URL. Raises RemoteError within seconds where nothing answers."""
    Remote(url, FIRST_TRIES).read(SEALED)
    return Remote(url)


def destination(url: str) -> Remote:
    """A URL that can be written to."""
    if url.startswith(("http:", "https:", "memory:")):
        raise RemoteError("a store cannot be written to this URL", url, "Give one such as s3://bucket/pair.zarr")
    if url.startswith("file:"):
        Path(url.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
    return source(url)


def outline(remote: Remote, folder: Path, sizes: Mapping[str, int]) -> None:
    """Copy what tells how far a store is: every zarr.json, the receipts, and what was written last."""
    names = [
        name for name in sizes if name.endswith(GROUP) or name.startswith("receipts/") or name in (SEALED, DAMAGED)
    ]
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
        if not _inside(name):
            raise remote.damaged(name, "leads out of the store")
    total = sum(size for size, _ in wanted.values())
    with bar(what, "bytes", total, quiet=quiet) as progress, _Several(progress.update) as several:
        several.all(lambda tick, name: _settle(remote, path / name, name, *wanted[name], tick), list(wanted))


def _settle(remote: Remote, path: Path, name: str, size: int, crc: int, tick: Tick) -> None:
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as file:
            if crc32c(iter(lambda: file.read(PIECE), b"")) == crc:
                tick(size)
                return
    remote.fetch(name, path, size, crc, tick)


class _Several:
    """Runs a task per name on several threads; the first error, or a stop, ends all of them at their next tick."""

    def __init__(self, tick: Tick) -> None:
        self._tick, self._lock, self._over = tick, threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, "stage")

    def __enter__(self) -> "_Several":
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


@contextmanager
def outlined(url: str) -> Iterator[tuple[Path, dict[str, int]]]:
    """The outline of a store at a URL as a folder that goes with the block, and the sizes of all its objects.

    Raises StoreError where there is no store.
    """
    remote = source(url)
    sizes = remote.sizes()
    if GROUP not in sizes:
        raise StoreError("no Granary store here", url, "Give the URL that harvest run wrote to")
    with tempfile.TemporaryDirectory(prefix="granary-") as folder:
        outline(remote, Path(folder), sizes)
        yield Path(folder), sizes


# --- a copy on this machine -----------------------------------------------------------------------------------------


def stage(url: str, below: str | Path | None = None, quiet: bool = False) -> Path:
    """The folder of a copy of the finished store at a URL: made if there is none, finished if it was interrupted.

    It lies in a folder of its own below `below` (none: below the user's cache folder). Every file is checked as it
    arrives. Where the URL does not answer, a whole copy is used as it is. Raises RemoteError, StoreError,
    StoreUnfinishedError, StoreDamagedError or SpaceError.
    """
    path = place(url, local(str(below or files.cache_folder() / "stores"), "Copies lie in a folder (--stage)"))
    with Log(quiet=quiet) as log:
        try:
            remote = source(url)
            sealed = remote.read(SEALED)
        except RemoteError as error:
            if not _whole(path):
                raise
            log.event(
                "stage", f"using the copy in {path}; whether it is still the same at the URL is not known: {error}"
            )
            return path
        if sealed is None:
            raise _unfinished(remote)
        if not _whole(path, sealed):
            with files.alone(path, lambda: log.event("stage", f"waiting: another process makes {path}")):
                if not _whole(path, sealed):
                    _copy(remote, path, sealed, log)
    return path


def _unfinished(remote: Remote) -> StoreError:
    if remote.read(GROUP) is None:
        return StoreError("no Granary store here", remote.url, "Give the URL that harvest run wrote to")
    way_out = "Run the same harvest run again: it goes on where it stopped"
    return StoreUnfinishedError("this store is not finished", remote.url, way_out)


def _whole(path: Path, sealed: bytes | None = None) -> bool:
    """Whether a copy is there, with every file at its size (and made from this `sealed`). `sealed` is written last."""
    if not (path / SEALED).is_file():
        return False
    found = (path / SEALED).read_bytes()
    if sealed is not None and found != sealed:
        return False
    sizes = {name: size for name, (size, _) in json.loads(found)["files"].items()}
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


def _copy(remote: Remote, path: Path, sealed: bytes, log: Log) -> None:
    table = _table(remote, sealed)
    if (path / GROUP).exists() and _id((path / GROUP).read_bytes()) != table["id"]:
        shutil.rmtree(path)  # the URL holds another store by now
    (path / SEALED).unlink(missing_ok=True)
    files.sweep(path)
    wanted = {name: (size, crc) for name, (size, crc) in table["files"].items()}
    total = sum(size for size, _ in wanted.values())
    here = sum(min(size, _size(path / name)) for name, (size, _) in wanted.items())
    files.require_space(path, total - here, "Free some space, or give another folder (--stage)")
    log.event("stage", f"staging {remote.url} ({total / 1e6:,.0f} MB, {here / 1e6:,.0f} MB are here) in {path}")
    _receipts(remote, path, table["receipts"])
    fetch(remote, path, wanted, "staging", log.quiet)
    files.write_atomic(path / SEALED, sealed)


def _table(remote: Remote, sealed: bytes) -> dict[str, Any]:
    """`sealed` as JSON, with names that stay inside the store."""
    try:
        table: dict[str, Any] = json.loads(sealed)
        if all(_inside(name) for name in [*table["files"], *(f"receipts/{name}" for name in table["receipts"])]):
            return table
    except (ValueError, KeyError, TypeError):
        pass
    raise remote.damaged(SEALED, "cannot be read")


def _inside(name: str) -> bool:
    return bool(PurePosixPath(name).parts) and not {"..", "/"} & set(PurePosixPath(name).parts)


def _id(group: bytes) -> str:
    return str(json.loads(group)["attributes"]["granary"]["id"])


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _receipts(remote: Remote, path: Path, crcs: Mapping[str, int]) -> None:
    def right(name: str) -> bool:
        return (path / name).is_file() and crc32c([(path / name).read_bytes()]) == crcs[Path(name).name]

    wrong = [name for name in (f"receipts/{name}" for name in crcs) if not right(name)]
    read(remote, path, wrong)
    for name in wrong:
        if not right(name):
            found = (path / name).is_file()
            (path / name).unlink(missing_ok=True)
            raise remote.damaged(name, "has another checksum" if found else "is missing")
