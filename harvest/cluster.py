"""Units on the workers of dask.distributed: the only file that knows it. A task is a unit, its result a receipt."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from distributed import Client, Future, LocalCluster, as_completed, get_worker
from distributed.scheduler import KilledWorker

from harvest.bench import Bench
from harvest.work import Crew, Receipt, Tick
from harvest.worker import Scale, Worker
from shared.device import torch_threads
from shared.errors import ClusterError
from shared.layout import Unit
from shared.log import Log
from shared.store import Store

TIMEOUT_S = 30  # for a scheduler to answer


class Cluster(Crew):
    """The workers of a dask cluster. A model is loaded once per worker; a lost worker costs its unit alone."""

    def __init__(self, client: Client, bench: Bench) -> None:
        self._client, self._bench = client, bench

    def scale(self, store: Store) -> Scale:
        found: Scale = self._client.submit(_scale, store.path.absolute(), self._bench, pure=False).result()
        return found

    @property
    def ahead(self) -> int:
        """Two units to a worker: it has the next one when it has made one, and none goes far ahead of the receipts."""
        return 2 * max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def make(self, store: Store, units: Sequence[Unit], tick: Tick) -> Iterator[Receipt]:
        path, left, taken = store.path.absolute(), iter(units), 0
        futures: list[Future] = []
        done = as_completed(loop=self._client.loop)

        def submit() -> None:
            for unit in islice(left, max(0, self.ahead - (len(futures) - taken))):
                futures.append(self._client.submit(_unit, unit, path, self._bench, pure=False))
                done.add(futures[-1])

        try:
            submit()
            for future in done:
                receipt: dict[str, Any] = future.result()
                taken += 1
                tick(len(store.rows_of(receipt["shard"])))
                yield receipt
                submit()
        except KilledWorker as error:
            way_out = "Look at its memory: lower batch.tokens or store.shard_bytes"
            raise ClusterError("a unit has killed every worker that tried it", error.last_worker, way_out) from None
        finally:
            self._client.cancel(futures)


@contextmanager
def local(workers: int, bench: Bench, log: Log) -> Iterator[Cluster]:
    """So many processes on this machine: one per GPU, or with `bench.threads` each (none: the cores shared out)."""
    threads = bench.threads or max(1, torch.get_num_threads() // workers)
    with (
        tempfile.TemporaryDirectory(prefix="granary-") as scratch,
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, local_directory=scratch,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        log.event("cluster", f"{workers} workers with {threads} torch threads each: {client.dashboard_link}")
        yield Cluster(client, replace(bench, threads=threads))


@contextmanager
def remote(address: str, bench: Bench, log: Log) -> Iterator[Cluster]:
    """The workers of a scheduler that runs already; they must see the store and the models under the same paths.

    Raises ClusterError where none answers.
    """
    try:
        # As the default it would stay so when nothing answers, and whoever uses dask next would wait for ever.
        client = Client(address, timeout=TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError("no scheduler answers", address, f"Start one: dask scheduler ({error})") from None
    with client:
        threads = bench.threads or torch.get_num_threads()
        count = len(client.scheduler_info(n_workers=-1)["workers"])
        log.event("cluster", f"{count} workers with {threads} torch threads each: {client.dashboard_link}")
        yield Cluster(client, replace(bench, threads=threads))


# --- on a worker ----------------------------------------------------------------------------------------------------


def _scale(path: Path, bench: Bench) -> Scale:
    with torch_threads(bench.threads):
        return _at(path, bench).scale()


def _unit(unit: Unit, path: Path, bench: Bench) -> dict[str, Any]:
    with torch_threads(bench.threads):
        worker = _at(path, bench)
        parts = worker.make(unit, lambda rows: None)
        return worker.store.put(*unit, parts, worker.made_with)


_worker: Worker | None = None  # of this process, with the model that it holds


def _at(path: Path, bench: Bench) -> Worker:
    global _worker
    store = Store.at(path)
    if _worker is None or _worker.store.path != path or _worker.store.header.id != store.header.id:
        _worker = Worker(store, replace(bench, device=_device(bench.device)), Log(quiet=True))
    _worker.store = store
    return _worker


def _device(name: str) -> str:
    """A GPU of its own for each worker of this machine."""
    place = get_worker().name
    if name in ("auto", "cuda") and torch.cuda.device_count() > 1 and isinstance(place, int):
        return f"cuda:{place % torch.cuda.device_count()}"
    return name
