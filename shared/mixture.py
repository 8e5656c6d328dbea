"""Several finished stores as one: the rows of each behind those of the one before, in the order that they are named in.

They need not be a family: a mixture is what a user names, and its stores know nothing of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from shared.errors import ConfigError, StoreError
from shared.family import open_family
from shared.flags import HELD_OUT
from shared.header import Header
from shared.joined import Joined, plan_of
from shared.view import View

ALIKE = "Harvest both with the same models and sites under the same names"
SAME_SCALE = "Harvest both corpora into one store, or more rows of one by harvest run --extends, which keeps the scale"

Place = View | str | Path


def open_mixture(stores: Place | Sequence[Place]) -> View:
    """Finished stores, each with those that it extends, read as one; a single one is itself.

    `View.stores` tells them apart. The header is that of the first, but for an id that says which stores stand in which
    order, and for the scale: it has the factor, which all share, and the largest value of all; median and sink norm are
    of a store and not of a mixture, so that a row is a sink or none whatever its store is mixed with.
    Raises ConfigError for no store; StoreError, naming both, for two that do not fit each other.
    """
    named = [stores] if isinstance(stores, str) or not isinstance(stores, Sequence) else stores
    opened = [open_family(one) if isinstance(one, str | Path) else one for one in named]
    views = [store for view in opened for store in view.stores]
    if not views:
        raise ConfigError("no store is named", "[]", "Give one or more")
    if len(views) == 1:
        return views[0]
    for one, other in combinations(views, 2):
        _require_two(one, other)
        _require_alike(one, other)
    _require_one_split(views)
    return Joined(views[0].path, _header(views), views, views)


def _header(views: Sequence[View]) -> Header:
    spec = {"mixture": [view.header.id for view in views]}
    scale = {
        name: {"factor": views[0].factor(name), "largest": _largest(views, name)} for name in views[0].header.sources
    }
    return replace(views[0].header, spec=spec, plan=plan_of(views), scale=scale, codec=None, extends=None)


def _largest(views: Sequence[View], source: str) -> float:
    return max(view.header.scale[source]["largest"] for view in views if view.header.scale is not None)


def _require_two(one: View, other: View) -> None:
    if shared := sorted(set(one.members) & set(other.members)):
        value = f"{one.path} and {other.path} both read the one whose id begins with {shared[0][:12]}"
        raise StoreError("a store stands twice in a mixture", value, "Name each once: it brings those that it extends")


def _require_alike(one: View, other: View) -> None:
    for (what, left, way_out), (_, right, _) in zip(_traits(one), _traits(other), strict=False):
        if left != right:
            value = f"{one.path} has {left}, {other.path} has {right}"
            raise StoreError(f"stores of a mixture must have the same {what}", value, way_out)


def _traits(view: View) -> Iterator[tuple[str, object, str]]:
    """(what the stores of a mixture have in common, its value, the way out where they do not), their sources first."""
    header = view.header
    yield "sources", ", ".join(sorted(header.sources)), ALIKE
    for name, source in sorted(header.sources.items()):
        model = header.models[source.model]
        yield f"name of the model of {name}", source.model, ALIKE
        yield f"weights of {name}", model.weights, ALIKE
        yield f"tokenizer of {name}", model.tokenizer, ALIKE
        yield f"site of {name}", source.site, ALIKE
        yield f"width of {name}", source.width, ALIKE
        yield f"scale factor of {name}", view.factor(name), SAME_SCALE
    yield "store.dtype", header.plan["dtype"], "Harvest one of them again with the other's"
    yield "rows in a chunk", view.chunk_rows, "Harvest one of them again with the other's store.chunk_bytes"


def _require_one_split(views: Sequence[View]) -> None:
    """A document that one store holds out must not be trained on in another."""
    held_out = {name: view for view in views for name, split in _documents(view) if split == HELD_OUT}
    for view in views:
        for name, split in _documents(view):
            if split != HELD_OUT and name in held_out:
                value = f"{name}, by {held_out[name].path} and not by {view.path}"
                way_out = "Harvest both with the same rows.seed and rows.held_out"
                raise StoreError("a document is held out by one store of a mixture and not by another", value, way_out)


def _documents(view: View) -> Iterator[tuple[str, int]]:
    """(id, split) of every document."""
    return zip(view.document_ids(), view.column("documents/split").tolist(), strict=True)
