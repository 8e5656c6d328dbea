"""What the tests of a harvest share: two saved models with a corpus, and a finished store of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harvest import cli
from shared.store import Store
from tests.harvest.command import Done, Harvest, write_config
from tests.harvest.pair import config
from tests.harvest.pair import harvest as harvested
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
    return harvested(config(home, home / "pair.zarr"))


@pytest.fixture
def harvest(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Harvest:
    """Runs the command in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["harvest", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def typed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished store beside its config, made in a subprocess: the whole command, as for a user."""
    folder = tmp_path_factory.mktemp("cli")
    file = write_config(home, folder)
    done = subprocess.run(
        [sys.executable, "-c", "from harvest.cli import main; main()", "run", str(file), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["store"] == str(folder / "pair.zarr")
    assert result["rows"] == 120
    assert set(result["scale_factor"]) == {"early", "inner", "gemma"}
    assert result["faults"]["gemma"]["clipped"] == result["faults"]["gemma"]["masked"] == 0
    assert "planned 120 rows" in done.stderr
    assert "Traceback" not in done.stderr
    return Store.open(folder / "pair.zarr")
