"""Where a store goes: into a folder, or to a URL. Then it is made in a folder here, and sent unit by unit."""

import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from harvest import lock
from harvest.config import StoreConfig
from shared import config, files, layout, remote, staging, verify
from shared.errors import StoreDamagedError, StoreError
from shared.header import Header
from shared.layout import GROUP, SEALED, Unit
from shared.log import Log, bar
from shared.store import Store

WAITING = 2  # units that wait to be sent before no more are made
PLAN = layout.receipt_file(None)
OF_UNITS = {name.partition("/")[0] for name in layout.unit_files("any", 0)}  # the groups that units fill

Spec = Mapping[str, Any]
Share = Callable[[Store], set[Unit]]


class Destination(ABC):
    """`path` is the folder in which the store is made, `name` what the user calls the destination."""

    room: ClassVar[str] = files.ROOM  # the way out where the folder has too little of it

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> "Destination":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Begin nothing more, and wait for what is at work."""

    @abstractmethod
    def at_once(self, units: int, ahead: int) -> int:
        """How many of `units` lie in the folder at most, where `ahead` of them are in the making."""

    @abstractmethod
    def is_finished(self, spec: Spec) -> bool:
        """Raises StoreMismatchError where another store is there."""

    @abstractmethod
    def finished(self, spec: Spec, log: Log) -> Store:
        """The finished store, to be looked at."""

    @abstractmethod
    def begin(self, spec: Spec, share: Share, log: Log) -> None:
        """Give the folder what is at the destination already. `share`: the units that this process makes."""

    @abstractmethod
    def planned(self, store: Store, log: Log) -> None:
        """The plan is in the folder."""

    @abstractmethod
    def frozen(self, store: Store, share: Share, log: Log) -> Store:
        """The scale is in the folder. Returns the store with the scale that counts."""

    @abstractmethod
    def made(self, unit: Unit) -> None:
        """A unit is in the folder."""

    @abstractmethod
    def seal(self, store: Store) -> None:
        """Seal the store, if all of its units are at the destination."""

    @abstractmethod
    def reopen(self, store: Store, units: Iterable[Unit], log: Log) -> Store:
        """Forget these units of a finished store, so that they are made again."""


def of(asked: StoreConfig) -> Destination:
    """Raises RemoteError where a URL does not answer, or cannot be written to."""
    return AtUrl(asked.url, asked.folder) if asked.url else Folder(asked.folder)


class Folder(Destination):
    """The store is where it is made: nothing needs to be done."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, str(path))

    def close(self) -> None:
        return

    def at_once(self, units: int, ahead: int) -> int:
        return units

    def is_finished(self, spec: Spec) -> bool:
        if not (self.path / GROUP).exists():
            return False
        store = Store.at(self.path)
        store.header.require_same(spec, self.path)
        return store.sealed

    def finished(self, spec: Spec, log: Log) -> Store:
        return Store.open(self.path)

    def begin(self, spec: Spec, share: Share, log: Log) -> None:
        return

    def planned(self, store: Store, log: Log) -> None:
        return

    def frozen(self, store: Store, share: Share, log: Log) -> Store:
        return store

    def made(self, unit: Unit) -> None:
        return

    def seal(self, store: Store) -> None:
        if not store.missing() and not store.sealed:
            store.seal()

    def reopen(self, store: Store, units: Iterable[Unit], log: Log) -> Store:
        store.reopen(units)
        return store


class AtUrl(Destination):
    """Everything is sent as soon as it is whole, receipts behind the files that they name, and `sealed` last of all.

    What has been sent of a unit is then removed from the folder, all but its receipt. The URL decides: a folder that
    does not fit it is emptied. Two that begin at once agree by conditional writes of zarr.json alone: the first one
    claims the URL for an id, and the first scale counts.
    """

    room = "Free some space, or give another folder (store.staging)"

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(path, url)
        self._remote = staging.destination(url)
        self._sender = ThreadPoolExecutor(1, "send")
        self._waiting: deque[Future[None]] = deque()
        self._sizes: dict[str, int] = {}  # of the objects that were there at the beginning

    def close(self) -> None:
        self._sender.shutdown(cancel_futures=True)

    def at_once(self, units: int, ahead: int) -> int:
        return min(units, ahead + WAITING + 1)

    def is_finished(self, spec: Spec) -> bool:
        group = self._remote.read(GROUP)
        if group is None:
            return False
        Header.parse(group, self.name).require_same(spec, self.name)
        return self._remote.read(SEALED) is not None

    def finished(self, spec: Spec, log: Log) -> Store:
        with lock.wait(self.path, lambda text: log.event("lock", text)):
            self.begin(spec, lambda store: set(), log)
        return Store.at(self.path)

    # --- going on -------------------------------------------------------------------------------------------------

    def begin(self, spec: Spec, share: Share, log: Log) -> None:
        self._sizes = self._remote.sizes()
        group = self._remote.read(GROUP)
        if group is None and self._sizes:
            raise StoreError("this URL is in use and holds no store", self.name, "Give another one (store.path)")
        if group is not None:
            Header.parse(group, self.name).require_same(spec, self.name)
        if self.path.exists() and not self._fits(spec, group):
            shutil.rmtree(self.path)
        if SEALED in self._sizes:
            self._look()
            return
        (self.path / SEALED).unlink(missing_ok=True)
        if group is not None and PLAN in self._sizes:
            self._fetch_plan(group, log)
        if (self.path / GROUP).exists():
            store = Store.at(self.path)
            self._settle(store, share(store))

    def _fits(self, spec: Spec, group: bytes | None) -> bool:
        """Whether the folder can go on towards a URL with this zarr.json. (It comes last, when a plan is fetched.)"""
        if not (self.path / GROUP).exists():
            return False
        if (self.path / GROUP).read_bytes() == group:
            return True
        here = Store.at(self.path)
        if group is None:  # nothing is there: a plan that is whole will do
            plan = files.read_json(self.path / PLAN)["files"] if (self.path / PLAN).exists() else {"plan": None}
            return here.header.id == config.fingerprint(spec) and all((self.path / name).exists() for name in plan)
        there = Header.parse(group, self.name)  # the scale may have been chosen here and not sent yet
        return here.header.id == there.id and there.scale is None and here.header.scale is not None

    def _look(self) -> None:
        """Have an outline of a finished store. Raises StoreDamagedError where it lacks files."""
        remote.outline(self._remote, self.path, self._sizes)
        if faults := verify.quick(Store.at(self.path), self._sizes):
            way_out = f"harvest repair {self.name} makes what is damaged again"
            listed = ", ".join(str(fault) for fault in faults[:5])
            raise StoreDamagedError(f"{len(faults)} files of {self.name} are damaged", listed, way_out)

    def _fetch_plan(self, group: bytes, log: Log) -> None:
        """Have the plan whole; zarr.json comes last."""
        metas = [name for name in self._sizes if name.endswith(f"/{GROUP}") and not (self.path / name).exists()]
        remote.read(self._remote, self.path, [*metas, PLAN])
        entries = files.read_json(self.path / PLAN)["files"]
        lacking = {name: one for name, one in entries.items() if not (self.path / name).exists()}
        files.require_space(self.path, sum(one["size"] for one in lacking.values()), self.room)
        if lacking:
            wanted = {name: (one["size"], one["crc32c"]) for name, one in lacking.items()}
            remote.fetch(self._remote, self.path, wanted, "fetching the plan", log.quiet)
        if not (self.path / GROUP).exists():
            files.write_atomic(self.path / GROUP, group)

    def _settle(self, store: Store, units: Iterable[Unit]) -> None:
        """Have the receipts of the units that are whole at the URL, and no others; send what waits to be sent."""
        names = {layout.receipt_file(unit): unit for unit in units}
        remote.read(self._remote, self.path, [name for name in names if name in self._sizes])
        bad = {fault.unit for fault in verify.quick(store, self._sizes)}
        for name, unit in names.items():
            if name in self._sizes and unit not in bad:
                self._clear(unit)
            elif name not in self._sizes and store.has(*unit) and self._whole(unit):
                self.made(unit)
            else:
                self._remote.delete([name] if name in self._sizes else [])
                (self.path / name).unlink(missing_ok=True)

    def _files(self, unit: Unit | None) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = files.read_json(self.path / layout.receipt_file(unit))["files"]
        return found

    def _whole(self, unit: Unit) -> bool:
        paths = {self.path / name: one["size"] for name, one in self._files(unit).items()}
        return all(path.exists() and path.stat().st_size == size for path, size in paths.items())

    # --- sending --------------------------------------------------------------------------------------------------

    def planned(self, store: Store, log: Log) -> None:
        group = (self.path / GROUP).read_bytes()
        if GROUP not in self._sizes and not self._remote.create(GROUP, group):
            Header.parse(self._remote.read(GROUP) or b"", self.name).require_same(store.header.spec, self.name)
        names = [*self._metas(of_units=False), *self._files(None)]
        lacking = [name for name in names if self._sizes.get(name) != (self.path / name).stat().st_size]
        with (
            bar("sending the plan", "files", len(lacking), quiet=log.quiet or not lacking) as progress,
            ThreadPoolExecutor(remote.CONNECTIONS, "send") as pool,
        ):
            for _ in pool.map(lambda name: self._remote.put(name, self.path / name), lacking):
                progress.update()
        if PLAN not in self._sizes:
            self._remote.put(PLAN, (self.path / PLAN).read_bytes())

    def frozen(self, store: Store, share: Share, log: Log) -> Store:
        here, there = (self.path / GROUP).read_bytes(), self._remote.read(GROUP) or b""
        if here != there:
            undecided = Header.parse(there, self.name).scale is None
            if not undecided or not self._remote.replace(GROUP, there, here):
                log.event("scale", f"another harvest has chosen the scale of {self.name}: going on with that")
                self.begin(store.header.spec, share, log)
                store = Store.at(self.path)
        store.declare()  # again, where the one that sent this scale did not come to it
        for name in self._metas(of_units=True):
            if name not in self._sizes:
                self._remote.put(name, (self.path / name).read_bytes())
        return store

    def _metas(self, of_units: bool) -> list[str]:
        """Every zarr.json but the group's own: of the plan, or of what units fill."""
        names = [path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob(f"*/{GROUP}"))]
        return [name for name in names if (name.partition("/")[0] in OF_UNITS) == of_units]

    def made(self, unit: Unit) -> None:
        """Send it behind those that are waiting. Raises what went wrong with one of them."""
        self._waiting.append(self._sender.submit(self._send, unit))
        self._wait_for(WAITING)

    def _wait_for(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _send(self, unit: Unit) -> None:
        for name in self._files(unit):
            self._remote.put(name, self.path / name)
        receipt = layout.receipt_file(unit)
        self._remote.put(receipt, (self.path / receipt).read_bytes())
        self._clear(unit)

    def _clear(self, unit: Unit | None) -> None:
        for name in self._files(unit):
            (self.path / name).unlink(missing_ok=True)

    def seal(self, store: Store) -> None:
        self._wait_for(0)
        sizes = self._remote.sizes()
        receipts = [layout.receipt_file(unit) for unit in store.units]
        if any(name not in sizes for name in receipts):  # other parts are at work
            return
        remote.read(self._remote, self.path, [name for name in receipts if not (self.path / name).exists()])
        if faults := verify.quick(store, sizes):
            raise StoreDamagedError(f"files have gone from {self.name}", faults[0], "Run it again: it makes them again")
        if not store.sealed:
            store.seal()
        self._remote.put(SEALED, (self.path / SEALED).read_bytes())
        self._clear(None)

    def reopen(self, store: Store, units: Iterable[Unit], log: Log) -> Store:
        self._remote.delete([SEALED, *(layout.receipt_file(unit) for unit in units)])
        self.begin(store.header.spec, lambda found: set(found.units), log)
        return Store.at(self.path)
