"""The rows of one source in its shard files, raw or packed: the one place that knows how they lie there.

Letters: S rows of a shard, C rows of a chunk, B rows that are asked for, D width of the source.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shared import codec, files, layout
from shared.codec import Codec, Packing
from shared.errors import StoreDamagedError
from shared.layout import crc32c, padded, raw
from shared.mapped import MappedShards
from shared.reading import THREADS, Access, File, Files, Grid, KeptShards, Pieces, Shards
from shared.source import Source

REQUESTS = 16  # of a network disk at once: their threads wait and take no core
REQUEST_BYTES = 2**22  # of one of them, as far as pieces that are asked for lie together


class Form(ABC):
    """How the rows of a source lie in its shard files: chunks one after another, then their index."""

    codecs: Sequence[dict[str, Any]] = ()  # of a chunk, as zarr.json spells them
    versions: Mapping[str, str] = {}  # of what decides the bytes

    def __init__(self, shard_rows: int, chunk_rows: int, width: int, dtype: str) -> None:
        self.shard_rows, self.chunk_rows, self.slots = shard_rows, chunk_rows, shard_rows // chunk_rows
        self.width, self.dtype, self._fill = width, np.dtype(layout.DTYPES[dtype]), layout.NANS[dtype]

    @abstractmethod
    def open(self, found: Files, access: Access) -> Shards:
        """The rows of these files. What is packed is decoded, whatever `access.io` says."""

    @abstractmethod
    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        """The chunks as they lie in the file, one after another."""

    def write(self, path: Path, rows_SD: np.ndarray) -> dict[str, Any]:
        """Write the file in one atomic step. Returns what its receipt says: size, crc32c, and that of every chunk."""
        lengths: list[int] = []
        crcs: list[int] = []

        def parts() -> Iterator[bytes | memoryview]:
            for chunk in self.encode(rows_SD):
                lengths.append(len(chunk))
                crcs.append(crc32c([chunk]))  # once, and while the write finds it in the processor's cache
                yield chunk
            index = layout.shard_index(lengths, self.slots)
            lengths.append(len(index))
            crcs.append(crc32c([index]))
            yield index

        files.write_atomic(path, parts())
        whole = layout.crc32c_joined(zip(crcs, lengths, strict=True))
        return {"size": sum(lengths), "crc32c": whole, "chunks": crcs[:-1]}

    def chunk(self, rows_SD: np.ndarray, start: int) -> np.ndarray:
        """C rows from `start` on, the last ones padded."""
        return padded(rows_SD[start : start + self.chunk_rows], self.chunk_rows, self._fill)


def form_of(source: Source, plan: Mapping[str, Any], packing: Packing | None) -> Form:
    """How the rows of `source` lie in a store of this plan. Raises ConfigError for a codec that is not installed."""
    if packing is None:
        return Raw(plan["shard_rows"], plan["chunk_rows"], source.width, plan["dtype"])
    found = codec.find(packing.name, packing.level)
    return Packed(plan["shard_rows"], packing.chunk_rows[source.name], source.width, plan["dtype"], found)


class Raw(Form):
    """Bytes as they are: a shard file is a matrix that can be mapped."""

    def open(self, found: Files, access: Access) -> Shards:
        # A piece is as much of a chunk as training reads at random, which a packed store has for a chunk.
        rows = layout.block_rows(self.chunk_rows, self.width * self.dtype.itemsize)
        grid = Grid(self.shard_rows, rows, self.width, self.dtype)
        if access.io == "pread":
            return KeptShards(RawPieces(found, grid), access.stays)
        return MappedShards(found, grid, access)

    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        return (raw(self.chunk(rows_SD, start)) for start in range(0, len(rows_SD), self.chunk_rows))


class Packed(Form):
    """Every chunk encoded by itself, so that a chunk is what is read at random."""

    def __init__(self, shard_rows: int, chunk_rows: int, width: int, dtype: str, codec: Codec) -> None:
        super().__init__(shard_rows, chunk_rows, width, dtype)
        self.codec, self.codecs, self.versions = codec, codec.zarr, codec.versions

    def open(self, found: Files, access: Access) -> Shards:
        grid = Grid(self.shard_rows, self.chunk_rows, self.width, self.dtype)
        return KeptShards(PackedPieces(found, grid, self.codec), access.stays)

    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        flying: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(THREADS, "encode") as pool:
            for start in range(0, len(rows_SD), self.chunk_rows):
                flying.append(pool.submit(self._encode, rows_SD, start))
                if len(flying) > 2 * THREADS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()

    def _encode(self, rows_SD: np.ndarray, start: int) -> bytes:
        return self.codec.encode(self.chunk(rows_SD, start))


class RawPieces(Pieces):
    """Parts of files as they lie there, by large reads: no page fault, which a network disk may answer late or never.

    A read does not need what is around it, so of a piece that is not kept only the rows are read, and those between.
    """

    threads = max(THREADS, REQUESTS)

    def __init__(self, found: Files, grid: Grid) -> None:
        super().__init__(found, grid)
        self.together = max(1, REQUEST_BYTES // (grid.piece_rows * grid.row_bytes))
        self._opened: dict[int, File] = {}  # two threads may open one shard: either will do

    def get(self, first: int, out: Sequence[np.ndarray]) -> None:
        self._read(first, 0, out)

    def some(self, piece: int, local_B: np.ndarray) -> np.ndarray:
        first = int(local_B[0])
        rows_ND = np.empty((int(local_B[-1]) + 1 - first, self.grid.width), self.grid.dtype)
        self._read(piece, first, [rows_ND])
        return rows_ND[local_B - first]

    def _read(self, piece: int, row: int, out: Sequence[np.ndarray]) -> None:
        """Fill `out`, one after another, with what lies from `row` of a piece on."""
        shard, slot = divmod(piece, self.grid.slots)
        if shard not in self._opened:
            self._opened[shard] = File(self.files.path(shard))
        self._opened[shard].fill(out, (slot * self.grid.piece_rows + row) * self.grid.row_bytes)


class PackedPieces(Pieces):
    """Chunks that are decoded, each checked first.

    (Zarr's own crc32c codec would stand in the file, and make the crc32c of all files alike.)
    """

    def __init__(self, found: Files, grid: Grid, codec: Codec) -> None:
        super().__init__(found, grid)
        self._codec = codec
        self._opened: dict[int, _PackedFile] = {}  # two threads may open one shard: either will do

    def get(self, first: int, out: Sequence[np.ndarray]) -> None:
        for chunk, rows_CD in enumerate(out, first):
            self._decode(chunk, rows_CD)

    def some(self, piece: int, local_B: np.ndarray) -> np.ndarray:
        rows_CD = np.empty((self.grid.piece_rows, self.grid.width), self.grid.dtype)
        self._decode(piece, rows_CD)
        return rows_CD[local_B]

    def _decode(self, chunk: int, rows_CD: np.ndarray) -> None:
        shard, slot = divmod(chunk, self.grid.slots)
        opened = self._open(shard)
        data = opened.file.read(*opened.index[slot].tolist())
        try:
            if crc32c([data]) != opened.crcs[slot]:
                raise ValueError("another checksum")
            self._codec.decode(data, rows_CD)
        except (ValueError, IndexError) as error:
            first = chunk * self.grid.piece_rows
            rows = range(first, min(first + self.grid.piece_rows, self.files.rows))
            raise _damaged(opened.file.path, f"rows {rows[0]} to {rows[-1]}: {error}") from None

    def _open(self, shard: int) -> "_PackedFile":
        if shard not in self._opened:
            path = self.files.path(shard)
            try:
                crcs = np.array(self.files.crcs(shard), np.uint32)
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                raise _damaged(path, "its receipt cannot be read") from None
            self._opened[shard] = _PackedFile(File(path), self.grid.slots, crcs)
        return self._opened[shard]


class _PackedFile:
    """A shard file with offset and length of its chunks, and their checksums."""

    def __init__(self, file: "File", slots: int, crcs: np.ndarray) -> None:
        self.file, self.crcs = file, crcs
        size = layout.index_bytes(slots)
        index = layout.parse_index(file.read(max(0, file.size - size), size), slots)
        if index is None:
            raise _damaged(file.path, "its index: another checksum")
        self.index = index.clip(max=file.size)  # what is absent stands beyond all files


def _damaged(path: Path, what: str) -> StoreDamagedError:
    way_out = "See harvest verify --full; harvest repair makes what is damaged again"
    return StoreDamagedError("a packed shard cannot be read", f"{path}, {what}", way_out)
