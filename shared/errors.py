"""What a user can be told. Each message is one line: what is wrong, the value, and the way out."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GranaryError(Exception):
    """A fault that a user can act on. Anything else that escapes is our own mistake and keeps its traceback.

    `exit_code` is 1 for a fault in data or in a run, 2 for a wrong call.
    """

    exit_code = 1

    def __init__(self, what: str, value: object, way_out: str) -> None:
        self.what, self.value, self.way_out = what, value, way_out
        super().__init__(f"{what}: {value}. {way_out}")

    def __reduce__(self) -> tuple[type["GranaryError"], tuple[str, str, str]]:
        """Errors travel from workers, too, with what their values look like."""
        return type(self), (self.what, str(self.value), self.way_out)


class ConfigError(GranaryError):
    """A key that does not exist, a value of the wrong kind, or values that contradict each other."""

    exit_code = 2


class CorpusError(GranaryError):
    """A corpus that is missing, unreadable or empty."""

    exit_code = 2


class ModelError(GranaryError):
    """A model or tokenizer that cannot be found, loaded or used as asked."""

    exit_code = 2


class SiteError(GranaryError):
    """A site that the model does not have."""

    exit_code = 2


class AlignmentError(GranaryError):
    """Tokens of several models that cannot be paired as asked."""

    exit_code = 2


class ActivationError(GranaryError):
    """Activations that must not be stored: not finite, of the wrong shape, or not what the model itself computes."""


class SpaceError(GranaryError):
    """Less room on the disk than the plan needs."""


class StoreError(GranaryError):
    """A path that is no Granary store, or a store that lacks what is asked of it."""


class StoreMismatchError(StoreError):
    """A store at this path that was made from another specification."""

    exit_code = 2


class StoreUnfinishedError(StoreError):
    """A store whose last unit has not been written yet."""


class StoreDamagedError(StoreError):
    """A store with files that are missing, not of the recorded size, or packed and not to be decoded."""


class RemoteError(GranaryError):
    """A URL that does not answer, or does not let itself be read or written."""


class LockError(GranaryError):
    """A store that another harvest is working on."""


class ClusterError(GranaryError):
    """A scheduler that does not answer, or workers that do not survive their work."""


class WiringError(GranaryError):
    """Spans that do not fit the sources, or a method that makes no sense on this wiring."""

    exit_code = 2


class RowsError(GranaryError):
    """Rows or codes that do not fit a dictionary."""

    exit_code = 2


class CopyError(GranaryError):
    """A copy of weights that was to be written into, where nobody would see it."""

    exit_code = 2


class CheckpointError(GranaryError):
    """A folder that holds no dictionary or no run that this version can read."""


class TrainingError(GranaryError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


class DivergenceError(TrainingError):
    """A loss or gradient that is not finite."""


class Stopped(SystemExit):
    """SIGINT, or SIGTERM as schedulers send it before they kill. The code is the shell's: 128 + the signal's number."""


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a user's error, what the system refuses (a full disk, no permission) and a stop into one line on stderr and
    an exit code.

    A stop unwinds the program, so that locks are let go and what is being written is finished; a second one kills it.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except GranaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'no file is named'}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print("interrupted" if stopped.code == 128 + signal.SIGINT else "terminated", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_stop() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM take their usual course at the end of the block, which asks meanwhile whether one has come.

    A second one takes it at once. What is ignored (SIGINT, of a job in the background) stays so. In another thread than
    the main one signals do not arrive, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(128 + number)
