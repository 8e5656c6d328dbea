"""The harvest command as a user meets it: what it prints, and one line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harvest import cli, lock, unit
from shared import files, models
from shared.store import Store
from tests.harvest.command import Harvest, assert_one_line, config_of, write_config
from tests.harvest.pair import tree


@pytest.fixture
def pair(typed: Store) -> Store:
    return typed


# --- what it prints -------------------------------------------------------------------------------------------------


def test_a_finished_store_is_left_alone_and_described_again(harvest: Harvest, home: Path, pair: Store) -> None:
    before = tree(pair.path)
    done = harvest("run", config_of(pair), "--json")
    assert done.code == 0
    assert done.json["id"] == pair.header.id
    assert done.err == f"{pair.path} is already finished: nothing to do\n"
    text = harvest("run", config_of(pair)).out
    assert f"store  {pair.path}\n" in text
    assert "rows  120\n" in text
    assert tree(pair.path) == before


def test_plan_tells_what_would_be_stored_and_how_long_it_takes_and_keeps_the_plan_beside_it(
    harvest: Harvest, home: Path, tmp_path: Path
) -> None:
    file = write_config(home, tmp_path)
    done = harvest("plan", file, "--json", "--set", "rows.count=50", "--store", tmp_path / "other.zarr")
    assert done.code == 0
    plan = done.json
    assert (plan["rows"], plan["alignment"], plan["store"]) == (50, "offsets", str(tmp_path / "other.zarr"))
    assert set(plan["bytes"]) == {"early", "inner", "gemma", "plan"}
    assert plan["total_bytes"] == sum(plan["bytes"].values())
    assert plan["free_bytes"] > 0
    assert 0 < plan["aligned_tokens"]["llama"] <= 1
    assert plan["seconds"] > 0 and set(plan["tokens_per_second"]) == {"llama", "gemma"}
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "other.zarr.plan"}
    text = harvest("plan", file).out
    assert "rows  120\n" in text
    assert " %" in text
    assert " MB" in text
    assert re.search(r"^ +seconds +0:\d\d:\d\d$", text, re.MULTILINE)
    assert re.search(r"tokens per second +llama [\d,]+, gemma [\d,]+$", text, re.MULTILINE)
    quick = harvest("plan", file, "--no-time").out
    assert "seconds" not in quick and "rows  120\n" in quick


def test_the_plan_is_what_the_run_stores(harvest: Harvest, home: Path, pair: Store) -> None:
    plan = harvest("plan", config_of(pair), "--json").json
    assert plan["id"] == pair.header.id
    assert {key: plan[key] for key in pair.header.plan} == pair.header.plan


def test_sites_are_listed_with_their_widths(harvest: Harvest, home: Path) -> None:
    found = harvest("sites", home / "gemma", "--json").json
    assert len(found) == 18
    assert found["resid.2"] == found["mlp_out.0"] == 24
    assert found["heads.1"] == 32
    lines = harvest("sites", home / "gemma").out.splitlines()
    assert [line.split() for line in lines] == [
        [f"{kind}.0", "...", f"{kind}.2", "width", *shape]
        for kind, shape in [
            ("resid", ["24"]), ("resid_in", ["24"]), ("attn_out", ["24"]), ("heads", ["32:", "4", "heads", "of", "8"]),
            ("mlp_in", ["24"]), ("mlp_out", ["24"]),
        ]
    ]  # fmt: skip


def test_flags_and_settings_reach_the_run(harvest: Harvest, home: Path, tmp_path: Path) -> None:
    file = write_config(home, tmp_path)
    done = harvest(
        "run", file, "--store", tmp_path / "x.zarr", "--threads", 2, "--device", "cpu", "--json",
        "--set", "rows.count=40", "--set", 'models.gemma.sites=["resid.0", "mlp_in.1"]',
    )  # fmt: skip
    assert done.code == 0, done.err
    assert set(done.json["scale_factor"]) == {"early", "inner", "gemma_resid_0", "gemma_mlp_in_1"}
    store = Store.open(tmp_path / "x.zarr")
    assert store.rows == 40
    assert json.loads((store.path / "receipts" / "00000.gemma.json").read_text())["threads"] == 2


@pytest.mark.parametrize(
    "command", ["run", "plan", "sites", "inspect", "status", "verify", "repair", "ls", "pack", "push", "pull", "import"]
)
def test_every_command_has_help_with_an_example(harvest: Harvest, command: str) -> None:
    done = harvest(command, "--help")
    assert done.code == 0
    assert f"Example: harvest {command}" in done.out


# --- mistakes -------------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing model": (["models.llama.path={tmp}/none"], "error: no such model: {tmp}/none. Give a folder"),
    "folder that is no model": (["models.llama.path={tmp}"], "error: no config.json in the model folder: {tmp}. "),
    "missing package": (["models.llama.path=package:nix"], "error: this package is not installed: nix. "),
    "missing corpus": (["corpus.path={tmp}/none.txt"], "error: no such corpus: {tmp}/none.txt. Check corpus.path"),
    "empty corpus": (["corpus.path={tmp}/empty.txt"], "error: no text in the corpus: {tmp}/empty.txt. Check the file"),
    "unreadable corpus": (["corpus.path={tmp}/binary.txt"], "error: cannot read the corpus: {tmp}/binary.txt. "),
    "missing field": (["corpus.text=txt"], "error: no field 'txt' in {home}/corpus.jsonl, line 1: text, id. "),
    "missing site": (
        ['models.llama.sites=["resid.9"]'],
        "error: the model has no site: resid.9. Its 3 blocks are resid.0 to resid.2",
    ),
    "misspelt site": (['models.llama.sites=["layers.1.mpl"]'], "error: the model has no site: layers.1.mpl. Did you m"),
    "context": (["rows.context=65"], "error: rows.context is longer than the model's: 65 > 64 of "),
    "slow tokenizer": (
        ["models.llama.path={tmp}/slow"],
        'error: rows.align "offsets" needs fast tokenizers, and this model has a slow one: llama. Save',
    ),
    "no bos": (["rows.bos=always"], "error: the tokenizer has no BOS token: llama. Set rows.bos to model or never"),
    "misspelt key": (["rows.contxt=5"], "error: unknown key: rows.contxt. Did you mean rows.context"),
    "wrong value": (["rows.count=-1"], "error: wrong value for rows.count: -1. "),
    "no setting": (["rows.count"], "error: a setting must read KEY=VALUE: rows.count. Example:"),
    "attention": (["models.llama.attention=none"], "error: cannot build this model: {home}/llama. Check its config"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    harvest: Harvest, home: Path, tmp_path: Path, case: str, command: str
) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    if case == "slow tokenizer":
        slow = shutil.copytree(home / "llama", tmp_path / "slow")
        (slow / "tokenizer.json").unlink()
        (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    file = write_config(home, tmp_path)
    before = tree(tmp_path)
    arguments, told = MISTAKES[case]
    changed = [part for setting in arguments for part in ("--set", setting.format(tmp=tmp_path))]
    assert_one_line(harvest(command, file, *changed), 2, told.format(tmp=tmp_path, home=home))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "error: cannot read the config file: {file}. Check the path"),
        ("models = [", "error: the config file is not valid TOML: {file}. "),
        ("[corpus]\npath = 'x'", "error: missing key: models. Add it to the file"),
        (
            "[models.a]\npath = 'x'\nsite = 'y'\nsites = ['resid.1']",
            "error: unknown key: models.a.site. Did you mean mo",
        ),
    ],
)
def test_a_config_file_that_cannot_be_used_gets_one_line(
    harvest: Harvest, tmp_path: Path, text: str | None, told: str
) -> None:
    file = tmp_path / "pair.toml"
    if text is not None:
        file.write_text(text)
    assert_one_line(harvest("run", file), 2, told.format(file=file))


def test_identical_alignment_of_other_tokenizers_is_refused(harvest: Harvest, home: Path, tmp_path: Path) -> None:
    done = harvest("run", write_config(home, tmp_path), "--set", "rows.align=identical")
    *progress, last = done.err.splitlines()
    assert last.startswith("error: the tokenizers put different special tokens around a text: llama and gemma. Set ro")
    assert all(line.startswith("planning") for line in progress)
    done = harvest("run", tmp_path / "pair.toml", "--set", "rows.align=identical", "--set", "rows.bos=never")
    assert done.err.splitlines()[-1].startswith("error: the tokenizers do not give the same ids: model 1 and model 2. ")
    assert done.code == 2
    assert not (tmp_path / "pair.zarr").exists()


def test_another_store_at_the_path_gets_one_line_with_the_fields_that_differ(
    harvest: Harvest, home: Path, pair: Store
) -> None:
    before = tree(pair.path)
    done = harvest("run", config_of(pair), "--set", "rows.seed=5", "--set", "rows.count=99")
    assert_one_line(done, 2, f"error: another store is at {pair.path}, and these fields differ (stored -> asked): ")
    assert "rows.count: 120 -> 99; rows.seed: 0 -> 5. Give another path" in done.err
    assert tree(pair.path) == before


def test_no_space_gets_one_line_before_any_model_runs(
    harvest: Harvest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    monkeypatch.setattr(models, "load", None)
    done = harvest("run", write_config(home, tmp_path))
    assert done.code == 1
    *progress, last = done.err.splitlines()
    assert last.startswith(f"error: no space left for this store: {tmp_path}/pair.zarr needs ")
    assert all(line.startswith("planning") for line in progress)
    assert not (tmp_path / "pair.zarr").exists()


@pytest.mark.parametrize("what", ["missing", "unfinished", "damaged"])
def test_a_store_that_cannot_be_read_gets_one_line(harvest: Harvest, pair: Store, tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.zarr"
    if what != "missing":
        shutil.copytree(pair.path, path)
    if what == "unfinished":
        (path / "sealed").unlink()
    if what == "damaged":
        (path / "norms/gemma/c/0").unlink()
    told = {
        "missing": f"error: no Granary store here: {path}. Give the folder NAME.zarr",
        "unfinished": f"error: this store is not finished: {path} has ",
        "damaged": f"error: 1 files of {path} are damaged: norms/gemma/c/0. See harvest verify ",
    }
    assert_one_line(harvest("inspect", path), 1, told[what])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("{tmp}/none", "error: no such model: {tmp}/none. "),
        ("package:nix", "error: this package is not installed: nix. "),
    ],
)
def test_sites_of_a_model_that_is_nowhere_get_one_line(harvest: Harvest, tmp_path: Path, model: str, told: str) -> None:
    assert_one_line(harvest("sites", model.format(tmp=tmp_path)), 2, told.format(tmp=tmp_path))


def test_a_fault_in_the_models_values_is_one_line_with_exit_code_1(
    harvest: Harvest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = unit.rows
    monkeypatch.setattr(unit, "rows", lambda *given: {name: x / 0 for name, x in genuine(*given).items()})
    done = harvest("run", write_config(home, tmp_path))
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert errors == done.err.splitlines()[-1:]
    assert " is not finite: document 'doc " in errors[0]
    assert "Traceback" not in done.err


def test_an_interrupt_ends_with_its_own_code(
    harvest: Harvest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli, "prepare", interrupted)
    file = write_config(home, tmp_path)
    done = harvest("plan", file)
    assert (done.code, done.err) == (130, f"to go on: harvest plan {file}\ninterrupted\n")


# --- two at once, and stops -----------------------------------------------------------------------------------------

SLOW = """
import signal, sys, time
from harvest import unit
from harvest.cli import main
genuine = unit.rows
def slow(*given):
    time.sleep(0.2)
    return genuine(*given)
unit.rows = slow
main()
"""


@contextmanager
def slow_run(home: Path, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A harvest in a process of its own that is at its first units, and its store."""
    file = write_config(home, folder)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            if list((folder / "pair.zarr" / "receipts").glob("0*.json")):
                break
            time.sleep(0.1)
        yield process, folder / "pair.zarr"
    finally:
        process.kill()
        process.communicate()


def test_a_second_harvest_of_a_store_is_refused_and_changes_nothing(
    harvest: Harvest, home: Path, tmp_path: Path
) -> None:
    with slow_run(home, tmp_path) as (process, path):
        done = harvest("run", tmp_path / "pair.toml")
        assert done.code == 1
        assert f"another harvest holds this store: {path} by process {process.pid} on " in done.err.splitlines()[-1]
        assert harvest("status", path, "--json").json["held_by"][0].startswith(f"process {process.pid} on ")
        assert process.poll() is None
    done = harvest("run", tmp_path / "pair.toml")  # it was killed
    assert (done.code, "taking over from process" in done.err) == (0, True)
    assert Store.open(path).rows == 120
    assert not lock.folder_of(path).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_harvest_lets_go_and_tells_how_to_go_on(
    harvest: Harvest, home: Path, pair: Store, tmp_path: Path, number: int, code: int
) -> None:
    with slow_run(home, tmp_path) as (process, path):
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
    assert "Traceback" not in err
    *_, stored, command, last = err.splitlines()
    made = len(Store.at(path).units) - len(Store.at(path).missing())
    assert stored == f"{made} of {len(Store.at(path).units)} units are made"
    assert command == f"to go on: harvest run {tmp_path}/pair.toml"
    assert last == {130: "interrupted", 143: "terminated"}[code]
    assert not list(path.rglob("*.partial")) and not lock.folder_of(path).exists()
    assert harvest(*command.split()[4:]).code == 0
    assert tree(path) == tree(pair.path)


def test_the_log_beside_a_store_has_times_hosts_and_processes(harvest: Harvest, home: Path, tmp_path: Path) -> None:
    assert harvest("run", write_config(home, tmp_path)).code == 0
    events = [json.loads(line) for line in (tmp_path / "pair.zarr.log").read_text().splitlines()]
    assert [event["event"] for event in events][:1] == ["start"]
    assert events[0]["process"] == os.getpid() and events[0]["host"]
    assert [event["event"] for event in events].count("unit") == 2 * Store.open(tmp_path / "pair.zarr").shards
    before = (tmp_path / "pair.zarr.log").read_bytes()
    assert harvest("run", tmp_path / "pair.toml").code == 0
    assert (tmp_path / "pair.zarr.log").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--workers", 2, "--part", "1/2"),
            "each of these shares out the work: --workers 2, --part 1/2. Give one of them",
        ),
        (("--part", "3/2"), "--part must read I/N: 3/2. Example: --part 1/8, up to 8/8"),
        (("--part", "two"), "--part must read I/N: two. Example: --part 1/8, up to 8/8"),
    ],
)
def test_work_that_is_shared_out_in_no_way_gets_one_line(
    harvest: Harvest, home: Path, tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    assert_one_line(harvest("run", write_config(home, tmp_path), *options), 2, f"error: {told}")
    assert not (tmp_path / "pair.zarr").exists()
