"""URLs of stores, and the names of their copies."""

from pathlib import Path

import pytest

from shared import remote
from shared.errors import ConfigError, StoreError
from shared.remote import name_of, place
from shared.store import Store
from tests.s3 import Bucket


def test_a_copy_is_called_what_its_url_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of(place("s3://bucket/caches/pair.zarr/", tmp_path)) == "pair"
    assert name_of(Path("here/pair.zarr")) == "pair" and name_of(Path("pair.v2")) == "pair.v2"
    assert name_of(Path("pair-0123456789ab.zarr")) == "pair-0123456789ab"
    (tmp_path / "some.zarr").mkdir()
    monkeypatch.chdir(tmp_path / "some.zarr")
    assert name_of(Path()) == "some"


def test_a_url_is_no_path(bucket: Bucket) -> None:
    with pytest.raises(StoreError, match=r"train\.stage"):
        Store.open(bucket.url)
    with pytest.raises(ConfigError, match="not a URL"):
        remote.local(bucket.url, "Give a folder")
    assert remote.local("a/b", "Give a folder") == Path("a/b")
