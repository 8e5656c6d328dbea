"""Objects are written whole and under conditions; what is wrong with an object store is one line."""

import sys
from pathlib import Path
from typing import Any

import pytest

from shared import staging
from shared.errors import RemoteError
from shared.objects import Objects
from shared.staging import stage
from tests.s3 import Bucket
from tests.web import Quiet, serving


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server."""
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


class Denying(Quiet):
    """Lets nobody in."""

    def do_GET(self) -> None:
        self.send_error(403)


# --- one line -------------------------------------------------------------------------------------------------------


def test_no_such_bucket(bucket: Bucket) -> None:
    with pytest.raises(RemoteError, match=r"^no such bucket: s3://no-such-bucket/x/sealed\. ") as error:
        stage("s3://no-such-bucket/x", quiet=True)
    one_line(error)
    with pytest.raises(RemoteError, match=r"^no such bucket: s3://no-such-bucket/x\. "):
        Objects("s3://no-such-bucket/x").sizes()


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
        Objects(url)
    one_line(error)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(RemoteError, match=r"pip install 'granary-sae\[s3\]'"):
        stage("s3://bucket/pair.zarr")


# --- conditional writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_an_object_is_created_once_and_replaced_only_as_it_was_known(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    there = staging.destination(bucket.url if kind == "s3" else f"file://{tmp_path}/new/x.zarr")
    assert there.read("a/b") is None
    assert there.create("a/b", b"one") and not there.create("a/b", b"two")
    assert not there.replace("a/b", b"two", b"three") and there.read("a/b") == b"one"
    assert there.replace("a/b", b"one", b"four") and there.read("a/b") == b"four"
    assert there.sizes() == {"a/b": 4}
    there.delete(["a/b", "nothing"])
    assert there.sizes() == {}


def test_of_two_that_replace_at_once_one_loses(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Objects(bucket.url)
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
