"""One stream of events: a JSONL file, and a console that is a view of it."""

import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed keeps it for good


class Log:
    """Appends one JSON object per event to `path` (none: nowhere) and echoes events that carry a `message`.

    The console is stderr, so that stdout holds results only.
    """

    def __init__(self, path: Path | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        self._files: list[TextIO] = []
        if path is not None:
            self.attach(path)

    def attach(self, path: Path) -> None:
        """Append all further events to `path`, too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(path.open("a", encoding="utf-8"))

    def event(self, kind: str, message: str = "", /, **fields: Any) -> None:
        if self._files:
            record = {
                "time": round(time.time(), 3),
                "event": kind,
                **({"message": message} if message else {}),
                **fields,
            }
            for file in self._files:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                file.flush()
        if message and not self.quiet:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def bar(
    what: str, unit: str, total: int, items: Iterable[T] | None = None, quiet: bool = False, done: int = 0
) -> "tqdm[T]":
    """A bar over `items`, or one to update by hand: rate and time left; off a terminal at most one line per 10 s.

    `done` of the total were done before.
    """
    live = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        unit_scale=total > 10_000,
        dynamic_ncols=live,
        mininterval=0.2 if live else 10.0,
        file=sys.stderr if live else _Lines(),
        disable=quiet,
    )


class _Lines:
    """A text stream for tqdm that turns its redrawn bar into plain lines."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()
