"""A user's mistake is one line with its exit code; our own mistake keeps its traceback."""

import errno
import os
import signal

import pytest

from shared import errors
from shared.errors import GranaryError, one_line

ALL = sorted(
    (one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, GranaryError)),
    key=lambda one: one.__name__,
)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_what_the_value_and_the_way_out_in_one_line(
    kind: type[GranaryError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_line():
        raise kind("no such key", "rows.cuont", "Did you mean rows.count?")
    assert ended.value.code == kind.exit_code
    assert kind.exit_code in (1, 2)
    assert capsys.readouterr() == ("", "error: no such key: rows.cuont. Did you mean rows.count?\n")
    assert kind.__doc__ and kind.__doc__.splitlines()[0]


@pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_a_stop_unwinds_and_is_one_word_and_the_shells_own_code(
    number: signal.Signals, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, undone = signal.getsignal(number), []
    with pytest.raises(SystemExit) as ended, one_line():
        try:
            os.kill(os.getpid(), number)
        finally:
            undone.append(True)
    assert (ended.value.code, undone) == (code, [True])
    assert capsys.readouterr().err == told
    assert signal.getsignal(number) == before


def test_what_the_system_refuses_is_one_line_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line():
        raise OSError(errno.ENOSPC, "No space left on device", "x.zarr/sealed")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: No space left on device: x.zarr/sealed\n"


def test_our_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), one_line():
        raise AssertionError
