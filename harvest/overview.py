"""What stores there are, how far they are, and which runs used them: read from receipts and headers alone."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harvest import lock
from shared import files, layout
from shared.errors import StoreError
from shared.store import Store

RUN = "store.json"  # in a run's folder: the id of the store it read


def status(path: Path) -> dict[str, Any]:
    """State, units and rows made, bytes and faults of one store, and who is at work on it."""
    held = [f"{holder} ({holder.slot}), heard of {max(age, 0):.0f} s ago" for holder, age in lock.holders(path)]
    if not path.exists() and held:
        return {"store": str(path), "state": "planning", "held_by": held}
    store = Store.at(path)
    made = [unit for unit in store.units if store.has(*unit)]
    receipts = _receipts(store)
    return {
        "store": str(path),
        "id": store.header.id,
        "state": state(store),
        "codec": codec(store),
        "extends": f"{extends.path}, by more {extends.kind}" if (extends := store.header.extends) else "",
        "rows": store.rows,
        "units": {model: [sum(name == model for _, name in made), store.shards] for model in store.header.models},
        "bytes": sum(entry["size"] for receipt in receipts for entry in receipt["files"].values()),
        "faults": faults(store),
        "made_with": _variants(receipts),
        "damage": store.condemned[0],
        "held_by": held,
    }


def state(store: Store) -> str:
    if store.condemned[0]:
        return "damaged"
    return "finished" if store.sealed else "planned" if store.header.scale is None else "unfinished"


def codec(store: Store) -> str:
    """How a packed store is encoded; empty for another."""
    found = store.header.codec
    return f"{found.name}, level {found.level}" if found else ""


def faults(store: Store) -> dict[str, dict[str, int]]:
    """{source: {fault: count}} of the units that are there: rows, or components where the name says so."""
    total: dict[str, dict[str, int]] = {}
    for receipt in _receipts(store):
        for source, counts in receipt["faults"].items():
            sums = total.setdefault(source, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                sums[name] += count
    return total


def made_with(store: Store) -> list[dict[str, Any]]:
    """The devices, threads and versions that made the units: with one of each, the bytes can be made again."""
    return _variants(_receipts(store))


def _receipts(store: Store) -> list[dict[str, Any]]:
    return [files.read_json(store.path / layout.receipt_file(unit)) for unit in store.units if store.has(*unit)]


def _variants(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for receipt in receipts:
        one = {key: receipt[key] for key in ("device", "threads", "versions")}
        if one not in found:
            found.append(one)
    return found


def ls(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """Every store below `folder`, with the runs below `runs` that name its id. Raises StoreError where none is."""
    used: dict[str, list[str]] = {}
    for run in _below(runs, RUN):
        found = files.read_json(run / RUN)
        for id in found.get("members", [found.get("id")]):
            used.setdefault(str(id), []).append(str(run))
    stores = []
    for path in _below(folder, layout.GROUP):
        try:
            store = Store.at(path)
        except StoreError:  # another Zarr group, or of another format
            continue
        sources = {name: f"{store.header.models[s.model].path} {s.site}" for name, s in store.header.sources.items()}
        extends = asdict(store.header.extends) if store.header.extends else {}
        stores.append(
            {
                "store": str(path), "id": store.header.id, "extends": extends, "state": state(store),
                "codec": codec(store), "rows": store.rows, "bytes": files.size_of(path), "sources": sources,
                "runs": used.get(store.header.id, []),
            }
        )  # fmt: skip
    if not stores:
        raise StoreError("no store below this folder", folder, "Give the folder that holds NAME.zarr")
    return stores


def _below(folder: Path, name: str) -> Iterator[Path]:
    """The folders that hold a file `name`; what lies inside them is not looked at."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        if name in names:
            folders.clear()
            yield Path(place)
        elif layout.GROUP in names:
            folders.clear()


def lines(stores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Stores as people read them: a line each, their sources and runs below."""
    shown = []
    for one in stores:
        packed = f" ({one['codec']})" if one["codec"] else ""
        size = f"{one['bytes'] / 1e6:,.1f} MB{packed}"
        shown.append(f"{one['store']}  {one['state']}  {one['rows']:,} rows  {size}  id {one['id'][:12]}")
        if extends := one["extends"]:
            shown.append(f"  more {extends['kind']} of {extends['path']}, id {extends['id'][:12]}")
        shown += [f"  {name}: {what}" for name, what in one["sources"].items()]
        shown += [f"  used by {run}" for run in one["runs"]]
    return shown
