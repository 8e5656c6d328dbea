"""Stores in an object store, such as s3://bucket/pair.zarr.

Only this file knows obstore, which takes credentials from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared import remote
from shared.errors import RemoteError
from shared.remote import CONNECTIONS, RECEIPTS, Remote, Several, Tick

PART = 5 * 2**20  # bytes of one request that writes; S3 takes no smaller ones and 10,000 of them
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your cloud has instead) in the environment"
METADATA = "/latest/api/token"  # where obstore looks for credentials when the environment has none


def prepare(url: str) -> None:
    """Have the folder of a file:// URL. Raises RemoteError where nothing can be written."""
    if url.startswith(("http:", "https:", "memory:")):
        raise RemoteError("a store cannot be written to this URL", url, "Give one such as s3://bucket/pair.zarr")
    if url.startswith("file:"):
        Path(url.removeprefix("file://")).mkdir(parents=True, exist_ok=True)


class Objects(Remote):
    """The objects below a URL.

    A piece is one request, which a slow line must move within obstore's 30 s (AWS_TIMEOUT=2m: longer). Requests that
    fail are tried again for three minutes.
    """

    def __init__(self, url: str, tries: int | None = None) -> None:
        """`tries`: of each request; none: as obstore does. Nothing is asked of the network yet."""
        super().__init__(url)
        options: dict[str, Any] = {} if tries is None else {"retry_config": {"max_retries": tries}}
        if url.startswith("http:"):
            options["client_options"] = {"allow_http": True}
        try:
            import obstore
            from obstore import exceptions
        except ModuleNotFoundError:
            way_out = "Install it: pip install 'granary-sae[s3]'"
            raise RemoteError("a store at a URL needs the package obstore", url, way_out) from None
        self._ob, self._exceptions = obstore, exceptions
        try:
            self._store = obstore.store.from_url(self.url, **({} if url.startswith("file:") else options))
        except (exceptions.BaseError, ValueError, OSError) as error:
            way_out = f"Give one such as s3://bucket/pair.zarr ({_first(error)})"
            raise RemoteError("cannot use this URL", url, way_out) from None

    def read(self, name: str) -> bytes | None:
        with self._explained(name):
            try:
                return bytes(self._ob.get(self._store, name).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def sizes(self) -> dict[str, int]:
        with self._explained(""):
            return {one["path"]: one["size"] for page in self._ob.list(self._store) for one in page}

    def send(self, batch: Mapping[str, Path | bytes], message: str, tick: Tick = int) -> None:
        """Files first, then the receipts that name them."""
        receipts = [name for name in batch if name.startswith(RECEIPTS)]
        with Several(tick) as run:
            for names in ([name for name in batch if name not in receipts], receipts):
                run.all(lambda tick, name: self._send(name, batch[name], tick), names)

    def _send(self, name: str, data: Path | bytes, tick: Tick) -> None:
        self.put(name, data)
        tick(len(data) if isinstance(data, bytes) else data.stat().st_size)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, whole or not at all. A file goes in pieces, several at a time."""
        with self._explained(name):
            self._ob.put(self._store, name, data, chunk_size=PART, max_concurrency=CONNECTIONS)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; whether it was written."""
        with self._explained(name):
            try:
                self._ob.put(self._store, name, data, mode="create")
            except self._exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Write an object if it still is `old`; whether it was. (file:// cannot make sure, and just writes.)"""
        with self._explained(name):
            found = self._ob.get(self._store, name)
            if bytes(found.bytes()) != old:
                return False
            version: Any = {key: found.meta.get(key) for key in ("e_tag", "version") if found.meta.get(key)}
            try:
                self._ob.put(self._store, name, new, mode=version)
            except self._exceptions.PreconditionError:
                return False
            except NotImplementedError:
                self._ob.put(self._store, name, new)
            return True

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._explained(name):
                try:
                    self._ob.delete(self._store, name)
                except FileNotFoundError:
                    continue

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, remote.PIECE):
            yield self._piece(name, start, min(start + remote.PIECE, size), size)

    def _piece(self, name: str, start: int, stop: int, size: int) -> bytes:
        with self._explained(name):
            try:
                whole = stop - start == size
                found = self._ob.get(self._store, name, options=None if whole else {"range": (start, stop)})
            except FileNotFoundError:
                raise self.damaged(name, "is missing") from None
            if found.meta["size"] != size:
                raise self.damaged(name, f"has {found.meta['size']} bytes, not {size}")
            return bytes(found.bytes())

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """What obstore raises, in one line."""
        try:
            yield
        except (self._exceptions.BaseError, OSError, NotImplementedError) as error:
            denied = isinstance(error, PermissionError | self._exceptions.UnauthenticatedError)
            where, reason = f"{self.url}/{name}" if name else self.url, _first(error)
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                what, way_out = "no such bucket", "Check the URL, or create the bucket"
            elif METADATA in str(error):
                what, way_out = "no credentials for this URL", f"Set {KEYS}, or AWS_SKIP_SIGNATURE=true if it is public"
            elif denied or " 403 " in reason:
                what, way_out = "access is denied", f"Check {KEYS} ({reason})"
            else:
                what, way_out = (
                    "this URL does not answer",
                    f"Check the network and AWS_ENDPOINT, and try again ({reason})",
                )
            raise RemoteError(what, where, way_out) from None


def _first(error: BaseException) -> str:
    """The reason in what obstore says: it tells the request, the reply's body and its own sources too."""
    line = str(error).partition("\n")[0]
    return line.rpartition(" - ")[2].partition("<?xml")[0].strip(" :")
