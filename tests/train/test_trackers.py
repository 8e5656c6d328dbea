"""Trackers show what metrics.jsonl has, every step once, and never end a run: read back from what they have written.

W&B is tested twice: as it is installed (offline, where it is), and as a small module that does what a test needs.
"""

import importlib
import importlib.util
import json
import struct
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import config as configs
from shared.errors import ConfigError, Stopped
from shared.log import Log
from shared.store import Store
from tests.build import make_store
from train import report, trackers
from train.config import LogConfig, TrainConfig
from train.fit import fit, resume
from train.trackers import TensorBoard, Trackers, WandB
from train.trainer import Trainer

ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 32, "exclusive": 4}, "method": {"name": "batch_topk", "k": 3},
    "steps": 12, "batch": 16, "threads": 1, "device": "cpu", "optimiser": {"lr": 1e-2, "warmup": 2},
}  # fmt: skip
FIGURES = {"loss": 0.5, "fve/a": 0.25}


def asked(**log: Any) -> dict[str, Any]:
    return {**ASKED, "log": {"every": 2, "checkpoint": 4, **log}}


def config(**log: Any) -> TrainConfig:
    return configs.parse(TrainConfig, asked(**log))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("trackers") / "pair.zarr"
    return make_store(path, rows=300, shard_rows=256, chunk_rows=16, documents=20)


def events(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (folder / report.METRICS).read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """{step: figures} as metrics.jsonl has them."""
    return {
        one["step"]: {name: value for name, value in one.items() if name not in ("time", "event", "step", "message")}
        for one in events(folder)
    }


def measured(folder: Path) -> dict[str, float]:
    return trackers.final(events(folder, "measure")[-1]["figures"])


class KilledError(BaseException):
    """Nothing runs behind it but what a context manager cannot leave out."""


def cut_short(
    store: Store, folder: Path, at: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KilledError,
    **log: Any,
) -> None:  # fmt: skip
    """Begin a run, or go on with one, that ends in the middle of a step."""
    genuine = Trainer.update

    def update(self: Trainer, x: Any) -> Any:
        if self.step + 1 == at:
            raise error
        return genuine(self, x)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Trainer, "update", update)
        if (folder / report.STORE).exists():
            resume(folder, quiet=True)
        else:
            fit(store, asked(**log), folder, quiet=True)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_config_that_says_nothing_of_trackers_has_none() -> None:
    assert trackers.asked(LogConfig()) == []
    assert trackers.asked(LogConfig(tensorboard=True, wandb="dictionaries")) == [TensorBoard, WandB]


@pytest.mark.parametrize("name", ["", "a/b", "a" * 129, "a?b"])
def test_a_project_that_wandb_would_refuse_is_refused_in_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match=r"wrong value for log\.wandb"):
        config(wandb=name)


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else genuine(name))


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "dictionaries")])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    hide(key, monkeypatch)
    way_out = rf"not installed: {key}\. pip install 'granary-sae\[{key}\]', or leave log\.{key} out"
    with pytest.raises(ConfigError, match=way_out):
        fit(store, asked(**{key: value}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes into ./wandb by default, which Python then takes for a package without files."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(place for place in sys.path if "site-packages" not in place)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="not installed: wandb"):
        trackers.require(LogConfig(wandb="dictionaries"))


def test_final_figures_are_those_of_the_run_and_of_every_source() -> None:
    found = {
        "rows": 9, "l0": 3.0, "dead": 0.5, "dense": 0.0, "spans": {}, "r": {},
        "sources": {"a": {"fve": 0.75, "exclusive": None}, "b": {"fve": None, "exclusive": 2}},
    }  # fmt: skip
    assert trackers.final(found) == {
        "measure/l0": 3.0, "measure/dead": 0.5, "measure/dense": 0.0, "measure/fve/a": 0.75, "measure/exclusive/b": 2,
    }  # fmt: skip


# --- any tracker ----------------------------------------------------------------------------------------------------


class OwnError(Exception):
    """Of a kind that the package of the tracker defines."""


OwnError.__module__ = "paper.printing"


class Paper(trackers.Tracker):
    """Writes down what it is told, and fails when it is told to."""

    package = "paper"
    told: list[Any]
    fails: dict[str, Exception]

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        self._do("open", step)
        self.place, self.shown = "desk", step

    def step(self, step: int, figures: Any) -> None:
        self._do("step", step, dict(figures))

    def finish(self, step: int, figures: Any) -> None:
        self._do("finish", step, dict(figures))

    def close(self, well: bool) -> None:
        self._do("close", well)

    def _do(self, *what: Any) -> None:
        self.told.append(what)
        if what[0] in self.fails:
            raise self.fails[what[0]]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> type[Paper]:
    monkeypatch.setattr(Paper, "told", [], raising=False)
    monkeypatch.setattr(Paper, "fails", {}, raising=False)
    monkeypatch.setattr(trackers, "asked", lambda log: [Paper])
    monkeypatch.setattr(Paper, "require", classmethod(lambda cls, log: None))
    return Paper


def test_a_tracker_is_told_every_line_of_the_log_and_closed(store: Store, tmp_path: Path, paper: type[Paper]) -> None:
    fit(store, asked(), tmp_path / "run", quiet=True)
    steps = [("step", step, figures) for step, figures in rows(tmp_path / "run").items()]
    assert [step for _, step, _ in steps] == [2, 4, 6, 8, 10, 12]
    assert paper.told == [("open", 0), *steps, ("finish", 12, measured(tmp_path / "run")), ("close", True)]
    assert [(one["tracker"], one["message"]) for one in events(tmp_path / "run", "tracker")] == [
        ("paper", "Paper: desk")
    ]


@pytest.mark.parametrize("error", [RuntimeError, KilledError, KeyboardInterrupt, Stopped])
def test_a_tracker_is_closed_however_training_ends(
    store: Store, tmp_path: Path, paper: type[Paper], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    cut_short(store, tmp_path / "run", 3, monkeypatch, error)
    assert [what[0] for what in paper.told] == ["open", "step", "close"] and paper.told[-1] == ("close", False)


def test_a_tracker_is_opened_at_the_step_that_a_run_goes_on_from(
    store: Store, tmp_path: Path, paper: type[Paper], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(store, tmp_path / "run", 8, monkeypatch)
    resume(tmp_path / "run", quiet=True)
    opened = [number for number, what in enumerate(paper.told) if what[0] == "open"]
    assert [what[:2] for what in paper.told[: opened[1]]] == [
        ("open", 0), ("step", 2), ("step", 4), ("step", 6), ("close", False),
    ]  # fmt: skip
    assert [what[1] for what in paper.told[opened[1] :]] == [4, 6, 8, 10, 12, 12, True]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TimeoutError("network"), OwnError("away")])
@pytest.mark.parametrize("moment", ["open", "step", "finish", "close"])
def test_a_tracker_that_fails_is_told_once_and_let_go(
    store: Store, tmp_path: Path, paper: type[Paper], moment: str, error: Exception
) -> None:
    paper.fails[moment] = error
    assert fit(store, asked(), tmp_path / "run", quiet=True).figures["rows"] > 0
    assert paper.told[-1][0] == moment and sum(what[0] == moment for what in paper.told) == 1
    (told,) = events(tmp_path / "run", "tracker_failed")
    assert told["tracker"] == "paper" and told["message"] == (
        f"Paper fails and gets no more of this run; metrics.jsonl has every figure ({error!r})"
    )
    assert told.get("step") == {"open": 0, "step": 2, "finish": 12, "close": None}[moment]
    assert list(rows(tmp_path / "run")) == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("error", [TypeError("of ours"), ValueError("of ours"), AssertionError("of ours")])
@pytest.mark.parametrize("moment", ["open", "step", "finish", "close"])
def test_a_mistake_of_ours_is_not_taken_for_a_failure_of_the_tracker(
    store: Store, tmp_path: Path, paper: type[Paper], moment: str, error: Exception
) -> None:
    paper.fails[moment] = error
    with pytest.raises(type(error), match="of ours"):
        fit(store, asked(), tmp_path / "run", quiet=True)
    assert events(tmp_path / "run", "tracker_failed") == []


def test_what_fails_takes_no_other_tracker_with_it(
    tmp_path: Path, paper: type[Paper], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stone(Paper):
        """Another one, that does not fail."""

        told: list[Any] = []  # noqa: RUF012
        fails: dict[str, Exception] = {}  # noqa: RUF012

    monkeypatch.setattr(trackers, "asked", lambda log: [Paper, Stone])
    paper.fails["step"] = OSError("no ink")
    with Log(tmp_path / report.METRICS, quiet=True) as log:
        shown = Trackers(tmp_path, config(), log)
        with shown.opened(0):
            shown.step(2, FIGURES)
            shown.step(4, FIGURES)
    assert [what[0] for what in paper.told] == ["open", "step"]
    assert [what[0] for what in Stone.told] == ["open", "step", "step", "close"]


# --- TensorBoard ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scalars() -> Callable[[Path], dict[str, dict[int, float]]]:
    """Reads {name: {step: number}} of a folder, as TensorBoard does; no step of a name may come twice."""
    package = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(package)

    def read(folder: Path) -> dict[str, dict[int, float]]:
        found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        found.Reload()
        series = {name: found.Scalars(name) for name in found.Tags()["scalars"]}
        for name, points in series.items():
            steps = [point.step for point in points]
            assert steps == sorted(set(steps)), name
        return {name: {point.step: point.value for point in points} for name, points in series.items()}

    return read


def expected(folder: Path, steps: int = 12) -> dict[str, dict[int, float]]:
    """What TensorBoard has to show of metrics.jsonl: its numbers in float32."""
    series: dict[str, dict[int, float]] = {}
    for step, figures in rows(folder).items():
        for name, value in figures.items():
            series.setdefault(name, {})[step] = float(np.float32(value))
    final = {name: {steps + 1: float(np.float32(value))} for name, value in measured(folder).items()}
    return series | final


Read = Callable[[Path], dict[str, dict[int, float]]]


def test_tensorboard_shows_every_number_of_the_log(store: Store, tmp_path: Path, scalars: Read) -> None:
    fit(store, asked(tensorboard=True), tmp_path / "run", quiet=True)
    shown = scalars(tmp_path / "run")
    assert shown == expected(tmp_path / "run")
    assert {"loss", "recon", "aux", "gradient", "l0", "dead", "fve/a", "fve/b", "epoch", "rows_s"} <= shown.keys()
    assert {"measure/fve/a", "measure/fve/b", "measure/l0", "measure/dead"} <= shown.keys()


def test_a_run_that_goes_on_shows_every_step_once_in_tensorboard(
    store: Store, tmp_path: Path, scalars: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    cut_short(store, folder, 8, monkeypatch, tensorboard=True)  # showed 6, behind its checkpoint of 4
    before = scalars(folder)["loss"]
    cut_short(store, folder, 12, monkeypatch)  # showed 10, behind that of 8
    resume(folder, quiet=True)
    assert list(before) == [2, 4, 6] and len(list((folder / "tensorboard").iterdir())) == 3
    assert scalars(folder) == expected(folder)


def test_a_run_without_a_checkpoint_begins_again_in_tensorboard(
    store: Store, tmp_path: Path, scalars: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(store, tmp_path / "run", 4, monkeypatch, tensorboard=True)
    resume(tmp_path / "run", quiet=True)
    assert scalars(tmp_path / "run") == expected(tmp_path / "run")


def test_a_run_that_is_measured_again_shows_that_once_in_tensorboard(
    store: Store, tmp_path: Path, scalars: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(report, "write", killed)
        fit(store, asked(tensorboard=True), tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)
    assert scalars(tmp_path / "run") == expected(tmp_path / "run")


def test_parts_are_read_in_their_order_whatever_clocks_say_and_however_many(
    tmp_path: Path, scalars: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in range(12):
        monkeypatch.setattr("time.time", lambda start=start: 1e9 - start)
        part = TensorBoard(tmp_path, config(), start)
        part.step(start + 1, {"loss": start})
        part.step(start + 2, {"loss": -1})
    assert scalars(tmp_path) == {"loss": {**{start + 1: start for start in range(12)}, 13: -1}}


def test_a_record_that_was_torn_hides_no_later_part(tmp_path: Path, scalars: Read) -> None:
    first = TensorBoard(tmp_path, config(), 0)
    for step in (1, 2):
        first.step(step, {"loss": step})
    path = tmp_path / "tensorboard" / "events.out.tfevents.000000"
    path.write_bytes(path.read_bytes()[:-5])
    TensorBoard(tmp_path, config(), 1).step(2, {"loss": 2})
    assert scalars(tmp_path) == {"loss": {1: 1, 2: 2}}


def test_figures_of_a_step_are_in_the_file_before_the_next_step(tmp_path: Path, scalars: Read) -> None:
    part = TensorBoard(tmp_path, config(), 0)
    part.step(1, {"loss": 1})
    assert scalars(tmp_path) == {"loss": {1: 1}}
    part.step(2, {"loss": float("nan")})
    assert np.isnan(scalars(tmp_path)["loss"][2])


def test_runs_of_one_process_have_files_of_their_own(tmp_path: Path, scalars: Read) -> None:
    with Log(quiet=True) as log:
        folders = [tmp_path / str(number) for number in range(3)]
        for folder in folders:
            folder.mkdir()
            (folder / report.METRICS).touch()
        shown = [Trackers(folder, config(tensorboard=True), log) for folder in folders]
        with shown[0].opened(0), shown[1].opened(0), shown[2].opened(0):
            for step in (1, 2):
                for number, one in enumerate(shown):
                    one.step(step, {"loss": 10 * number + step})
    assert [scalars(folder)["loss"] for folder in folders] == [{1: 1, 2: 2}, {1: 11, 2: 12}, {1: 21, 2: 22}]


def test_a_folder_that_cannot_be_written_ends_no_run(store: Store, tmp_path: Path, scalars: Read) -> None:
    (tmp_path / "file").touch()
    with Log(tmp_path / report.METRICS, quiet=True) as log:
        shown = Trackers(tmp_path / "file", config(tensorboard=True), log)
        with shown.opened(0):
            shown.step(2, FIGURES)
    (told,) = events(tmp_path, "tracker_failed")
    assert "TensorBoard fails" in told["message"] and "NotADirectoryError" in told["message"]


# --- W&B ------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What W&B has been given by one start of a run."""

    id: str
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    project: str = ""
    exit_code: int | None = None


class Fake(types.ModuleType):
    """As much of wandb as is used, whose server has the steps up to `has`, and which fails as it is told to."""

    class Settings(dict[str, Any]):
        """As wandb.Settings of a release that does not know FLUSH."""

        model_fields = frozenset({"console", "finish_timeout"})

    class Error(Exception):
        """As wandb.Error."""

    def __init__(self, mode: str) -> None:
        super().__init__("wandb")
        self.mode, self.has, self.starts, self.key, self.__version__ = mode, -1, [], None, "0.29.0"
        self.fails: dict[str, Exception] = {}
        self.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="fake")
        self.Error.__module__ = "wandb.errors"

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode, api_key=self.key))

    def login(self, verify: bool) -> None:
        self.fail("login")

    def init(self, **keys: Any) -> Any:
        self.fail("init")
        assert keys["reinit"] == "create_new" and keys["resume"] == "allow" and Path(keys["dir"]).is_dir()
        assert keys["settings"]["finish_timeout"] > 0 and keys["settings"]["console"] == "off"
        seen = Seen(keys["id"], config=keys["config"], name=keys["name"], project=keys["project"])
        self.starts.append(seen)

        def log(figures: dict[str, float], step: int, commit: bool) -> None:
            self.fail("log")
            assert commit and step not in seen.history
            seen.history[step] = figures

        def finish(exit_code: int) -> None:
            seen.exit_code = exit_code
            self.fail("finish")

        offline = self.mode == "offline"
        return types.SimpleNamespace(
            log=log, finish=finish, summary=seen.summary, offline=offline, url=None if offline else "https://w.b/1",
            starting_step=0 if offline else self.has + 1,
        )  # fmt: skip

    def fail(self, moment: str) -> None:
        if moment in self.fails:
            raise self.fails[moment]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake("offline")
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


Starts = Callable[[Path], list[Seen]]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Starts]:
    """The installed wandb, offline; gives what is in its files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    wandb = pytest.importorskip("wandb")

    def read(folder: Path) -> list[Seen]:
        wandb.teardown()  # its process writes the rest behind `finish`
        return [_seen(path) for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]

    yield read
    with suppress(ConnectionError):  # of a process that a test has killed
        wandb.teardown()


@pytest.fixture(params=["fake", "real"])
def starts(request: pytest.FixtureRequest) -> Starts:
    """Gives what each start of a run has given to W&B, first to last."""
    if request.param == "real":
        found: Starts = request.getfixturevalue("real")
        return found
    fake = request.getfixturevalue("fake")
    return lambda folder: [seen for seen in fake.starts if seen.name == folder.name]


def _seen(path: Path) -> Seen:
    """A file of wandb: records of protocol buffers in blocks, as LevelDB's log has them."""
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    seen = Seen(path.stem.removeprefix("run-"))
    for data in _records(path.read_bytes()):
        record = pb.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
            figures = {name: value for name, value in items.items() if not name.startswith("_")}
            assert items["_step"] not in seen.history
            seen.history[items["_step"]] = figures
        elif kind == "summary":
            seen.summary |= {
                "/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.summary.update
            }
        elif kind == "run":
            seen.config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
            seen.name, seen.project = record.run.display_name, record.run.project
        elif kind == "exit":
            seen.exit_code = record.exit.exit_code
    return seen


def _records(data: bytes) -> Iterator[bytes]:
    at, whole, block = 7, b"", 2**15
    while at < len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb_shows_every_number_of_the_log(store: Store, tmp_path: Path, starts: Starts) -> None:
    folder = tmp_path / "some-run"
    fit(store, asked(wandb="dictionaries"), folder, quiet=True)
    (seen,) = starts(folder)
    assert seen.history == rows(folder) and list(seen.history) == [2, 4, 6, 8, 10, 12]
    assert measured(folder).items() <= seen.summary.items() and "measure/fve/a" in seen.summary
    assert (seen.name, seen.project, seen.exit_code) == ("some-run", "dictionaries", 0)
    assert {name: seen.config[name] for name in ASKED if name in ("steps", "batch")} == {"steps": 12, "batch": 16}
    assert seen.config["optimiser"]["beta2"] == 0.999  # as resolved
    assert json.loads((folder / "wandb.json").read_text()) == {"id": seen.id, "step": 12}


def test_a_run_that_goes_on_shows_every_step_once_in_wandb(
    store: Store, tmp_path: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    cut_short(store, folder, 8, monkeypatch, wandb="dictionaries")
    cut_short(store, folder, 7, monkeypatch)  # shows nothing that was not shown before
    resume(folder, quiet=True)
    seen = sorted(starts(folder), key=lambda one: min(one.history, default=7))  # names of its files tell seconds
    assert len({one.id for one in seen}) == 1
    assert [list(one.history) for one in seen] == [[2, 4, 6], [], [8, 10, 12]]
    assert sorted(one.exit_code for one in seen) == [0, 1, 1]
    timed = {"rows_s", "waited_s"}
    for one in seen:
        for step, figures in one.history.items():  # what came first stays, and is the same
            again = rows(folder)[step]
            assert {k: v for k, v in figures.items() if k not in timed} == {
                k: v for k, v in again.items() if k not in timed
            }


def test_online_wandb_says_which_steps_it_has(fake: Fake, tmp_path: Path) -> None:
    """A machine that died may have sent less than it logged: the log has what is missing, and nothing is sent twice."""
    fake.mode = "online"
    with Log(tmp_path / report.METRICS, quiet=True) as log:
        shown = Trackers(tmp_path, config(wandb="dictionaries"), log)
        with shown.opened(0):
            for step in (2, 4, 6):
                log.event("step", step=step, **FIGURES)
                shown.step(step, FIGURES)
        for has in (2, 8):
            fake.has = has
            with shown.opened(6):
                for step in (8, 10):
                    shown.step(step, FIGURES)
    assert [list(seen.history) for seen in fake.starts] == [[2, 4, 6], [4, 6, 8, 10], [10]]
    assert all(figures == FIGURES for seen in fake.starts for figures in seen.history.values())
    assert [one["message"] for one in events(tmp_path, "tracker")] == ["WandB: https://w.b/1"] * 3


def test_runs_of_one_process_are_runs_of_their_own_in_wandb(tmp_path: Path, starts: Starts) -> None:
    with Log(quiet=True) as log:
        folders = [tmp_path / f"run-{number}" for number in range(3)]
        for folder in folders:
            folder.mkdir()
            (folder / report.METRICS).touch()
        shown = [Trackers(folder, config(wandb="dictionaries"), log) for folder in folders]
        with shown[0].opened(0), shown[1].opened(0), shown[2].opened(0):
            for step in (1, 2):
                for number, one in enumerate(shown):
                    one.step(step, {"loss": 10 * number + step})
            assert getattr(importlib.import_module("wandb"), "run", None) is None
    seen = [one for folder in folders for one in starts(folder)]
    assert len({one.id for one in seen}) == 3
    assert [[figures["loss"] for figures in one.history.values()] for one in seen] == [[1, 2], [11, 12], [21, 22]]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [Fake.Error("server away"), TimeoutError("Timed out finishing run.")])
def test_wandb_that_fails_ends_no_run(store: Store, tmp_path: Path, fake: Fake, moment: str, error: Exception) -> None:
    fake.fails[moment] = error
    fit(store, asked(wandb="dictionaries"), tmp_path / "run", quiet=True)
    (told,) = events(tmp_path / "run", "tracker_failed")
    assert repr(error) in told["message"] and (tmp_path / "run" / report.PAGE).exists()


def test_a_wandb_server_that_does_not_answer_ends_no_run(
    store: Store, tmp_path: Path, real: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of `discard`, where nothing listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    fit(store, asked(wandb="dictionaries"), tmp_path / "run", quiet=True)
    (told,) = events(tmp_path / "run", "tracker_failed")
    assert "WandB fails" in told["message"] and told["step"] == 0
    assert list(rows(tmp_path / "run")) == [2, 4, 6, 8, 10, 12]


def test_wandb_that_dies_while_training_ends_no_run(
    store: Store, tmp_path: Path, real: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil = importlib.import_module("psutil")
    genuine = Trainer.update

    def update(self: Trainer, x: Any) -> Any:
        if self.step == 5:
            for child in psutil.Process().children():
                if child.name().startswith("wandb"):
                    child.kill()
                    child.wait(10)
        return genuine(self, x)

    monkeypatch.setattr(Trainer, "update", update)
    fit(store, asked(wandb="dictionaries"), tmp_path / "run", quiet=True)
    (told,) = events(tmp_path / "run", "tracker_failed")
    assert told["step"] == 6 and list(rows(tmp_path / "run")) == [2, 4, 6, 8, 10, 12]


def test_a_missing_key_is_told_before_anything_is_written(store: Store, tmp_path: Path, fake: Fake) -> None:
    fake.mode, fake.fails["login"] = "online", Fake.Error("No API key configured.")
    with pytest.raises(ConfigError, match=r"W&B cannot be used here: dictionaries\. Run wandb login.*No API key"):
        fit(store, asked(wandb="dictionaries"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_offline_needs_no_key_and_one_that_is_there_is_not_asked_for(fake: Fake) -> None:
    fake.fails["login"] = Fake.Error("No API key configured.")
    trackers.require(LogConfig(wandb="dictionaries"))
    for mode in ("online", "shared"):
        fake.mode = mode
        with pytest.raises(ConfigError, match="No API key"):
            trackers.require(LogConfig(wandb="dictionaries"))
    fake.key = "0" * 40
    trackers.require(LogConfig(wandb="dictionaries"))


def test_a_wandb_that_is_too_old_is_refused(fake: Fake) -> None:
    fake.__version__ = "0.28.2"
    with pytest.raises(ConfigError, match=r"this wandb is too old: 0\.28\.2\. pip install --upgrade"):
        trackers.require(LogConfig(wandb="dictionaries"))


def test_the_installed_wandb_asks_for_a_key(tmp_path: Path, real: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="No API key configured"):
        trackers.require(LogConfig(wandb="dictionaries"))
