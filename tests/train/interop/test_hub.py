"""Dictionaries go to the hub and come back by the real huggingface_hub, against a small hub on this machine.

What tests/hub.py has not (large files by LFS or Xet, tokens, limits) is not covered.
"""

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CheckpointError
from tests.hub import Hub, served
from tests.train.interop import files
from tests.train.interop.test_crosscoders import near
from tests.train.interop.test_sae_lens import of_sae_lens
from train.dictionary import Dictionary
from train.interop import hub as hubs

PUSH = """
import sys, torch
from train.interop.dictionary_learning import BatchTopKCrossCoder
torch.manual_seed(0)
made = BatchTopKCrossCoder(6, 40, 2, k=5, code_normalization="SAE")
made.threshold = 0.5
print(made.push_to_hub("org/crosscoder", private=True))
torch.save(made.state_dict(), sys.argv[1])
again = BatchTopKCrossCoder.from_pretrained("org/crosscoder", from_hub=True)
pairs = zip(made.state_dict().values(), again.state_dict().values())
assert all(torch.equal(a, b) or a.isnan().all() for a, b in pairs)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as found:
        yield found


def run(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, for which this hub is the hub."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "HF_TOKEN": "hf_of_this_test"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_crosscoder_is_pushed_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "cache", "-c", PUSH, str(tmp_path / "state.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{hub.address}/org/crosscoder/commit/")
    pushed = hub.repositories["org/crosscoder"]
    assert {"README.md", "config.json", "model.safetensors", "trainer_config.json"} <= set(pushed)
    assert json.loads(pushed["config.json"])["dict_class"] == "BatchTopKCrossCoder"
    assert pushed["README.md"].startswith(b"---\nlibrary_name: dictionary_learning")


def test_a_folder_of_a_repository_is_imported(hub: Hub, tmp_path: Path) -> None:
    made = files.crosscoder("E1", batch_topk=False)
    made.tables = {"config.json": {"activation_dim": files.D, "dict_class": "CrossCoder"}}
    made.write(tmp_path / "local", "model.safetensors")
    hub.repositories["org/many"] = {
        f"layer_13/{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()
    } | {"layer_14/model.safetensors": b"not asked for"}
    import_ = "from train.cli import main; import sys; sys.argv = ['train', *sys.argv[1:]]; main()"
    target = tmp_path / "out"
    done = run(hub, tmp_path / "cache", "-c", import_, "import", "hub:org/many/layer_13", "--out", str(target))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CrossCoder, E1, CROSSCODER" in done.stdout
    found = Dictionary.load(target)
    x = {name: torch.from_numpy(made.rows[:, s]).float() for s, name in enumerate("ab")}
    assert near(found.encode(x), made.codes)
    assert not any("layer_14" in call for call in hub.calls)
    for name, message in [("hub:org/none", "nothing of this name on the hub"), ("hub:org/many/x", "no such folder")]:
        done = run(hub, tmp_path / "cache", "-c", import_, "import", name, "--out", str(tmp_path / "other"))
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {message}"), done.stderr


def test_saes_of_the_registry_of_sae_lens_are_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for sae_lens: its own registry is on the network."""
    made = of_sae_lens("gated")

    class SAE:
        cfg = types.SimpleNamespace(to_dict=lambda: made.tables["cfg.json"])

        @classmethod
        def from_pretrained(cls, release: str, sae_id: str) -> Any:
            if (release, sae_id) != ("gemma", "layer_3/l0_70"):
                raise ValueError(f"Release {release} not found")
            return cls

        @staticmethod
        def state_dict() -> Any:
            return made.state

    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=SAE))
    found = hubs.of_registry("gemma", "layer_3/l0_70", ["gemma"])
    assert found.kind == "SAELens, gated"
    assert near(found.dictionary.encode({"gemma": torch.from_numpy(made.rows).float()}), made.codes)
    with pytest.raises(CheckpointError, match="no such SAE in SAELens' registry: other, 1"):
        hubs.of_registry("other", "1")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(CheckpointError, match="pip install sae-lens"):
        hubs.of_registry("gemma", "layer_3/l0_70")
