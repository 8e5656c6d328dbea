"""What is known, and refused, before a harvest is planned."""

import json
from pathlib import Path

import pytest

from harvest.job import prepare
from shared.config import fingerprint
from shared.errors import ConfigError, ModelError, SiteError
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config, harvest, one
from tests.tiny import byte_level, save_model


def test_a_context_longer_than_the_models_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rows.context is longer than the model's: 65 > 64 of .*llama. Set rows.cont"):
        prepare(config(home, tmp_path / "x.zarr", rows={"context": 65}), Log(quiet=True))
    prepare(config(home, tmp_path / "x.zarr", rows={"context": 64}), Log(quiet=True))


def test_a_site_that_the_model_has_not_is_refused_with_the_nearest(home: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"the model has no site: resid.7. Its 3 blocks are resid.0 to resid.2"):
        prepare(one(home, tmp_path / "x.zarr", ["resid.7"]), Log(quiet=True))


def test_pairs_need_fast_tokenizers_and_a_model_on_its_own_does_not(home: Path, tmp_path: Path) -> None:
    slow = save_model(tmp_path / "slow", "llama", byte_level(), seed=6)
    (slow / "tokenizer.json").unlink()
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    asked = {"slow": {"path": str(slow), "sites": ["resid.1"]}}
    with_fast = {**asked, "llama": {"path": str(home / "llama"), "sites": ["resid.1"]}}
    with pytest.raises(ModelError, match=r'"offsets" needs fast tokenizers, and this model has a slow one: slow. Save'):
        prepare(config(home, tmp_path / "x.zarr", models=with_fast), Log(quiet=True))
    store = harvest(config(home, tmp_path / "y.zarr", models=asked, rows={"count": 40}))
    assert store.header.plan["alignment"] == "identical"
    assert set(store.column("tokens/slow/end").tolist()) == {-1}


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this device cannot be used: cuda:99"):
        harvest(config(home, tmp_path / "x.zarr", device="cuda:99"))
    assert list(tmp_path.iterdir()) == []


def test_threads_and_device_are_no_part_of_the_id(home: Path, pair: Store) -> None:
    for changed in (config(home, pair.path, threads=2), config(home, pair.path, device="auto")):
        assert harvest(changed).header.id == pair.header.id


def test_a_pattern_of_sites_is_a_source_for_each_and_heads_keep_their_shape(home: Path, tmp_path: Path) -> None:
    store = harvest(one(home, tmp_path / "x.zarr", ["resid.{0,2}", "heads.*", "resid.0"], rows={"count": 40}))
    assert {name: source.site for name, source in store.header.sources.items()} == {
        "llama_resid_0": "resid.0", "llama_resid_2": "resid.2",
        "llama_heads_0": "heads.0", "llama_heads_1": "heads.1", "llama_heads_2": "heads.2",
    }  # fmt: skip
    assert store.source("llama_heads_1").heads == 4 and store.source("llama_resid_0").heads is None
    attributes = json.loads((store.path / "activations/llama_heads_1/zarr.json").read_text())["attributes"]
    assert (attributes["heads"], attributes["head_dim"]) == (4, 8)
    again = harvest(
        one(home, tmp_path / "x.zarr", ["resid.0", "resid.2", "heads.0", "heads.1", "heads.2"], rows={"count": 40})
    )
    assert again.header.id == store.header.id


def test_the_order_of_models_is_part_of_the_id_where_it_decides_rows(home: Path, tmp_path: Path) -> None:
    def spec(align: str, names: list[str]) -> dict[str, object]:
        models = {name: {"path": str(home / name), "sites": ["resid.1"]} for name in names}
        return prepare(config(home, tmp_path / "x.zarr", models=models, rows={"align": align}), Log(quiet=True)).spec

    there, back = ["llama", "gemma"], ["gemma", "llama"]
    assert fingerprint(spec("offsets", there)) == fingerprint(spec("offsets", back))
    assert fingerprint(spec("greedy", there)) != fingerprint(spec("greedy", back))
