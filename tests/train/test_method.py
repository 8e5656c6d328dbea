"""Methods are found by their file names; what the methods that keep k latents have in common."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train.methods
from shared.errors import ConfigError, WiringError
from shared.store import Store
from tests import cases
from tests.build import make_store
from train import method as methods
from train.fit import fit, resume
from train.measure import measure
from train.method import TopKConfig
from train.wiring import build

WIRING = build("crosscoder", {"a": 20, "b": 16}, 48)


def test_the_three_methods_are_there() -> None:
    assert {"standard", "topk", "batch_topk"} <= set(methods.names())


@pytest.mark.parametrize("name", cases.names())
def test_a_method_is_parsed_from_its_name_and_from_its_table(name: str) -> None:
    config = methods.parse(name)
    assert config.name == name
    assert methods.parse({"name": name}) == config
    assert methods.parse(config.model_dump(mode="json")) == config
    assert methods.find(name).__module__ == f"train.methods.{name}"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("batchtopk", "unknown method: batchtopk. Did you mean batch_topk"),
        ({"name": "relu-ish"}, "unknown method: relu-ish. Did you mean jumprelu"),
        ({"name": 5}, "unknown method: 5"),
        ({"k": 3}, "missing key: method.name. Choose one of batch_topk"),
        ({"name": "topk", "k_anealed": 1}, "unknown key: method.k_anealed. Did you mean method.k_anneal"),
        ({"name": "topk", "k": 0}, "wrong value for method.k: 0"),
        ({"name": "batch_topk", "threshold_decay": 1.0}, "wrong value for method.threshold_decay"),
        ({"name": "standard", "k": 3}, "unknown key: method.k"),
    ],
)
def test_a_wrong_method_is_refused_with_the_way_out(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        methods.parse(asked)


@pytest.mark.parametrize("name", [n for n in cases.names() if issubclass(methods.find(n), TopKConfig)])
def test_a_k_larger_than_the_latents_is_refused_at_any_step(name: str) -> None:
    assert methods.parse({"name": name, "k": 48}).build(WIRING, 10)
    for keys in ({"k": 49}, {"k": 3, "k_start": 49, "k_anneal": 5}):
        with pytest.raises(WiringError, match="k is larger than the latents: 49 > 48"):
            methods.parse({"name": name, **keys}).build(WIRING, 10)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_k_goes_from_its_start_to_its_end_and_without_steps_is_at_its_end_at_once(name: str) -> None:
    def ks(**keys: int) -> list[int]:
        activation = methods.parse({"name": name, **keys}).build(WIRING, 10).activation
        assert activation.counts == [ks_at(activation, 0)]
        return [ks_at(activation, step) for step in range(6)]

    def ks_at(activation: Any, step: int) -> int:
        activation.schedule(step)
        return int(activation.counts[0])

    assert ks(k=2, k_start=10, k_anneal=4) == [10, 8, 6, 4, 2, 2]
    assert ks(k=10, k_start=2, k_anneal=4) == [2, 4, 6, 8, 10, 10]
    assert ks(k=2, k_start=10) == [2] * 6
    assert ks(k=2, k_anneal=4) == [2] * 6


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_auxk_defaults_to_half_the_mean_width_of_the_sources(name: str) -> None:
    def k_aux(**keys: int) -> int:
        term: Any = methods.parse({"name": name, **keys}).build(WIRING, 10).terms[1]
        assert term.name == "aux" and term.weight(5) == 1 / 32
        return int(term.k_aux)

    assert (k_aux(), k_aux(k_aux=7)) == (9, 7)


@pytest.mark.parametrize("name", cases.names())
def test_no_term_has_the_name_of_a_figure(name: str) -> None:
    extras = {key: 1.0 for key in ("multi", "entropy", "ghost", "silent") if key in methods.find(name).model_fields}
    keys = {"groups": [0.5, 0.5]} if name == "matryoshka" else {}
    terms = [term.name for term in methods.parse({"name": name, **extras, **keys}).build(WIRING, 10).terms]
    assert len(set(terms)) == len(terms) >= 2 and not set(terms) & {"loss", "l0", "dead", "gradient", "step", "epoch"}


METHOD = '''
"""Twice what ReLU gives, for a test."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from train.code import Activation, Code, DenseCode
from train.pre import Pre
from train.method import Method, MethodConfig
from train.wiring import Wiring


class Config(MethodConfig):
    name: Literal["doubled"] = "doubled"
    factor: float = 2.0

    def build(self, wiring: Wiring, steps: int) -> Method:
        return Method(Doubled(wiring.latents, self.factor), [self.reconstruction()])


class Doubled(Activation):
    def __init__(self, latents: int, factor: float) -> None:
        super().__init__(latents)
        self.factor = factor

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        f_BL = self.factor * relu(pre.dense_BL)
        return DenseCode(f_BL)
'''


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "doubled.py").write_text(METHOD)
    monkeypatch.setattr(train.methods, "__path__", [*train.methods.__path__, str(tmp_path / "methods")])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("train.methods.doubled", None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("method") / "store.zarr", rows=300, documents=20, sources=cases.WIDTHS)


SPANS = [
    {"name": "into_c", "size": 6, "readers": ["a", "b"], "writers": ["c"]},
    {"name": "only_b", "size": 4, "readers": ["b"], "writers": ["b"]},
    {"name": "rest"},
]
WIRINGS: dict[str, dict[str, Any]] = {
    **{case: {"kind": kind, "sources": list(cases.WIDTHS)[:n]} for case, (kind, n) in cases.CASES.items()},
    "spans": {"kind": "spans", "spans": SPANS},
    "readers": {"kind": "crosscoder", "readers": ["a", "c"]},
    "skip": {"kind": "transcoder", "sources": ["a", "b"], "skip": True},
    "unit": {"kind": "dedicated", "decoder": "unit", "norm": "mixed"},
}


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("case", WIRINGS)
def test_a_file_that_is_added_at_run_time_is_trained_saved_resumed_and_measured(
    case: str, store: Store, tmp_path: Path
) -> None:
    asked = {
        "wiring": {"latents": 24, **WIRINGS[case]}, "method": {"name": "doubled", "factor": 3.0}, "steps": 30,
        "batch": 32, "threads": 1, "device": "cpu", "log": {"every": 5, "checkpoint": 15},
        "optimiser": {"lr": 1e-2, "warmup": 2},
        "resample": {"steps": [10, 20], "rows": 50, "idle_rows": 1}, "dead_rows": 100,
    }  # fmt: skip
    whole = fit(store, asked, tmp_path / "run", quiet=True)
    steps = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in steps if event["event"] == "step"]
    assert losses[-1] < 0.9 * losses[0]
    shutil.rmtree(whole.folder / "checkpoints" / "step_00000030")
    (whole.folder / "report.html").unlink()
    again = resume(whole.folder, quiet=True)
    state = whole.dictionary.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.dictionary.state_dict().items())
    assert measure(again.dictionary, store, quiet=True) == whole.figures == again.figures
    assert again.dictionary.method.model_dump() == {"name": "doubled", "factor": 3.0, "recon": "squared"}


@pytest.mark.usefixtures("doubled")
def test_a_file_that_is_added_at_run_time_is_listed_and_its_keys_are_checked() -> None:
    assert "doubled" in methods.names()
    with pytest.raises(ConfigError, match=r"unknown key: method\.factr"):
        methods.parse({"name": "doubled", "factr": 1})
