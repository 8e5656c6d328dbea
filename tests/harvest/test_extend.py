"""Siblings: more rows of a corpus, or more sources of the same rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest.config import HarvestConfig
from harvest.job import prepare
from shared import verify
from shared.errors import AlignmentError, ConfigError, CorpusError, StoreMismatchError
from shared.family import open_family
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import classes, config, harvest, one, stored, tree
from tests.tiny import byte_level, save_model, sentencepiece
from train.scale import ordinary_rows

QUIET = Log(quiet=True)


def sibling(home: Path, parent: Store, path: Path, **tables: Any) -> HarvestConfig:
    return config(home, path, store={"extends": str(parent.path)}, **tables)


def only(parent: Store, path: Path, models: dict[str, Any], **tables: Any) -> HarvestConfig:
    """More sources: models alone are enough, since the rows are there."""
    store = {"extends": str(parent.path), "path": str(path), **tables.pop("store", {})}
    asked = {"models": models, "store": store, "device": "cpu", "threads": 1, **tables}
    return HarvestConfig.model_validate(asked)


@pytest.fixture(scope="module")
def small(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(config(home, tmp_path_factory.mktemp("family") / "small.zarr", rows={"count": 150}))


@pytest.fixture(scope="module")
def more(home: Path, small: Store) -> Store:
    return harvest(sibling(home, small, small.path.with_name("more.zarr"), rows={"count": 120}))


@pytest.fixture(scope="module")
def wide(home: Path, small: Store) -> Store:
    new = {
        "llama": {"path": str(home / "llama"), "sites": {"late": "resid.2"}},
        "gemma": {"path": str(home / "gemma"), "sites": {"mlp": "mlp_out.0"}},
    }
    return harvest(only(small, small.path.with_name("wide.zarr"), new))


# --- more rows ------------------------------------------------------------------------------------------------------


def test_more_rows_are_of_other_documents_under_the_same_scale(small: Store, more: Store) -> None:
    assert more.rows == 120 and more.header.id != small.header.id
    assert not set(more.document_ids()) & set(small.document_ids())
    assert more.header.scale is not None and small.header.scale is not None
    for name in small.header.sources:
        for key in ("factor", "sink_norm", "median_norm"):
            assert more.header.scale[name][key] == small.header.scale[name][key]
    assert verify.full(more) == []


def test_a_third_generation_leaves_out_the_documents_of_both(home: Path, small: Store, more: Store) -> None:
    third = harvest(sibling(home, more, small.path.with_name("third.zarr"), rows={"count": 10}))
    family = open_family(third.path)
    assert len(set(family.document_ids())) == len(family.document_ids())
    assert family.rows == 280 and len(family.members) == 3


def test_more_rows_must_be_made_alike(home: Path, small: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreMismatchError, match=r"more rows must be made like those of .*rows.context: 24 -> 20"):
        prepare(sibling(home, small, tmp_path / "x.zarr", rows={"context": 20}), QUIET)


def test_a_corpus_that_is_used_up_gives_no_more_rows(home: Path, tmp_path: Path) -> None:
    everything = harvest(config(home, tmp_path / "all.zarr", rows={"count": None}))
    with pytest.raises(AlignmentError, match=r"no row came of the corpus"):
        harvest(sibling(home, everything, tmp_path / "x.zarr"))


def test_a_sibling_that_is_made_again_has_the_same_bytes(home: Path, small: Store, more: Store) -> None:
    again = harvest(sibling(home, small, small.path.with_name("again.zarr"), rows={"count": 120}))
    assert tree(again.path) == tree(more.path)


# --- more sources ---------------------------------------------------------------------------------------------------


def test_more_sources_share_the_plan_and_hold_what_a_harvest_of_all_holds(
    home: Path, small: Store, wide: Store, tmp_path: Path
) -> None:
    asked = {
        "llama": {"path": str(home / "llama"), "sites": {"early": "resid.0", "inner": "mlp_out.1", "late": "resid.2"}},
        "gemma": {"path": str(home / "gemma"), "sites": {"gemma": "resid.1", "mlp": "mlp_out.0"}},
    }
    whole = {"shard_bytes": 10**6}
    together = harvest(config(home, tmp_path / "x.zarr", rows={"count": 150}, models=asked, store=whole))
    for name in ("late", "mlp"):
        # Other shards have other batches, and so other roundings: by a step of fp16, 2^-10 of a value.
        assert np.allclose(stored(wide, name), stored(together, name), rtol=2**-9, atol=1e-3)
    for table in ("rows/llama/token", "batches/gemma/segment", "tokens/gemma/end", "documents/split"):
        assert np.array_equal(wide.column(table), small.column(table))
    assert wide.header.plan["tokens"] == small.header.plan["tokens"]
    assert verify.full(wide) == []


def test_a_tuned_model_can_be_added_and_another_tokenizer_cannot(home: Path, small: Store, tmp_path: Path) -> None:
    save_model(tmp_path / "tuned", "llama", byte_level(), seed=8)
    save_model(tmp_path / "other", "llama", sentencepiece(size=590), seed=8)

    def tuned_by(name: str, folder: str, source: str) -> HarvestConfig:
        asked = {name: {"path": str(tmp_path / folder), "sites": {source: "resid.0"}}}
        return only(small, small.path.with_name(f"{source}.zarr"), asked)

    tuned = harvest(tuned_by("tuned", "tuned", "new"))
    whole = open_family(tuned.path)
    assert set(whole.header.models) == {"tuned", "llama", "gemma"} and whole.rows == small.rows
    assert np.array_equal(whole.column("rows/tuned/token"), small.column("rows/llama/token"))
    ordinary_N = np.array([name == "ordinary/train" for name in classes(tuned, "new")])
    assert np.array_equal(ordinary_rows(whole, "new"), ordinary_N)
    with pytest.raises(ConfigError, match=r"no model of the store reads the same tokens as this one: other. Rows pair"):
        prepare(tuned_by("other", "other", "newer"), QUIET)
    with pytest.raises(ConfigError, match=r"the store has another model of this name: llama. Give the model another"):
        prepare(tuned_by("llama", "tuned", "newest"), QUIET)


def test_a_store_of_one_model_takes_more_sources(home: Path, tmp_path: Path) -> None:
    """Its models share every token: nothing has to be drafted, and there is no text to draft it from."""
    parent = harvest(one(home, tmp_path / "x.zarr", ["resid.0"]))
    assert parent.header.plan["alignment"] == "identical"
    asked = {"llama": {"path": str(home / "llama"), "sites": {"late": "resid.2", "heads": "heads.1"}}}
    wider = harvest(only(parent, tmp_path / "y.zarr", asked))
    whole = harvest(one(home, tmp_path / "z.zarr", ["resid.0", "resid.2"]))
    assert np.allclose(stored(wider, "late"), stored(whole, "llama_resid_2"), atol=1e-3)
    assert set(open_family(wider.path).header.sources) == {"llama", "late", "heads"}


def test_more_sources_are_of_the_rows_that_are_there_whatever_is_asked(
    home: Path, small: Store, tmp_path: Path
) -> None:
    new = {"gemma": {"path": str(home / "gemma"), "sites": {"new": "resid.0"}}}
    same: dict[str, Any] = {
        "rows": {"count": 150, "context": 24, "align": "auto"}, "batch": {"tokens": 100},
        "corpus": {"path": str(home / "corpus.jsonl"), "id": "id"}, "store": {"shard_bytes": 10_240},
    }  # fmt: skip
    prepare(only(small, tmp_path / "x.zarr", new, **same), QUIET)
    (tmp_path / "other.txt").write_text("Another text.")
    for key, value, told in [
        ("rows", {"count": 77}, r"rows\.count: 150 -> 77"), ("rows", {"seed": 3}, r"rows\.seed: 0 -> 3"),
        ("batch", {"tokens": 50}, r"batch\.tokens: 100 -> 50"),
        ("store", {"dtype": "bfloat16"}, r"store\.dtype: 'float16' -> 'bfloat16'"),
        ("corpus", {"path": str(tmp_path / "other.txt")}, r"corpus\."),
    ]:  # fmt: skip
        with pytest.raises(StoreMismatchError, match=rf"are of the rows of .*small\.zarr \(stored -> asked\): {told}"):
            prepare(only(small, tmp_path / "x.zarr", new, **{key: value}), QUIET)
    with pytest.raises(CorpusError):
        prepare(only(small, tmp_path / "x.zarr", new, corpus={"path": str(tmp_path / "nowhere.txt")}), QUIET)


def test_a_source_that_is_there_is_not_made_again_under_another_name(
    home: Path, small: Store, wide: Store, tmp_path: Path
) -> None:
    again = {"gemma": {"path": str(home / "gemma"), "sites": {"twice": "resid.1"}}}
    for parent in (small, wide):
        with pytest.raises(ConfigError, match=r"the store has this source already: twice is its gemma\. Leave it out"):
            prepare(only(parent, tmp_path / "x.zarr", again), QUIET)


def test_who_wants_more_sources_and_names_them_like_the_others_is_told_how(
    home: Path, small: Store, tmp_path: Path
) -> None:
    asked = {name: {"path": str(home / name), "sites": ["resid.2"]} for name in ("llama", "gemma")}
    asked["llama"]["sites"] = {"early": "resid.2", "inner": "mlp_out.0"}
    with pytest.raises(StoreMismatchError, match=r'for more sources give new names: sites = \{NAME = "resid\.20"\}$'):
        prepare(sibling(home, small, tmp_path / "x.zarr", models=asked), QUIET)


def test_all_sources_or_none_of_them(home: Path, small: Store, more: Store, wide: Store, tmp_path: Path) -> None:
    def of(parent: Store, *names: str) -> HarvestConfig:
        sites = {name: f"resid.{number}" for number, name in enumerate(names)}
        return only(parent, tmp_path / "x.zarr", {"gemma": {"path": str(home / "gemma"), "sites": sites}})

    with pytest.raises(ConfigError, match=r"a sibling has all sources of the store that it extends, or none of them"):
        prepare(of(small, "new", "gemma"), QUIET)
    with pytest.raises(ConfigError, match=r"more sources extend one store, not a family of rows"):
        prepare(of(more, "new"), QUIET)
