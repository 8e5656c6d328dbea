"""What a store says of itself: attributes.granary of its group, as STORE.md describes it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from shared import config
from shared.codec import Packing
from shared.errors import StoreError, StoreMismatchError
from shared.layout import GROUP
from shared.source import Model, Source

FORMAT = 1


@dataclass(frozen=True)
class Extends:
    """The store that a sibling extends: by more `rows` of its corpus, or by more `sources` of its rows."""

    kind: Literal["rows", "sources"]
    id: str
    path: str  # from the folder that holds the sibling; no part of its id


@dataclass(frozen=True)
class Header:
    """`spec` decides every value, and the id; `codec` is of a packed store alone."""

    spec: dict[str, Any]
    models: dict[str, Model]
    sources: dict[str, Source]
    plan: dict[str, Any]
    scale: dict[str, dict[str, float]] | None = None
    codec: Packing | None = None
    extends: Extends | None = None

    @cached_property
    def id(self) -> str:
        return config.fingerprint(self.spec)

    def attributes(self) -> dict[str, Any]:
        return {"granary": {"format": FORMAT, "id": self.id, **asdict(self)}}

    @classmethod
    def read(cls, path: Path) -> "Header":
        try:
            data = (path / GROUP).read_bytes()
        except OSError:
            data = b""
        return cls.parse(data, path)

    @classmethod
    def parse(cls, group: bytes, path: object) -> "Header":
        """The header in the bytes of a store's zarr.json. Raises StoreError, naming `path`, where there is none."""
        try:
            data = json.loads(group)["attributes"]["granary"]
            if data["format"] != FORMAT:
                raise StoreError("another format of store", data["format"], f"This version reads format {FORMAT}")
            models = {name: Model(**model) for name, model in data["models"].items()}
            sources = {name: Source(**source) for name, source in data["sources"].items()}
            packing = Packing(**data["codec"]) if data["codec"] else None
            extends = Extends(**data["extends"]) if data["extends"] else None
            return cls(data["spec"], models, sources, data["plan"], data["scale"], packing, extends)
        except (ValueError, KeyError, TypeError, AttributeError):
            way_out = "Give the folder NAME.zarr that harvest run wrote"
            raise StoreError("no Granary store here", path, way_out) from None

    def require_same(self, spec: Mapping[str, Any], path: object) -> None:
        """Raises StoreMismatchError where this store, which is at `path`, was made from another spec."""
        if self.id != config.fingerprint(spec):
            fields = "; ".join(config.differences(self.spec, spec))
            raise StoreMismatchError(
                f"another store is at {path}, and these fields differ (stored -> asked)", fields,
                "Give another path (store.path), or the configuration that the stored one was made from",
            )  # fmt: skip
