"""A real S3 server (moto) as a process of its own on loopback, and buckets of it as tests see them."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import S3Store


@dataclass(frozen=True)
class Bucket:
    """A bucket; `url` is that of a store in it."""

    name: str
    endpoint: str
    log: Path  # of the server: a line for every request

    @property
    def url(self) -> str:
        return f"s3://{self.name}/some/pair.zarr"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT": self.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any",
        }  # fmt: skip

    @property
    def _store(self) -> S3Store:
        return S3Store(
            self.name, endpoint=self.endpoint, region="us-east-1", access_key_id="any", secret_access_key="any",
            client_options={"allow_http": True},
        )  # fmt: skip

    def names(self) -> list[str]:
        """Of every object of the bucket, below the store's URL or not."""
        return sorted(one["path"].removeprefix("some/pair.zarr/") for page in obstore.list(self._store) for one in page)

    def tree(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names()}

    def read(self, name: str) -> bytes:
        return bytes(obstore.get(self._store, f"some/pair.zarr/{name}").bytes())

    def write(self, name: str, data: bytes) -> None:
        obstore.put(self._store, f"some/pair.zarr/{name}", data)

    def fill(self, tree: Mapping[str, bytes]) -> None:
        for name, data in tree.items():
            self.write(name, data)

    def delete(self, *names: str) -> None:
        for name in names:
            obstore.delete(self._store, f"some/pair.zarr/{name}")

    @contextmanager
    def requests(self) -> Iterator[list[str]]:
        """What the server is asked for meanwhile, as `GET name`; whole when the block has ended."""
        asked: list[str] = []
        before = len(self._lines())
        yield asked
        asked += self._lines()[before:]

    def _lines(self) -> list[str]:
        found = re.findall(rf"(GET|PUT|HEAD|DELETE|POST) /{self.name}/some/pair\.zarr/(\S*) HTTP", self.log.read_text())
        return [f"{verb} {name}" for verb, name in found]


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, Path]]:
    """The endpoint of a server that ends with the block, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, endpoint = folder / "server.log", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ}) as process:
        try:
            for _ in range(600):
                with suppress(OSError), urllib.request.urlopen(f"{endpoint}/moto-api/"):
                    break
                time.sleep(0.1)
            yield endpoint, log
        finally:
            process.kill()


def make_bucket(name: str, endpoint: str, log: Path) -> Bucket:
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return Bucket(name, endpoint, log)
