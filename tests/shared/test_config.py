"""Configs refuse what they do not know, and equal values have equal fingerprints whatever their order."""

import hashlib
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import field_validator, model_validator

from shared.config import (
    Config,
    canonical,
    differences,
    fingerprint,
    keys_of,
    override,
    parse,
    read_toml,
    required,
    settings,
    to_toml,
)  # fmt: skip
from shared.errors import ConfigError


class Model(Config):
    path: str
    dtype: str = "auto"
    layers: tuple[int, ...] = ()


class Rows(Config):
    count: int = 8
    drop: float = 0.5

    @field_validator("count")
    @classmethod
    def _positive(cls, count: int) -> int:
        if count < 1:
            raise ValueError("Give at least 1")
        return count


class Store(Config):
    path: Path = Path("a.zarr")


class Span(Config):
    first: int = 0
    last: int = 9

    @model_validator(mode="after")
    def _in_order(self) -> "Span":
        if self.first > self.last:
            raise ValueError("Let first be at most last")
        return self


class Demo(Config):
    models: dict[str, Model]
    rows: Rows = Rows()
    store: Store | None = None
    parts: tuple[Rows, ...] = ()
    note: str | None = None


MINIMAL = {"models": {"a": {"path": "/m"}}}

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)
mappings = st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=4)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def refusal(data: dict[str, Any], prefix: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Demo, data, prefix)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        ({**MINIMAL, "nota": "x"}, "nota", "note"),
        ({**MINIMAL, "rows": {"cuont": 3}}, "rows.cuont", "rows.count"),
        ({"models": {"gemma": {"path": "/m", "dtyp": "float32"}}}, "models.gemma.dtyp", "models.gemma.dtype"),
        ({**MINIMAL, "store": {"pth": "x"}}, "store.pth", "store.path"),
        ({**MINIMAL, "parts": [{}, {"dorp": 0.1}]}, "parts.1.dorp", "parts.1.drop"),
        ({"modles": {}, **MINIMAL}, "modles", "models.*."),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_known_one_named(
    data: dict[str, Any], key: str, nearest: str
) -> None:
    message = refusal(data)
    assert message.startswith(f"unknown key: {key}. Did you mean {nearest}")


def test_an_unknown_key_that_resembles_none_lists_all_known_ones() -> None:
    message = refusal({**MINIMAL, "zzzzzzzz": 1})
    assert message == f"unknown key: zzzzzzzz. Known: {', '.join(keys_of(Demo))}"


def test_keys_are_dotted_and_tables_with_free_names_show_a_star() -> None:
    assert keys_of(Demo) == [
        *("models.*.path", "models.*.dtype", "models.*.layers", "rows.count", "rows.drop", "store.path"),
        *("parts.*.count", "parts.*.drop", "note"),
    ]


def test_a_missing_key_is_named_with_the_setting_that_would_give_it() -> None:
    assert refusal({}) == "missing key: models. Add it to the file, or give --set models=VALUE"
    assert refusal({"models": {"a": {}}}).startswith("missing key: models.a.path. ")


def test_the_prefix_stands_before_keys_and_suggestions() -> None:
    assert refusal({}, "method.").startswith("missing key: method.models. ")
    assert "method.rows.cuont. Did you mean method.rows.count" in refusal({**MINIMAL, "rows": {"cuont": 1}}, "method.")


def test_a_wrong_value_is_shown_with_its_reason() -> None:
    message = refusal({**MINIMAL, "rows": {"count": "many"}})
    assert message.startswith("wrong value for rows.count: 'many'. Input should be a valid integer")
    assert refusal({**MINIMAL, "rows": {"count": 0}}) == "wrong value for rows.count: 0. Give at least 1"


def test_keys_that_contradict_one_another_are_told_by_their_table_not_by_all_its_values() -> None:
    class Outer(Config):
        span: Span = Span()

    with pytest.raises(ConfigError) as inner:
        parse(Outer, {"span": {"first": 10}})
    assert str(inner.value) == "these settings cannot be used: span. Let first be at most last"
    with pytest.raises(ConfigError) as whole:
        parse(Span, {"first": 10})
    assert str(whole.value) == "these settings cannot be used: the config as a whole. Let first be at most last"


def test_a_config_cannot_be_changed() -> None:
    config = parse(Demo, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.note = "x"  # type: ignore[misc]


def test_a_fault_in_a_config_is_a_wrong_call() -> None:
    assert ConfigError.exit_code == 2


# --- --set ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-0.5", -0.5),
        ("1e-4", 1e-4),
        ("true", True),
        ('["a", "b"]', ["a", "b"]),
        ("{ x = 1 }", {"x": 1}),
        ('"64"', "64"),
        ("'a b'", "a b"),
        ("resid.13", "resid.13"),
        ("/data/text files/#1", "/data/text files/#1"),
        ("True", "True"),
        ("07", "07"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_setting_is_read_as_toml_and_as_a_plain_string_where_it_is_not(text: str, value: Any) -> None:
    assert override({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_settings_lie_over_the_file_and_later_ones_over_earlier_ones() -> None:
    data = {"a": {"b": 1, "c": 2}, "d": 3}
    assert override(data, ["a.b=5", "e.f.g=x", "a.b=6"]) == {"a": {"b": 6, "c": 2}, "d": 3, "e": {"f": {"g": "x"}}}
    assert data == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize("setting", ["a.b", "=3", ""])
def test_a_setting_without_key_or_equals_sign_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="a setting must read KEY=VALUE"):
        override({}, [setting])


@pytest.mark.parametrize("value", [1, "x", [1], None])
def test_a_key_that_passes_through_a_value_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no keys below it: a\.b\.c"):
        override({"a": {"b": value}}, ["a.b.c=1"])


def test_settings_lie_over_a_file_with_dates_too() -> None:
    data = tomllib.loads("when = 2024-05-01")
    assert override(data, ["a=1"]) == {**data, "a": 1}


# --- TOML -----------------------------------------------------------------------------------------------------------


def test_a_config_survives_the_way_through_toml(tmp_path: Path) -> None:
    config = Demo(
        models={"a": Model(path="/m", layers=(1, 2)), "b-2": Model(path='C:\\x "y"\n', dtype="bfloat16")},
        rows=Rows(drop=1e-5),
        parts=(Rows(count=2), Rows()),
        note="ä\u2028",
    )
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert parse(Demo, read_toml(tmp_path / "c.toml")) == config


@given(
    st.dictionaries(st.text(max_size=3), st.builds(Model, path=st.text(), layers=st.tuples(st.integers()))), st.text()
)
def test_any_config_survives_the_way_through_toml(models: dict[str, Model], note: str) -> None:
    config = Demo(models=models, note=note)
    assert parse(Demo, tomllib.loads(to_toml(config))) == config


def test_resolved_toml_holds_defaults_and_leaves_out_none() -> None:
    assert tomllib.loads(to_toml(parse(Demo, MINIMAL))) == {
        "models": {"a": {"path": "/m", "dtype": "auto", "layers": []}},
        "rows": {"count": 8, "drop": 0.5},
        "parts": [],
    }


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file: .*gone\.toml"):
        read_toml(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        read_toml(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = \n", "is not valid TOML.*line 1"),
        (b"a = 1\na = 2\n", "is not valid TOML"),
        (b"\x00\xff\xfe", "cannot read the config file"),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- canonical JSON -------------------------------------------------------------------------------------------------


def test_canonical_json_is_sorted_without_spaces_and_plain_utf8() -> None:
    assert canonical({"b": [1, 2.5, None], "a": {"d": "ä", "c": True}}) == '{"a":{"c":true,"d":"ä"},"b":[1,2.5,null]}'


def test_the_fingerprint_is_the_sha256_of_the_canonical_json() -> None:
    assert fingerprint({"b": "ä", "a": 1}) == hashlib.sha256('{"a":1,"b":"ä"}'.encode()).hexdigest()
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_value_that_json_cannot_hold_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


@given(trees)
def test_canonical_json_and_fingerprint_do_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert canonical(reordered(value)) == canonical(value)
    assert fingerprint(reordered(value)) == fingerprint(value)


@given(trees)
def test_canonical_json_reads_back_as_the_value(value: Any) -> None:
    assert json.loads(canonical(value)) == value


# --- differences ----------------------------------------------------------------------------------------------------


def test_differences_name_every_leaf_that_differs() -> None:
    old = {"a": 1, "b": {"c": [1], "d": "x"}, "e": 0, "same": {"x": 1}}
    new = {"a": 2, "b": {"c": [1], "d": "y"}, "f": {"g": 1}, "same": {"x": 1}}
    assert differences(old, new) == ["a: 1 -> 2", "b.d: 'x' -> 'y'", "e: 0 -> None", "f: None -> {'g': 1}"]


@pytest.mark.parametrize(
    ("old", "new"), [({"a": 1}, {"a": 1.0}), ({"a": True}, {"a": 1}), ({"a": None}, {}), ({"a": {}}, {})]
)
def test_values_that_python_calls_equal_and_json_does_not_are_differences(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert len(differences({"x": old}, {"x": new})) == 1


def test_a_tuple_is_no_other_value_than_the_list_that_json_made_of_it() -> None:
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []


@given(mappings, mappings)
def test_there_are_differences_exactly_where_fingerprints_differ(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert bool(differences(old, new)) == (fingerprint(old) != fingerprint(new))
    assert differences(old, reordered(old)) == []


@pytest.mark.parametrize("value", ["x.zarr", "\U0001f600 \u00e9.zarr", 'a"b\\c', "3", "true", 7, 0.5, ["a", "b"], True])
def test_a_flag_reaches_its_key_as_it_was_given(value: Any) -> None:
    assert override({}, settings({"store.path": value, "other": None})) == {"store": {"path": value}}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_cannot_hold_is_refused(value: float) -> None:
    class Some(Config):
        lr: float

    with pytest.raises(ConfigError, match="wrong value for lr: "):
        parse(Some, {"lr": value})


class Inner(Config):
    size: int
    kind: str = "a"


class Outer(Config):
    inner: Inner
    named: dict[str, Inner]
    steps: int
    other: Inner | None = None


def test_a_missing_table_is_asked_for_by_its_own_missing_key() -> None:
    assert required(Outer) == ["inner.size", "named", "steps"]
    whole = {"inner": {"size": 1}, "named": {}, "steps": 3}
    assert parse(Outer, whole).steps == 3
    for key, table in (("inner.size", "inner"), ("named", "named"), ("steps", "steps")):
        with pytest.raises(ConfigError, match=rf"^missing key: {key}\. Add it to the file, or give --set {key}=VALUE"):
            parse(Outer, {name: value for name, value in whole.items() if name != table})
    with pytest.raises(ConfigError, match=r"^missing key: inner\.size\. "):
        parse(Outer, {**whole, "inner": {}})


def test_a_misspelt_key_is_told_before_the_one_that_it_leaves_missing() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key: stepz\. Did you mean steps"):
        parse(Outer, {"inner": {"size": 1}, "named": {}, "stepz": 3})
