"""What a harvest is told: defaults, refusals, and the names of its sources."""

from typing import Any

import pytest

from harvest.config import HarvestConfig, ModelConfig
from shared.config import keys_of, parse, to_toml
from shared.errors import ConfigError

MODEL = {"path": "folder", "sites": ["resid.1"]}


def config(**tables: Any) -> HarvestConfig:
    return parse(HarvestConfig, {"models": {"m": MODEL}, **tables})


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(HarvestConfig, data)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_model_and_a_site_are_all_that_must_be_given() -> None:
    made = config()
    assert made.corpus.path == "python-docs"
    assert made.models["m"].dtype == "auto"
    assert made.store.nonfinite == "fail"
    assert (made.rows.count, made.rows.align, made.rows.bos, made.rows.seed) == (None, "auto", "model", 0)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match=r"frozen"):
        config().rows.seed = 1


@pytest.mark.parametrize(
    ("sites", "names"),
    [
        (["resid.13"], {"gemma": "resid.13"}),
        (["resid.1", "mlp_out.2"], {"gemma_resid_1": "resid.1", "gemma_mlp_out_2": "mlp_out.2"}),
        (["layers.1:in", "resid.1"], {"gemma_layers_1_in": "layers.1:in", "gemma_resid_1": "resid.1"}),
        ({"early": "resid.1", "late": "resid.9"}, {"early": "resid.1", "late": "resid.9"}),
        ({"early": "resid.1"}, {"early": "resid.1"}),
    ],
)
def test_sources_are_named_after_their_model_and_site_or_as_the_table_says(
    sites: list[str] | dict[str, str], names: dict[str, str]
) -> None:
    assert ModelConfig(path="p", sites=sites).source_names("gemma") == names


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("corpsu", "corpus"),
        ("corpus.pth", "corpus.path"),
        ("rows.cuont", "rows.count"),
        ("batch.token", "batch.tokens"),
        ("store.nonfinit", "store.nonfinite"),
        ("models.m.dtyp", "models.m.dtype"),
        ("thread", "threads"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_known_one(key: str, near: str) -> None:
    data: dict[str, Any] = {"models": {"m": dict(MODEL)}}
    *tables, leaf = key.split(".")
    table = data
    for name in tables:
        table = table.setdefault(name, {})
    table[leaf] = 1
    message = refused(data)
    assert message.startswith(f"unknown key: {key}. Did you mean ")
    assert near in message


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"rows": {"count": 0}}, "wrong value for rows.count: 0. "),
        ({"rows": {"context": 1}}, "wrong value for rows.context: 1. "),
        ({"rows": {"held_out": 1.0}}, "wrong value for rows.held_out: 1.0. "),
        ({"rows": {"align": "guess"}}, "wrong value for rows.align: 'guess'. "),
        ({"rows": {"bos": "yes"}}, "wrong value for rows.bos: 'yes'. "),
        ({"store": {"nonfinite": "ignore"}}, "wrong value for store.nonfinite: 'ignore'. "),
        ({"batch": {"tokens": "many"}}, "wrong value for batch.tokens: 'many'. "),
        ({"threads": 0}, "wrong value for threads: 0. "),
        ({"models": {"m": {"path": "p", "sites": []}}}, "wrong value for models.m.sites: []. Name at least one site"),
        ({"models": {"m": {"path": "p", "sites": {}}}}, "wrong value for models.m.sites: {}. Name at least one site"),
        ({"models": {"m": {**MODEL, "dtype": "int8"}}}, "wrong value for models.m.dtype: 'int8'. Choose auto"),
        ({"models": {"m": {"sites": ["resid.1"]}}}, "missing key: models.m.path. Add it to the file"),
        ({"models": {"m": {"path": "p"}}}, "missing key: models.m.sites. Add it to the file"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(table: dict[str, Any], told: str) -> None:
    assert refused({"models": {"m": MODEL}, **table}).startswith(told)


def test_models_must_be_given() -> None:
    assert refused({}).startswith("missing key: models.")
    assert "Add a table [models.NAME]" in refused({"models": {}})


@pytest.mark.parametrize("name", ["a b", "a/b", "ä", "", "a.b"])
def test_a_name_that_cannot_be_a_files_name_is_refused(name: str) -> None:
    assert "may have letters, digits, _ and - only" in refused({"models": {name: MODEL}})
    sites = {name: "resid.1"}
    assert "may have letters, digits, _ and - only" in refused({"models": {"m": {"path": "p", "sites": sites}}})


def test_two_sources_cannot_share_a_name() -> None:
    models = {"a": {"path": "p", "sites": {"x": "resid.1"}}, "b": {"path": "q", "sites": {"x": "resid.2"}}}
    assert "Each source needs a name of its own, got x, x" in refused({"models": models})


@pytest.mark.parametrize("sites", [{"x": "resid.1", "y": "resid.1"}, ["resid.1", "resid.2", "resid.1"]])
def test_a_site_cannot_be_read_twice(sites: dict[str, str] | list[str]) -> None:
    assert "Name each site of a model once" in refused({"models": {"m": {"path": "p", "sites": sites}}})


def test_the_config_as_resolved_reads_back_equal() -> None:
    import tomllib

    made = config(rows={"count": 5}, store={"path": "x.zarr"})
    assert parse(HarvestConfig, tomllib.loads(to_toml(made))) == made


def test_every_key_can_be_named() -> None:
    keys = keys_of(HarvestConfig)
    assert {"models.*.path", "models.*.sites", "corpus.text", "rows.align", "store.path", "threads"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_the_order_of_corpora_in_the_file_means_nothing() -> None:
    def texts(*names: str) -> list[str]:
        models = {"m": {"path": "p", "sites": ["resid.1"]}}
        return list(HarvestConfig.model_validate({"models": models, "corpora": {name: {} for name in names}}).texts)

    assert texts("web", "code") == texts("code", "web") == ["code", "web"]


def test_settings_that_would_do_nothing_are_refused() -> None:
    assert "Let skip (24) be less than context (24)" in refused(
        {"models": {"m": MODEL}, "rows": {"skip": 24, "context": 24}}
    )
    chat = {"models": {"m": MODEL}, "chat": {"template": "own.jinja"}}
    assert "say which field holds them (corpus.messages)" in refused(chat)
    corpora = {"a": {"path": "a.txt"}, "b": {"path": "b.jsonl", "messages": "m"}}
    assert HarvestConfig.model_validate({**chat, "corpora": corpora}).chat.template == "own.jinja"


def test_a_corpus_and_corpora_exclude_each_other() -> None:
    tables = {"models": {"m": {"path": "p", "sites": ["resid.1"]}}, "corpora": {"a": {}}, "corpus": {"path": "b.txt"}}
    with pytest.raises(ValueError, match="Give corpus or corpora, not both"):
        HarvestConfig.model_validate(tables)
