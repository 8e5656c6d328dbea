"""What is written is what was there: a dictionary's outputs, and a run that goes on from its checkpoint."""

from pathlib import Path

import pytest
import torch

from tests import cases
from tests.cases import CASES
from tests.contracts.test_purity import rows, same
from train import checkpoint
from train.dictionary import Dictionary
from train.trainer import Trainer

STEPS = 8
RUN = {"store": "s", "config": "c"}
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", cases.names())


def stepped(case: str, name: str, steps: int, seed: int = 0) -> Trainer:
    trainer = cases.trainer(case, name, STEPS, seed=seed, dead_rows=64)
    for step in range(steps):
        trainer.update(rows(case, step))
    return trainer


@every_case
@every_method
def test_a_trained_dictionary_comes_back_with_the_same_outputs(case: str, name: str, tmp_path: Path) -> None:
    trained = stepped(case, name, STEPS).dictionary.eval()
    trained.save(tmp_path / "dictionary")
    loaded, x = Dictionary.load(tmp_path / "dictionary"), rows(case, 99)
    assert same(dict(loaded.state_dict()), dict(trained.state_dict()))
    assert torch.equal(loaded.encode(x), trained.encode(x)) and same(loaded(x).y, trained(x).y)
    assert torch.equal(loaded.norms(), trained.norms())
    loaded.save(tmp_path / "again")
    for file in ("dictionary.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "dictionary" / file).read_bytes()


@every_case
@every_method
def test_a_run_from_its_checkpoint_equals_the_run_without_a_break(case: str, name: str, tmp_path: Path) -> None:
    whole = stepped(case, name, STEPS // 2)
    path = checkpoint.save(whole, tmp_path, RUN, keep=1)
    resumed = cases.trainer(case, name, STEPS, seed=5, dead_rows=64)
    checkpoint.load(resumed, path, RUN)
    assert same(resumed.state_dict(), whole.state_dict())
    for step in range(STEPS // 2, STEPS):
        assert same(resumed.update(rows(case, step)), whole.update(rows(case, step)))
    assert same(resumed.state_dict(), whole.state_dict())
