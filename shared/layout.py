"""STORE.md as code: the arrays of a store, the names of its files and their bytes. Pure.

Letters: N rows, S rows per shard, C rows per chunk, D width of a source, K length of packed moments, X classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import torch

from shared.moments import CLASSES, packed_fields
from shared.source import Source

TABLE_CHUNK = 2**22  # items per chunk of tokens, segments, documents and batches
ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that a shard does not hold
LEAST_BLOCK_BYTES = 256 * 1024  # of any source: what a disk reads at full rate
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}  # the codec of all that is not packed
GROUP, SEALED, DAMAGED = "zarr.json", "sealed", "damaged"
CASTAGNOLI = 0x82F63B78  # the polynomial of crc32c, reflected (RFC 3720)
UNIT_ARRAYS = ("activations", "norms", "faults", "moments")
Unit = tuple[int, str]  # (shard, model)
DTYPES = {"float16": "<f2", "bfloat16": "<u2"}  # how activations lie on the disk: NumPy and Zarr know no bfloat16
NANS = {"float16": np.nan, "bfloat16": 0x7FC0}  # what fills the rows that a last chunk lacks


@dataclass(frozen=True)
class Array:
    """One Zarr array. `shard` is the rows of its file where that holds several chunks of `chunk` rows."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    dims: tuple[str, ...]
    shard: tuple[int, ...] | None = None
    fill: float = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    codecs: Sequence[Any] = ()  # of a chunk, as zarr.json spells them; none: its bytes as they are


def table_array(name: str, values: np.ndarray, shard_rows: int) -> Array:
    """An array of the plan."""
    chunk = shard_rows if name.startswith("rows/") else max(1, min(TABLE_CHUNK, len(values)))
    dim = "row" if name.startswith("rows/") else name.replace("/", "_")  # xarray: one name, one length
    return Array(values.shape, values.dtype.str, (chunk,), (dim,))


def unit_arrays(
    source: Source, plan: Mapping[str, Any], factor: float, chunk_rows: int, codecs: Sequence[dict[str, Any]] = ()
) -> dict[str, Array]:
    """{name: array} of all that the units of one source fill; chunks and codecs are those of its activations."""
    n, s, c, fields = plan["rows"], plan["shard_rows"], chunk_rows, packed_fields(source.width)
    k = fields["norm_histogram"][1]
    shape = {"heads": source.heads, "head_dim": source.width // source.heads} if source.heads else {}
    dtype = plan["dtype"]
    kind = {} if dtype == "float16" else {"dtype": dtype}
    return {
        f"activations/{source.name}": Array(
            (n, source.width), DTYPES[dtype], (c, source.width), ("row", f"width_{source.name}"),
            (s, source.width), NANS[dtype], {"scale_factor": factor, **shape, **kind}, codecs,
        ),
        f"norms/{source.name}": Array((n,), "<f4", (s,), ("row",), fill=np.nan),
        f"faults/{source.name}": Array((n,), "|u1", (s,), ("row",)),
        f"moments/{source.name}": Array(
            (plan["shards"], len(CLASSES), k), "<f8", (1, len(CLASSES), k),
            ("shard", "class", f"moment_{source.name}"), None, np.nan, {"classes": list(CLASSES), "fields": fields},
        ),
    }  # fmt: skip


def is_packed(meta: Mapping[str, Any]) -> bool:
    """Whether the chunks of an array are anything but their bytes, by its zarr.json."""
    outer = meta["codecs"][0]
    codecs = outer["configuration"]["codecs"] if outer["name"] == "sharding_indexed" else meta["codecs"]
    return any(codec["name"] != BYTES["name"] for codec in codecs)


def chunk_file(name: str, index: Sequence[int]) -> str:
    """The file of one chunk (or shard) of an array, below the store's folder."""
    return "/".join([name, "c", *map(str, index)])


def unit_files(source: str, shard: int) -> list[str]:
    """The files that one unit writes of one of its sources."""
    index = ((shard, 0), (shard,), (shard,), (shard, 0, 0))
    return [chunk_file(f"{kind}/{source}", at) for kind, at in zip(UNIT_ARRAYS, index, strict=True)]


def receipt_file(unit: Unit | None) -> str:
    """The receipt of a unit, or (none) of the plan."""
    return f"receipts/{unit[0]:05d}.{unit[1]}.json" if unit else "receipts/plan.json"


def shard_index(lengths: Sequence[int], slots: int) -> bytes:
    """The index of a shard whose chunks stand back to back (Zarr v3, sharding_indexed, index_location end)."""
    index = np.full((slots, 2), ABSENT, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]])
    return index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")


def parse_index(data: bytes, slots: int) -> np.ndarray | None:
    """[slots, 2] of offsets and lengths, from the last bytes of a shard file; none where they are no index."""
    if len(data) != index_bytes(slots) or crc32c([data[:-4]]).to_bytes(4, "little") != data[-4:]:
        return None
    return np.frombuffer(data[:-4], "<u8").reshape(slots, 2)


def index_bytes(slots: int) -> int:
    return 16 * slots + 4


def block_rows(chunk_rows: int, row_bytes: int) -> int:
    """Rows that are read together: the smallest divisor of a chunk with 256 KiB of a source, else the whole chunk."""
    divisors = (n for n in range(1, chunk_rows + 1) if chunk_rows % n == 0)
    return next((n for n in divisors if n * row_bytes >= LEAST_BLOCK_BYTES), chunk_rows)


def padded(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    if len(values) == length:
        return np.ascontiguousarray(values)
    return np.concatenate([values, np.full((length - len(values), *values.shape[1:]), fill, values.dtype)])


def floats(stored: np.ndarray) -> torch.Tensor:
    """Activations as they lie on the disk, as numbers: float16 or bfloat16, over the same memory."""
    values = torch.from_numpy(stored)
    return values.view(torch.bfloat16) if values.dtype == torch.uint16 else values


def stored(values: torch.Tensor) -> np.ndarray:
    """Numbers as they lie on the disk, over the same memory: the inverse of `floats`."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def raw(values: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def crc32c(parts: Iterable[bytes | memoryview]) -> int:
    """Of `parts`, one after another."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, np.frombuffer(part, np.uint8))
    return int(crc)


def crc32c_joined(parts: Iterable[tuple[int, int]]) -> int:
    """The crc32c of bytes that stand one after another, from that of each and its length: no byte is read again.

    As zlib's crc32_combine: x^(8 x length) modulo the polynomial moves the one on, and the other is added.
    """
    whole = 0
    for crc, length in parts:
        whole = _product(_shift(length), whole) ^ crc
    return whole


@lru_cache
def _shift(length: int) -> int:
    """x^(8 x length), by squaring. Bit 31 stands for x^0, as everywhere in a reflected crc."""
    power, square = 1 << 31, 1 << 23
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return power


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo that of crc32c."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (CASTAGNOLI if b & 1 else 0)
    return product
