"""A sibling of a finished store: more rows of its corpus, or more sources of its rows (STORE.md)."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harvest.draft import key_of
from shared import config, files, layout
from shared.errors import ConfigError, StoreMismatchError
from shared.family import open_family, parent_of
from shared.header import Extends, Header
from shared.layout import GROUP
from shared.source import Model, Source
from shared.store import Store
from shared.view import View

FREE = ("rows.count", "store.shard_bytes", "extends")  # what may differ between rows of one family


@dataclass(frozen=True)
class Sibling:
    """What a store will extend. `twins` {model: the model of `parent` that reads the same tokens}, of more sources."""

    parent: Store
    family: View
    kind: Any
    twins: dict[str, str]

    def extends(self, path: Path) -> Extends:
        """As the header of the store at `path` says it."""
        place = os.path.relpath(self.parent.path.absolute(), path.absolute().parent)
        return Extends(self.kind, self.parent.header.id, Path(place).as_posix())

    def keys(self, seed: int) -> np.ndarray:
        """Of the documents that the family has: more rows are of others."""
        return np.array([key_of(name, seed) for name in self.family.document_ids()], "S32")

    @property
    def plan(self) -> dict[str, Any]:
        """The summary of the plan that more sources share."""
        summary = self.parent.header.plan
        of_models = {key: summary[key] for key in ("tokens", "read", "aligned_tokens")}
        renamed = {key: {name: found[twin] for name, twin in self.twins.items()} for key, found in of_models.items()}
        return {**summary, **renamed}

    def spec(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the store's id is made of. Raises StoreMismatchError where rows would be of another making."""
        made = {**spec, "extends": [self.kind, self.parent.header.id]}
        if self.kind == "sources":
            shared = {key: value for key, value in self.parent.header.spec.items() if key not in ("models", "sources")}
            return {**made, **shared, "extends": made["extends"]}
        found = config.differences(self.parent.header.spec, made)
        if wrong := [field for field in found if not field.startswith(FREE)]:
            what = f"more rows must be made like those of {self.parent.path} (stored -> asked)"
            way_out = "Give its configuration, with another rows.count"
            if any(field.startswith("sources.") for field in wrong):
                way_out += '; for more sources give new names: sites = {NAME = "resid.20"}'
            raise StoreMismatchError(what, "; ".join(wrong), way_out)
        return made

    def require_rows(self, given: Mapping[str, Any], text: Callable[[], Any]) -> None:
        """More sources are of the rows that are there, whatever a config says of rows that it would have made.

        `given` are its keys without the defaults, `text` the identity of its corpora. Raises StoreMismatchError.
        """
        spec = self.parent.header.spec
        asked: dict[str, Any] = {
            table: {key: value for key, value in given.get(table, {}).items() if key in spec[table]}
            for table in ("rows", "batch", "store")
        }
        if asked["rows"].get("align") == "auto":
            del asked["rows"]["align"]
        stored = {table: {key: spec[table][key] for key in keys} for table, keys in asked.items()}
        if given.keys() & {"corpus", "corpora"}:
            asked["corpus"], stored["corpus"] = {"": text()}, {"": spec["corpus"]}
        if wrong := config.differences(stored, asked):
            what = f"more sources are of the rows of {self.parent.path} (stored -> asked)"
            way_out = "Leave these keys out; for more rows give all sources of the store, under their names"
            raise StoreMismatchError(what, "; ".join(wrong), way_out)

    def share(self, path: Path, header: Header) -> Store:
        """The store at `path`, planned like its parent: the same tokens, rows and batches under its models' names."""
        tables: dict[str, np.ndarray] = {}
        for name in self._planned():
            kind, owner, *rest = name.split("/")
            models = [model for model, twin in self.twins.items() if twin == owner]
            names = [f"{kind}/{model}/{rest[0]}" for model in models] if rest else [name]
            tables |= dict.fromkeys(names, self.parent.column(name))
        return Store.create(path, header, tables)

    def _planned(self) -> list[str]:
        """The tables of the parent's plan."""
        names = [group.parent.relative_to(self.parent.path).as_posix() for group in self.parent.path.rglob(GROUP)]
        arrays = [name for name in sorted(names) if "/" in name and not name.startswith(layout.UNIT_ARRAYS)]
        return [name for name in arrays if files.read_json(self.parent.path / name / GROUP)["node_type"] == "array"]


def of(path: str, found: Mapping[str, Model], sources: Mapping[str, Source], replaced: Mapping[str, Any]) -> Sibling:
    """A sibling of the store at `path` with these models and sources.

    Raises StoreError where the store is not finished, ConfigError where the sources are neither its own nor all new.
    """
    parent, family = Store.open(path), open_family(path)
    shared = sources.keys() & family.header.sources.keys()
    if not shared:
        _require_new(family, found, sources)
        return Sibling(parent, family, "sources", _twins(parent, family, found, replaced))
    if shared != family.header.sources.keys() or shared != sources.keys():
        listed = f"{', '.join(sources)} of {', '.join(family.header.sources)}"
        raise ConfigError(
            "a sibling has all sources of the store that it extends, or none of them", listed,
            "For more rows give all of them; for more sources give new ones, under other names",
        )  # fmt: skip
    if parent.header.extends is not None and parent.header.extends.kind == "sources":
        way_out = f"Extend {parent.header.extends.path}, and the result by the other sources"
        raise ConfigError("a store of more sources cannot be extended by rows", path, way_out)
    return Sibling(parent, family, "rows", {})


def _require_new(family: View, found: Mapping[str, Model], sources: Mapping[str, Source]) -> None:
    def what(source: Source, of: Mapping[str, Model]) -> str:
        return config.canonical([of[source.model].identity(), source.site])

    there = {what(source, family.header.models): name for name, source in family.header.sources.items()}
    for name, source in sources.items():
        if twin := there.get(what(source, found)):
            raise ConfigError("the store has this source already", f"{name} is its {twin}", "Leave it out")


def _twins(parent: Store, family: View, found: Mapping[str, Model], replaced: Mapping[str, Any]) -> dict[str, str]:
    if parent.header.extends is not None and parent.header.extends.kind == "rows":
        what = "more sources extend one store, not a family of rows"
        raise ConfigError(what, parent.path, f"Extend {parent.header.extends.path} and this one, each by itself")
    spec = parent.header.spec["models"]
    twins = {}
    for name, model in found.items():
        same = family.header.models.get(name)
        if same is not None and same.identity() != model.identity():
            raise ConfigError("the store has another model of this name", name, "Give the model another name")
        alike = [
            twin for twin, one in parent.header.models.items()
            if one.tokenizer == model.tokenizer and spec[twin]["replace"] == replaced[name]
        ]  # fmt: skip
        if not alike:
            raise ConfigError(
                "no model of the store reads the same tokens as this one", name,
                "Rows pair tokens, so other tokenizers need a harvest of all models together",
            )  # fmt: skip
        twins[name] = name if name in alike else alike[0]
    return twins


def scale(store: Store, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The scale that was measured; where the store has more rows of a family, the family's own."""
    made = {name: dict(values) for name, values in measured.items()}
    if store.header.extends is None or store.header.extends.kind != "rows":
        return made
    family = Header.read(parent_of(store)).scale
    assert family is not None
    return {name: {**family[name], "tolerance": values["tolerance"]} for name, values in made.items()}
