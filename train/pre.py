"""Pre-activations of a batch, computed as activations ask for them; and where a source's latents stand in its weights.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S of one source, n some of them, K kept
entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from train.kernels import AUTO, Choice, Columns, Entries, PreActivation, borrowed, hand_back, sparse
from train.wiring import Wiring, size_of

TINY = 1e-30  # the least decoder norm that scores are weighed by
AT_ONCE = 2048  # latents whose encoders are copied together on a CPU


@dataclass(frozen=True)
class Ports:
    """The latents of one source: slices of the dictionary's, and where each stands in the source's own matrices."""

    source: str
    slices: tuple[slice, ...]
    local_L: Tensor  # int64; 0 where the source has no part in the latent
    present_L: Tensor  # float32: 1 or 0

    @classmethod
    def of(cls, source: str, slices: tuple[slice, ...], latents: int) -> "Ports":
        local_L, present_L = torch.zeros(latents, dtype=torch.int64), torch.zeros(latents)
        first = 0
        for one in slices:
            local_L[one] = torch.arange(first, first + one.stop - one.start)
            present_L[one] = 1.0
            first += one.stop - one.start
        return cls(source, slices, local_L, present_L)

    def to(self, device: torch.device) -> "Ports":
        return Ports(self.source, self.slices, self.local_L.to(device), self.present_L.to(device))

    def own(self, of_L: Tensor, dim: int = 0) -> Tensor:
        """What a tensor over the dictionary's latents has of the source's own, in their order."""
        parts = [of_L.narrow(dim, one.start, one.stop - one.start) for one in self.slices]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def rows(self, W_SD: Tensor, latents: Tensor, sparse_gradient: bool = False) -> Tensor:
        """The rows of the source's own matrix that some latents have, [n, D]; 0 where it has no part in one."""
        return embedding(self.local_L[latents], W_SD, sparse=sparse_gradient) * self.present_L[latents, None]

    def spread(self, of_S: Tensor) -> Tensor:
        """The other way round: what each latent of the source has, over the dictionary's latents; 0 for all others."""
        return of_S[self.local_L] * self.present_L.view(-1, *[1] * (of_S.ndim - 1))

    @property
    def size(self) -> int:
        return size_of(self.slices)


class Pre:
    """The pre-activations of one batch, h = b + sum over readers of x . W, computed as an activation asks for them."""

    def __init__(
        self,
        wiring: Wiring,
        x: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        ports: Mapping[str, Ports],
        bias_L: Tensor,
        choice: Choice = AUTO,
    ) -> None:
        self.wiring, self.x, self.weights, self.ports, self.bias_L = wiring, x, weights, ports, bias_L
        self.choice: Choice = choice
        self._weighed: tuple[Tensor, Tensor, Tensor] | None = None  # h x norm; the norm; and as it was multiplied in
        self._borrowed: Tensor | None = None  # behind h x norm

    @property
    def rows(self) -> int:
        return len(next(iter(self.x.values())))

    def sparse(self, share: float) -> bool:
        """Whether codes of which this share is kept are to be entries, and no matrix."""
        return sparse(self.choice, self.bias_L.device, share)

    def _products(self) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
        """Of every span: its latents, the rows that it reads, of all its sources side by side, and its encoders.

        So each is one product, which holds nothing of a source that the span does not read.
        """
        first, beside = dict.fromkeys(self.weights, 0), dict[tuple[str, ...], Tensor]()
        for span in self.wiring.spans:
            readers = tuple(source for source in self.wiring.readers if source in span.readers)
            if readers not in beside:
                beside[readers] = side_by_side([self.x[source] for source in readers])
            parts = [self.weights[source].narrow(0, first[source], span.size) for source in readers]
            first |= {source: first[source] + span.size for source in readers}
            yield self.wiring.slices[span.name], beside[readers], parts

    @cached_property
    def dense_BL(self) -> Tensor:
        """h_BL with a graph: for dense methods."""
        spans = [linear(x_BD, side_by_side(parts), self.bias_L[own]) for own, x_BD, parts in self._products()]
        return side_by_side(spans)

    @cached_property
    def h_BL(self) -> Tensor:
        """h_BL without a graph."""
        return self.weighed(torch.ones_like(self.bias_L))

    @torch.no_grad()
    def weighed(self, norm_L: Tensor) -> Tensor:
        """h x norm, [B, L], without a graph: the one dense product that a sparse method needs.

        The norm goes into the encoders, which are smaller. One of 0 counts as TINY, so that h can be told again.
        """
        if self._weighed is None or self._weighed[1] is not norm_L:
            safe_L = norm_L.clamp_min(TINY).to(self.bias_L.dtype)
            known = "dense_BL" in self.__dict__
            self._weighed = self.dense_BL.detach() * safe_L if known else self._product(safe_L), norm_L, safe_L
        return self._weighed[0]

    def _product(self, norm_L: Tensor) -> Tensor:
        """On a CPU a transposed matrix: of a product that is so written it is done a tenth sooner (LOG.md)."""
        rows, latents, on_cpu = self.rows, len(norm_L), self.bias_L.device.type == "cpu"
        at_once = AT_ONCE if on_cpu else latents
        self._borrowed = borrowed(rows * latents, self.bias_L)
        score_BL = self._borrowed.view(latents, rows).T if on_cpu else self._borrowed.view(rows, latents)
        for own, x_BD, parts in self._products():
            for first in range(own.start, own.stop, at_once):
                some = slice(first, min(first + at_once, own.stop))
                inside = slice(some.start - own.start, some.stop - own.start)
                W_SD = side_by_side([part[inside] * norm_L[some, None] for part in parts])
                torch.addmm(self.bias_L[some] * norm_L[some], x_BD, W_SD.T, out=score_BL[:, some])
        return score_BL

    def release(self) -> None:
        """Hand back the memory of the scores: for who knows that nobody reads them, nor anything that shows them."""
        if self._borrowed is not None:
            hand_back(self._borrowed)
        self._weighed = self._borrowed = None
        self.__dict__.pop("h_BL", None)

    def _known(self) -> tuple[Tensor, Tensor]:
        """Scores that there are, and what h was multiplied by in them."""
        if self._weighed is None:
            self.weighed(torch.ones_like(self.bias_L))
        assert self._weighed is not None
        return self._weighed[0], self._weighed[2]

    def at(self, entries: Entries) -> Tensor:
        """h at kept entries, with a graph that reaches those entries only."""
        score_BL, safe_L = self._known()
        with torch.no_grad():
            h_K = score_BL[entries.row_K, entries.latent_K] / safe_L[entries.latent_K]
        sources: Sequence[str] = self.wiring.readers
        slices, x = [self.ports[s].slices for s in sources], [self.x[s] for s in sources]
        return PreActivation.apply(h_K, entries, slices, x, self.bias_L, *(self.weights[s] for s in sources))

    @torch.no_grad()
    def columns(self, latents: Tensor) -> Tensor:
        """h of some latents, [B, n], without a graph."""
        if self._weighed is not None:
            score_BL, safe_L = self._known()
            return (score_BL.T.index_select(0, latents) / safe_L[latents, None]).T
        h_Bn = self.bias_L[latents].expand(self.rows, -1)
        for source, W_SD in self.weights.items():
            h_Bn = h_Bn + self.x[source] @ self.ports[source].rows(W_SD, latents).T
        return h_Bn

    def graph_of(self, f_Bn: Tensor, latents: Tensor, sparse_gradient: bool = False) -> Tensor:
        """The codes of some latents, relu(h) where they are kept, with a graph."""
        places = [(self.x[s], self.ports[s].local_L[latents], self.ports[s].present_L[latents]) for s in self.weights]
        return Columns.apply(f_Bn, latents, places, sparse_gradient, self.bias_L, *self.weights.values())


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
