"""A finished store is sent to the hub or to an object store, `sealed` last; what is there already is not sent again.

What tests/hub.py has not (Xet, LFS in several parts, tokens, limits) is not covered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harvest import push as pushing
from harvest.push import push
from shared.errors import RemoteError, StoreDamagedError, StoreError, StoreMismatchError
from shared.hub import Repository
from shared.log import Log
from shared.staging import stage
from shared.store import Store
from tests.build import Tree, make_store, tree
from tests.harvest.command import Harvest, assert_one_line
from tests.hub import Hub
from tests.s3 import Bucket

URL, NAME = "hf://datasets/org/pair", "datasets/org/pair"
BESIDE = {"README.md"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("push") / "pair.zarr")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "BATCH_FILES", 10)


def send(store: Store, url: str) -> bool:
    return push(store, url, None, Log(quiet=True))


def pushed(hub: Hub) -> Tree:
    return {name: data for name, data in hub.repositories[NAME].items() if name not in BESIDE}


@pytest.mark.parametrize("large", [100, 10**9])
def test_what_is_pushed_can_be_pulled(hub: Hub, store: Store, tmp_path: Path, large: int) -> None:
    """Large files by LFS, small ones inside of the commit."""
    hub.large = large
    assert send(store, URL)
    assert pushed(hub) == tree(store.path)
    assert tree(stage(URL, tmp_path / "here", quiet=True)) == tree(store.path)
    assert bool(hub.uploaded) == (large == 100)
    card = hub.repositories[NAME]["README.md"].decode()
    assert "| a | " in card and f"harvest pull {URL}" in card and store.header.id in card


def test_it_is_sealed_last_and_every_unit_comes_whole(hub: Hub, store: Store, small_parts: None) -> None:
    send(store, URL)
    seen: set[str] = set()
    for files in hub.commits.values():
        assert "sealed" not in seen
        for unit in store.units:
            receipt = f"receipts/{unit[0]:05d}.{unit[1]}.json"
            source = unit[1].removeprefix("model_")
            assert (receipt in files) == (f"activations/{source}/c/{unit[0]}/0" in files)
        seen |= set(files)
    assert "sealed" in seen and len(hub.messages) > 3
    assert hub.messages[0].startswith("Add part 1 of ") and hub.messages[-1].startswith("Seal store ")


def test_a_push_that_was_stopped_goes_on(hub: Hub, store: Store, small_parts: None, tmp_path: Path) -> None:
    hub.large, hub.refused = 100, 2
    with pytest.raises(RemoteError, match=r"^the hub refuses: .*HF_TOKEN") as error:
        send(store, URL)
    assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="not finished"):
        stage(URL, tmp_path / "here", quiet=True)
    there = set(hub.repositories[NAME])
    hub.refused = 10**9
    committed = len(hub.messages)
    assert send(store, URL) and pushed(hub) == tree(store.path)
    later = [name for name in tree(store.path) if name not in there]
    assert 0 < len(later) < len(tree(store.path)) and len(hub.messages) > committed
    assert "README.md" in there and hub.messages[-1].startswith("Seal store ")
    whole, commits = len(hub.uploaded), len(hub.messages)
    assert not send(store, URL)  # it is there
    assert (whole, commits) == (len(hub.uploaded), len(hub.messages))


def test_a_large_file_that_is_not_taken_is_one_line(hub: Hub, store: Store) -> None:
    hub.large, hub.full = 100, True
    with pytest.raises(RemoteError, match="the hub does not answer") as error:
        send(store, URL)
    assert "\n" not in str(error.value)
    assert hub.repositories[NAME] == {}


def test_only_what_is_missing_or_of_another_size_is_sent_again(hub: Hub, store: Store) -> None:
    send(store, URL)
    files = hub.repositories[NAME]
    del files["sealed"], files["README.md"], files["receipts/00001.model_b.json"]
    files["norms/a/c/0"] = b"short"
    files["receipts/00002.model_a.json"] = bytes(len(files["receipts/00002.model_a.json"]))
    before = dict(files)
    sent: list[str] = []
    genuine = Repository.send

    def watched(there: Repository, batch: Mapping[str, Path | bytes], *given: Any) -> None:
        sent.extend(batch)
        genuine(there, batch, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Repository, "send", watched)
        assert send(store, URL)
    assert pushed(hub) == tree(store.path)
    units = {(0, "a"), (1, "b"), (2, "a")}
    assert {name for name in sent if name.startswith("activations/")} == {f"activations/{s}/c/{n}/0" for n, s in units}
    assert "zarr.json" not in sent and "README.md" in sent and before["zarr.json"] == files["zarr.json"]


def test_all_files_are_sent_again_where_that_is_asked_for(hub: Hub, store: Store) -> None:
    send(store, URL)
    files, shard = hub.repositories[NAME], "activations/a/c/1/0"
    files[shard], files["README.md"] = bytes(len(files[shard])), b"mine"
    assert not send(store, URL)
    assert push(store, URL, None, Log(quiet=True), again=True)
    assert pushed(hub) == tree(store.path) and hub.repositories[NAME]["README.md"] == b"mine"


def test_another_store_or_anything_else_there_is_left_alone(hub: Hub, store: Store, tmp_path: Path) -> None:
    send(store, URL)
    before = dict(hub.repositories[NAME])
    with pytest.raises(StoreMismatchError, match="another store"):
        send(make_store(tmp_path / "other.zarr", rows=64), URL)
    assert hub.repositories[NAME] == before
    hub.repositories["datasets/org/used"] = {".gitattributes": b"", "README.md": b"mine", "data.parquet": b"x"}
    with pytest.raises(StoreError, match=r"in use.*data\.parquet"):
        send(store, "hf://datasets/org/used")
    assert send(store, "hf://datasets/org/used/below")
    assert hub.repositories["datasets/org/used"]["README.md"] == b"mine"


def test_a_card_that_is_there_is_kept(hub: Hub, store: Store) -> None:
    hub.repositories[NAME] = {".gitattributes": b"", "README.md": b"mine"}
    send(store, URL)
    assert hub.repositories[NAME]["README.md"] == b"mine"


def test_a_damaged_store_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "pair.zarr")
    shard = damaged.path / "activations/a/c/1/0"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(StoreDamagedError, match="harvest repair"):
        send(damaged, URL)
    assert hub.repositories == {NAME: {}}


def test_a_revision_is_not_written_to(hub: Hub, store: Store) -> None:
    with pytest.raises(RemoteError, match="main branch"):
        send(store, f"{URL}@v1")
    assert hub.calls == []


def test_an_object_store_takes_it_too(bucket: Bucket, store: Store, tmp_path: Path) -> None:
    with bucket.requests() as asked:
        assert send(store, bucket.url)
    assert bucket.tree() == tree(store.path)
    put = [line.removeprefix("PUT ") for line in asked if line.startswith("PUT ")]
    assert put[-1] == "sealed" and "README.md" not in put
    for unit in store.units:
        receipt, source = f"receipts/{unit[0]:05d}.{unit[1]}.json", unit[1].removeprefix("model_")
        assert put.index(receipt) > put.index(f"activations/{source}/c/{unit[0]}/0")
    assert not send(store, bucket.url)
    assert tree(stage(bucket.url, tmp_path / "here", quiet=True)) == tree(store.path)


# --- the command ----------------------------------------------------------------------------------------------------


def test_push_status_verify_and_pull_take_a_repository(
    harvest: Harvest, hub: Hub, store: Store, tmp_path: Path
) -> None:
    done = harvest("push", store.path, URL, "--private", "--json")
    assert (done.code, done.json) == (0, {"url": URL, "id": store.header.id, "sent": True}), done.err
    assert hub.private == {NAME: True}
    assert harvest("push", store.path, URL).out == f"{URL}: the store was there already\n"
    assert harvest("status", URL, "--json").json["state"] == "finished"
    assert harvest("verify", URL, "--full").out == f"{URL}: sound (receipts, sizes and checksums)\n"
    done = harvest("pull", URL, "--stage", tmp_path)
    assert done.code == 0 and tree(Path(done.out.strip())) == tree(store.path)
    shard = "activations/a/c/1/0"
    hub.repositories[NAME][shard] = bytes(len(hub.repositories[NAME][shard]))
    assert harvest("verify", URL).code == 0
    done = harvest("verify", URL, "--full")
    assert (done.code, done.out) == (1, f"{shard} has another checksum (shard 1 of model_a)\n")
    assert_one_line(harvest("repair", URL, "--full"), 1, f"error: a harvest is not written to the hub: {URL}. ")


def test_mistakes_are_one_line(harvest: Harvest, hub: Hub, store: Store, tmp_path: Path) -> None:
    assert_one_line(harvest("push", store.path, "org/pair"), 2, "error: this is no URL: org/pair. Example: s3://")
    assert_one_line(harvest("push", store.path, "hf://org/pair"), 1, "error: cannot use this URL: hf://org/pair. ")
    assert_one_line(harvest("push", URL, URL), 2, "error: a path on this machine is needed here, not a URL: ")
    assert_one_line(harvest("push", tmp_path, URL), 1, f"error: no Granary store here: {tmp_path}. ")
    assert_one_line(harvest("pull", URL), 1, "error: no such dataset repository, or no right to read it: ")
    hub.repositories[NAME] = {"README.md": b""}
    assert_one_line(harvest("pull", URL), 1, f"error: no Granary store here: {URL}. ")
    assert hub.repositories == {NAME: {"README.md": b""}}
