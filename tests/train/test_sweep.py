"""A sweep's runs: every combination once, an entry each, names that tell them apart, and what makes no sense."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.sweep import expand

BASE: dict[str, Any] = {
    "steps": 5, "wiring": {"latents": 32}, "method": {"name": "batch_topk", "k": 4, "threshold_decay": 0.5},
}  # fmt: skip


def runs(toml: str, **base: Any) -> list[Any]:
    return expand({**BASE, **base, "sweep": tomllib.loads(toml)})


def refused(toml: str, **base: Any) -> str:
    with pytest.raises(ConfigError) as error:
        runs(toml, **base)
    return str(error.value)


def test_a_grid_is_every_combination_with_the_last_key_turning_fastest() -> None:
    found = runs('[grid]\nmethod.k = [2, 4]\n"wiring.latents" = [16, 32, 64]')
    assert [(one.config.method.k, one.config.wiring.latents) for one in found] == [
        (2, 16), (2, 32), (2, 64), (4, 16), (4, 32), (4, 64),
    ]  # fmt: skip
    assert [one.name for one in found][:2] == ["0-k=2-latents=16", "1-k=2-latents=32"]
    assert {one.config.method.threshold_decay for one in found} == {0.5}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_grid_has_as_many_runs_as_the_product_of_its_lists(sizes: list[int]) -> None:
    keys = ["seed", "method.k", "dead_rows"]
    found = expand({**BASE, "sweep": {"grid": {k: list(range(1, n + 1)) for k, n in zip(keys, sizes, strict=False)}}})
    product = 1
    for size in sizes:
        product *= size
    assert len({one.name for one in found}) == len({one.config.model_dump_json() for one in found}) == product


def test_runs_are_listed_and_one_of_another_method_keeps_the_keys_that_both_know() -> None:
    found = runs(
        '[[runs]]\nmethod = {name = "topk"}\nwiring.sources = ["a", "b"]\n'
        '[[runs]]\n"method.k" = 8\n[[runs]]\nmethod = "standard"\nwiring.exclusive = {a = 1, b = 2}'
    )
    assert [one.config.method.name for one in found] == ["topk", "batch_topk", "standard"]
    assert [getattr(one.config.method, "k", None) for one in found] == [4, 8, None]
    assert found[1].config.method.threshold_decay == 0.5
    assert found[0].config.wiring.sources == ["a", "b"] and found[2].config.wiring.exclusive == {"a": 1, "b": 2}
    assert [one.name for one in found] == ["0-topk-sources=a+b", "1-k=8", "2-standard-exclusive=_a_1_b_2_"]


def test_grid_and_runs_multiply() -> None:
    found = runs('[grid]\nseed = [0, 1]\n[[runs]]\nmethod.name = "topk"\n[[runs]]\nmethod.name = "batch_topk"')
    assert [(one.config.method.name, one.config.seed) for one in found] == [
        ("topk", 0), ("topk", 1), ("batch_topk", 0), ("batch_topk", 1),
    ]  # fmt: skip


def test_twelve_runs_are_numbered_so_that_they_sort() -> None:
    names = [one.name for one in expand({**BASE, "sweep": {"grid": {"seed": list(range(12))}}})]
    assert names == sorted(names) and names[0] == "00-seed=0"


def test_a_name_is_short_enough_for_a_folder() -> None:
    [one] = runs(f'[grid]\nrows.documents = [["{"x" * 300}"]]')
    assert len(one.name) == 100


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[grid]\nmethod.k = 3", "sweep.grid.method.k: 3. Give a list of values"),
        ("[grid]\nmethod.k = []", "sweep.grid.method.k: []"),
        ("[grid]\nmethod.q = [3]", "unknown key: method.q"),
        ("[grid]\nsedd = [3]", "unknown key: sedd. Did you mean seed?"),
        ("[grid]\nseed = [-1]", "wrong value for seed: -1"),
        ("[gird]\nseed = [1]", "unknown key: sweep.gird. Did you mean sweep.grid"),
        ('[grid]\nmethod.name = ["tpok"]', "unknown method: tpok"),
        ('[grid]\nmethod.name = ["topk", "standard"]\nmethod.k = [3]', "unknown key: method.k"),
        ("[grid]\nseed = [3, 3]", "two runs of the sweep are the same: 0-seed=3 and 1-seed=3"),
        ("[grid]\nseed = [3]\n[[runs]]\nseed = 4", "a key stands in sweep.grid and in sweep.runs: seed"),
        ("[grid]\nsteps.more = [3]", "wrong value for sweep.grid.steps"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(toml: str, told: str) -> None:
    assert told in refused(toml)


def test_a_sweep_over_nothing_is_the_config_itself() -> None:
    [one] = runs("")
    assert one.name == "run" and one.config.method.k == 4
