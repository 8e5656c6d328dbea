"""The tokens of several models -> the places at which all of them end together. Each place is one row.

Letters: M models, T tokens of a document in one model, J places.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from harvest.segments import Tokens
from shared.errors import AlignmentError

WINDOW = 64  # tokens of one model in a window of greedy at most; the time that a dead end takes grows with its square

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


def greedy(tokens: Sequence[Tokens]) -> np.ndarray:
    """Algorithm 1 of the DFC paper (https://arxiv.org/abs/2602.11729), for any number of models: stops_MJ.

    Tokens without content (special ones, white space) are skipped. Where the next tokens read alike, they are a place;
    where not, the shorter text grows until the windows read alike, and their last tokens are a place. What follows
    windows that never do is left out. Texts are compared in NFKC, without case and white space. Other than the listing:
    whole characters alone compare equal, any window that can still grow does, and none beyond WINDOW tokens.
    """
    at = [0] * len(tokens)
    places: list[list[int]] = []
    while (ends := _window(tokens, [_content(one, start) for one, start in zip(tokens, at, strict=True)])) is not None:
        places.append(ends)
        at = ends
    return np.array(places, np.int64).reshape(-1, len(tokens)).T


def _content(tokens: Tokens, start: int) -> int:
    """The next token that holds more than white space."""
    while start < len(tokens.pieces) and not tokens.pieces[start].strip():
        start += 1
    return start


def _window(tokens: Sequence[Tokens], starts: Sequence[int]) -> list[int] | None:
    """Where windows that begin at `starts` end alike; none where they do not."""
    if any(start >= len(one.pieces) for one, start in zip(tokens, starts, strict=True)):
        return None
    ends = [start + 1 for start in starts]
    while True:
        windows = [b"".join(one.pieces[a:b]) for one, a, b in zip(tokens, starts, ends, strict=True)]
        texts = [_read(window) for window in windows]
        if texts[0] is not None and all(text == texts[0] for text in texts):
            return ends
        lengths = [len(window.decode(errors="ignore").strip()) for window in windows]
        growing = [m for m, one in enumerate(tokens) if ends[m] < len(one.pieces) and ends[m] - starts[m] < WINDOW]
        if not growing:
            return None
        shortest = min(growing, key=lambda m: (lengths[m], -m))  # of two alike the second, as in the paper
        ends[shortest] += 1


def _read(window: bytes) -> str | None:
    """A window as it is compared; none where it ends inside a character."""
    try:
        text = window.decode()
    except UnicodeDecodeError:
        return None
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def complete(tokens: Sequence[Tokens], stops_MJ: np.ndarray) -> bool:
    """Whether no content is left behind the last place."""
    last_M = stops_MJ[:, -1] if stops_MJ.shape[1] else np.zeros(len(tokens), np.int64)
    return all(_content(one, int(last)) == len(one.pieces) for one, last in zip(tokens, last_M, strict=True))


RULES: dict[str, Align] = {"identical": identical, "offsets": offsets, "greedy": greedy}
