"""Options and results of the commands."""

import json
from pathlib import Path

import pytest

from harvest.console import config_of, resumable, show
from shared.errors import ConfigError, Stopped
from tests.harvest.command import write_config


def test_settings_and_flags_lie_over_the_file(home: Path, tmp_path: Path) -> None:
    file = write_config(home, tmp_path)
    made = config_of(file, ["rows.context=9", "models.gemma.dtype=bfloat16"], "other.zarr", "cpu", 3)
    assert (made.rows.context, made.models["gemma"].dtype, made.store.path) == (9, "bfloat16", "other.zarr")
    assert (made.device, made.threads, made.rows.count) == ("cpu", 3, 120)
    with pytest.raises(ConfigError, match=r"unknown key: rows.contxt. Did you mean rows.context"):
        config_of(file, ["rows.contxt=9"], None, None, None)


def test_results_are_shown_with_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "rows": 1234567, "total_bytes": 2_500_000, "aligned_tokens": {"a": 0.934}, "seconds": 3725.4,
        "tokens_per_second": {"a": 1234.6}, "disk_bytes_per_second": 1.5e8, "faults": {"a": {"clipped": 0, "sink": 12}},
        "skipped": {"empty": 0, "repeated": 3},
    }  # fmt: skip
    show(result, False)
    shown = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown == {
        "rows": "1,234,567", "total bytes": "2.5 MB", "aligned tokens": "a 93.4 %", "seconds": "1:02:05",
        "tokens per second": "a 1,235", "disk bytes per second": "150 MB", "faults": "a sink 12",
        "skipped": "repeated 3",
    }  # fmt: skip
    show(result, True)
    assert json.loads(capsys.readouterr().out) == result


def test_who_is_stopped_is_told_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["harvest", "run", "my pair.toml"])
    with pytest.raises(Stopped), resumable(tmp_path / "x.zarr"):
        raise Stopped(130)
    assert capsys.readouterr().err == "to go on: harvest run 'my pair.toml'\n"
