"""What the tests of a harvest share: two saved models with a corpus, and a finished store of them."""

import json
from pathlib import Path

import pytest

from shared.store import Store
from tests.harvest.pair import config, harvest
from tests.tiny import TEXTS, byte_level, save_model, sentencepiece


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    save_model(root / "llama", "llama", byte_level(), seed=1)
    save_model(root / "gemma", "gemma3", sentencepiece(), seed=2, width=24)
    records = [{"text": text, "id": f"doc {number}"} for number, text in enumerate(TEXTS)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="session")
def pair(home: Path) -> Store:
    return harvest(config(home, home / "pair.zarr"))
