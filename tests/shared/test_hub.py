"""Stores in repositories of the hub, by the real huggingface_hub against a small hub on this machine.

What tests/hub.py has not (Xet, LFS in several parts, tokens, limits) is not covered.
"""

from pathlib import Path

import pytest

from shared import staging
from shared.errors import RemoteError, StoreDamagedError, StoreUnfinishedError
from shared.hub import Repository
from shared.remote import place
from shared.staging import stage
from shared.store import Store
from tests.build import make_store, tree
from tests.hub import Hub

URL = "hf://datasets/org/pair"
SHARD = "activations/a/c/1/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("hub") / "pair.zarr")


@pytest.fixture
def full(hub: Hub, store: Store) -> Hub:
    """A hub with the store in a repository of its own, and in a folder of another one."""
    files = tree(store.path)
    hub.repositories["datasets/org/pair"] = {**files, "README.md": b"a card"}
    hub.repositories["datasets/org/many"] = {f"layer/13/{name}": data for name, data in files.items()} | {"x": b""}
    return hub


@pytest.mark.parametrize("url", [URL, f"{URL}/", "hf://datasets/org/many/layer/13"])
def test_a_copy_has_the_bytes_of_the_store(full: Hub, store: Store, tmp_path: Path, url: str) -> None:
    path = stage(url, tmp_path / "here", quiet=True)
    assert path == place(url, tmp_path / "here")
    assert tree(path) == tree(store.path)
    assert stage(url, tmp_path / "here", quiet=True) == path


def test_everything_is_read_at_the_commit_that_the_revision_named_first(full: Hub, store: Store) -> None:
    there = Repository(URL)
    assert there.read("README.md") == b"a card"
    old = full.sha("datasets/org/pair")
    full.repositories["datasets/org/pair"] = {"README.md": b"another"}
    assert there.read("README.md") == b"a card" and len(there.sizes()) > 1
    assert Repository(f"{URL}@{old}").read("README.md") == b"a card"
    assert Repository(URL).read("README.md") == Repository(f"{URL}@main").read("README.md") == b"another"
    assert Repository(URL).read("zarr.json") is None and Repository(URL).sizes() == {"README.md": 7}
    assert Repository(f"{URL}/nothing").sizes() == {}


def test_what_is_wrong_there_is_found_and_named(full: Hub, tmp_path: Path) -> None:
    files = full.repositories["datasets/org/pair"]
    sound = files[SHARD]
    harms = {"has another checksum": bytes(len(sound)), "bytes, not": sound[:-1], "has more than": sound + b"x"}
    for said, data in harms.items():
        files[SHARD] = data
        with pytest.raises(StoreDamagedError, match=said) as error:
            stage(URL, tmp_path / "here", quiet=True)
        assert SHARD in str(error.value) and "harvest push" in str(error.value) and "\n" not in str(error.value)
    del files[SHARD]
    with pytest.raises(StoreDamagedError, match="is missing"):
        stage(URL, tmp_path / "here", quiet=True)
    del files["sealed"]
    with pytest.raises(StoreUnfinishedError):
        stage(URL, tmp_path / "here", quiet=True)


def test_an_outline_is_read_without_activations(full: Hub, store: Store) -> None:
    with staging.outlined(URL) as (path, sizes):
        assert Store.at(path).header == store.header and sizes[SHARD] == (store.path / SHARD).stat().st_size
    assert not any("activations/a/c/" in call for call in full.calls)


def test_a_name_that_is_not_there_is_one_line(full: Hub, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"^no such dataset repository, or no right to read it: .*HF_TOKEN") as error:
        stage("hf://datasets/org/nothing", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(RemoteError, match="no such revision"):
        stage(f"{URL}@nothing", tmp_path)


@pytest.mark.parametrize(
    "url", ["hf://org/pair", "hf://datasets/pair", "hf://models/org/pair", "hf://", "hf://datasets/"]
)
def test_what_is_no_url_of_a_dataset_repository(url: str) -> None:
    with pytest.raises(RemoteError, match=r"^cannot use this URL.*hf://datasets/ORG/NAME"):
        Repository(url)


def test_without_a_network_a_whole_copy_is_used(
    full: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stage(URL, tmp_path, quiet=True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert stage(URL, tmp_path) == path
    assert "using the copy" in capsys.readouterr().err
    with pytest.raises(RemoteError, match="the hub does not answer"):
        stage("hf://datasets/org/many/layer/13", tmp_path)


def test_a_harvest_is_not_written_to_the_hub(hub: Hub) -> None:
    with pytest.raises(RemoteError, match="harvest push"):
        staging.destination(URL)
    assert hub.calls == []
