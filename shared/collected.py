"""Folders that dictionary_learning's ActivationCache has written: the rows of one model at one site.

    <folder>/shard_<i>.memmap   raw rows of shard i        shard_<i>.meta   {"shape": [n, D], "dtype": "torch.float16"}
    <folder>/config.json        what it was made with      tokens.pt, sequence_ranges.pt   there, or one level above

Letters: N rows, B rows that are asked for, D width.
"""

import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import files
from shared.errors import StoreDamagedError, StoreError

DTYPES: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "torch.float16": (np.dtype("<f2"), torch.float16), "torch.bfloat16": (np.dtype("<i2"), torch.bfloat16),
    "torch.float32": (np.dtype("<f4"), torch.float32), "torch.float64": (np.dtype("<f8"), torch.float64),
    "torch.int8": (np.dtype("i1"), torch.int8),
}  # fmt: skip
OLDEST = "torch.float32"  # of a .meta without a dtype


class Collected:
    """A folder of an ActivationCache. Raises StoreError where it is none, StoreDamagedError where it is torn."""

    made_by = "ActivationCache"

    def __init__(self, path: Path) -> None:
        found = {
            int(m[1]): file for file in path.glob("shard_*.meta") if (m := re.fullmatch(r"shard_(\d+)", file.stem))
        }
        if not found:
            raise StoreError("no activations here", path, "Give a store, or a folder with shard_0.memmap and .meta")
        if sorted(found) != list(range(len(found))):
            lacking = min(set(range(len(found) + 1)) - set(found))
            raise StoreDamagedError("a shard is missing", path / f"shard_{lacking}.meta", "Collect it again")
        self.path = path
        self._maps = [self._map(found[n]) for n in range(len(found))]
        shapes = {(one.shape[1], one.dtype) for one in self._maps}
        if len(shapes) > 1:
            raise StoreDamagedError("shards of several kinds", path, "They are of several runs: collect it again")
        self.width = self._maps[0].shape[1]
        self._ends = np.cumsum([len(one) for one in self._maps])
        self.count = int(self._ends[-1])
        if (told := self.config.get("total_size")) not in (None, self.count):
            raise StoreDamagedError("rows are missing", f"{self.count:,} of {told:,} in {path}", "Collect it again")

    def _map(self, meta: Path) -> np.ndarray:
        told = _table(meta)
        name = str(told.get("dtype", OLDEST))
        if name not in DTYPES or len(told.get("shape", ())) != 2:
            raise StoreDamagedError("a shard of an unknown kind", f"{name} in {meta}", f"Known: {', '.join(DTYPES)}")
        stored, self.dtype = DTYPES[name]
        file, (rows, width) = meta.with_suffix(".memmap"), told["shape"]
        size = file.stat().st_size if file.exists() else 0
        if size != rows * width * stored.itemsize:
            value = f"{file} has {size:,} bytes of {rows * width * stored.itemsize:,}"
            raise StoreDamagedError("a shard is torn", value, "Collect it again")
        return np.memmap(file, stored, "r", shape=(rows, width))

    @property
    def site(self) -> str:
        """Of layer_13_out: resid.13. Of any other name: the name."""
        found = re.fullmatch(r"layer_(\d+)_(in|out)", self.path.name)
        return f"{'resid' if found[2] == 'out' else 'resid_in'}.{found[1]}" if found else self.path.name

    def take(self, rows_B: np.ndarray) -> Tensor:
        out_BD = np.empty((len(rows_B), self.width), self._maps[0].dtype)
        shard_B = np.searchsorted(self._ends, rows_B, side="right")
        for shard in np.unique(shard_B):
            own_n = np.flatnonzero(shard_B == shard)
            own_n = own_n[np.argsort(rows_B[own_n], kind="stable")]  # in file order
            first = self._ends[shard] - len(self._maps[shard])
            out_BD[own_n] = self._maps[shard][rows_B[own_n] - first]
        found = torch.from_numpy(out_BD)
        return found.view(torch.bfloat16) if self.dtype == torch.bfloat16 else found

    @cached_property
    def tokens(self) -> Tensor | None:
        return self._beside("tokens.pt", self.count)

    @cached_property
    def ranges(self) -> Tensor | None:
        return self._beside("sequence_ranges.pt", None)

    def _beside(self, name: str, length: int | None) -> Tensor | None:
        """A tensor in the folder, or above it. Raises StoreDamagedError for one of another length."""
        for place in (self.path / name, self.path.parent / name):
            if place.exists():
                found: Tensor = torch.load(place, map_location="cpu", weights_only=True)
                if length is not None and len(found) != length:
                    value = f"{len(found):,} in {place} for {length:,} rows"
                    raise StoreDamagedError("tokens are of other rows", value, "Collect it again")
                return found
        return None

    @cached_property
    def config(self) -> dict[str, Any]:
        return _table(self.path / "config.json")

    def fingerprint(self) -> str:
        """sha256 of all rows, as they stand in the shards."""
        digest = hashlib.sha256()
        for one in self._maps:
            for start in range(0, len(one), 65_536):
                digest.update(np.ascontiguousarray(one[start : start + 65_536]).data)
        return digest.hexdigest()


def _table(path: Path) -> dict[str, Any]:
    """{} where there is no such file. Raises StoreDamagedError for one that is no table."""
    if not path.exists():
        return {}
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise StoreDamagedError("this file cannot be read", path, str(error)) from None
    if not isinstance(found, dict):
        raise StoreDamagedError("this file holds no table", path, "Collect it again")
    return found
