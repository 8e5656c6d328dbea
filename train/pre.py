"""Pre-activations of a batch, computed as activations ask for them; and where a source's latents stand in its weights.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S of one source, n some of them, K kept
entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from train.kernels import choice
from train.kernels.choice import Kernels
from train.kernels.entries import Entries, borrowed, hand_back
from train.kernels.products import Place, PreActivation, Whole, of_source, product
from train.kernels.select import above, by_latent
from train.wiring import Wiring, size_of

TINY = 1e-30  # the least decoder norm that scores are weighed by
SAMPLE = 256  # rows, and latents, by which the number of entries is told
COLUMNS = {"cpu": 2**19, "cuda": 2**27}  # numbers of rows by some latents that are held at once: a core's cache
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
        if self.everywhere:
            return of_L  # not a slice of it, whose gradient would be copied
        return of_source(of_L, self.slices, dim)

    def rows(self, W_SD: Tensor, latents: Tensor) -> Tensor:
        """The rows of the source's own matrix that some latents have, [n, D]; 0 where it has no part in one."""
        return W_SD[self.local_L[latents]] * self.present_L[latents, None]

    def spread(self, of_S: Tensor) -> Tensor:
        """The other way round: what each latent of the source has, over the dictionary's latents; 0 for all others."""
        return of_S[self.local_L] * self.present_L.view(-1, *[1] * (of_S.ndim - 1))

    @property
    def size(self) -> int:
        return size_of(self.slices)

    @property
    def everywhere(self) -> bool:
        """Whether the source has a part in every latent."""
        return self.size == len(self.local_L)


@dataclass(frozen=True)
class Scores:
    """(h - less) x norm of a batch, [B, L]. What is None was left out."""

    score_BL: Tensor
    asked_L: Tensor | None  # the norm
    norm_L: Tensor | None  # as it was multiplied in
    less_L: Tensor | None

    def h(self, score: Tensor, latents: Tensor | slice = slice(None)) -> Tensor:
        """h of some scores, given the latent of each, or of the last dimension."""
        h = score if self.norm_L is None else score / self.norm_L[latents]
        return h if self.less_L is None else h + self.less_L[latents]


class Pre:
    """The pre-activations of one batch, h = b + sum over readers of x . W, computed as an activation asks for them."""

    def __init__(
        self,
        wiring: Wiring,
        x: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        ports: Mapping[str, Ports],
        bias_L: Tensor,
        kernels: Kernels,
        encoders: dict[int, Tensor] | None = None,
    ) -> None:
        self.wiring, self.x, self.weights, self.ports, self.bias_L = wiring, x, weights, ports, bias_L
        self.kernels = kernels
        self._encoders = encoders  # as a part of the rows leaves them to the next, by the first of their latents
        self._known: Scores | None = None
        self._borrowed: Tensor | None = None  # behind the scores

    @property
    def rows(self) -> int:
        return len(next(iter(self.x.values())))

    def parts(self) -> "Iterator[Pre]":
        """The pre-activations of so many rows after each other as the scores of are to be held at once."""
        assert self.kernels.micro_batch is not None
        alike, encoders = Kernels(self.kernels.codes, "bf16" if self.bf16 else "fp32"), dict[int, Tensor]()
        for first in range(0, self.rows, self.kernels.micro_batch):
            x = {name: x_BD[first : first + self.kernels.micro_batch] for name, x_BD in self.x.items()}
            yield Pre(self.wiring, x, self.weights, self.ports, self.bias_L, alike, encoders)

    def sparse(self, share: float) -> bool:
        """Whether codes of which this share is kept are to be entries, and no matrix."""
        return self.kernels.sparse(self.bias_L.device, share)

    @cached_property
    def bf16(self) -> bool:
        """Whether products are rounded to bf16, their factors and what comes out. All else is fp32."""
        size = self.rows * sum(W_SD.numel() for W_SD in self.weights.values())
        return self.bias_L.dtype == torch.float32 and self.kernels.bf16(self.bias_L.device, size)

    def _products(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
        """Of every span: its latents, the rows that it reads, of all its sources side by side in `dtype`, its encoders.

        So each is one product, which holds nothing of a source that the span does not read.
        """
        first, beside = dict.fromkeys(self.weights, 0), dict[tuple[str, ...], Tensor]()
        for span in self.wiring.spans:
            readers = tuple(source for source in self.wiring.readers if source in span.readers)
            if readers not in beside:
                beside[readers] = side_by_side([self.x[source].to(dtype) for source in readers])
            parts = [self.weights[source].narrow(0, first[source], span.size) for source in readers]
            first |= {source: first[source] + span.size for source in readers}
            yield self.wiring.slices[span.name], beside[readers], parts

    @cached_property
    def dense_BL(self) -> Tensor:
        """h_BL with a graph: for dense methods."""
        with torch.no_grad():
            known = self.scores()
            h_BL = known.h(known.score_BL.to(self.bias_L.dtype))
        return Whole.apply(h_BL, self._places(), self.bf16, self.bias_L, *self._given())

    @cached_property
    def h_BL(self) -> Tensor:
        """h_BL without a graph."""
        return self.weighed().to(self.bias_L.dtype)

    def weighed(self, norm_L: Tensor | None = None, less_L: Tensor | None = None) -> Tensor:
        """(h - less) x norm, [B, L], without a graph: the one dense product that a sparse method needs.

        Both go into the encoders and biases, which are smaller. A norm of 0 counts as TINY, so that h can be told.
        """
        known = self._known
        if known is None or known.asked_L is not norm_L or known.less_L is not less_L:
            with torch.no_grad():
                self._known = known = self._scores(norm_L, less_L)
        return known.score_BL

    def scores(self) -> Scores:
        """Those that there are, or pre-activations as they are."""
        if self._known is None:
            self.weighed()
        assert self._known is not None
        return self._known

    def _scores(self, norm_L: Tensor | None, less_L: Tensor | None) -> Scores:
        safe_L = None if norm_L is None else norm_L.clamp_min(TINY).to(self.bias_L.dtype)
        if "dense_BL" not in self.__dict__:
            return Scores(self._product(safe_L, less_L), norm_L, safe_L, less_L)
        score_BL = self.dense_BL.detach() if less_L is None else self.dense_BL.detach() - less_L
        return Scores(score_BL if safe_L is None else score_BL * safe_L, norm_L, safe_L, less_L)

    def _product(self, norm_L: Tensor | None, less_L: Tensor | None) -> Tensor:
        """The scores, in whichever layout is sooner written (LOG.md)."""
        rows, latents, on_cpu = self.rows, len(self.bias_L), self.bias_L.device.type == "cpu"
        bias_L = self.bias_L if less_L is None else self.bias_L - less_L
        bias_L = bias_L if norm_L is None else bias_L * norm_L
        at_once = AT_ONCE if on_cpu else latents
        dtype = torch.bfloat16 if self.bf16 else self.bias_L.dtype
        self._borrowed = borrowed(rows * latents, dtype, self.bias_L.device)
        score_BL = self._borrowed.view(rows, latents)
        if choice.by_latent(self.bias_L.device.type):
            score_BL = self._borrowed.view(latents, rows).T
        for own, x_BD, parts in self._products(dtype):
            for first in range(own.start, own.stop, at_once):
                some = slice(first, min(first + at_once, own.stop))
                inside = slice(some.start - own.start, some.stop - own.start)
                W_SD = (self._encoders or {}).get(first)
                if W_SD is None:
                    of_norm = None if norm_L is None else norm_L[some]
                    W_SD = _weighed([part[inside] for part in parts], of_norm).to(dtype)
                if self._encoders is not None:
                    self._encoders[first] = W_SD
                torch.addmm(bias_L[some].to(dtype), x_BD, W_SD.T, out=score_BL[:, some])
        return score_BL

    def release(self) -> None:
        """Hand back the memory of the scores: for who knows that nobody reads them, nor anything that shows them."""
        if self._borrowed is not None:
            hand_back(self._borrowed)
        self._known = self._borrowed = None
        for name in ("h_BL", "dense_BL"):
            self.__dict__.pop(name, None)

    def _places(self) -> list[Place]:
        """Of every source, where its latents stand."""
        ports = [self.ports[source] for source in self.wiring.readers]
        return [(one.slices, one.local_L, one.present_L) for one in ports]

    def _given(self) -> list[Tensor]:
        """The rows of every source, then its weights."""
        return [table[source] for table in (self.x, self.weights) for source in self.wiring.readers]

    @torch.no_grad()
    def above(self, less_L: Tensor | None = None) -> Entries | None:
        """Entries whose h is above `less` (none: 0), or None where they are so many that a matrix is faster.

        How many there are is told by some rows and latents. A GPU would have to be waited for: there entries are to be
        asked for.
        """
        on_cpu = self.bias_L.device.type == "cpu"
        if self.kernels.codes == "dense" or (self.kernels.codes == "auto" and not on_cpu):
            return None
        score_BL = self.weighed(None, less_L)
        some = score_BL[:: max(1, self.rows // SAMPLE), :: max(1, len(self.bias_L) // SAMPLE)]
        passes = torch.count_nonzero(~(some <= 0)) / some.numel()  # so does what is not a number
        return above(score_BL, 0.0) if self.sparse(float(passes)) else None

    def at(self, entries: Entries, score_K: Tensor | None = None) -> Tensor:
        """h at kept entries, with a graph that reaches those entries only; of their h x norm, where that is told."""
        return self.with_graph(entries, self.values(entries, score_K))

    @torch.no_grad()
    def values(self, entries: Entries, score_K: Tensor | None = None) -> Tensor:
        """The same without a graph."""
        known = self.scores()
        score_K = known.score_BL[entries.row_K, entries.latent_K] if score_K is None else score_K
        return known.h(score_K.to(self.bias_L.dtype), entries.latent_K)

    def with_graph(self, entries: Entries, h_K: Tensor) -> Tensor:
        """The same, where the values are known."""
        return PreActivation.apply(h_K, entries, self._places(), self.bias_L, *self._given())

    @torch.no_grad()
    def columns(self, latents: Tensor, rows: slice = slice(None)) -> Tensor:
        """h of some latents on some rows, [B, n], without a graph; the latents of a row side by side in memory."""
        if (known := self._known) is not None:
            score_BL = known.score_BL[rows]
            if by_latent(known.score_BL):
                score_Bn = score_BL.T.index_select(0, latents).T.contiguous()
            else:
                score_Bn = score_BL.gather(1, latents.expand(len(score_BL), -1))
            return known.h(score_Bn.to(self.bias_L.dtype), latents)
        h_Bn = self.bias_L[latents]
        for source, W_SD in self.weights.items():
            h_Bn = h_Bn + product(self.x[source][rows], self.ports[source].rows(W_SD, latents).T, self.bf16)
        return h_Bn

    def parts_of(self, latents: Tensor) -> list[slice]:
        """Parts of the rows, of which columns of these latents are held at once."""
        count = -(-self.rows * len(latents) // COLUMNS.get(self.bias_L.device.type, COLUMNS["cuda"]))
        rows = -(-self.rows // max(count, 1))
        return [slice(first, min(first + rows, self.rows)) for first in range(0, self.rows, rows)]


def _weighed(parts: Sequence[Tensor], norm_L: Tensor | None) -> Tensor:
    """Encoders side by side, times norms, in one pass."""
    if norm_L is None:
        return side_by_side(parts)
    widths = [part.shape[1] for part in parts]
    W_SD = parts[0].new_empty(len(norm_L), sum(widths))
    for part, own_SD in zip(parts, W_SD.split(widths, 1), strict=True):
        torch.mul(part, norm_L[:, None], out=own_SD)
    return W_SD


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
