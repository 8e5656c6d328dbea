"""What a user can be told. Each message is one line: what is wrong, the value, and the way out."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class GranaryError(Exception):
    """A fault that a user can act on. Anything else that escapes is our own mistake and keeps its traceback.

    `exit_code` is 1 for a fault in data or in a run, 2 for a wrong call.
    """

    exit_code = 1

    def __init__(self, what: str, value: object, way_out: str) -> None:
        self.what, self.value, self.way_out = what, value, way_out
        super().__init__(f"{what}: {value}. {way_out}")


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
    """A store with files that are missing or not of the recorded size."""


class WiringError(GranaryError):
    """Spans that do not fit the sources, or a method that makes no sense on this wiring."""

    exit_code = 2


class RowsError(GranaryError):
    """Rows or codes that do not fit a dictionary."""

    exit_code = 2


class CheckpointError(GranaryError):
    """A folder that holds no dictionary or no run that this version can read."""


class TrainingError(GranaryError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a user's error, and what the system refuses (a full disk, no permission), into one line on stderr and its
    exit code; an interrupt into exit code 130."""
    try:
        yield
    except GranaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'no file is named'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
