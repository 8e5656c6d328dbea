"""A store at a URL is copied whole, checked and resumed; what is wrong there or on the way is one line."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from shared import files, remote
from shared.errors import ConfigError, RemoteError, SpaceError, StoreDamagedError, StoreError, StoreUnfinishedError
from shared.remote import Remote, name_of, place, stage
from shared.store import Store
from tests.build import make_store
from tests.s3 import Bucket

Tree = dict[str, bytes]
SHARD = "activations/a/c/1/0"


def tree(path: Path) -> Tree:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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


class Quiet(SimpleHTTPRequestHandler):
    """The files of a folder."""

    def log_message(self, *given: Any) -> None:
        return


class Denying(Quiet):
    """Lets nobody in."""

    def do_GET(self) -> None:
        self.send_error(403)


@contextmanager
def serving(handler: Callable[..., Quiet]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# --- a copy ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_called_what_its_url_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of(place("s3://bucket/caches/pair.zarr/", tmp_path)) == "pair"
    assert name_of(Path("here/pair.zarr")) == "pair" and name_of(Path("pair.v2")) == "pair.v2"
    assert name_of(Path("pair-0123456789ab.zarr")) == "pair-0123456789ab"
    (tmp_path / "some.zarr").mkdir()
    monkeypatch.chdir(tmp_path / "some.zarr")
    assert name_of(Path()) == "some"


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
    genuine, calls = Remote._piece, []

    def piece(self: Remote, name: str, *given: int) -> bytes:
        calls.append(name)
        if len(calls) > 30:
            raise RemoteError("the network has gone", name, "Wait")
        return genuine(self, name, *given)

    with monkeypatch.context() as patched, pytest.raises(RemoteError, match="the network has gone"):
        patched.setattr(Remote, "_piece", piece)
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
    genuine, harmed = Remote._piece, []

    def piece(self: Remote, name: str, *given: int) -> bytes:
        data = genuine(self, name, *given)
        if name == SHARD and not harmed:
            harmed.append(name)
            return bytes(len(data))
        return data

    monkeypatch.setattr(Remote, "_piece", piece)
    assert tree(stage(full.url, quiet=True)) == tree(store.path)
    assert harmed


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_names_that_lead_out_of_the_store_are_refused(full: Bucket, name: str, tmp_path: Path) -> None:
    sealed = json.loads(full.read("sealed"))
    sealed["files"][name] = sealed["files"].pop(SHARD)
    full.write("sealed", json.dumps(sealed).encode())
    with pytest.raises(StoreDamagedError, match="cannot be read: sealed"):
        stage(full.url, tmp_path / "here", quiet=True)
    with pytest.raises(StoreDamagedError, match="leads out of the store"):
        remote.fetch(Remote(full.url), tmp_path / "here", {name: (1, 1)}, "staging", quiet=True)
    assert not list(tmp_path.rglob("outside"))


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


# --- one line -------------------------------------------------------------------------------------------------------


def test_no_such_bucket(bucket: Bucket) -> None:
    with pytest.raises(RemoteError, match=r"^no such bucket: s3://no-such-bucket/x/sealed\. ") as error:
        stage("s3://no-such-bucket/x", quiet=True)
    one_line(error)
    with pytest.raises(RemoteError, match=r"^no such bucket: s3://no-such-bucket/x\. "):
        Remote("s3://no-such-bucket/x").sizes()


def test_no_server(bucket: Bucket, away: None) -> None:
    with pytest.raises(RemoteError, match="does not answer") as error:
        stage(bucket.url, quiet=True)
    assert one_line(error).startswith(f"this URL does not answer: {bucket.url}/sealed. Check the network")


def test_no_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match=r"^no credentials for this URL: .* Set AWS_ACCESS_KEY_ID") as error:
        stage(bucket.url, quiet=True)
    one_line(error)


def test_access_denied(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Denying) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT", endpoint)
        with pytest.raises(RemoteError, match=r"^access is denied: .* Check AWS_ACCESS_KEY_ID") as error:
            stage(bucket.url, quiet=True)
        one_line(error)


@pytest.mark.parametrize("url", ["foo://bucket/x", "s3://", "://", "https://"])
def test_what_is_no_url_of_a_store(url: str) -> None:
    with pytest.raises(RemoteError, match=r"^cannot use this URL") as error:
        Remote(url)
    one_line(error)


@pytest.mark.parametrize("url", ["https://host/x.zarr", "http://host/x.zarr", "memory:///x.zarr"])
def test_what_cannot_be_written_to(url: str) -> None:
    with pytest.raises(RemoteError, match="cannot be written to"):
        remote.destination(url)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(RemoteError, match=r"pip install 'granary-sae\[s3\]'"):
        stage("s3://bucket/pair.zarr")


def test_a_url_is_no_path(bucket: Bucket) -> None:
    with pytest.raises(StoreError, match=r"train\.stage"):
        Store.open(bucket.url)
    with pytest.raises(ConfigError, match="not a URL"):
        remote.local(bucket.url, "Give a folder")
    assert remote.local("a/b", "Give a folder") == Path("a/b")


# --- conditional writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_an_object_is_created_once_and_replaced_only_as_it_was_known(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    there = remote.destination(bucket.url if kind == "s3" else f"file://{tmp_path}/new/x.zarr")
    assert there.read("a/b") is None
    assert there.create("a/b", b"one") and not there.create("a/b", b"two")
    assert not there.replace("a/b", b"two", b"three") and there.read("a/b") == b"one"
    assert there.replace("a/b", b"one", b"four") and there.read("a/b") == b"four"
    assert there.sizes() == {"a/b": 4}
    there.delete(["a/b", "nothing"])
    assert there.sizes() == {}


def test_of_two_that_replace_at_once_one_loses(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Remote(bucket.url)
    there.put("x", b"old")
    genuine = there._ob.get

    def get(*given: Any, **options: Any) -> Any:
        found = genuine(*given, **options)
        bucket.write("x", b"faster")
        return found

    monkeypatch.setattr(there._ob, "get", get)
    assert not there.replace("x", b"old", b"slower")
    monkeypatch.undo()
    assert bucket.read("x") == b"faster"
