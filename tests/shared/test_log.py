"""One stream of events in a file, and the console as a view of it."""

import io
import json
import sys
from pathlib import Path

import pytest

from shared.log import Log, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_event_is_one_line_of_json_and_those_with_a_message_are_echoed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    with Log(path) as log:
        log.event("step", step=3, loss=0.5)
        log.event("done", "naïve: finished", path=tmp_path)
    first, second = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert first.pop("time") <= second.pop("time")
    assert first == {"event": "step", "step": 3, "loss": 0.5}
    assert second == {"event": "done", "message": "naïve: finished", "path": str(tmp_path)}
    out, err = capsys.readouterr()
    assert (out, err) == ("", "naïve: finished\n")  # stdout is for results


def test_events_are_on_disk_before_the_log_is_closed_and_a_second_log_appends(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for name in ("one", "two"):
        log = Log(path, quiet=True)
        log.event(name)
        assert json.loads(path.read_text().splitlines()[-1])["event"] == name
        log.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_quiet_log_and_a_quiet_bar_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(quiet=True) as log, bar("training", "steps", 3, quiet=log.quiet) as progress:
        log.event("done", "finished")
        for _ in range(3):
            progress.update()
            progress.set_postfix({"loss": "1"})
    assert list(bar("reading", "rows", 3, range(3), quiet=True)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_off_a_terminal_a_bar_is_plain_lines_that_end_with_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar("reading", "rows", 20_000, range(20_000))) == list(range(20_000))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    assert all(line.startswith("reading: ") for line in lines)
    assert "100%" in lines[-1]
    assert "20.0k/20.0k" in lines[-1]
    assert "rows/s" in lines[-1]
    assert len(lines) <= 3  # at most one in 10 s


def test_on_a_terminal_a_bar_is_redrawn_in_its_line_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar("training", "steps", 4) as progress:
        for _ in range(4):
            progress.update()
            progress.refresh()
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1
    assert "\rtraining: " in drawn
    assert " steps/s" in drawn
    assert "2/4 [" in drawn
    assert "4/4 [" in drawn
