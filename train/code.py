"""What a batch turns into: pre-activations, codes, and the record of a forward pass. And what makes codes: activations.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S latents of one source, K kept entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shared.errors import WiringError
from train.kernels import Choice, Columns, Decode, Entries, PreActivation, sparse
from train.wiring import Wiring, size_of

TINY = 1e-30  # the least decoder norm that scores are weighed by


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

    def rows(self, W_SD: Tensor, latents: Tensor) -> Tensor:
        """The rows of the source's own matrix that some latents have, [n, D]; 0 where it has no part in one."""
        return W_SD.index_select(0, self.local_L[latents]) * self.present_L[latents, None]

    def spread(self, of_S: Tensor) -> Tensor:
        """The other way round: what each latent of the source has, over the dictionary's latents; 0 for all others."""
        return of_S[self.local_L] * self.present_L.view(-1, *[1] * (of_S.ndim - 1))

    @property
    def size(self) -> int:
        return size_of(self.slices)


class Code(ABC):
    """The codes f_BL of a batch, dense, as kept entries, or as those of each writer.

    Final classes: DenseCode, SparseCode, SplitCode.
    """

    @abstractmethod
    def dense(self) -> Tensor:
        """f_BL."""

    @abstractmethod
    def sparse(self) -> Tensor:
        """f_BL as a sparse matrix, coalesced, without a graph."""

    @abstractmethod
    def write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        """sum over latents of f x W: what the code writes to one source, [B, D]."""

    @abstractmethod
    def write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        """What each group of latents (`group_L` is the number of a latent's) writes to one source, [B, groups, D]."""

    @abstractmethod
    def fires_L(self, ports: Ports | None = None) -> Tensor:
        """How many rows of the batch each latent fires on (a code above 0), int64; with `ports` where it writes."""

    @abstractmethod
    def l1(self, weight_L: Tensor) -> Tensor:
        """The mean over rows of sum over latents of f x weight, a scalar; what penalties see."""

    @abstractmethod
    def sums(self, of: Callable[[Tensor], Tensor], weight_L: Tensor) -> Tensor:
        """The sum over latents of of(f x weight) for every row, [B]: what penalties see. of(0) must be 0."""

    @abstractmethod
    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        """The smallest positive f x norm in each group of latents, [groups]; infinite where no code is positive.

        Of norms per writer, [writers, L]: that of each, [writers, groups].
        """


@dataclass(frozen=True)
class DenseCode(Code):
    """Codes as a matrix. `soft_BL` is what penalties see: f itself for ReLU."""

    f_BL: Tensor
    soft_BL: Tensor

    def dense(self) -> Tensor:
        return self.f_BL

    def sparse(self) -> Tensor:
        return self.f_BL.detach().to_sparse().coalesce()

    def write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        return ports.own(self.f_BL, 1) @ W_SD

    def write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        each = (DenseCode(self.f_BL * (group_L == g), self.soft_BL) for g in range(groups))
        return torch.stack([one.write(W_SD, ports) for one in each], 1)

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        return _present((self.f_BL > 0).sum(0), ports)

    def l1(self, weight_L: Tensor) -> Tensor:
        return (self.soft_BL @ weight_L).mean()

    def sums(self, of: Callable[[Tensor], Tensor], weight_L: Tensor) -> Tensor:
        return of(self.soft_BL * weight_L).sum(1)

    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        return _smallest_positive(self.f_BL * norm_L, group_L.expand_as(self.f_BL), groups)


@dataclass(frozen=True)
class SparseCode(Code):
    """Codes as kept entries; an entry's value may be 0, where a row has fewer than k positive pre-activations."""

    entries: Entries
    value_K: Tensor

    def dense(self) -> Tensor:
        f_BL = self.value_K.new_zeros(self.entries.rows, self.entries.latents)
        return f_BL.index_put((self.entries.row_K, self.entries.latent_K), self.value_K)

    def sparse(self) -> Tensor:
        places = torch.stack([self.entries.row_K, self.entries.latent_K])
        size = (self.entries.rows, self.entries.latents)
        return torch.sparse_coo_tensor(places, self.value_K.detach(), size, check_invariants=False).coalesce()

    def write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        latent_K = self.entries.latent_K
        present_K = ports.present_L[latent_K].to(self.value_K.dtype)
        y_BD = Decode.apply(self.value_K, W_SD, self.entries, ports.slices, ports.local_L[latent_K], present_K)
        return y_BD

    def write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        place_K = self.entries.row_K * groups + group_L[self.entries.latent_K]
        order_K = torch.argsort(place_K, stable=True)
        split = Entries(
            place_K[order_K], self.entries.latent_K[order_K], self.entries.rows * groups, self.entries.latents
        )
        written = SparseCode(split, self.value_K[order_K]).write(W_SD, ports)
        return written.view(self.entries.rows, groups, W_SD.shape[1])

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        fires_L = torch.bincount(self.entries.latent_K, (self.value_K > 0).double(), self.entries.latents).long()
        return _present(fires_L, ports)

    def l1(self, weight_L: Tensor) -> Tensor:
        return (self.value_K * weight_L[self.entries.latent_K]).sum() / self.entries.rows

    def sums(self, of: Callable[[Tensor], Tensor], weight_L: Tensor) -> Tensor:
        value_K = of(self.value_K * weight_L[self.entries.latent_K])
        return value_K.new_zeros(self.entries.rows).index_add(0, self.entries.row_K, value_K)

    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        latent_K = self.entries.latent_K
        return _smallest_positive(self.value_K * norm_L[latent_K], group_L[latent_K], groups)


@dataclass(frozen=True)
class SplitCode(Code):
    """Codes that every writer selects for itself (norm = decoupled): `of` has them, {writer: its own}.

    Taken together, a latent has its code on a row where any writer keeps it.
    """

    of: Mapping[str, SparseCode]

    @cached_property
    def together(self) -> SparseCode:
        one, parts = next(iter(self.of.values())).entries, self.of.values()
        place_K = torch.cat([part.entries.row_K * one.latents + part.entries.latent_K for part in parts])
        place_U, where_K = torch.unique(place_K, return_inverse=True)
        value_K = torch.cat([part.value_K for part in parts])
        value_U = value_K.new_zeros(len(place_U)).scatter_reduce(0, where_K, value_K, "amax")
        return SparseCode(Entries(place_U // one.latents, place_U % one.latents, one.rows, one.latents), value_U)

    def dense(self) -> Tensor:
        return self.together.dense()

    def sparse(self) -> Tensor:
        return self.together.sparse()

    def write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        return self.of[ports.source].write(W_SD, ports)

    def write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        return self.of[ports.source].write_groups(W_SD, ports, group_L, groups)

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        return (self.together if ports is None else self.of[ports.source]).fires_L(ports)

    def l1(self, weight_L: Tensor) -> Tensor:
        return torch.stack([one.l1(own_L) for one, own_L in self._each(weight_L)]).sum()

    def sums(self, of: Callable[[Tensor], Tensor], weight_L: Tensor) -> Tensor:
        return torch.stack([one.sums(of, own_L) for one, own_L in self._each(weight_L)]).sum(0)

    def _each(self, of_L: Tensor) -> Iterator[tuple[SparseCode, Tensor]]:
        """The codes of each writer, and its own of values [writers, L], or those [L] that are for all."""
        return zip(self.of.values(), of_L.expand(len(self.of), -1), strict=True)

    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        return torch.stack([one.smallest(own_L, group_L, groups) for one, own_L in self._each(norm_L)])


def _present(fires_L: Tensor, ports: Ports | None) -> Tensor:
    return fires_L if ports is None else fires_L * ports.present_L.long()


def _smallest_positive(score: Tensor, group: Tensor, groups: int) -> Tensor:
    positive = torch.where(score > 0, score, torch.inf).flatten()
    return score.new_full((groups,), torch.inf).scatter_reduce(0, group.flatten(), positive, "amin")


class Pre:
    """The pre-activations of one batch, h = b + sum over readers of x . W, computed as an activation asks for them."""

    def __init__(
        self,
        wiring: Wiring,
        x: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        ports: Mapping[str, Ports],
        bias_L: Tensor,
        choice: Choice = "auto",
    ) -> None:
        self.wiring, self.x, self.weights, self.ports, self.bias_L = wiring, x, weights, ports, bias_L
        self.choice: Choice = choice
        self._weighed: tuple[Tensor, Tensor, Tensor] | None = None  # h x norm; the norm; and as it was multiplied in

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
        score_BL = self.bias_L.new_empty(latents, rows).T if on_cpu else self.bias_L.new_empty(rows, latents)
        for own, x_BD, parts in self._products():
            W_SD = side_by_side([part * norm_L[own, None] for part in parts])
            torch.addmm(self.bias_L[own] * norm_L[own], x_BD, W_SD.T, out=score_BL[:, own])
        return score_BL

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
        for source, x_BD in self.x.items():
            h_Bn = h_Bn + x_BD @ self.ports[source].rows(self.weights[source], latents).T
        return h_Bn

    def graph_of(self, f_Bn: Tensor, latents: Tensor) -> Tensor:
        """The codes of some latents, relu(h) where they are kept, with a graph."""
        places = [(self.x[s], self.ports[s].local_L[latents], self.ports[s].present_L[latents]) for s in self.weights]
        return Columns.apply(f_Bn, latents, places, self.bias_L, *self.weights.values())


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


class Activation(nn.Module, ABC):
    """Pre-activations -> codes. Owns what lives per latent: the bias, and a method's thresholds or gates."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.bias_L = nn.Parameter(torch.zeros(latents))
        self.begins = {"bias_L": 0.0}  # the value of each parameter at a latent that begins, and begins again

    @abstractmethod
    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        """The codes; `norm_L` weights latents against each other where a method ranks them. Changes nothing."""

    def decouple(self) -> None:
        """Let every writer select for itself from here on: norms are then [writers, L]. Raises WiringError."""
        way_out = "Set wiring.norm to sum: that is what it would be"
        raise WiringError("this method selects no latents, for one source or for all", "wiring.norm decoupled", way_out)

    def again(self, f_BL: Tensor, norm_L: Tensor) -> Code:
        """The code behind a matrix of codes: of decoupled ones, what each writer has selected of them."""
        return DenseCode(f_BL, f_BL)

    def observe(self, code: Code, norm_L: Tensor) -> None:
        """Called once per training step, with no graph: the only place where running statistics change."""

    def shift(self, by_L: Tensor) -> None:
        """Give the same codes where the inner products of rows and encoders are larger by so much. No graph."""
        self.bias_L.sub_(by_L)
        self._shift(by_L)

    def _shift(self, by_L: Tensor) -> None:
        """What an activation that looks behind the bias has to do beside it."""

    def schedule(self, step: int) -> None:
        """Called before each training step, for values that depend on the step alone."""


@dataclass(frozen=True)
class Forward:
    """One forward pass, in scaled space: the target and its reconstruction y per writer, and the code between them."""

    target: dict[str, Tensor]
    y: dict[str, Tensor]
    code: Code
    pre: Pre
    norm_L: Tensor  # decoupled: [writers, L]
    weight_L: Tensor  # of a latent's codes in penalties, as its span says
    base: dict[str, Tensor]  # of y what no code writes, [D] or [B, D]: the bias, and what a skip connection passes on
