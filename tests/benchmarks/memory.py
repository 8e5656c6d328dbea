"""The memory of a harvest while the corpus and the rows grow, and the shards do not.

python -m tests.benchmarks.memory [rows]     (rows of the smallest; the others have 4 and 16 times as many)

Each is planned in one process and made in another, which resumes it: what planning has left to the first would hide
what units take. Anonymous memory is what a process holds; the pages of files are the kernel's to take back.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harvest import destination, planner, work
from harvest.bench import Bench
from harvest.config import HarvestConfig
from harvest.job import prepare
from shared.log import Log
from shared.store import Store
from tests.benchmarks.pairs import machine
from tests.tiny import byte_level, save_model

TIMES = (1, 4, 16)
SHARD_BYTES, WIDTH = 2**22, 128
PHASES = ("read the corpus", "plan", "make units")
POLL_S = 0.01


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_model(place / "model", "llama", byte_level(), width=WIDTH, layers=2, context=256)
        found = [measured(place, rows * times) for times in TIMES]
    print(f"{machine()}; shards of {SHARD_BYTES / 1e6:.1f} MB, rows of {2 * WIDTH} bytes\n")
    print(f"{'peak, MB':<24}" + "".join(f"{rows * times:>14,} rows" for times in TIMES) + f"{'bytes a row':>14}")
    for phase in PHASES:
        for kind in ("anonymous", "of files"):
            peaks = [one[phase][kind] for one in found]
            growth = (peaks[-1] - peaks[0]) / (rows * (TIMES[-1] - TIMES[0]))
            cells = "".join(f"{peak / 1e6:>19.1f}" for peak in peaks)
            print(f"{f'{phase}, {kind}':<24}{cells}{growth:>14.1f}")


def measured(place: Path, rows: int) -> dict[str, dict[str, int]]:
    corpus = place / f"{rows}.jsonl"
    corpus.write_text("".join(json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(texts(rows))))
    peaks: dict[str, dict[str, int]] = {}
    for phase in ("plan", "units"):
        command = [sys.executable, "-m", "tests.benchmarks.memory", phase, str(place), str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks |= json.loads(done.stdout.splitlines()[-1])
    corpus.unlink()
    return peaks


def texts(rows: int) -> Iterator[str]:
    """Python's help topics over and over, numbered, as long as there are at least so many tokens (of 4 letters)."""
    from pydoc_data import topics

    letters = number = 0
    while letters < 4 * rows:
        for name in sorted(topics.topics):
            number += 1
            yield f"{number}\n{topics.topics[name]}"
            letters += len(topics.topics[name])


def one(part: str, place: Path, rows: int) -> None:
    """Plan, or make the units of what was planned; print the peaks of what was done."""
    log, peaks = Log(quiet=True), {}
    config = HarvestConfig.model_validate(
        {
            "models": {"m": {"path": str(place / "model"), "sites": ["resid.0"]}},
            "corpus": {"path": str(place / f"{rows}.jsonl"), "id": "id"},
            "rows": {"count": rows, "context": 256},
            "batch": {"tokens": 4096},
            "store": {"path": str(place / f"{rows}.zarr"), "shard_bytes": SHARD_BYTES, "chunk_bytes": 2**18},
            "device": "cpu",
            "threads": 1,
        }
    )
    with watched() as peaks["read the corpus"]:
        job = prepare(config, log)
    if part == "plan":
        with watched() as peaks["plan"]:
            planner.place(planner.planned(job, log), job.path)
    else:
        crew = work.OneProcess(Bench(job.checkpoints, "cpu", 1), log)
        with watched() as peaks["make units"]:
            store = Store.at(job.path)
            work.finish(store.freeze(crew.scale(store)), crew, log, destination.Folder(job.path))
    print(json.dumps(peaks))


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest resident memory of this process while the block runs, by kind, in bytes."""
    peaks = {"anonymous": 0, "of files": 0}
    over = threading.Event()

    def look() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            for kind, field in (("anonymous", "RssAnon"), ("of files", "RssFile")):
                match = re.search(rf"{field}:\s+(\d+) kB", status)
                assert match
                peaks[kind] = max(peaks[kind], 1024 * int(match[1]))
            if over.wait(POLL_S):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    if sys.argv[1:2] in (["plan"], ["units"]):
        one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
