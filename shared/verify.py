"""Is a store sound? By its receipts and the sizes of its files, or by every checksum too."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shared import files, layout
from shared.layout import GROUP, SEALED, Unit, crc32c
from shared.store import Store

BLOCK = 2**22  # bytes read at a time


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file. `unit` must be made again to mend it; none: the file is of the plan."""

    file: str
    what: str
    unit: Unit | None = None

    def __str__(self) -> str:
        return f"{self.file} {self.what}" + (f" (shard {self.unit[0]} of {self.unit[1]})" if self.unit else "")


@dataclass(frozen=True)
class Entry:
    """A file that a receipt names: its size, and the crc32c of the whole and, in shards, of each chunk."""

    name: str
    unit: Unit | None
    size: int
    crc32c: int
    chunks: list[int]


def quick(store: Store, sizes: Mapping[str, int] | None = None) -> list[Fault]:
    """Receipts against the header, their own names and `sealed`; every file's size; every zarr.json.

    A unit without a receipt is a fault in a finished store only. `sizes` {name: bytes} tells of files that are
    elsewhere; none: they are in the store's folder.
    """
    entries, faults = read_receipts(store)
    for entry in entries:
        there = _size(store.path / entry.name) if sizes is None else sizes.get(entry.name)
        faults += _sized(entry.name, there, entry.size, entry.unit)
    return faults + (list(_sealed(store)) if store.sealed else [])


def full(
    store: Store, threads: int = 8, tick: Callable[[int], object] = int, sizes: Mapping[str, int] | None = None,
    holds: Callable[[str, int, int], bool] | None = None,
) -> list[Fault]:  # fmt: skip
    """`quick`, and the checksum of every file of the right size. `tick` is called with the bytes of each.

    Of files that are elsewhere, `sizes` tells as in `quick`, and `holds` whether one has this size and crc32c.
    """
    faults = quick(store, sizes)
    bad = {fault.file for fault in faults}
    entries = [entry for entry in read_receipts(store)[0] if entry.name not in bad]

    def check(entry: Entry) -> list[Fault]:
        if holds is None:
            return summed(store, entry)
        right = holds(entry.name, entry.size, entry.crc32c)
        return [] if right else [Fault(entry.name, "has another checksum", entry.unit)]

    with ThreadPoolExecutor(threads, "checksum") as pool:
        for entry, found in zip(entries, pool.map(check, entries), strict=True):
            faults += found
            tick(entry.size)
    return faults


def read_receipts(store: Store) -> tuple[list[Entry], list[Fault]]:
    """The files that the store's receipts name, and what is wrong with the other receipts."""
    entries: list[Entry] = []
    faults: list[Fault] = []
    for unit in [None, *store.units]:
        name = layout.receipt_file(unit)
        if not (store.path / name).exists():
            faults += [Fault(name, "is missing", unit)] if store.sealed or unit is None else []
            continue
        try:
            receipt = files.read_json(store.path / name)
            wrong = _foreign(store, receipt, unit)
            found = [
                Entry(file, unit, int(one["size"]), int(one["crc32c"]), list(one.get("chunks", [])))
                for file, one in receipt["files"].items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong = "cannot be read"
        if wrong:
            faults.append(Fault(name, wrong, unit))
        else:
            entries += found
    return entries, faults


def _foreign(store: Store, receipt: Mapping[str, Any], unit: Unit | None) -> str:
    """Why a receipt does not belong where it lies; empty where it does."""
    if receipt["id"] != store.header.id:
        return "is of another store"
    if unit is None:
        return ""
    if (receipt["shard"], receipt["model"]) != unit:
        return f"is of shard {receipt['shard']} of {receipt['model']}"
    expected = {name for source in store.sources_of(unit[1]) for name in layout.unit_files(source.name, unit[0])}
    return "" if set(receipt["files"]) == expected else "names other files than its unit writes"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sized(name: str, found: int | None, size: int, unit: Unit | None) -> list[Fault]:
    if found is None:
        return [Fault(name, "is missing", unit)]
    return [] if found == size else [Fault(name, f"has {found} bytes, not {size}", unit)]


def summed(store: Store, entry: Entry) -> list[Fault]:
    """What the checksum of one file of the right size says."""
    with (store.path / entry.name).open("rb") as file:
        if crc32c(iter(lambda: file.read(BLOCK), b"")) == entry.crc32c:
            return []
    where = _rows(store, entry) if entry.chunks else ""
    return [Fault(entry.name, f"has another checksum{where}", entry.unit)]


def _rows(store: Store, entry: Entry) -> str:
    """Where in a shard file the bytes are not those that were written."""
    assert entry.unit is not None
    form = store.form(entry.name.split("/")[1])
    with (store.path / entry.name).open("rb") as file:
        file.seek(entry.size - layout.index_bytes(form.slots))
        index = layout.parse_index(file.read(), form.slots)
        if index is None:
            return " in its index"
        bad = [
            chunk
            for chunk, crc in enumerate(entry.chunks)
            if _crc_of(file, *index[chunk].clip(max=entry.size).tolist()) != crc
        ]
    if not bad:
        return " in its index"
    rows = store.rows_of(entry.unit[0])
    first, stop = (rows.start + chunk * form.chunk_rows for chunk in (bad[0], bad[-1] + 1))
    return f" in {len(bad)} of {len(entry.chunks)} chunks, rows {first} to {min(stop, rows.stop) - 1}"


def _crc_of(file: BinaryIO, offset: int, length: int) -> int:
    file.seek(offset)
    return crc32c([file.read(length)])


def _sealed(store: Store) -> Iterator[Fault]:
    """`sealed` against the receipts on the disk and every zarr.json."""
    try:
        sealed = files.read_json(store.path / SEALED)
        receipts: dict[str, int] = sealed["receipts"]
        groups = {name: entry for name, entry in sealed["files"].items() if Path(name).name == GROUP}
        wrong = "is of another store" if sealed["id"] != store.header.id else ""
    except (ValueError, KeyError, TypeError, AttributeError):
        wrong = "cannot be read"
    if wrong:
        yield Fault(SEALED, wrong)
        return
    for unit in [None, *store.units]:
        path = store.path / layout.receipt_file(unit)
        if path.exists() and crc32c([path.read_bytes()]) != receipts.get(path.name):
            yield Fault(layout.receipt_file(unit), "is not the one that was sealed", unit)
    for name, (size, crc) in groups.items():
        if sized := _sized(name, _size(store.path / name), size, None):
            yield from sized
        elif crc32c([(store.path / name).read_bytes()]) != crc:
            yield Fault(name, "has another checksum")
