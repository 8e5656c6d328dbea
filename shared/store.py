"""The store on disk: the only file that knows zarr. The format is STORE.md, beside this file.

Letters: N rows, S rows per shard, C rows per chunk, D width of a source, K length of packed moments.
"""

import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import zarr

from shared import files, layout
from shared.errors import StoreDamagedError, StoreError, StoreUnfinishedError
from shared.flags import count_faults
from shared.header import Header
from shared.layout import DAMAGED, GROUP, SEALED, Unit, crc32c, padded, raw
from shared.reading import MAPPED, Access, Files, Shards
from shared.shard import Form, form_of
from shared.view import View


@dataclass(frozen=True)
class Part:
    """What one unit stores of one source: rows, their norms and faults, moments per class, and a count (cast.Cast)."""

    activations_ND: np.ndarray
    norms_N: np.ndarray
    faults_N: np.ndarray
    moments_XK: np.ndarray
    subnormal: int = 0


class Store(View):
    """A store, finished or not. Reading is by memory map, or by decoding what is packed, and needs no zarr."""

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header)
        self.shard_rows: int = header.plan["shard_rows"]

    @property
    def members(self) -> list[str]:
        return [self.header.id]

    @property
    def seals(self) -> list[str]:
        return [files.sha256_file(self.path / SEALED)]

    def beside(self, source: str) -> list[str]:
        return list(self.header.models)

    # --- making -------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, header: Header, tables: Mapping[str, np.ndarray]) -> "Store":
        """Write the plan: the group and `tables` {array name: values}, whole or not at all. The path must be free."""
        assert not path.exists()
        with files.folder_atomic(path) as folder:
            staged = cls(folder, header)
            zarr.create_group(folder, zarr_format=3, attributes=header.attributes())
            written: dict[str, Any] = {}
            for name, values in tables.items():
                array = layout.table_array(name, values, staged.shard_rows)
                staged._declare(name, array)
                for index, start in enumerate(range(0, len(values), array.chunk[0])):
                    piece = values[start : start + array.chunk[0]]
                    written |= staged._write(layout.chunk_file(name, (index,)), padded(piece, array.chunk[0], 0))
            files.write_json(folder / layout.receipt_file(None), {"id": header.id, "files": written})
        return cls(path, header)

    @classmethod
    def resume(cls, path: Path, header: Header) -> "Store":
        """The store that is already at `path`. Raises StoreMismatchError where it was made from another spec."""
        found = Header.read(path)
        found.require_same(header.spec, path)
        return cls(path, found)

    def freeze(self, scale: Mapping[str, Mapping[str, float]]) -> "Store":
        """Fix the scale of every source and declare the arrays that units fill. Call once, before the first unit."""
        assert Header.read(self.path).scale is None  # asked of the disk: this object may be older
        header = replace(self.header, scale={name: dict(values) for name, values in scale.items()})
        frozen = Store(self.path, header)
        for array in frozen._unit_arrays():
            shutil.rmtree(self.path / array, ignore_errors=True)  # of a run that was killed here; it holds no data
        frozen.declare()
        group = files.read_json(self.path / GROUP)
        files.write_json(self.path / GROUP, {**group, "attributes": header.attributes()})
        return frozen

    def declare(self) -> None:
        """Declare those of the arrays that units fill which are not declared yet. The scale must be known."""
        for array, spec in self._unit_arrays().items():
            self._declare(array, spec)

    def _unit_arrays(self) -> dict[str, layout.Array]:
        found: dict[str, layout.Array] = {}
        for name, source in self.header.sources.items():
            form, factor = self.form(name), self.factor(name)
            found |= layout.unit_arrays(source, self.header.plan, factor, form.chunk_rows, form.codecs)
        return found

    def put(self, shard: int, model: str, parts: Mapping[str, Part], made_with: Mapping[str, Any]) -> dict[str, Any]:
        """Write one unit, whole, its receipt last. `made_with` is device, threads and versions. Returns the receipt."""
        assert self.header.scale is not None and not self.sealed
        names = [source.name for source in self.sources_of(model)]
        assert parts.keys() == set(names)
        parts = {name: parts[name] for name in names}  # the receipt's bytes do not depend on the caller's order
        written: dict[str, Any] = {}
        for name, part in parts.items():
            rows = self.rows_of(shard)
            assert part.activations_ND.shape == (len(rows), self.header.sources[name].width)
            stored = layout.DTYPES[self.header.plan["dtype"]]
            assert (part.activations_ND.dtype, part.norms_N.dtype, part.faults_N.dtype) == (stored, "f4", "u1")
            activations, norms, faults, moments = layout.unit_files(name, shard)
            written |= {activations: self.form(name).write(self.path / activations, part.activations_ND)}
            written |= self._write(norms, padded(part.norms_N, self.shard_rows, np.nan))
            written |= self._write(faults, padded(part.faults_N, self.shard_rows, 0))
            written |= self._write(moments, part.moments_XK)
        counts = {
            name: {**count_faults(part.faults_N), "subnormal_components": part.subnormal}
            for name, part in parts.items()
        }
        receipt = {
            "id": self.header.id,
            "shard": shard,
            "model": model,
            "files": written,
            "faults": counts,
            **made_with,
            "versions": {**made_with["versions"], **self.form(names[0]).versions},
        }
        files.write_json(self.path / layout.receipt_file((shard, model)), receipt)
        return receipt

    def has(self, shard: int, model: str) -> bool:
        return (self.path / layout.receipt_file((shard, model))).exists()

    def seal(self) -> None:
        """Write the table of all receipts. Every unit must be there."""
        assert not self.missing()
        table: dict[str, Any] = {"id": self.header.id, "receipts": {}, "files": {}}
        for path in sorted((self.path / "receipts").glob("*.json")):
            receipt = files.read_json(path)
            table["receipts"][path.name] = crc32c([path.read_bytes()])
            table["files"] |= {name: [entry["size"], entry["crc32c"]] for name, entry in receipt["files"].items()}
        for path in sorted(self.path.rglob("zarr.json")):
            data = path.read_bytes()
            table["files"][str(path.relative_to(self.path))] = [len(data), crc32c([data])]
        files.write_json(self.path / SEALED, table)
        (self.path / DAMAGED).unlink(missing_ok=True)

    @property
    def sealed(self) -> bool:
        return (self.path / SEALED).exists()

    @property
    def units(self) -> list[Unit]:
        """Every (shard, model)."""
        return [(shard, model) for model in self.header.models for shard in range(self.shards)]

    def missing(self) -> list[Unit]:
        """The units that have no receipt yet."""
        return [unit for unit in self.units if not self.has(*unit)]

    def condemn(self, faults: Sequence[str], units: Iterable[Unit]) -> None:
        """Write down what a check has found: nobody opens the store before these units are made again."""
        files.write_json(self.path / DAMAGED, {"faults": list(faults), "units": [list(unit) for unit in units]})

    @property
    def condemned(self) -> tuple[list[str], list[Unit]]:
        """The faults that a check has written down, and the units that mend them."""
        if not (self.path / DAMAGED).exists():
            return [], []
        found = files.read_json(self.path / DAMAGED)
        return found["faults"], [(shard, model) for shard, model in found["units"]]

    def reopen(self, units: Iterable[Unit]) -> None:
        """Forget these units, so that they are made again; the store is unfinished from now on."""
        for name in (SEALED, *(layout.receipt_file(unit) for unit in units)):
            (self.path / name).unlink(missing_ok=True)
        files.sync_folder(self.path / "receipts")
        files.sync_folder(self.path)

    # --- reading ------------------------------------------------------------------------------------------------

    @classmethod
    def at(cls, path: Path) -> "Store":
        """The store at `path` in whatever state it is."""
        return cls(path, Header.read(path))

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """A finished store, after a check of `sealed` and of the size of every file.

        Raises StoreError, StoreUnfinishedError, or StoreDamagedError with the names of the bad files.
        """
        if "://" in str(path):
            way_out = "Copy it to this machine first, and open the folder that train.stage(url) returns"
            raise StoreError("a store at a URL cannot be opened there", path, way_out)
        store = cls.at(Path(path))
        if not store.sealed:
            units = f"{path} has {len(store.units) - len(store.missing())} of {len(store.units)} units"
            way_out = "Run the same harvest run again: it goes on where it stopped"
            raise StoreUnfinishedError("this store is not finished", units, way_out)
        if bad := store.condemned[0] or store._damaged():
            listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            way_out = f"See harvest verify {path}; harvest repair {path} makes what is damaged again"
            raise StoreDamagedError(f"{len(bad)} files of {path} are damaged", listed, way_out)
        return store

    def _damaged(self) -> list[str]:
        """The files that are missing or of another size than `sealed` says; `sealed` itself where it is broken."""
        try:
            sealed = files.read_json(self.path / SEALED)
            bad = [name for name, (size, _) in sealed["files"].items() if _size(self.path / name) != size]
            return bad if sealed["id"] == self.header.id else [SEALED]
        except (ValueError, KeyError, TypeError):
            return [SEALED]

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def form(self, source: str) -> Form:
        """How the activations of a source lie in their shard files."""
        return form_of(self.source(source), self.header.plan, self.header.codec)

    def activations(self, source: str, access: Access = MAPPED) -> Shards:
        def path(shard: int) -> Path:
            return self.path / layout.unit_files(source, shard)[0]

        def crcs(shard: int) -> list[int]:
            receipt = files.read_json(self.path / layout.receipt_file((shard, self.source(source).model)))
            found: list[int] = receipt["files"][layout.unit_files(source, shard)[0]]["chunks"]
            return found

        return self.form(source).open(Files(self.rows, path, crcs), access)

    def map(self, name: str, index: int = 0) -> np.ndarray:
        """A read-only memory map of file `index` of the array `name`, without padding. Refuses what is packed."""
        meta = files.read_json(self.path / name / "zarr.json")
        if layout.is_packed(meta):
            raise StoreError("this array is packed and cannot be mapped", name, "Take its rows by read or stored")
        shape, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        length = min(chunk[0], shape[0] - index * chunk[0])
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        return np.memmap(
            self.path / layout.chunk_file(name, (index, *[0] * (len(shape) - 1))),
            dtype,
            "r",
            shape=(length, *shape[1:]),
        )

    def column(self, name: str) -> np.ndarray:
        """The whole of an array, in memory where it has several files. Meant for tables, not for activations."""
        meta = files.read_json(self.path / name / "zarr.json")
        shape, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        if not shape[0]:
            return np.empty(shape, meta["data_type"])
        maps = [self.map(name, index) for index in range(-(-shape[0] // chunk[0]))]
        return maps[0] if len(maps) == 1 else np.concatenate(maps)

    def lazily(self, name: str) -> "Column":
        """An array to read here and there: of `column`, what is asked for."""
        return Column(self, name)

    # --- files --------------------------------------------------------------------------------------------------

    def _declare(self, name: str, array: layout.Array) -> None:
        """Write an array's zarr.json, and those of the groups above it, where there are none."""
        *groups, _ = name.split("/")
        for depth in range(len(groups)):
            zarr.open_group(self.path, path="/".join(groups[: depth + 1]), mode="a", zarr_format=3)
        if (self.path / name / GROUP).exists():
            return
        codecs: Sequence[Any] = array.codecs or ("auto",)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Numcodecs codecs are not in the Zarr version 3"
            )  # pcodec: STORE.md says it
            zarr.create_array(
                self.path, name=name, shape=array.shape, dtype=array.dtype, chunks=array.chunk, shards=array.shard,
                filters=None, serializer=codecs[0], compressors=codecs[1:] or None, fill_value=array.fill,
                dimension_names=array.dims, attributes=array.attributes, zarr_format=3,
            )  # fmt: skip

    def _write(self, name: str, values: np.ndarray) -> dict[str, Any]:
        data = raw(values)
        files.write_atomic(self.path / name, [data])
        return {name: {"size": len(data), "crc32c": crc32c([data])}}


class Column:
    """Items of an array by number or by [start:stop], from the files that hold them; the last one stays mapped."""

    def __init__(self, store: Store, name: str) -> None:
        meta = files.read_json(store.path / name / "zarr.json")
        self._store, self._name, self._dtype = store, name, meta["data_type"]
        self._length, self._items = meta["shape"][0], meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._held: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._length)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> np.ndarray: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            n = self._items
            parts = [
                self._file(k)[max(start - k * n, 0) : stop - k * n]
                for k in range(start // n, -(-max(stop, start) // n))
            ]
            return np.concatenate(parts) if parts else np.empty(0, self._dtype)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._file(index // self._items)[index % self._items]

    def _file(self, number: int) -> np.ndarray:
        if self._held is None or self._held[0] != number:
            self._held = number, self._store.map(self._name, number)
        return self._held[1]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
