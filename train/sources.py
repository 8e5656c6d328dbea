"""What a run asks of a store: its sources by their names, and differences of two of them, such as "chat - base".

Letters: B rows of a batch, D width of a source.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import ConfigError, StoreError
from shared.view import View

MINUS = " - "  # no stored source has a space in its name (harvest.config)
WHOLE = slice(None)


def difference(source: str, other: str) -> str:
    """The name of a source whose row is that of `source` less that of `other`: "chat - base".

    It stands wherever the sources of a run are named. Raises ConfigError where it would be no difference of two.
    """
    return MINUS.join(parts(f"{source}{MINUS}{other}"))


def parts(name: str) -> tuple[str, ...]:
    """The stored sources that `name` is made of: itself, or two, of which the second is subtracted.

    Raises ConfigError for a difference of one source, or of three.
    """
    found = tuple(name.split(MINUS))
    if MINUS in name and (len(found) > 2 or not all(found)):
        raise ConfigError("a difference is of two sources", repr(name), "Write it like 'chat - base'")
    if len(set(found)) < len(found):
        raise ConfigError("a source less itself is 0", repr(name), "Name two sources")
    return found


def in_brackets(name: str) -> str:
    """A name as it stands in a sum: "chat", "(chat - base)"."""
    return f"({name})" if len(parts(name)) > 1 else name


class Sources:
    """The sources of a run by `name`, and how their rows are made of those that are `stored`.

    "chat"         stored value x factor, in float32
    "chat - base"  the same of chat, less the same of base: factors are powers of two, so it is rounded once

    `stored` names what is read, each once however often it is needed; `widths` is {name: width} of what is made.
    Raises StoreError where the store has no such source, or two of a difference have not one width; ConfigError as
    `parts` does.
    """

    def __init__(self, store: View, names: Iterable[str]) -> None:
        self._parts = {name: parts(name) for name in names}
        self.stored = list(dict.fromkeys(part for made_of in self._parts.values() for part in made_of))
        self._found = {part: store.source(part) for part in self.stored}
        self._models = {part: store.header.models[one.model].path for part, one in self._found.items()}
        self._factors = {part: store.factor(part) for part in self.stored}
        self.widths = {name: self._width(made_of) for name, made_of in self._parts.items()}

    def _width(self, made_of: tuple[str, ...]) -> int:
        widths = {part: self._found[part].width for part in made_of}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{part} has {width}" for part, width in widths.items())
            raise StoreError("a difference is of sources of one width", told, "Give them as two sources")
        return widths[made_of[0]]

    def described(self) -> dict[str, dict[str, Any]]:
        """{name: model, site and width}; of a difference both models and sites, as its name has them."""
        return {
            name: {
                "model": MINUS.join(self._models[part] for part in made_of),
                "site": MINUS.join(self._found[part].site for part in made_of),
                "width": self.widths[name],
            }
            for name, made_of in self._parts.items()
        }

    def rows(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: float32 [B, D]} in the models' own units, of {stored source: [B, D]} as they were stored."""
        first = stored[self.stored[0]]
        x = {name: torch.empty(len(first), width, device=first.device) for name, width in self.widths.items()}
        for part in self.stored:
            self.put(part, stored[part], x)
        return x

    def put(self, part: str, stored_BD: Tensor, x: Mapping[str, Tensor], at: slice = WHOLE) -> None:
        """Put one stored source into all that is made of it, rows `at` of `x`. Called for each of `stored` in order.

        One at a time, so that a device holds one copy of what was stored beside what is made. What is already there
        counts for nothing: the first source that is put into a row overwrites it.
        """
        for name, made_of in self._parts.items():
            if part not in made_of:
                continue
            factor = self._factors[part] * (1.0 if part == made_of[0] else -1.0)
            x_BD = x[name][at]
            if part == min(made_of, key=self.stored.index):
                x_BD.copy_(stored_BD)
                if factor != 1.0:
                    x_BD.mul_(factor)
            else:
                x_BD.add_(stored_BD, alpha=factor)

    def mean(self, name: str, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """The mean of a source, [D], of those of the stored sources over the same rows."""
        first_D, *others = (stored[part] for part in self._parts[name])
        return first_D - others[0] if others else first_D
