"""Configuration: frozen pydantic models, TOML files, `--set key=value`, canonical JSON and its fingerprint."""

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError


class Config(BaseModel):
    """Base of every config: cannot be changed, and refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


FEW = 8  # names that a message lists beside the nearest ones

C = TypeVar("C", bound=Config)


def parse(kind: type[C], data: Mapping[str, Any], prefix: str = "") -> C:
    """Validate `data`; `prefix` (such as "method.") stands before keys in messages. Raises ConfigError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, error, prefix) from None


def _explain(kind: type[Config], error: ValidationError, prefix: str) -> ConfigError:
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key is missing, too
    key = prefix + ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # list[str]: of a union
    if first["type"] == "extra_forbidden":
        return unknown("unknown key", key, [prefix + name for name in keys_of(kind)])
    if first["type"] == "missing":
        inner = [name for name in required(kind) if name == key.removeprefix(prefix) or name.startswith(f"{key}.")]
        key = prefix + inner[0] if inner else key
        return ConfigError("missing key", key, f"Add it to the file, or give --set {key}=VALUE")
    reason = first["msg"].removeprefix("Value error, ")
    leaf = any(_filled(key, prefix + name) == key for name in keys_of(kind))
    if isinstance(first["input"], Mapping) and not leaf:  # of a table: its keys contradict one another
        return ConfigError("these settings cannot be used", key or "the config as a whole", reason)
    return ConfigError(f"wrong value for {key}", repr(first.get("input")), reason)


def unknown(what: str, value: str, known: Iterable[str], error: type[ConfigError] = ConfigError) -> ConfigError:
    """An error that names the nearest of `known`; a key inside a table keyed by the user matches by its last parts."""
    known = list(known)
    near = difflib.get_close_matches(value, [_filled(value, name) for name in known], n=3, cutoff=0.5)
    listed = f"Known: {', '.join(known)}"
    if not near:
        return error(what, value, listed)
    return error(what, value, f"Did you mean {' or '.join(near)}?" + (f" {listed}" if len(known) <= FEW else ""))


def _filled(value: str, name: str) -> str:
    """`models.*.dtype` seen from `models.gemma.dtyp` reads `models.gemma.dtype`."""
    given = value.split(".")
    parts = name.split(".")
    return ".".join(given[i] if part == "*" and i < len(given) else part for i, part in enumerate(parts))


def keys_of(kind: type[Config]) -> list[str]:
    """Every dotted key of a config; a table with free names, or a list, shows as `*`: `models.*.dtype`."""
    keys = []
    for name, field in kind.model_fields.items():
        inner = _inner_config(field.annotation)
        if inner is None:
            keys.append(name)
            continue
        table = f"{name}.*" if get_origin(field.annotation) in (dict, list, tuple) else name
        keys += [f"{table}.{key}" for key in keys_of(inner)]
    return keys


def required(kind: type[Config]) -> list[str]:
    """The dotted keys that a config cannot do without; below a table with free names, the table's."""
    keys = []
    for name, field in kind.model_fields.items():
        if field.is_required():
            inner = _inner_config(field.annotation)
            keys += [f"{name}.{key}" for key in required(inner)] if inner is field.annotation and inner else [name]
    return keys


def _inner_config(annotation: Any) -> type[Config] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the config file", path, f"Check the path ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the config file is not valid TOML", path, str(error)) from None


def override(data: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`data` with `a.b=value` settings laid over it. A value is read as TOML, and as a plain string where it is not.

    Raises ConfigError for a setting without `=` or a key that passes through a value.
    """
    merged = copy.deepcopy(dict(data))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError("a setting must read KEY=VALUE", setting, "Example: --set seed=1")
        put(merged, key, toml_value(text))
    return merged


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested tables. Raises ConfigError where it passes through a value."""
    *tables, leaf = key.split(".")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError("this key is a value and has no keys below it", key, f"Set {name} itself")
    data[leaf] = value


def settings(flags: Mapping[str, Any]) -> list[str]:
    """The flags that were given, as `override` reads them: {"store.path": "x"} -> ['store.path="x"']."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]


def toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(config: Config) -> str:
    """The config as resolved, defaults included; keys whose value is none are left out, as TOML has no such value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which the canonical JSON of two nested mappings differs."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif canonical(a) != canonical(b) or (key in old) != (key in new):
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found
