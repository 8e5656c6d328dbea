"""Two harvests of one store: the second is refused while the first lives, and takes over when it does not."""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harvest import lock
from harvest.lock import Holder, hold, holders
from shared.errors import LockError

HOLD = """
import sys, time
from pathlib import Path
from harvest.lock import hold
with hold(Path(sys.argv[1]), print, sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "x.zarr"


@pytest.fixture
def said() -> list[str]:
    return []


def other(store: Path, slot: str = lock.WHOLE) -> "subprocess.Popen[str]":
    """Another process that holds a slot."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(store), slot], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def plant(store: Path, holder: Holder, silent_s: float = 0.0) -> Path:
    """The mark of some process, touched a while ago."""
    mark = lock.folder_of(store) / f"{holder.slot}.json"
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(json.dumps(asdict(holder)))
    os.utime(mark, (time.time() - silent_s,) * 2)
    return mark


def test_a_free_store_is_held_and_let_go_without_a_trace(store: Path, said: list[str]) -> None:
    with hold(store, said.append):
        ((holder, silent_s),) = holders(store)
        assert (holder.pid, holder.slot) == (os.getpid(), "whole")
        assert abs(silent_s) < 5
    assert list(store.parent.iterdir()) == []
    assert said == []


def test_it_is_let_go_when_the_block_fails(store: Path, said: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), hold(store, said.append):
        raise ZeroDivisionError
    assert list(store.parent.iterdir()) == []


def test_a_second_process_is_refused_by_name_and_changes_nothing(store: Path, said: list[str]) -> None:
    process = other(store)
    try:
        with pytest.raises(LockError, match=rf"another harvest holds this store: .*x.zarr by process {process.pid} on"):
            hold(store, said.append).__enter__()
        assert [holder.pid for holder, _ in holders(store)] == [process.pid]
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_is_taken_over_at_once_with_a_message(store: Path, said: list[str]) -> None:
    process = other(store)
    process.kill()
    process.wait()
    with hold(store, said.append):
        assert [holder.pid for holder, _ in holders(store)] == [os.getpid()]
    assert said == [f"taking over from process {process.pid} on {Holder.me('whole').host}, which has ended"]
    assert list(store.parent.iterdir()) == []


def test_a_number_that_another_process_has_got_since_is_no_sign_of_life(store: Path, said: list[str]) -> None:
    plant(store, replace(Holder.me("whole"), started=1000.0, token="t"))
    with hold(store, said.append):
        assert len(said) == 1


@pytest.mark.parametrize(("silent_s", "free"), [(lock.SILENT_S - 60, False), (lock.SILENT_S + 60, True)])
def test_a_process_on_another_machine_is_gone_when_it_has_been_silent(
    store: Path, said: list[str], silent_s: float, free: bool
) -> None:
    mark = plant(store, replace(Holder.me("whole"), host="far", machine="another", token="t"), silent_s)
    if free:
        with hold(store, said.append):
            assert said == [f"taking over from process {os.getpid()} on far, which has ended"]
        assert not mark.exists()
    else:
        with pytest.raises(LockError, match="on far, last heard of 60 s ago"):
            hold(store, said.append).__enter__()
        assert mark.exists()


def test_a_holder_gives_signs_of_life(store: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with hold(store, said.append):
        mark = lock.folder_of(store) / "whole.json"
        os.utime(mark, (0, 0))
        for _ in range(500):
            if mark.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        ((_, silent_s),) = holders(store)
        assert abs(silent_s) < 60


def test_the_mark_of_who_has_taken_over_is_left_alone(store: Path, said: list[str]) -> None:
    later = replace(Holder.me("whole"), token="later")
    with hold(store, said.append):
        mark = plant(store, later)
    assert lock._read(mark) == later


def test_only_the_mark_that_was_judged_is_taken(store: Path) -> None:
    dead, alive = replace(Holder.me("whole"), token="dead"), replace(Holder.me("whole"), token="alive")
    mark = plant(store, alive)
    lock._take(mark, dead)
    assert lock._read(mark) == alive
    lock._take(mark, alive)
    assert list(mark.parent.iterdir()) == []


def test_a_mark_without_content_is_a_harvest_that_begins_until_it_has_been_silent(store: Path, said: list[str]) -> None:
    mark = plant(store, Holder.me("whole"))
    mark.write_text("")
    with pytest.raises(LockError, match="another harvest has just begun here"):
        hold(store, said.append).__enter__()
    os.utime(mark, (0, 0))
    with hold(store, said.append):
        pass


def test_parts_of_one_whole_stand_beside_each_other_and_nothing_else_does(store: Path, said: list[str]) -> None:
    with ExitStack() as stack:
        for part in ("1-of-3", "2-of-3", "3-of-3"):
            stack.enter_context(hold(store, said.append, part))
        assert len(holders(store)) == 3
        for slot in ("2-of-3", "1-of-2", "whole"):
            with pytest.raises(LockError):
                hold(store, said.append, slot).__enter__()
        assert len(holders(store)) == 3
    with hold(store, said.append), pytest.raises(LockError):
        hold(store, said.append, "1-of-3").__enter__()
    assert list(store.parent.iterdir()) == []


def test_what_a_killed_process_left_in_the_folder_goes_with_it(store: Path, said: list[str]) -> None:
    with hold(store, said.append):
        (lock.folder_of(store) / "whole.abc.partial").write_text("taken, and then it was killed")
    assert list(store.parent.iterdir()) == []


def test_a_holder_that_was_killed_behind_its_last_step_leaves_nothing(store: Path, said: list[str]) -> None:
    process = other(store)
    process.kill()
    process.wait()
    lock.sweep(store, said.append)
    assert said == [f"process {process.pid} on {platform.node()} has ended without letting go"]
    assert list(store.parent.iterdir()) == []
    with hold(store, said.append):
        lock.sweep(store, said.append)  # one that lives is left alone
        assert len(holders(store)) == 1
    lock.sweep(store, said.append)
    assert len(said) == 1
