"""A store at a URL is copied whole, checked and resumed; what is wrong there or on the way is one line."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared import files, remote, staging
from shared.errors import RemoteError, SpaceError, StoreDamagedError, StoreError, StoreUnfinishedError
from shared.objects import Objects
from shared.remote import place
from shared.staging import stage
from shared.store import Store
from tests.build import make_store, tree
from tests.s3 import Bucket
from tests.web import Quiet, serving

SHARD = "activations/a/c/1/0"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("remote") / "pair.zarr")


@pytest.fixture
def full(bucket: Bucket, store: Store) -> Bucket:
    """A bucket with a finished store."""
    bucket.fill(tree(store.path))
    return bucket


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server."""
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- a copy ---------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_bytes_of_the_store_and_can_be_opened(full: Bucket, store: Store, tmp_path: Path) -> None:
    path = stage(full.url, tmp_path / "here", quiet=True)
    assert path == place(full.url, tmp_path / "here")
    assert tree(path) == tree(store.path)
    assert Store.open(path).read(0, 5)["a"].equal(store.read(0, 5)["a"])


def test_a_copy_lies_in_the_users_cache_under_the_name_and_a_hash_of_the_url(full: Bucket, tmp_path: Path) -> None:
    path = stage(f"{full.url}/", quiet=True)
    assert path.parent == tmp_path / "cache" / "stores"
    assert path.name.startswith("pair.zarr-") and path == place(full.url, path.parent)
    assert path != place(full.url.replace("some", "other"), path.parent)


def test_a_whole_copy_is_used_after_one_look_at_sealed(full: Bucket) -> None:
    path = stage(full.url, quiet=True)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with full.requests() as asked:
        assert stage(full.url, quiet=True) == path
    assert set(asked) == {"GET sealed"}
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_large_files_arrive_in_pieces(full: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "moments/a/c/1/0/0"
    monkeypatch.setattr(remote, "PIECE", (store.path / name).stat().st_size // 3 - 1)
    with full.requests() as asked:
        assert tree(stage(full.url, quiet=True)) == tree(store.path)
    assert asked.count(f"GET {name}") == 4 and asked.count(f"GET {SHARD}") == 1


def test_without_a_network_a_whole_copy_is_used_and_it_is_said_that_it_was_not_compared(
    full: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stage(full.url, quiet=True)
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    assert stage(full.url) == path
    said = capsys.readouterr().err
    assert f"using the copy in {path}; whether it is still the same at the URL is not known" in said
    assert len(said.splitlines()) == 1


def test_without_a_network_half_a_copy_is_not_used(full: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stage(full.url, quiet=True)
    (path / SHARD).unlink()
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match="does not answer"):
        stage(full.url, quiet=True)


def test_an_interrupted_copy_fetches_only_what_is_missing_or_wrong(full: Bucket, store: Store) -> None:
    path = stage(full.url, quiet=True)
    (path / "sealed").unlink()
    (path / SHARD).unlink()
    short, wrong, receipt = path / "norms/a/c/0", path / "rows/document/c/2", path / "receipts/00001.model_a.json"
    short.write_bytes(short.read_bytes()[:-1])
    wrong.write_bytes(bytes(wrong.stat().st_size))
    receipt.write_text("{}")
    with full.requests() as asked:
        assert stage(full.url, quiet=True) == path
    fetched = {"norms/a/c/0", "rows/document/c/2", "receipts/00001.model_a.json", SHARD, "sealed"}
    assert set(asked) == {f"GET {name}" for name in fetched}
    assert tree(path) == tree(store.path)


def test_a_copy_that_breaks_off_leaves_whole_files_only_and_goes_on(
    full: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, calls = Objects._piece, []

    def piece(self: Objects, name: str, *given: int) -> bytes:
        calls.append(name)
        if len(calls) > 30:
            raise RemoteError("the network has gone", name, "Wait")
        return genuine(self, name, *given)

    with monkeypatch.context() as patched, pytest.raises(RemoteError, match="the network has gone"):
        patched.setattr(Objects, "_piece", piece)
        stage(full.url, quiet=True)
    expected, found = tree(store.path), tree(place(full.url, files.cache_folder() / "stores"))
    assert found.items() < expected.items() and "sealed" not in found
    assert 20 <= len([name for name in found if "receipts" not in name]) <= 30
    with full.requests() as asked:
        assert tree(stage(full.url, quiet=True)) == expected
    assert set(asked) == {f"GET {name}" for name in expected if name not in found}


def test_another_store_at_the_url_replaces_the_copy(full: Bucket, store: Store, tmp_path: Path) -> None:
    path = stage(full.url, quiet=True)
    other = make_store(tmp_path / "other.zarr", rows=50, sources={"z": 4})
    full.delete(*full.names())
    full.fill(tree(other.path))
    assert stage(full.url, quiet=True) == path
    assert tree(path) == tree(other.path)


def test_a_copy_can_be_made_from_a_folder_or_a_web_server(store: Store, tmp_path: Path) -> None:
    with serving(partial(Quiet, directory=str(store.path))) as endpoint:
        for url in (f"file://{store.path}", f"{endpoint}/"):
            assert tree(stage(url, tmp_path, quiet=True)) == tree(store.path)


# --- what is wrong at the URL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, "rows/document/c/0", "receipts/00000.model_a.json", "norms/a/zarr.json"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: None, "is missing"),
        (lambda data: data[:-1], "bytes, not|another checksum"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "another checksum"),
    ],
    ids=["missing", "truncated", "flipped"],
)
def test_a_damaged_object_is_found_and_named(full: Bucket, name: str, harm: Any, said: str) -> None:
    data = harm(full.read(name))
    full.delete(name) if data is None else full.write(name, data)
    with pytest.raises(StoreDamagedError, match=said) as error:
        stage(full.url, quiet=True)
    assert name in one_line(error) and f"harvest repair {full.url}" in one_line(error)
    path = place(full.url, files.cache_folder() / "stores")
    assert not (path / "sealed").exists() and not (path / name).exists()
    assert not list(path.rglob("*.partial"))


def test_a_checksum_that_is_wrong_once_was_an_error_of_the_way(
    full: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, harmed = Objects._piece, []

    def piece(self: Objects, name: str, *given: int) -> bytes:
        data = genuine(self, name, *given)
        if name == SHARD and not harmed:
            harmed.append(name)
            return bytes(len(data))
        return data

    monkeypatch.setattr(Objects, "_piece", piece)
    assert tree(stage(full.url, quiet=True)) == tree(store.path)
    assert harmed


def test_a_store_that_is_not_finished_or_not_there_is_not_copied(full: Bucket, tmp_path: Path) -> None:
    full.delete("sealed")
    with pytest.raises(StoreUnfinishedError, match="not finished"):
        stage(full.url, quiet=True)
    with pytest.raises(StoreError, match="no Granary store here"):
        stage(f"{full.url}/nothing", quiet=True)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_known_before_anything_is_fetched(
    full: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with full.requests() as asked, pytest.raises(SpaceError, match="--stage"):
        stage(full.url, quiet=True)
    assert set(asked) == {"GET sealed"}


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_names_that_lead_out_of_the_store_are_refused(full: Bucket, name: str, tmp_path: Path) -> None:
    sealed = json.loads(full.read("sealed"))
    sealed["files"][name] = sealed["files"].pop(SHARD)
    full.write("sealed", json.dumps(sealed).encode())
    with pytest.raises(StoreDamagedError, match="cannot be read: sealed"):
        stage(full.url, tmp_path / "here", quiet=True)
    with pytest.raises(StoreDamagedError, match="leads out of the store"):
        remote.fetch(Objects(full.url), tmp_path / "here", {name: (1, 1)}, "staging", quiet=True)
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("url", ["https://host/x.zarr", "http://host/x.zarr", "memory:///x.zarr"])
def test_what_cannot_be_written_to(url: str) -> None:
    with pytest.raises(RemoteError, match="cannot be written to"):
        staging.destination(url)
