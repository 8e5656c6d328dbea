"""A store's models are found where it names them, or where they lie now, and must be the same ones."""

import shutil
from pathlib import Path

import pytest

from harvest import bench
from shared.errors import ModelError
from shared.store import Store
from tests.tiny import byte_level, save_model, sentencepiece


def test_models_are_found_where_the_store_names_them(pair: Store) -> None:
    found = bench.find(pair.header, {}, print)
    assert {name: one.path for name, one in found.items()} == {n: m.path for n, m in pair.header.models.items()}


def test_a_model_that_has_moved_is_found_by_its_new_path(home: Path, pair: Store, tmp_path: Path) -> None:
    moved = {"gemma": str(shutil.copytree(home / "gemma", tmp_path / "elsewhere"))}
    assert bench.find(pair.header, moved, print)["gemma"].path == moved["gemma"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("nothing there", r"no such model: .*other\. Give --model gemma=PATH, where it lies now"),
        ("tokenizer", r"this is not the tokenizer of gemma in the store: .*other\. Give --model gemma=PATH"),
        ("weights", r"these are not the weights of gemma in the store: .*other\. Give --model gemma=PATH"),
    ],
)
def test_another_model_is_refused_by_name(pair: Store, tmp_path: Path, change: str, told: str) -> None:
    if change != "nothing there":
        tokenizer = byte_level() if change == "tokenizer" else sentencepiece()
        save_model(tmp_path / "other", "gemma3", tokenizer, seed=9, width=24)
    moved = {"gemma": str(tmp_path / "other")}
    with pytest.raises(ModelError, match=told):
        bench.find(pair.header, moved, print)
    if change == "weights":
        assert bench.find(pair.header, moved, print, weights=False)["gemma"].path == moved["gemma"]
