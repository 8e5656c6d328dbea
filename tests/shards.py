"""Shard files of one source as every form writes them, and every way to read them."""

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared import codec
from shared.reading import Access, Files, Grid, KeptShards, Shards
from shared.shard import Form, Packed, Raw, RawPieces

ROWS, SHARD, CHUNK, WIDTH = 59, 24, 4, 6  # three shards; a ragged one, with a ragged chunk
FORMS: dict[str, Form] = {
    "raw": Raw(SHARD, CHUNK, WIDTH, "float16"),
    **{name: Packed(SHARD, CHUNK, WIDTH, "float16", codec.find(name)) for name in codec.CODECS},
    "bfloat16": Packed(SHARD, CHUNK, WIDTH, "bfloat16", codec.find("blosc")),
}
WAYS = {**{name: name for name in FORMS}, "pread": "raw", "pread, half a chunk a piece": "raw"}  # {way: form}


@dataclass(frozen=True)
class Written:
    form: Form
    folder: Path
    rows_ND: np.ndarray
    entries: list[dict[str, Any]]

    @property
    def files(self) -> Files:
        return Files(len(self.rows_ND), self.path, lambda shard: self.entries[shard]["chunks"])

    def path(self, shard: int) -> Path:
        return self.folder / str(shard)

    def open(self, way: str = "map", stays: bool = False, drops: bool = False) -> Shards:
        if way == "pread, half a chunk a piece":
            return KeptShards(RawPieces(self.files, Grid(SHARD, CHUNK // 2, WIDTH, self.form.dtype)), stays)
        return self.form.open(self.files, Access("pread" if way == "pread" else "map", stays, drops))


def write(form: Form, folder: Path, rows_ND: np.ndarray | None = None) -> Written:
    bits = np.random.default_rng(0).integers(0, 2**16, (ROWS, form.width), dtype=np.uint16)
    rows_ND = bits.view(form.dtype) if rows_ND is None else rows_ND
    starts = range(0, len(rows_ND), form.shard_rows)
    entries = [form.write(folder / str(n), rows_ND[at : at + form.shard_rows]) for n, at in enumerate(starts)]
    return Written(form, folder, rows_ND, entries)


def taken(source: Shards, rows_B: np.ndarray, like: np.ndarray, pool: Executor) -> bytes:
    out_BD = np.empty((len(rows_B), like.shape[1]), like.dtype)
    source.check(rows_B)
    source.take(rows_B, out_BD, pool)
    return out_BD.tobytes()
