"""The tokens of several models -> the places at which all of them end together. Each place is one row.

Letters: M models, T tokens of a document in one model, J places.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from harvest.segments import Tokens
from shared.errors import AlignmentError

Align = Callable[[Sequence[Tokens]], np.ndarray]


def identical(tokens: Sequence[Tokens]) -> np.ndarray:
    """Every token is a place: stops_MJ. Raises AlignmentError where the ids differ between models."""
    first = tokens[0].ids_T
    for number, other in enumerate(tokens[1:], 2):
        if not np.array_equal(first, other.ids_T):
            raise AlignmentError(
                "the tokenizers do not give the same ids", f"model 1 and model {number}", 'Set rows.align to "offsets"'
            )
    return np.tile(np.arange(1, len(first) + 1), (len(tokens), 1))


def offsets(tokens: Sequence[Tokens]) -> np.ndarray:
    """The characters at which a token of every model ends, as stops_MJ: how many tokens of model m end by place j.

    Both models have then read the same prefix of the document. Of several tokens with one end, the last one counts.
    """
    ends = [np.unique(one.ends_T[one.ends_T >= 0]) for one in tokens]
    common_J = reduce(np.intersect1d, ends)
    return np.stack([_last_with(one.ends_T, common_J) + 1 for one in tokens])


def _last_with(ends_T: np.ndarray, wanted_J: np.ndarray) -> np.ndarray:
    """The index of the last token that has each of these ends."""
    known = np.flatnonzero(ends_T >= 0)
    return known[np.searchsorted(ends_T[known], wanted_J, "right") - 1]


RULES: dict[str, Align] = {"identical": identical, "offsets": offsets}
