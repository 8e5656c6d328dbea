"""A run on batches of an iterator: what it writes, that it repeats, and what it refuses before any work."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import CheckpointError, GranaryError, RowsError, TrainingError
from tests import cases
from tests.build import make_store
from train.dictionary import Dictionary
from train.fit import fit, resume
from train.measure import Measure

ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 32, "exclusive": 4}, "method": {"name": "batch_topk", "k": 3},
    "steps": 30, "batch": 16, "threads": 1, "log": {"every": 10, "measure_rows": 50}, "device": "cpu",
    "optimiser": {"lr": 1e-2, "warmup": 2}, "scale": {"kind": "none", "centre": False},
}  # fmt: skip


def made(batches: int = 10**6, seed: int = 0, batch: int = 16) -> Iterator[dict[str, Tensor]]:
    planted = cases.planted("dedicated")
    for step in range(batches):
        yield planted.rows(batch, seed=1000 * seed + step)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(table: str, **keys: Any) -> dict[str, Any]:
    return {**ASKED, table: {**ASKED.get(table, {}), **keys}}


def test_a_run_learns_and_is_measured_on_the_batches_behind_those_it_was_trained_on(tmp_path: Path) -> None:
    served: list[dict[str, Tensor]] = []

    def watched() -> Iterator[dict[str, Tensor]]:
        for x in made():
            served.append(x)
            yield x

    run = fit(watched(), ASKED, tmp_path / "run", quiet=True)
    assert len(served) == 30 + 4  # 50 rows to measure on, in batches of 16
    steps = [event for event in events(run.folder) if event["event"] == "step"]
    assert [event["step"] for event in steps] == [10, 20, 30] and steps[-1]["loss"] < steps[0]["loss"]
    total = Measure(run.dictionary)
    for x in served[30:]:
        total.add(x)
    assert run.figures == json.loads(json.dumps(total.result() | {"training_rows": 0}))
    assert run.figures["rows"] == 64
    files = {path.name for path in run.folder.iterdir()}
    assert files == {"config.toml", "store.json", "metrics.jsonl", "dictionary", "measure.json", "report.html"}
    page = (run.folder / "report.html").read_text()
    assert "Batches made as needed" in page and "only_a" in page


def test_the_same_batches_give_the_same_bits_and_what_a_config_says_counts(tmp_path: Path) -> None:
    def weights(name: str, config: Mapping[str, Any], seed: int = 0) -> bytes:
        folder = fit(made(seed=seed), config, tmp_path / name, quiet=True).folder
        return (folder / "dictionary" / "dictionary.safetensors").read_bytes()

    one = weights("one", ASKED)
    assert weights("two", ASKED) == one
    assert weights("three", ASKED, seed=1) != one and weights("four", {**ASKED, "seed": 1}) != one


def test_rows_of_any_float_type_and_of_sources_that_are_not_asked_for(tmp_path: Path) -> None:
    def halves() -> Iterator[dict[str, Tensor]]:
        for x in made():
            yield {**{name: x_BD.half() for name, x_BD in x.items()}, "unread": torch.zeros(16, 3)}

    asked = changed("wiring", sources=["b", "a"])
    assert list(fit(halves(), asked, tmp_path / "run", quiet=True).dictionary.wiring.widths) == ["b", "a"]


def test_thresholds_are_calibrated_on_batches_of_their_own(tmp_path: Path) -> None:
    run = fit(made(), changed("method", calibrate=True), tmp_path / "run", quiet=True)
    plain = fit(made(), ASKED, tmp_path / "plain", quiet=True)
    assert run.figures["l0"] == pytest.approx(3, abs=0.6)
    names = ("activation.mean", "encoder.a")
    same = [torch.equal(*(one.dictionary.state_dict()[name] for one in (run, plain))) for name in names]
    assert same == [False, True]


NO_STORE: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({**ASKED, "scale": {}}, r"no known scale: scale\.kind median_norm, centre True\. Scale them"),
    "centre": (changed("scale", centre=True), r"no known scale: scale\.kind none, centre True\. Scale them"),
    "twice": (changed("wiring", sources=["a", "b", "a"]), "a source is named twice: a, b, a"),
    "batch": ({**ASKED, "batch": 8}, r"batch 0 does not fit the run: a: \(16, 20\), not \(8, 20\)"),
    "memory": (changed("wiring", latents=10**12), "the run does not fit into memory"),
    "bias": (changed("init", bias="median"), "a bias begins at rows of a store: init.bias median"),
    "rows": (changed("rows", split="all"), r"this is for runs on a store: \[rows\]"),
    "resample": (changed("resample", steps=[3]), r"this is for runs on a store: \[resample\]"),
    "source": (changed("wiring", sources=["a", "c"]), "the batches have no such source: c. They have: a, b"),
    "wiring": (changed("wiring", exclusive=16), "no latent is left to share"),
    "k": (changed("method", k=33), "k is larger than the latents"),
}


@pytest.mark.parametrize("case", NO_STORE)
def test_what_cannot_be_is_said_before_any_work(case: str, tmp_path: Path) -> None:
    asked, told = NO_STORE[case]
    with pytest.raises(GranaryError, match=told):
        fit(made(), asked, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_batches_that_are_wrong_are_named(tmp_path: Path) -> None:
    def then(other: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        yield from made(3)
        yield other

    [x] = made(1)
    wrong = {
        r"batch 3 does not fit the run: a: \(7, 20\), not \(16, 20\)": {**x, "a": x["a"][:7]},
        r"batch 3 does not fit the run: b: \(16, 5\), not \(16, 16\)": {**x, "b": x["b"][:, :5]},
        r"batch 3 does not fit the run: b: no rows": {"a": x["a"]},
    }
    for number, (told, other) in enumerate(wrong.items()):
        with pytest.raises(RowsError, match=told):
            fit(then(other), ASKED, tmp_path / str(number), quiet=True)
    for number in (2, 31):  # while it trains, and while it is measured
        bad = ({**one, "b": one["b"] * (torch.nan if n == number else 1)} for n, one in enumerate(made()))
        with pytest.raises(RowsError, match=f"batch {number} does not fit the run: b holds values that are not finite"):
            fit(bad, ASKED, tmp_path / f"nan{number}", quiet=True)
        assert [event["event"] for event in events(tmp_path / f"nan{number}")][-1] == "failed"


def test_what_is_no_batch_is_told_before_any_work(tmp_path: Path) -> None:
    [x] = made(1)
    wrong: dict[str, tuple[Any, str]] = {
        "tensors": (iter([x["a"]]), "the iterator gives no batch of rows"),
        "none": (iter([]), "the iterator gives no batch of rows: None"),
        "lines": (iter([{"a": x["a"][0], "b": x["b"]}]), r"a: \(20,\), not \(16, 20\)"),
        "numbers": (iter([{0: x["a"], 1: x["b"]}]), "a source of this name cannot be: 0"),
        "dots": (iter([{"l13.resid": x["a"], "b": x["b"]}]), "a source of this name cannot be: 'l13.resid'"),
        "nothing": (iter([{"a": x["a"][:, :0], "b": x["b"]}]), r"a: \(16, 0\), not \(16, D\)"),
        "list": ([x], r"these are batches, and no stores: a list of 1\. Give their iterator"),
    }
    for given, told in wrong.values():
        with pytest.raises(GranaryError, match=told):
            fit(given, ASKED, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


def test_arrays_and_what_gives_an_iterator_are_taken_too(tmp_path: Path) -> None:
    class Given:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({name: x_BD.numpy() for name, x_BD in x.items()} for x in made())

    arrays, tensors = (fit(rows, ASKED, tmp_path / name, quiet=True) for name, rows in (("a", Given()), ("b", made())))
    assert arrays.figures == tensors.figures


def test_an_iterator_that_ends_too_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the batches have come to an end: after 12\. 18 more are needed"):
        fit(made(12), ASKED, tmp_path / "twelve", quiet=True)
    with pytest.raises(TrainingError, match=r"after 31\. 3 more are needed"):
        fit(made(31), ASKED, tmp_path / "measure", quiet=True)


def test_such_a_run_cannot_go_on_and_is_told_from_others(tmp_path: Path) -> None:
    run = fit(made(), ASKED, tmp_path / "run", quiet=True)
    assert resume(run.folder, quiet=True).figures == run.figures  # it is finished
    (run.folder / "report.html").unlink()
    store = make_store(tmp_path / "pair.zarr", rows=100)
    for given in (None, store):
        with pytest.raises(CheckpointError, match="this run read no store, but batches that were made for it"):
            resume(run.folder, given, quiet=True)
    assert isinstance(Dictionary.load(run.folder), Dictionary)
