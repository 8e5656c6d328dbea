"""Dictionaries go to the hub and come back by the real huggingface_hub, against a small hub on this machine.

What tests/hub.py has not (large files by LFS or Xet, tokens, limits) is not covered.
"""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CheckpointError
from tests.hub import Hub
from tests.train.interop import files
from tests.train.interop.test_crosscoders import near
from tests.train.interop.test_sae_lens import of_sae_lens
from train import cli
from train.dictionary import Dictionary
from train.interop import hub as hubs
from train.interop.dictionary_learning import BatchTopKCrossCoder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command, for which the hub is that of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def test_a_crosscoder_is_pushed_and_comes_back(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    made = BatchTopKCrossCoder(6, 40, 2, k=5, code_normalization="SAE")
    made.threshold = 0.5
    assert made.push_to_hub("org/crosscoder", private=True).startswith(f"{hub.address}/org/crosscoder/commit/")
    assert hub.private == {"org/crosscoder": True}
    pushed = hub.repositories["org/crosscoder"]
    assert {"README.md", "config.json", "model.safetensors", "trainer_config.json"} <= set(pushed)
    assert json.loads(pushed["config.json"])["dict_class"] == "BatchTopKCrossCoder"
    assert pushed["README.md"].startswith(b"---\nlibrary_name: dictionary_learning")
    again = BatchTopKCrossCoder.from_pretrained("org/crosscoder", from_hub=True)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_folder_of_a_repository_is_imported(hub: Hub, train: Run, tmp_path: Path) -> None:
    made = files.crosscoder("E1", batch_topk=False)
    made.tables = {"config.json": {"activation_dim": files.D, "dict_class": "CrossCoder"}}
    made.write(tmp_path / "local", "model.safetensors")
    hub.repositories["org/many"] = {
        f"layer_13/{path.name}": path.read_bytes() for path in (tmp_path / "local").iterdir()
    } | {"layer_14/model.safetensors": b"not asked for"}
    target = tmp_path / "out"
    code, out, err = train("import", "hub:org/many/layer_13", "--out", target)
    assert code == 0, err
    assert "CrossCoder, E1, CROSSCODER" in out
    found = Dictionary.load(target)
    x = {name: torch.from_numpy(made.rows[:, s]).float() for s, name in enumerate("ab")}
    assert near(found.encode(x), made.codes)
    assert not any("layer_14" in call for call in hub.calls)
    for name, message in [("hub:org/none", "nothing of this name on the hub"), ("hub:org/many/x", "no such folder")]:
        code, _, err = train("import", name, "--out", tmp_path / "other")
        assert code == 1 and err.splitlines()[-1].startswith(f"error: {message}"), err


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
