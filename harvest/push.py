"""A finished store -> a URL: what is not there yet, in batches, `sealed` last of all."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from harvest import check
from shared import files, layout, remote, staging, verify
from shared.errors import StoreDamagedError, StoreError, StoreMismatchError
from shared.layout import GROUP, SEALED, Unit
from shared.log import Log, bar
from shared.store import Store

BATCH_BYTES, BATCH_FILES = 2 * 10**9, 200  # of one commit, on the hub
CARD = "README.md"
BESIDE = {CARD, ".gitattributes"}  # what a repository has that is not of the store
Batch = dict[str, Path | bytes]

TEXT = """---
tags: [granary, activations]
viewer: false
---
# {name}

Activations of language models, harvested with Granary: {rows:,} rows of {documents:,} documents, {dtype}. Rows of all
sources are aligned.

| source | model | site | width |
|---|---|---|---|
{sources}

```sh
harvest pull {url}
train run {url} --latents 16384 --steps 20000
```

Store `{id}`.
"""


def push(store: Store, url: str, private: bool | None, log: Log, again: bool = False) -> bool:
    """Whether anything was sent: not where the store is there already. A push that was stopped goes on.

    `private`: of a repository that is made; `again`: send all files, those of the right size, too. Every checksum is
    checked before. Raises StoreMismatchError where another store is there, StoreError where something else is,
    StoreDamagedError where files of the store are not what its receipts say, RemoteError.
    """
    there = staging.target(url, private)
    sizes, sealed = there.sizes(), (store.path / SEALED).read_bytes()
    _require_same(store, there, sizes)
    if there.read(SEALED) == sealed and not again:
        return False
    if faults := check.files_of(store, True, log):
        way_out = f"harvest repair {store.path} --full makes what is damaged again"
        raise StoreDamagedError(f"{len(faults)} files of {store.path} are damaged", faults[0], way_out)
    own = {name: size for name, size in sizes.items() if name in BESIDE or not again}
    batches = list(_batches(store, there, own, url))
    total = sum(_bytes(data) for batch in batches for data in batch.values())
    log.event("push", f"{total / 1e6:,.0f} MB in {len(batches)} parts are not at {url} yet")
    with bar("pushing", "bytes", total, quiet=log.quiet) as progress:
        for number, batch in enumerate(batches, 1):
            there.send(batch, f"Add part {number} of {len(batches)} of store {store.header.id[:12]}", progress.update)
    found = staging.at(url).sizes()
    if faults := verify.quick(store, found):
        raise StoreDamagedError(f"files have gone from {url}", faults[0], "Push again: it sends them again")
    there.send({SEALED: store.path / SEALED}, f"Seal store {store.header.id[:12]}")
    return True


def _require_same(store: Store, there: remote.Remote, sizes: Mapping[str, int]) -> None:
    if GROUP not in sizes:
        if others := sorted(set(sizes) - BESIDE):
            raise StoreError("this URL is in use and holds no store", f"{there.url}: {others[0]}", "Give another one")
        return
    group = there.read(GROUP)
    if group != (store.path / GROUP).read_bytes():
        what = "another store is at this URL, or another form of this one"
        raise StoreMismatchError(what, there.url, "Give another one")


def _batches(store: Store, there: remote.Remote, sizes: Mapping[str, int], url: str) -> Iterator[Batch]:
    """The plan, then units, each whole in one batch."""
    plan = {name: store.path / name for name in _plan(store)}
    batch: Batch = {name: path for name, path in plan.items() if sizes.get(name) != path.stat().st_size}
    if url.startswith(remote.HUB) and CARD not in sizes:
        batch[CARD] = _card(store, url).encode()
    done = _there(store, there, sizes)
    for unit in store.units:
        if batch and _is_full(batch):
            yield batch
            batch = {}
        batch |= {} if unit in done else _files(store, unit)
    if batch:
        yield batch


def _plan(store: Store) -> list[str]:
    """zarr.json, which claims the place, every other zarr.json, the plan's arrays and its receipt."""
    of_units = {entry.name for entry in verify.read_receipts(store)[0] if entry.unit}
    named = [name for name in files.read_json(store.path / SEALED)["files"] if name not in of_units]
    return [GROUP, *(name for name in named if name != GROUP), layout.receipt_file(None)]


def _there(store: Store, there: remote.Remote, sizes: Mapping[str, int]) -> set[Unit]:
    """The units that are there: their receipts byte for byte, and their files by size."""
    receipts = {layout.receipt_file(unit): unit for unit in store.units}
    asked = [name for name in receipts if name in sizes]
    with tempfile.TemporaryDirectory(prefix="granary-") as folder:
        remote.read(there, Path(folder), asked)
        found = [name for name in asked if (Path(folder) / name).is_file()]
        same = [name for name in found if (Path(folder) / name).read_bytes() == (store.path / name).read_bytes()]
    files_of = {name: _files(store, receipts[name]) for name in same}
    return {
        receipts[name]
        for name, paths in files_of.items()
        if all(sizes.get(file) == path.stat().st_size for file, path in paths.items())
    }


def _files(store: Store, unit: Unit) -> dict[str, Path]:
    """The files of a unit, its receipt behind them."""
    receipt = layout.receipt_file(unit)
    named = [*files.read_json(store.path / receipt)["files"], receipt]
    return {name: store.path / name for name in named}


def _is_full(batch: Batch) -> bool:
    return len(batch) >= BATCH_FILES or sum(map(_bytes, batch.values())) >= BATCH_BYTES


def _bytes(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _card(store: Store, url: str) -> str:
    """What the hub shows of the repository."""
    header, plan = store.header, store.header.plan
    sources = "\n".join(
        f"| {name} | {_public(header.models[one.model].path)} | {one.site} | {one.width} |"
        for name, one in header.sources.items()
    )
    return TEXT.format(
        name=remote.name_of(store.path), rows=plan["rows"], documents=plan["documents"], dtype=plan["dtype"],
        sources=sources, url=url.rstrip("/"), id=header.id,
    )  # fmt: skip


def _public(path: str) -> str:
    """Of a folder on this machine the last part."""
    return Path(path).name if Path(path).expanduser().is_absolute() else path
