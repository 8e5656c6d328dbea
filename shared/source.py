"""What a row comes from: a model, and a source (that model at one site, under a short name)."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """One model of a store. `path` says where it was found and is no part of the store's id."""

    name: str
    path: str
    weights: str  # fingerprint of the weights
    tokenizer: str  # fingerprint of the tokenizer
    dtype: str
    attention: str

    def identity(self) -> dict[str, Any]:
        """All that decides a value: everything but the names of things."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "path")}


@dataclass(frozen=True)
class Source:
    """One model at one site. `width` is the number of components of its rows.

    `heads` is set for a site heads.N: its rows are that many heads of width / heads components, one after another.
    """

    name: str
    model: str
    site: str
    width: int
    heads: int | None = None
