"""What lies at a URL: opened by the kind of URL, looked at, and copied to this machine whole."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared import files
from shared.errors import RemoteError, StoreError, StoreUnfinishedError
from shared.hub import Repository
from shared.layout import GROUP, SEALED, crc32c
from shared.log import Log
from shared.objects import Objects, prepare
from shared.remote import HUB, Remote, fetch, inside, local, outline, place, read

FIRST_TRIES = 3  # of the first request: a wrong URL is known within seconds; later ones try for longer


def at(url: str, tries: int | None = None) -> Remote:
    """What lies at a URL. `tries`: of each request; none: as its library does. Nothing is asked of the network yet."""
    if url.startswith(HUB):
        return Repository(url)
    return Objects(url, tries)


def source(url: str) -> Remote:
    """What lies at a URL. Raises RemoteError within seconds where nothing answers."""
    at(url, FIRST_TRIES).read(SEALED)
    return at(url)


def destination(url: str) -> Objects:
    """Where units can be sent to as they are made."""
    if url.startswith(HUB):
        raise RemoteError("a harvest is not written to the hub", url, "Harvest into a folder, and harvest push that")
    prepare(url)
    source(url)
    return Objects(url)


def target(url: str, private: bool | None) -> Remote:
    """Where a finished store can be sent to. A repository is made, `private` or (none) as its owner's are."""
    if not url.startswith(HUB):
        return destination(url)
    made = Repository(url)
    made.make(private)
    return made


@contextmanager
def outlined(url: str) -> Iterator[tuple[Path, dict[str, int]]]:
    """The outline of a store at a URL as a folder that goes with the block, and the sizes of all its objects.

    Raises StoreError where there is no store.
    """
    remote = source(url)
    sizes = remote.sizes()
    if GROUP not in sizes:
        raise StoreError("no Granary store here", url, "Give the URL that harvest run or push wrote to")
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
        return StoreError("no Granary store here", remote.url, "Give the URL that harvest run or push wrote to")
    way_out = "Run the same harvest run, or harvest push, again: it goes on where it stopped"
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
        if all(inside(name) for name in [*table["files"], *(f"receipts/{name}" for name in table["receipts"])]):
            return table
    except (ValueError, KeyError, TypeError):
        pass
    raise remote.damaged(SEALED, "cannot be read")


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
