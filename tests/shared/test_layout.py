"""The bytes of a store, by hand."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared import layout
from shared.source import Source


def test_crc32c_has_the_check_value_of_its_specification() -> None:
    assert layout.crc32c([b"123456789"]) == 0xE3069283  # RFC 3720, B.4
    assert layout.crc32c([bytes(32)]) == 0x8A9136AA
    assert layout.crc32c([b"1234", memoryview(b"56789")]) == 0xE3069283
    assert layout.crc32c([]) == 0


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_the_checksum_of_a_whole_follows_from_those_of_its_parts(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert layout.crc32c_joined([(layout.crc32c([part]), len(part)) for part in parts]) == layout.crc32c([whole])


def test_checksums_of_large_parts_join_in_their_order() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.bytes(2**21), rng.bytes(2**21), rng.bytes(3**9)]
    joined = layout.crc32c_joined([(layout.crc32c([part]), len(part)) for part in parts])
    assert joined == layout.crc32c(parts)
    assert joined != layout.crc32c_joined([(layout.crc32c([part]), len(part)) for part in parts[::-1]])


def test_the_index_of_a_shard_gives_offset_and_length_of_every_chunk_and_its_own_checksum() -> None:
    index = layout.shard_index([10, 10, 4], 5)
    pairs = struct.iter_unpack("<QQ", index[:-4])
    absent = (2**64 - 1, 2**64 - 1)
    assert list(pairs) == [(0, 10), (10, 10), (20, 4), absent, absent]
    assert struct.unpack("<I", index[-4:]) == (layout.crc32c([index[:-4]]),)


def test_padding_keeps_what_is_there_and_its_type() -> None:
    values = np.arange(6, dtype="<f2").reshape(3, 2)
    assert layout.padded(values, 3, 0).tolist() == values.tolist()
    longer = layout.padded(values, 5, np.nan)
    assert longer.dtype == values.dtype
    assert longer[:3].tolist() == values.tolist()
    assert np.isnan(longer[3:]).all()


def test_raw_bytes_are_in_c_order_whatever_the_memory() -> None:
    values = np.arange(6, dtype="<u2").reshape(2, 3)
    assert bytes(layout.raw(np.asfortranarray(values))) == struct.pack("<6H", *range(6))


def test_bfloat16_lies_on_the_disk_as_the_bits_of_uint16() -> None:
    numbers = torch.tensor([[1.0, -2.0], [float("nan"), 3e38]], dtype=torch.bfloat16)
    bits = layout.stored(numbers)
    assert bits.dtype == np.dtype(layout.DTYPES["bfloat16"]) and bits[0].tolist() == [0x3F80, 0xC000]
    assert torch.equal(layout.floats(bits).view(torch.int16), numbers.view(torch.int16))
    assert layout.floats(np.array([layout.NANS["bfloat16"]], np.uint16)).isnan().all()
    half = torch.tensor([1.5], dtype=torch.float16)
    assert layout.stored(half).dtype == np.dtype(layout.DTYPES["float16"]) and torch.equal(
        layout.floats(layout.stored(half)), half
    )


@pytest.mark.parametrize("source", ["a", "chat-2"])
def test_the_files_of_a_unit_belong_to_the_arrays_of_its_source(source: str) -> None:
    plan = {"rows": 20, "shard_rows": 8, "chunk_rows": 4, "shards": 3, "dtype": "float16"}
    arrays = layout.unit_arrays(Source(source, "m", "resid.1", 6), plan, 2.0, 4)
    names = layout.unit_files(source, 2)
    assert [name.split("/c/")[0] for name in names] == list(arrays)
    assert [name.split("/c/")[1] for name in names] == ["2/0", "2", "2", "2/0/0"]
    for name, array in zip(names, arrays.values(), strict=True):
        assert len(name.split("/c/")[1].split("/")) == len(array.shape)
    assert layout.receipt_file((2, "m")) == "receipts/00002.m.json"
    assert layout.receipt_file(None) == "receipts/plan.json"


def test_an_index_reads_back_and_is_none_where_it_is_damaged() -> None:
    data = layout.shard_index([10, 10, 4], 5)
    assert len(data) == layout.index_bytes(5)
    index = layout.parse_index(data, 5)
    assert index is not None
    assert index[:3].tolist() == [[0, 10], [10, 10], [20, 4]]
    assert (index[3:] == layout.ABSENT).all()
    for damaged in (data[:-1], data + b"x", b"\x01" + data[1:], data[:-1] + b"x", b""):
        assert layout.parse_index(damaged, 5) is None
    assert layout.parse_index(data, 4) is None


@pytest.mark.parametrize(
    ("chunk_rows", "row_bytes", "rows"),
    [(1024, 512, 512), (1024, 1280, 256), (100, 128, 100), (96, 4096, 96), (96, 8192, 32), (1024, 2**20, 1), (1, 2, 1)],
)
def test_a_block_is_a_divisor_of_a_chunk_with_256_kib(chunk_rows: int, row_bytes: int, rows: int) -> None:
    assert layout.block_rows(chunk_rows, row_bytes) == rows
