"""A finished store once more, its activations compressed: cold storage that trains as it stands."""

import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from harvest import check, lock
from shared import files, layout, verify
from shared.codec import Codec, Packing
from shared.errors import StoreDamagedError, StoreError, StoreMismatchError
from shared.header import Header
from shared.layout import GROUP, UNIT_ARRAYS, Unit
from shared.log import Log, bar
from shared.reading import THREADS
from shared.store import Part, Store
from shared.verify import Entry

GUESS_CHUNKS = 16  # of a source, that say beforehand how much room is needed
SAMPLE_BYTES = 2**26  # of a source, that the speed of decoding is measured on

Entries = Mapping[Unit | None, Sequence[Entry]]


def pack(store: Store, out: Path, codec: Codec, log: Log) -> dict[str, Any]:
    """Write what `store` (finished) holds to `out`, its activations encoded: what is not there yet, or is damaged.

    Returns what was measured. Raises StoreDamagedError where the store is not what its receipts say, StoreMismatchError
    where `out` is another store or form, SpaceError, and LockError where another pack is at it.
    """
    entries: dict[Unit | None, list[Entry]] = defaultdict(list)
    for entry in verify.read_receipts(store)[0]:
        entries[entry.unit].append(entry)
    with lock.hold(out, lambda text: log.event("lock", text)):
        files.sweep(out)
        packed = _begun(store, out, codec, entries)
        log.attach(out.with_name(f"{out.name}.log"))
        units = check.to_mend(packed, verify.quick(packed))
        if units or packed.condemned[0]:
            packed.reopen(units)
        encode_mb_s = _encode(store, packed, entries, log)
        if not packed.sealed:
            packed.seal()
    return _measured(store, packed) | {"encode_mb_s": encode_mb_s, "decode_mb_s": _decode(packed), "threads": THREADS}


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `pack` measured, as people read it."""
    before, after = found["bytes"], found["packed_bytes"]
    sources = [
        f"  {name}: {before[name] / 1e6:,.1f} MB -> {after[name] / 1e6:,.1f} MB, ratio {ratio:.3f}"
        for name, ratio in found["ratio"].items()
    ]
    encoded = f"encoded at {found['encode_mb_s']:,.0f} MB/s, " if found["encode_mb_s"] else ""
    speed = f"  {encoded}decoded at {found['decode_mb_s']:,.0f} MB/s ({found['threads']} threads)"
    return [f"{found['store']}: {found['codec']['name']}, level {found['codec']['level']}", *sources, speed]


def _begun(store: Store, out: Path, codec: Codec, entries: Entries) -> Store:
    """The store at `out`, with the plan and the scale of `store`, and room for what it lacks."""
    # A chunk is what `train` reads at random, so that it decodes nothing that it does not serve.
    rows = {name: layout.block_rows(store.chunk_rows, 2 * one.width) for name, one in store.header.sources.items()}
    header = replace(store.header, scale=None, codec=Packing(codec.name, codec.level, rows))
    if not out.exists():
        _require_sound(store, entries[None])
        _require_space(store, out, header)
        _copy_plan(store, out, header, entries[None])
    if not (out / GROUP).exists():
        raise StoreError("this path is in use and is no store", out, "Give another path (--out)")
    packed = Store.resume(out, header)
    if packed.header.codec != header.codec:
        forms = [asdict(one) if one else "raw" for one in (packed.header.codec, header.codec)]
        what = f"another form of this store is at {out} (stored -> asked)"
        raise StoreMismatchError(what, f"{forms[0]} -> {forms[1]}", "Give another path (--out)")
    assert store.header.scale is not None
    return packed.freeze(store.header.scale) if packed.header.scale is None else packed


def _copy_plan(store: Store, out: Path, header: Header, entries: Sequence[Entry]) -> None:
    """The plan of `store`, byte for byte, under another header."""
    groups = [str(path.relative_to(store.path)) for path in store.path.rglob(GROUP)]
    planned = [name for name in groups if not name.startswith(UNIT_ARRAYS)]
    with files.folder_atomic(out) as folder:
        for name in [*planned, layout.receipt_file(None), *(entry.name for entry in entries)]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.path / name, folder / name)
        group = files.read_json(folder / GROUP)
        files.write_json(folder / GROUP, {**group, "attributes": header.attributes()})


def _require_space(store: Store, out: Path, header: Header) -> None:
    """Room for what some chunks of the first shard say that the whole comes to."""
    needed = sum(entry.size for entry in verify.read_receipts(store)[0])
    for name, before in _bytes(store).items():
        form = Store(out, header).form(name)
        rows_ND = store.stored(name, np.arange(min(GUESS_CHUNKS * form.chunk_rows, store.rows)))
        needed += int(before * (sum(map(len, form.encode(rows_ND))) / rows_ND.nbytes - 1))
    files.require_space(out, needed)


def _encode(store: Store, packed: Store, entries: Entries, log: Log) -> float | None:
    """Put every unit that is missing. Returns MB of rows per second, encoding and writing; none where none was."""
    todo, done_bytes, seconds = packed.missing(), 0, 0.0
    total = sum(len(store.rows_of(shard)) for shard, _ in todo)
    with bar("packing", "rows", total, quiet=log.quiet) as progress:
        for shard, model in todo:
            _require_sound(store, entries[shard, model])
            size, took = _put(store, packed, shard, model)
            done_bytes, seconds = done_bytes + size, seconds + took
            log.event("unit", shard=shard, model=model)
            progress.update(len(store.rows_of(shard)))
    return round(done_bytes / seconds / 1e6, 1) if todo else None


def _put(store: Store, packed: Store, shard: int, model: str) -> tuple[int, float]:
    """Put one unit. Returns the bytes of its rows and the seconds of encoding and writing; one unit is in memory."""
    receipt = files.read_json(store.path / layout.receipt_file((shard, model)))
    made_with = {key: receipt[key] for key in ("device", "threads", "versions")}
    parts = {name: _part(store, name, shard, counts) for name, counts in receipt["faults"].items()}
    began = time.perf_counter()
    packed.put(shard, model, parts, made_with)
    return sum(part.activations_ND.nbytes for part in parts.values()), time.perf_counter() - began


def _part(store: Store, source: str, shard: int, counts: Mapping[str, int]) -> Part:
    """What a unit stored of one source."""
    rows_ND = store.stored(source, np.array(store.rows_of(shard)))
    norms_N, faults_N, (moments_XK,) = (store.map(f"{kind}/{source}", shard) for kind in UNIT_ARRAYS[1:])
    return Part(rows_ND, norms_N, faults_N, moments_XK, counts["subnormal_components"])


def _require_sound(store: Store, entries: Sequence[Entry]) -> None:
    """Raise StoreDamagedError where a file has another checksum: it would get a fitting one."""
    for fault in (fault for entry in entries for fault in verify.summed(store, entry)):
        way_out = f"First: harvest verify {store.path} --full, and harvest repair {store.path}"
        raise StoreDamagedError("this store is damaged", fault, way_out)


def _measured(store: Store, packed: Store) -> dict[str, Any]:
    raw, after = _bytes(store), _bytes(packed)
    return {
        "store": str(packed.path),
        "id": packed.header.id,
        "codec": {"name": packed.header.codec.name, "level": packed.header.codec.level} if packed.header.codec else {},
        "bytes": raw, "packed_bytes": after, "ratio": {name: round(raw[name] / after[name], 3) for name in raw},
    }  # fmt: skip


def _bytes(store: Store) -> dict[str, int]:
    """{source: bytes of its activations on the disk}."""
    sizes = dict.fromkeys(store.header.sources, 0)
    for entry in verify.read_receipts(store)[0]:
        if entry.name.startswith("activations/"):
            sizes[entry.name.split("/")[1]] += entry.size
    return sizes


def _decode(packed: Store) -> float:
    """MB of rows per second, read and decoded by all threads, of a sample of every source."""
    done_bytes, began = 0, time.perf_counter()
    for name, source in packed.header.sources.items():
        count = min(SAMPLE_BYTES // (2 * source.width), packed.rows)
        done_bytes += packed.stored(name, np.arange(count)).nbytes
    return round(done_bytes / (time.perf_counter() - began) / 1e6, 1)
