"""A user's mistake is one line with its exit code; our own mistake keeps its traceback."""

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


def test_an_interrupt_is_one_word_and_the_shells_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), one_line():
        raise AssertionError
