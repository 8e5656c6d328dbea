"""A shard file is what its receipt says, and what is damaged in a packed one is one error that names the file."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import codec, files, layout
from shared.errors import StoreDamagedError
from shared.reading import MAPPED, Files
from tests.shards import CHUNK, FORMS, ROWS, SHARD, WIDTH, Written, taken, write


@pytest.fixture(scope="module", params=FORMS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(FORMS[request.param], tmp_path_factory.mktemp("shard"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def test_what_a_receipt_says_of_the_file_is_so(written: Written) -> None:
    slots, checksums = SHARD // CHUNK, []
    for shard, entry in enumerate(written.entries):
        data = written.path(shard).read_bytes()
        index = layout.parse_index(data[-layout.index_bytes(slots) :], slots)
        assert index is not None
        present = -(-len(written.rows_ND[shard * SHARD :][:SHARD]) // CHUNK)
        assert (index[present:] == layout.ABSENT).all()
        chunks = [data[offset : offset + length] for offset, length in index[:present].tolist()]
        crcs = [layout.crc32c([chunk]) for chunk in chunks]
        assert entry == {"size": len(data), "crc32c": layout.crc32c([data]), "chunks": crcs}
        assert b"".join(chunks) == data[: -layout.index_bytes(slots)]
        checksums += crcs
    assert len(set(checksums)) == len(checksums)  # no two chunks look alike to it


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: flip(path, 3), r"rows 24 to 27: another checksum"),
        (lambda path: flip(path, -1), "its index: another checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its index: another checksum"),
        (lambda path: path.write_bytes(b""), "its index: another checksum"),
    ],
    ids=["a flipped bit", "its index", "cut short", "empty"],
)
def test_damage_is_one_error_that_names_the_file(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, ahead: bool, damage: Any, what: str
) -> None:
    made = write(FORMS[name], tmp_path)
    damage(made.path(1))
    source = made.open()
    if ahead:
        source.will_need([(0, ROWS)], pool)
    told = f"a packed shard cannot be read: {made.path(1)}, {what}. See harvest verify"
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=told):
            taken(source, np.array([0, 25, 58]), made.rows_ND, pool)
    assert taken(source, np.array([0, 58]), made.rows_ND, pool) == made.rows_ND[[0, 58]].tobytes()


@pytest.mark.parametrize("name", codec.CODECS)
def test_swapped_shards_are_noticed_by_their_checksums(tmp_path: Path, pool: ThreadPoolExecutor, name: str) -> None:
    made = write(FORMS[name], tmp_path)
    first = made.path(0).read_bytes()
    made.path(0).write_bytes(made.path(1).read_bytes())
    made.path(1).write_bytes(first)
    with pytest.raises(StoreDamagedError, match="rows 0 to 3: another checksum"):
        taken(made.open(), np.array([0]), made.rows_ND, pool)


def test_a_receipt_that_is_gone_is_said(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    made = write(FORMS["zstd"], tmp_path)
    source = made.form.open(Files(ROWS, made.path, lambda shard: files.read_json(tmp_path / "none")), MAPPED)
    with pytest.raises(StoreDamagedError, match="its receipt cannot be read"):
        taken(source, np.array([0]), made.rows_ND, pool)


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "shard_index", lambda lengths, slots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FORMS["blosc"].write(tmp_path / "0", np.zeros((SHARD, WIDTH), np.float16))
    assert list(tmp_path.iterdir()) == []
