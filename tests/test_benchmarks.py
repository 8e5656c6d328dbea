"""The benchmarks run and report. What they measure is no test's business: a machine that is shared has no timings."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.benchmarks import device, harvest, loader, memory, put, step, sweep, whole
from train.code import DenseCode, SparseCode

pytestmark = pytest.mark.slow


def said(
    main: Callable[[], None], given: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr("sys.argv", ["benchmark", *given])
    main()
    return capfd.readouterr().out


def test_put_is_compared_with_a_plain_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = said(put.main, ["20", "7", str(tmp_path)], monkeypatch, capfd)
    assert "7 interleaved pairs" in told and re.search(r"\nratio +\d+\.\d{3} ", told)
    assert re.search(r"limit 0\.8: (holds|MISSED)\n$", told)
    assert not list(tmp_path.iterdir())


def test_memory_is_told_by_phase_and_rows(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    told = said(memory.main, ["300"], monkeypatch, capfd)
    assert re.search(r"peak, MB +300 rows +1,200 rows +4,800 rows", told)
    assert len(re.findall(r"\n(?:read the corpus|plan|make units), (?:anonymous|of files)(?: +[\d.-]+){4}", told)) == 6


def test_the_loader_is_compared_with_what_people_do_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(loader.main, ["8", "64", "2", "2"], monkeypatch, capfd)
    assert len(re.findall(r"\nratio +[\d.]+ ", told)) == 3 and "limit 20" in told and not list(tmp_path.iterdir())


def test_the_ways_of_the_loader_come_as_a_table(tmp_path: Path) -> None:
    asked = ["-p", "no:xdist", "tests/benchmarks/loader.py", "-k", "512x1", "--basetemp", str(tmp_path / "t")]
    # A worker of xdist tells its children that they are such workers, too, and benchmarks would then not run.
    here = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *asked], env=here, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert all(re.search(rf"\ntest_way\[512x1-{way}\] +[\d.,]+ \(", run.stdout) for way in loader.ROUNDS)


def test_batches_on_a_device_are_compared_with_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(device.main, ["8", "64", "128", "3", "cpu"], monkeypatch, capfd)
    assert len(re.findall(r"\nratio +[\d.]+ ", told)) == 2 and re.search(r"\nstall +\d+\.\d\d%\nlimit 2%: ", told)
    assert not list(tmp_path.iterdir())


def test_runs_at_once_are_compared_with_their_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(sweep.main, ["64", "32", "2"], monkeypatch, capfd)
    assert "8 runs of 64 latents" in told and re.search(r"limit 0\.909: (holds|MISSED)\n$", told)
    assert not list(tmp_path.iterdir())


def test_a_whole_run_is_compared_with_its_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said(whole.main, ["topk", "64", "64", "40"], monkeypatch, capfd)
    assert len(re.findall(r"\nrun +[\d,]+ rows/s   step +[\d,]+ rows/s   ratio", "\n" + told)) == 7
    assert re.search(r"limit 0\.9: (holds|MISSED)\n$", told)
    assert not list(tmp_path.iterdir())


def test_a_step_is_compared_with_the_product_of_its_encoder_and_with_the_dense_reference(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(step.main)
    words = "--kinds dedicated --methods topk,jumprelu,standard --widths 24 --latents 320 --k 4 --batch 64 --rounds 2"
    out = tmp_path / "step.json"
    done = CliRunner().invoke(app, [*words.split(), "--device", "cpu", "--out", str(out)])
    assert done.exit_code == 0, done.output
    steps, _, taken = done.output.partition("\nmemory, over rows x latents in fp32\n")
    lines = steps.splitlines()[2:]
    assert len(lines) == len(set(lines)) == len(taken.splitlines()) == 4
    assert all(re.search(r"bare +\d+ ms   step \d+\.\d\d \(", one) for one in lines)
    told = json.loads(out.read_text())["cases"]
    found = [(one["method"], one["dead"]) for one in told]
    assert found == [("topk", 0), ("topk", 0.1), ("jumprelu", 0), ("standard", 0)]
    assert all("dense" in one for one in told)
    assert all(one["memory"] is None or one["memory"] > 0 for one in told)


STUB = """
import json, sys, torch
saved = torch.load(sys.argv[-1], weights_only=True)
h = (saved["x"] @ saved["encoder"].T).relu()
kept = h * (h >= h.topk(int(sys.argv[-2]), 1).values[:, -1:])
print(json.dumps(float((kept @ saved["decoder"] - saved["x"]).square().sum(1).mean()) * FACTOR), flush=True)
for _ in sys.stdin:
    print(json.dumps(10.0), flush=True)
"""


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_another_library_is_compared_where_it_reconstructs_the_batch_alike(tmp_path: Path, factor: float) -> None:
    stub, python = tmp_path / "stub.py", tmp_path / "eai-sparsify" / "bin" / "python"
    stub.write_text(STUB.replace("FACTOR", str(factor)))
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {stub} $@\n")
    python.chmod(0o755)
    case, cpu = step.Case("autoencoder", "topk", 24, 320, 4, 64, 0.0), torch.device("cpu")
    if factor == 1:
        told = step.measured(case, cpu, 2, tmp_path)
        assert told["eai-sparsify"]["least"] > 10 and "eai-sparsify" in step.line(case, told)
    else:
        with pytest.raises(AssertionError, match=r"eai-sparsify: [\d.]+ is not our [\d.]+"):
            step.measured(case, cpu, 2, tmp_path)


@pytest.mark.parametrize(("kernels", "kind"), [("sparse", SparseCode), ("dense", DenseCode)])
def test_the_dense_reference_is_dense_and_k_latents_fire_whatever_the_method_is(kernels: str, kind: type) -> None:
    case = step.Case("crosscoder", "topk", 24, 320, 4, 64, 0.1)
    trainer = case.trainer("cpu", kernels)
    assert isinstance(trainer.dictionary.code(case.rows(torch.device("cpu"))), kind)
    assert int(trainer.dead_L.sum()) == 32
    for method in ("jumprelu", "standard"):
        other = replace(case, method=method, dead=0.0)
        x = other.rows(torch.device("cpu"))
        code = step.begun(other, x, "cpu", kernels).dictionary.code(x)
        assert isinstance(code, kind) and int(code.fires_L().sum()) == pytest.approx(4 * 64, abs=1)


def test_a_harvest_is_compared_with_its_forward_passes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = said(harvest.main, ["7", "cpu"], monkeypatch, capfd)
    assert "7 interleaved pairs" in told and re.search(r"limit 0\.95: (holds|MISSED)\n$", told)
