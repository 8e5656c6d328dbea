"""`train` on the command line: results on stdout, a user's mistake as one line on stderr, and its exit code."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.store import Store
from tests import cases
from tests.build import make_store
from tests.s3 import Bucket
from train import cli, report
from train.dictionary import Dictionary, create
from train.fit import fit
from train.measure import measure
from train.method import names
from train.scale import Scale
from train.trainer import Trainer
from train.wiring import Span, Wiring

SMALL = [
    "--steps", "4", "--batch", "16", "--threads", "1", "--latents", "32", "--set", "method.k=3", "--device", "cpu",
]  # fmt: skip


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    def said(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Said(int(caught.value.code or 0), *capsys.readouterr())

    return said


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("cli") / "pair.zarr"
    return make_store(path, rows=200, shard_rows=256, chunk_rows=16, documents=20)


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = {
        "wiring": {"kind": "dedicated", "latents": 32}, "method": {"name": "topk", "k": 3}, "steps": 4, "batch": 16,
        "threads": 1, "device": "cpu",
    }  # fmt: skip
    return fit(store, asked, tmp_path_factory.mktemp("runs") / "run", quiet=True).folder


def test_a_grid_prints_its_runs_side_by_side_and_what_failed(store: Store, say: Say, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    said = say("run", store.path, *SMALL, "--method", "topk", "--grid", "optimiser.lr=1e-3,1e30", "--out", out)
    assert said.code == 1
    assert (
        said.err.splitlines()[-1]
        == f"error: runs failed: 1 of 2. Where another try may help, they go on with: train resume {out}"
    )
    lines = said.out.splitlines()
    assert lines[0].split() == ["run", "FVE", "a", "FVE", "b", "L0", "dead"] and lines[1].split()[0] == "0-lr=0.001"
    assert lines[3:5] == [f"store   {store.path}", f"runs    {out}"]
    assert lines[5].startswith("1-lr=1e+30: the loss is not finite")
    again = say("resume", out, "--json")
    told = json.loads(again.out)
    assert again.code == 1 and list(told["runs"]) == ["0-lr=0.001"] and list(told["failed"]) == ["1-lr=1e+30"]
    two = say("resume", out / "0-lr=0.001", out / "0-lr=0.001")
    assert two.code == 0 and two.out.count("\n0-lr=0.001 ") == 1


def test_a_plan_of_a_run_and_of_a_sweep_in_text_and_json(
    store: Store, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = say("plan", store.path, *SMALL, "--method", "topk")
    assert said.code == 0 and said.out.startswith(f"store    {store.path}: 200 rows\nrows     ") and said.err == ""
    told = json.loads(say("plan", store.path, *SMALL, "--method", "topk", "--grid", "seed=0,1", "--json").out)
    assert [one["run"] for one in told["runs"]] == ["0-seed=0", "1-seed=1"] and told["passes"] == [
        ["0-seed=0", "1-seed=1"]
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--grid", "method.k"], "wrong value for sweep.grid.method.k: []. Give a list of values, such as [1]"),
        (["--grid", "method.kk=1,2"], "unknown key: method.kk. Did you mean"),
        (["--grid", "seed=1,1"], "two runs of the sweep are the same: 0-seed=1 and 1-seed=1. Leave one out"),
        (["--grid", "seed=0,1", "--gpus", "x"], "wrong value for --gpus: x. Give numbers, such as 0,1, or: all"),
        (["--grid", "seed=0,1", "--memory", "0.0000001"], "the run does not fit into memory: "),
        (["--set", "sweep=3"], "wrong value for sweep"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    store: Store, say: Say, tmp_path: Path, options: list[str], told: str
) -> None:
    said = say("run", store.path, *SMALL, "--method", "topk", *options, "--out", tmp_path / "out")
    assert said.code == 2 and said.err.startswith(f"error: {told}") and said.err.count("\n") == 1, said.err
    assert said.out == "" and not (tmp_path / "out").exists()


def test_run_prints_its_figures_and_where_everything_is(store: Store, say: Say, tmp_path: Path) -> None:
    out = tmp_path / "here"
    said = say("run", store.path, "--method", "batch_topk", "--wiring", "dedicated", *SMALL, "--out", out)
    assert said.code == 0
    figures = json.loads((out / "measure.json").read_text())
    assert said.out.startswith(report.text(figures))
    assert f"store       {store.path}" in said.out
    assert f"dictionary  {out / 'dictionary'}" in said.out and f"report      {out / 'report.html'}" in said.out
    assert "training dedicated batch_topk" in said.err and "Traceback" not in said.err


def test_run_with_json_prints_one_object_and_nothing_else(store: Store, say: Say, tmp_path: Path) -> None:
    said = say("run", store.path, "--method", "standard", *SMALL[:8], "--out", tmp_path / "r", "--json")
    found = json.loads(said.out)
    assert said.code == 0 and found.pop("folder") == str(tmp_path / "r")
    assert found == json.loads((tmp_path / "r" / "measure.json").read_text())


def test_flags_are_laid_over_settings_and_settings_over_the_file(store: Store, say: Say, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'steps = 2\nbatch = 8\nseed = 7\nthreads = 1\n[wiring]\nkind = "transcoder"\nlatents = 16\n'
        '[method]\nname = "topk"\nk = 2\n[log]\nevery = 1\n'
    )
    said = say(
        "run", store.path, "--config", file, "--set", "seed=8", "--set", "batch=9", "--seed", "9", "--sources", "b,a",
        "--out", tmp_path / "r",
    )  # fmt: skip
    assert said.code == 0, said.err
    found = Dictionary.load(tmp_path / "r")
    text = (tmp_path / "r" / "config.toml").read_text()
    assert "seed = 9" in text and "batch = 9" in text and "steps = 2" in text
    assert found.wiring.readers == ("b",) and found.method.model_dump()["k"] == 2


def test_a_run_that_is_terminated_says_how_to_go_on_and_goes_on(
    store: Store, say: Say, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, genuine = tmp_path / "r", Trainer.update

    def update(self: Trainer, x: Any) -> Any:
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return genuine(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        said = say("run", store.path, "--method", "topk", "--wiring", "dedicated", *SMALL, "--out", out)
    assert said.code == 143 and said.out == ""
    assert said.err.endswith(f"stopped at step 3; to go on: train resume {out}\nterminated\n")
    again = say("resume", out)
    assert again.code == 0 and f"going on with {out} at step 3 of 4" in again.err
    figures = json.loads((out / "measure.json").read_text())
    assert again.out.startswith(report.text(figures)) and f"store       {store.path}" in again.out
    assert figures == json.loads((run / "measure.json").read_text())
    finished = say("resume", out, "--json")
    assert (
        json.loads(finished.out) == {"folder": str(out), **figures} and finished.err == f"{out} is finished already\n"
    )
    wrong = say("resume", out / "checkpoints")
    assert (
        wrong.code == 1
        and wrong.err.startswith(f"error: no run here: {out / 'checkpoints'}. ")
        and wrong.err.count("\n") == 1
    )


def test_measure_gives_the_figures_of_the_run(store: Store, say: Say, run: Path) -> None:
    figures = json.loads((run / "measure.json").read_text())
    said = say("measure", run)
    assert (said.code, said.out.strip()) == (0, report.text(figures))
    for arguments in ([run], [run / "dictionary"], [run, "--store", store.path]):
        said = say("measure", *arguments, "--json")
        assert (said.code, json.loads(said.out), said.err) == (0, figures, "")
    few = json.loads(say("measure", run, "--rows", 5, "--json").out)
    assert few == measure(Dictionary.load(run), store, 5, quiet=True)


def test_measure_refuses_a_store_of_another_site(store: Store, say: Say, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(store.path, tmp_path / "other.zarr")
    group = json.loads((other / "zarr.json").read_text())
    group["attributes"]["granary"]["sources"]["b"]["site"] = "resid.7"
    text = json.dumps(group).ljust((other / "zarr.json").stat().st_size)
    (other / "zarr.json").write_text(text)
    sealed = json.loads((other / "sealed").read_text())
    sealed["files"]["zarr.json"][0] = len(text)
    (other / "sealed").write_text(json.dumps(sealed))
    for folder in (run, run / "dictionary"):
        said = say("measure", folder, "--store", other)
        assert said.code == 1
        assert said.err.startswith(
            "error: b is another site in this store: resid.1 -> resid.7. Give a store of the site"
        )


def test_measure_reads_as_many_rows_as_the_run_did(store: Store, say: Say, tmp_path: Path) -> None:
    arguments = ("--method", "topk", "--out", tmp_path / "run", "--set", "log.measure_rows=7", "--json")
    figures = {k: v for k, v in json.loads(say("run", store.path, *SMALL, *arguments).out).items() if k != "folder"}
    assert figures["rows"] == 7
    assert json.loads(say("measure", tmp_path / "run", "--json").out) == figures
    assert json.loads(say("measure", tmp_path / "run" / "dictionary", "--json").out) == figures


def test_a_run_can_be_measured_from_another_folder(
    store: Store, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    assert say("run", store.path.name, "--method", "topk", *SMALL, "--out", tmp_path / "r").code == 0
    monkeypatch.chdir(tmp_path)
    assert say("measure", "r", "--json").code == 0


def test_methods_lists_every_method_with_its_keys(say: Say) -> None:
    said, listed = say("methods"), json.loads(say("methods", "--json").out)
    assert said.code == 0 and [line for line in said.out.splitlines() if not line.startswith(" ")] == names()
    assert sorted(listed) == names()
    assert listed["topk"]["k"] == 32 and "k=32" in said.out


def test_compare_tells_how_alike_two_dictionaries_are(say: Say, run: Path) -> None:
    said = say("compare", run, run / "dictionary")
    assert said.code == 0 and said.out.splitlines()[0].split() == [
        "source", "latents", "mean", "median", "above_0.7", "above_0.9",
    ]  # fmt: skip
    assert said.out.splitlines()[1].split() == ["a", "30", "1.0000", "1.0000", "1.0000", "1.0000"]
    assert json.loads(say("compare", run, run, "--json").out)["b"]["mean"] == pytest.approx(1)
    missing = say("compare", run, run / "nothing")
    assert missing.code == 1 and missing.err.startswith("error: no dictionary here: ")


def test_show_says_what_a_dictionary_is(say: Say, run: Path) -> None:
    said, described = say("show", run), json.loads(say("show", run / "dictionary", "--json").out)
    assert said.code == 0
    assert [span["name"] for span in described["spans"]] == ["only_a", "shared", "only_b"]
    assert described["parameters"] == 32 + 2 * 30 * 6 + 2 * 30 * 4 + 6 + 4
    assert "span        only_a: 2 latents, a -> a" in said.out
    assert "span        shared: 28 latents, a + b -> a + b" in said.out
    assert "source      b: width 4, rows are scaled by " in said.out


def test_show_says_what_is_special_about_spans(say: Say, tmp_path: Path) -> None:
    spans = (Span("one", 6, ("a",), ("b",), k=2, weight=0.5), Span("two", 10, ("a",), ("b", "c"), tied=True))
    wires = Wiring(spans, {"a": 4, "b": 6, "c": 6}, skip=True)
    create(wires, cases.method("topk"), Scale(wires.widths), "sum", 1)[0].save(tmp_path / "d")
    told = say("show", tmp_path / "d").out
    assert "span        one: 6 latents, a -> b, keeps 2, weight 0.5\n" in told
    assert "span        two: 10 latents, a -> b + c, one vector for all\n" in told
    assert "\nskip        a linear map from what is read to what is written\n" in told


def test_a_difference_is_a_source_of_run_measure_and_show(say: Say, tmp_path: Path) -> None:
    widths = {"base": 6, "chat": 6}
    store = make_store(tmp_path / "twins.zarr", rows=200, shard_rows=256, chunk_rows=16, sources=widths, documents=20)
    arguments = ("--method", "topk", "--wiring", "dedicated", *SMALL, "--out", tmp_path / "r")
    said = say("run", store.path, "--sources", "base, chat - base", *arguments)
    assert said.code == 0 and "\nchat - base  " in said.out
    figures = json.loads((tmp_path / "r" / "measure.json").read_text())
    assert list(figures["sources"]) == ["base", "chat - base"]
    assert json.loads(say("measure", tmp_path / "r", "--store", store.path, "--json").out) == figures
    shown = say("show", tmp_path / "r").out
    assert "source      chat - base: width 6, rows are scaled by " in shown
    assert "span        shared: 28 latents, base + (chat - base) -> base + (chat - base)\n" in shown
    assert "span        only_chat - base: 2 latents, (chat - base) -> (chat - base)\n" in shown


def test_several_stores_are_trained_on_and_measured_as_one(
    store: Store, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = make_store(tmp_path / "more.zarr", rows=150, shard_rows=256, chunk_rows=16, documents=20, corpus="more/")
    weights = ("--set", "rows.weights.pair=0.3", "--set", "rows.weights={pair = 0.25, more = 0.75}")
    arguments = ("--method", "topk", *SMALL, "--out", tmp_path / "r", *weights)
    monkeypatch.chdir(tmp_path)
    said = say("run", store.path, "more.zarr", *arguments)
    assert said.code == 0 and f"store       {store.path}\nstore       more.zarr\n" in said.out
    assert re.search(r", weights \d+\)", said.err)
    figures = json.loads((tmp_path / "r" / "measure.json").read_text())
    monkeypatch.chdir(store.path.parent)
    both = ("--store", store.path, "--store", more.path)
    assert json.loads(say("measure", tmp_path / "r", "--json").out) == figures
    assert json.loads(say("measure", tmp_path / "r", *both, "--json").out) == figures
    alone = json.loads(say("measure", tmp_path / "r", "--store", more.path, "--json").out)
    assert alone == measure(Dictionary.load(tmp_path / "r"), more, quiet=True)
    resumed = json.loads(say("resume", tmp_path / "r", *both, "--json").out)
    assert resumed == {"folder": str(tmp_path / "r"), **figures}


@pytest.mark.parametrize("command", ["run", "measure", "methods", "show"])
def test_every_command_has_help_with_an_example(say: Say, command: str) -> None:
    said = say(command, "--help")
    assert said.code == 0 and f"Example: train {command}" in said.out


# --- mistakes ---------------------------------------------------------------------------------------------------


def assert_one_line(said: Said, code: int, *parts: str) -> None:
    assert said.out == "" and said.err.endswith("\n") and said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: ") and said.code == code
    for part in parts:
        assert part in said.err


BASE = ["--method", "topk", *SMALL]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([*BASE, "--set", "optimiser.lrr=1"], 2, ["unknown key: optimiser.lrr", "optimiser.lr"]),
        ([*BASE, "--set", "method.kk=1"], 2, ["unknown key: method.kk"]),
        ([*BASE, "--set", "method.k=33"], 2, ["k is larger than the latents: 33 > 32"]),
        ([*BASE, "--set", "method.k=three"], 2, ["wrong value for method.k: 'three'"]),
        ([*BASE, "--set", "method=5"], 2, ["this key is a value and has no keys below it: method.name"]),
        ([*BASE, "--set", "nonsense"], 2, ["a setting must read KEY=VALUE: nonsense"]),
        ([*BASE, "--wiring", "autoencoder"], 2, ["autoencoder needs 1 source(s): a, b. Set wiring.sources"]),
        ([*BASE, "--wiring", "transcoder", "--sources", "a"], 2, ["transcoder needs 2 source(s): a"]),
        ([*BASE, "--wiring", "sae"], 2, ["wrong value for wiring.kind: 'sae'"]),
        ([*BASE, "--sources", "a,c"], 1, ["this store has no source: c. It has: a, b"]),
        ([*BASE, "--sources", "a,c - a"], 1, ["this store has no source: c. It has: a, b"]),
        ([*BASE, "--sources", "a,b - b"], 2, ["a source less itself is 0: 'b - b'. Name two sources"]),
        ([*BASE, "--sources", "a, a - b"], 1, ["a difference is of sources of one width: a has 6, b has 4"]),
        ([*BASE, "--method", "top-k"], 2, ["unknown method: top-k. Did you mean topk"]),
        ([*BASE, "--device", "gpu"], 2, ["this device cannot be used: gpu"]),
        ([*BASE, "--config", "nowhere.toml"], 2, ["cannot read the config file: nowhere.toml"]),
        (SMALL, 2, ["missing key: method.name"]),
        (["--method", "topk", "--latents", "64"], 2, ["missing key: steps"]),
        (["--method", "topk", "--steps", "4"], 2, ["missing key: wiring"]),
    ],
)  # fmt: skip
def test_a_wrong_call_of_run_is_one_line_and_makes_nothing(
    store: Store, say: Say, tmp_path: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    assert_one_line(say("run", store.path, *arguments, "--out", tmp_path / "r"), code, *parts)
    assert not (tmp_path / "r").exists()


def test_what_is_no_store_or_not_a_finished_one_is_refused_and_left_alone(
    store: Store, say: Say, tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished.zarr"
    shutil.copytree(store.path, unfinished)
    (unfinished / "sealed").unlink()
    (unfinished / "receipts" / "00000.model_b.json").unlink()
    before = sorted(path.relative_to(unfinished) for path in unfinished.rglob("*"))
    said = say("run", unfinished, *BASE, "--out", tmp_path / "r")
    assert_one_line(said, 1, "this store is not finished", "1 of 2 units", "harvest run")
    assert sorted(path.relative_to(unfinished) for path in unfinished.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", Path(__file__)):
        assert_one_line(say("run", path, *BASE, "--out", tmp_path / "r"), 1, f"no Granary store here: {path}")
    assert not (tmp_path / "r").exists()


def test_stores_that_make_no_mixture_are_refused_in_one_line(store: Store, say: Say, tmp_path: Path) -> None:
    narrow = make_store(tmp_path / "narrow.zarr", chunk_rows=16, sources={"a": 6, "b": 3}, corpus="x/")
    said = say("run", store.path, narrow.path, *BASE, "--out", tmp_path / "r")
    assert_one_line(said, 1, f"must have the same width of b: {store.path} has 4, {narrow.path} has 3. Harvest")
    said = say("run", store.path, store.path, *BASE, "--out", tmp_path / "r")
    assert_one_line(
        said, 1, f"a store stands twice in a mixture: {store.path} and {store.path} both read the one whose id"
    )
    more = make_store(tmp_path / "more.zarr", rows=150, chunk_rows=16, corpus="more/")
    weights = ("--set", "rows.weights={pair = 1, mor = 2}")
    said = say("run", store.path, more.path, *BASE, *weights, "--out", tmp_path / "r")
    assert_one_line(said, 2, "rows.weights names a store that is not there: mor. Did you mean more?")
    assert not (tmp_path / "r").exists()


def test_a_damaged_store_is_refused_with_the_file(store: Store, say: Say, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(store.path, damaged)
    (damaged / "activations" / "a" / "c" / "0" / "0").write_bytes(b"short")
    assert_one_line(say("run", damaged, *BASE, "--out", tmp_path / "r"), 1, "activations/a/c/0/0")


def test_the_folder_of_a_run_is_not_run_into_again(store: Store, say: Say, run: Path) -> None:
    assert_one_line(say("run", store.path, *BASE, "--out", run), 1, "this folder holds a run already", "--out")


@pytest.mark.parametrize("command", ["measure", "show"])
def test_a_folder_without_a_dictionary_is_refused(say: Say, tmp_path: Path, command: str) -> None:
    assert_one_line(say(command, tmp_path / "nowhere"), 1, "no dictionary here", "nowhere")


def test_a_dictionary_that_names_no_store_asks_for_one(say: Say, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "dictionary", tmp_path / "x" / "alone")
    assert_one_line(say("measure", tmp_path / "x" / "alone"), 1, "does not name its store", "--store")


def test_measuring_on_a_store_that_moved_away_or_does_not_fit_is_one_line(say: Say, run: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "o.zarr", rows=60, shard_rows=64, sources={"a": 6, "b": 5}, documents=9)
    assert_one_line(say("measure", run, "--store", other.path, "--json"), 1, "another width of rows", "b has 5")
    assert_one_line(say("measure", run, "--store", tmp_path / "gone.zarr"), 1, "no Granary store here")


@pytest.mark.parametrize("rows", [0, -3])
def test_measuring_no_rows_is_a_wrong_call(say: Say, run: Path, rows: int) -> None:
    said = say("measure", run, f"--rows={rows}")
    assert said.code == 2 and "--rows" in said.err and "Traceback" not in said.err


def test_a_run_that_diverges_ends_with_one_line(store: Store, say: Say, tmp_path: Path) -> None:
    said = say(
        "run", store.path, *BASE, "--set", "optimiser.lr=1e30", "--set", "optimiser.warmup=0", "--out", tmp_path / "r"
    )
    assert said.code == 1 and "Traceback" not in said.err
    assert said.err.splitlines()[-1].startswith("error: the loss is not finite")


# --- a store at a URL -----------------------------------------------------------------------------------------------


@pytest.fixture
def full(bucket: Bucket, store: Store) -> Bucket:
    bucket.fill({p.relative_to(store.path).as_posix(): p.read_bytes() for p in store.path.rglob("*") if p.is_file()})
    return bucket


def test_run_on_a_url_makes_a_copy_and_then_needs_no_network(
    store: Store, full: Bucket, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = say("run", store.path, "--method", "topk", *SMALL, "--out", tmp_path / "local", "--json")
    said = say("run", full.url, "--method", "topk", *SMALL, "--out", tmp_path / "1")
    assert said.code == 0 and f"store       {full.url}" in said.out and "staging: 100%" in said.err
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    again = say("run", full.url, "--method", "topk", *SMALL, "--out", tmp_path / "2", "--json")
    figures = [json.loads(text) for text in (local.out, again.out)]
    assert figures[0] == {**figures[1], "folder": figures[0]["folder"]}
    measured = say("measure", tmp_path / "1", "--json")  # on the copy that the run names
    assert json.loads(measured.out).items() <= figures[0].items()


def test_stage_names_the_place_of_the_copy(full: Bucket, run: Path, say: Say, tmp_path: Path) -> None:
    said = say("measure", run, "--store", full.url, "--stage", tmp_path / "copies", "--json")
    assert said.code == 0 and json.loads(said.out) == json.loads((run / "measure.json").read_text())
    assert [path.name.split("-")[0] for path in (tmp_path / "copies").iterdir() if path.is_dir()] == ["pair.zarr"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "STORE", "--method", "topk", *SMALL, "--out", "s3://bucket/run"),
        ("run", "s3://bucket/x.zarr", "--method", "topk", *SMALL, "--stage", "s3://bucket/run"),
        ("measure", "s3://bucket/run"), ("show", "s3://bucket/run"),
    ],
    ids=["run --out", "run --stage", "measure", "show"],
)  # fmt: skip
def test_a_run_has_a_folder_and_no_url(
    store: Store, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = say(*(store.path if word == "STORE" else word for word in words))
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1) and "s3://bucket/run" in said.err
    assert not list(tmp_path.iterdir())
