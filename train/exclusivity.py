"""What is exclusive about the spans that do not read every source: by construction, by budget, and in truth.

integrity  the largest change of the span's pre-activations, and of what it alone writes, when the rows of the sources
           that it does not read are noise (of the same length, less the mean): 0, by construction
coupling   how much its codes change then: sum |f - f'| / sum f. 0 where no budget is shared
shadow     of each of its latents the largest correlation, over rows, of its code with that of any latent that reads a
           source which the span does not: near 1 where the other source has the same feature, and the span only seems
           to have it alone. Its median over the latents that fire on FEWEST rows or more; `shadowed` are those above
           SHADOWED

Letters: B rows of a batch, N rows, L latents, E latents of a span.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.chance import keyed, normal
from train.code import Code
from train.dictionary import Dictionary
from train.wiring import Span

ROWS = 16_384  # the first ones, whose codes are correlated
MOVED = 1024  # the first ones, of which sources are replaced by noise
FEWEST = 10  # rows on which a latent must fire to have a shadow
SHADOWED = 0.7  # of a correlation: half of the code's variance is that of another source's latent
PIECE = 256  # of these at once, since their codes are B x L matrices
TOGETHER = 64  # latents of a span that are correlated at once


class Exclusivity:
    """Adds up batches of rows, and gives the figures of each span that does not read every source."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, self.rows = dictionary, 0
        every = set(dictionary.wiring.readers)
        self.spans = [span for span in dictionary.wiring.spans if every - set(span.readers)]
        self._integrity = {span.name: 0.0 for span in self.spans}
        self._changed = {span.name: [0.0, 0.0] for span in self.spans}  # sums of |f - f'|, and of f
        self._codes: list[Tensor] = []  # sparse, [B, L]

    @torch.no_grad()
    def add(self, x: Mapping[str, Tensor], code: Code) -> None:
        """Raw rows {source: [B, D]} of every reader, and their codes; those behind ROWS are passed over."""
        count = min(len(next(iter(x.values()))), ROWS - self.rows)
        if not self.spans or not count:
            return
        codes_BL = code.sparse().cpu()
        self._codes.append(codes_BL.index_select(0, torch.arange(count)))
        moved = max(0, min(MOVED - self.rows, count))
        for start in range(0, moved, PIECE):
            self._move({name: rows_BD[start : min(start + PIECE, moved)] for name, rows_BD in x.items()}, start)
        self.rows += count

    def _move(self, x: Mapping[str, Tensor], start: int) -> None:
        """Put noise in place of the rows of the sources that each span does not read."""
        pre, f_BL = self.dictionary.pre(x), self.dictionary.encode(x)
        noise = {name: self._noise(number, name, x[name], start) for number, name in enumerate(x)}
        for span in self.spans:
            latents = self.dictionary.wiring.slices[span.name]
            loud = {name: rows_BD if name in span.readers else noise[name] for name, rows_BD in x.items()}
            moved, moved_BL = self.dictionary.pre(loud), self.dictionary.encode(loud)
            own = [self._written(span, one.h_BL) for one in (pre, moved)]
            change = max(float((a - b).abs().max()) for a, b in zip(*own, strict=True))
            self._integrity[span.name] = max(self._integrity[span.name], change)
            for n, part in enumerate(((f_BL - moved_BL)[:, latents].abs(), f_BL[:, latents])):
                self._changed[span.name][n] += float(part.double().sum())

    def _noise(self, number: int, name: str, x_BD: Tensor, start: int) -> Tensor:
        """Random directions, each as long as its row less the mean. Those of a row depend on its number alone."""
        rows, width = x_BD.shape
        first = (self.rows + start) * width
        drawn = normal(keyed(number), np.arange(first, first + rows * width))
        noise_BD = torch.from_numpy(drawn).to(x_BD).view(rows, width)
        mean_D = self.dictionary.scale.mean(name)
        long_B, drawn_B = (torch.linalg.vector_norm(one_BD, dim=1) for one_BD in (x_BD - mean_D, noise_BD))
        return mean_D + noise_BD * (long_B / drawn_B)[:, None]

    def _written(self, span: Span, h_BL: Tensor) -> list[Tensor]:
        """The pre-activations of a span, and what it would write with all of them that are positive (decoupled: and
        selected)."""
        alone_BL = torch.zeros_like(h_BL)
        latents = self.dictionary.wiring.slices[span.name]
        alone_BL[:, latents] = h_BL[:, latents].clamp_min(0)
        code = self.dictionary.activation.again(alone_BL, self.dictionary.norms())
        written = self.dictionary.written(code, dict(self.dictionary.bias.items()))
        return [h_BL[:, latents], *(written[name] for name in span.writers)]

    def result(self) -> dict[str, dict[str, Any]]:
        """{span: its figures}; a figure that no row defines is None."""
        if not self.rows:
            return {}
        codes_NL = torch.cat(self._codes).coalesce()
        found = {}
        for span in self.spans:
            change, total = self._changed[span.name]
            shadow_E = shadows(codes_NL, *self._seen(span))
            told = shadow_E[~np.isnan(shadow_E)]
            found[span.name] = {
                "integrity": self._integrity[span.name],
                "coupling": change / total if total else None,
                "shadow": float(np.median(told)) if len(told) else None,
                "shadowed": int((told > SHADOWED).sum()),
            }
        return found

    def _seen(self, span: Span) -> tuple[Tensor, Tensor]:
        """The latents of a span, and those of all spans that read a source which it does not."""
        wiring = self.dictionary.wiring
        places = {one.name: torch.arange(wiring.latents)[wiring.slices[one.name]] for one in wiring.spans}
        others = [one.name for one in wiring.spans if set(one.readers) - set(span.readers)]
        return places[span.name], torch.cat([places[name] for name in others])


def shadows(codes_NL: Tensor, own: Tensor, others: Tensor) -> np.ndarray:
    """The largest correlation of each latent of `own` with any of `others`, [E]; NaN where it fires on fewer than
    FEWEST rows. `codes_NL` is sparse."""
    rows = codes_NL.shape[0]
    transposed_LN = codes_NL.double().t().coalesce()
    mean_L = torch.sparse.sum(transposed_LN, 1).to_dense() / rows
    square_L = torch.sparse.sum(transposed_LN * transposed_LN, 1).to_dense() / rows
    spread_L = (square_L - mean_L.square()).clamp_min(0).sqrt()
    fires_L = torch.bincount(transposed_LN.indices()[0][transposed_LN.values() > 0], minlength=len(mean_L))
    others_XN = transposed_LN.index_select(0, others)
    found = np.full(len(own), np.nan)
    for start in range(0, len(own), TOGETHER):
        some = own[start : start + TOGETHER]
        f_NE = transposed_LN.index_select(0, some).to_dense().t()
        both_XE = torch.sparse.mm(others_XN, f_NE) / rows - mean_L[others][:, None] * mean_L[some]
        scale_XE = spread_L[others][:, None] * spread_L[some]
        largest_E = torch.where(scale_XE > 0, both_XE / scale_XE, 0.0).max(0).values
        found[start : start + len(some)] = torch.where(fires_L[some] >= FEWEST, largest_E, torch.nan).numpy()
    return found
