"""Looking changes nothing: neither a bit of the trainer's state, nor of the training that follows."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import CASES
from train import checkpoint
from train.dictionary import relative_norms
from train.measure import Measure, evaluating
from train.trainer import Trainer

BEFORE, AFTER, BATCH = 4, 4, 32
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", cases.names())


def rows(case: str, step: int) -> dict[str, Tensor]:
    return cases.random_rows(case, BATCH, seed=step)


def tensors(state: Any, path: str = "") -> dict[str, Any]:
    """Every value of a nested state by its path."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else None
    if items is None:
        return {path: state}
    return {key: value for name, part in items for key, value in tensors(part, f"{path}/{name}").items()}


def same(left: Any, right: Any) -> bool:
    a, b = tensors(left), tensors(right)
    return a.keys() == b.keys() and all(
        torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key] for key, value in a.items()
    )


def look(trainer: Trainer, case: str, folder: Path) -> None:
    """All that one may do with a dictionary while it trains, on rows that training does not see."""
    dictionary, x = trainer.dictionary, cases.random_rows(case, 100, seed=99)
    total = Measure(dictionary)
    with evaluating(dictionary):
        total.add(x)
        dictionary.decode(dictionary.encode(x))
    total.result()
    dictionary(x), dictionary.encode(x), dictionary.norms(), relative_norms(dictionary.decoder_norms())
    dictionary.save(folder / "dictionary")
    checkpoint.save(trainer, folder, {}, keep=1)
    copy.deepcopy(dictionary).to(torch.float64)
    _ = trainer.dead_L


@every_case
@every_method
def test_looking_in_the_middle_changes_no_bit_of_state_or_of_what_follows(case: str, name: str, tmp_path: Path) -> None:
    watched, alone = (cases.trainer(case, name, BEFORE + AFTER, dead_rows=64) for _ in range(2))
    for step in range(BEFORE):
        watched.update(rows(case, step)), alone.update(rows(case, step))
    before, generator = copy.deepcopy(watched.state_dict()), torch.get_rng_state()
    look(watched, case, tmp_path)
    assert same(watched.state_dict(), before) and torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in watched.dictionary.modules())
    for step in range(BEFORE, BEFORE + AFTER):
        assert same(watched.update(rows(case, step)), alone.update(rows(case, step)))
    assert same(watched.state_dict(), alone.state_dict())
    assert not same(watched.state_dict(), before)


@every_case
@every_method
def test_a_forward_pass_is_a_function_of_rows_and_weights(case: str, name: str) -> None:
    dictionary, x = cases.trainer(case, name).dictionary, rows(case, 0)
    for training in (True, False):
        dictionary.train(training)
        first, second = dictionary(x), dictionary(x)
        assert same(first.y, second.y) and torch.equal(first.code.dense(), second.code.dense())
    assert same(x, rows(case, 0))
