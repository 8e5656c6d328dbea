"""What a store says of itself reads back, and its id depends on what decides a value alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared import files
from shared.codec import Packing
from shared.config import fingerprint
from shared.errors import StoreError
from shared.header import Header
from shared.layout import GROUP
from shared.source import Model, Source

HEADER = Header(
    {"format": 1, "corpus": "abc"},
    {"m": Model("m", "/models/m", "w", "t", "float32", "eager")},
    {"s": Source("s", "m", "heads.1", 12, 3)},
    {"rows": 7, "dtype": "float16"},
    {"s": {"factor": 2.0}},
)
PACKED = replace(HEADER, codec=Packing("zstd", 3, {"s": 4}))


@pytest.mark.parametrize("header", [HEADER, PACKED, replace(HEADER, scale=None)], ids=["raw", "packed", "planned"])
def test_a_header_reads_back_as_it_was_written(header: Header, tmp_path: Path) -> None:
    files.write_json(tmp_path / GROUP, {"attributes": header.attributes()})
    assert Header.read(tmp_path) == header


def test_the_id_is_the_fingerprint_of_the_spec_alone() -> None:
    elsewhere = replace(HEADER.models["m"], path="/elsewhere")
    assert HEADER.id == fingerprint(HEADER.spec)
    assert replace(HEADER, models={"m": elsewhere}, scale={"s": {"factor": 4.0}}).id == PACKED.id == HEADER.id
    assert replace(HEADER, spec={**HEADER.spec, "corpus": "x"}).id != HEADER.id
    assert elsewhere.identity() == HEADER.models["m"].identity()


@pytest.mark.parametrize("content", ["", "{}", "[]", json.dumps({"attributes": {"granary": {"format": 1}}})])
def test_what_is_no_header_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / GROUP).write_text(content)
    with pytest.raises(StoreError, match=f"no Granary store here: {tmp_path}. Give the folder"):
        Header.read(tmp_path)
