"""Stores in dataset repositories of the HuggingFace hub: hf://datasets/ORG/NAME[@REVISION][/FOLDER].

huggingface_hub does it, with its token (HF_TOKEN, or hf auth login), its endpoint and its cache of neither.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from shared import remote
from shared.errors import RemoteError
from shared.remote import Remote, Tick

FORM = re.compile(
    r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<below>.+))?"
)
TOKEN = "Check the name; of a private one the token (HF_TOKEN, or hf auth login)"


class Repository(Remote):
    """Reads one commit of the repository: that which the revision named first."""

    way_out: ClassVar[str] = "Who has the store: harvest push STORE {url} --again"

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        super().__init__(url)
        found = FORM.fullmatch(self.url)
        if found is None:
            raise RemoteError("cannot use this URL", url, "Give one such as hf://datasets/ORG/NAME")
        self.name = found["name"]
        self._below = f"{found['below']}/" if found["below"] else ""
        self._revision = unquote(found["revision"]) if found["revision"] else None
        self._hub, self._files = HfApi(), HfFileSystem(skip_instance_cache=True)

    @cached_property
    def _commit(self) -> str:
        return str(self._hub.dataset_info(self.name, revision=self._revision).sha)

    def read(self, name: str) -> bytes | None:
        from huggingface_hub.errors import EntryNotFoundError

        with self._explained(name):
            try:
                with self._open(name) as file:
                    return bytes(file.read())
            except (EntryNotFoundError, FileNotFoundError):
                return None

    def sizes(self) -> dict[str, int]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._explained(""):
            below = self._below.rstrip("/") or None
            tree = self._hub.list_repo_tree(
                self.name, below, recursive=True, revision=self._commit, repo_type="dataset"
            )
            try:
                return {one.path.removeprefix(self._below): one.size for one in tree if isinstance(one, RepoFile)}
            except EntryNotFoundError:
                return {}

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        from huggingface_hub.errors import EntryNotFoundError

        done = 0
        with self._explained(name):
            try:
                with self._open(name) as file:
                    while done <= size and (piece := file.read(remote.PIECE)):
                        done += len(piece)
                        yield piece
            except (EntryNotFoundError, FileNotFoundError):
                raise self.damaged(name, "is missing") from None
        if done != size:
            raise self.damaged(name, f"has {'more than ' if done > size else ''}{min(done, size)} bytes, not {size}")

    def make(self, private: bool | None) -> None:
        """Have the repository. Raises RemoteError where it cannot be written."""
        if self._revision is not None:
            raise RemoteError("a store is written to the main branch", self.url, "Leave out the revision")
        with self._explained(""):
            self._hub.create_repo(self.name, repo_type="dataset", private=private, exist_ok=True)

    def send(self, batch: Mapping[str, Path | bytes], message: str, tick: Tick = int) -> None:
        """One commit."""
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(self._below + name, data) for name, data in batch.items()]
        with self._explained(""), _without_bars():
            self._hub.create_commit(self.name, added, commit_message=message, repo_type="dataset")
        tick(sum(one.upload_info.size for one in added))

    def _open(self, name: str) -> Any:
        path = f"datasets/{self.name}/{self._below}{name}"
        return self._files.open(path, "rb", block_size=0, revision=self._commit)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """What huggingface_hub and its HTTP library (httpx, from version 2 on httpx2) raise, in one line."""
        from huggingface_hub.errors import (
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import get_session

        http = sys.modules[type(get_session()).__module__.partition(".")[0]]
        try:
            yield
        except RepositoryNotFoundError:
            raise RemoteError("no such dataset repository, or no right to read it", self.url, TOKEN) from None
        except RevisionNotFoundError:
            raise RemoteError(
                "no such revision of this repository", self.url, "Give one that it has, or none"
            ) from None
        except (HfHubHTTPError, OSError, http.HTTPError, ValueError, RuntimeError) as error:
            told = error.server_message if isinstance(error, HfHubHTTPError) else None
            reason = (told or str(error)).strip().partition("\n")[0]
            denied = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            what = "the hub refuses" if denied else "the hub does not answer"
            way_out = f"{TOKEN} ({reason})" if denied else f"Check the network, and try again ({reason})"
            raise RemoteError(what, f"{self.url}/{name}" if name else self.url, way_out) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Of huggingface_hub: one for every file."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
