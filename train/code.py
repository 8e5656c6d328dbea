"""What a batch turns into: codes, and the record of a forward pass. And what makes codes: activations.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S latents of one source, K kept entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError, WiringError
from train import shards
from train.kernels.entries import Entries
from train.kernels.products import Decode, OfLatents, SquaredDistance, product, totals
from train.pre import Ports, Pre


class Code(ABC):
    """The codes f_BL of a batch, dense, as kept entries, or as those of each writer.

    Final classes: DenseCode, SparseCode, SplitCode.
    """

    kind: ClassVar[str]  # in the log
    sums_entries: ClassVar[bool] = True  # not of whole matrices

    @abstractmethod
    def dense(self) -> Tensor:
        """f_BL."""

    @abstractmethod
    def sparse(self) -> Tensor:
        """f_BL as a sparse matrix, coalesced, without a graph."""

    def write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        """sum over latents of f x W: what the code writes to one source, [B, D]."""
        return shards.total(self._write(W_SD, ports))

    def write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        """What each group of latents (`group_L` is the number of a latent's) writes to one source, [B, groups, D]."""
        return shards.total(self._write_groups(W_SD, ports, group_L, groups))

    def l1(self, weight_L: Tensor) -> Tensor:
        """The mean over rows of sum over latents of f x weight, a scalar."""
        return shards.total(self._l1(weight_L))

    def sums(self, of: Callable[[Tensor], Tensor], scale_L: Tensor, weight_L: Tensor | None = None) -> Tensor:
        """The sum over latents of of(f x scale) (x weight) for every row, [B]. of(0) must be 0."""
        return shards.total(self._sums(of, scale_L, weight_L))

    # These four are of the latents that this rank has.

    @abstractmethod
    def _write(self, W_SD: Tensor, ports: Ports) -> Tensor: ...

    @abstractmethod
    def _write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor: ...

    @abstractmethod
    def _l1(self, weight_L: Tensor) -> Tensor: ...

    @abstractmethod
    def _sums(self, of: Callable[[Tensor], Tensor], scale_L: Tensor, weight_L: Tensor | None) -> Tensor: ...

    @abstractmethod
    def fires_L(self, ports: Ports | None = None) -> Tensor:
        """How many rows of the batch each latent fires on (a code above 0), int64; with `ports` where it writes."""

    @property
    def soft(self) -> "Code":
        """The codes that penalties see, where they see others."""
        return self

    @abstractmethod
    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        """The smallest positive f x norm in each group of latents, [groups]; infinite where no code is positive.

        Of norms per writer, [writers, L]: that of each, [writers, groups].
        """


@dataclass(frozen=True)
class DenseCode(Code):
    """Codes as a matrix."""

    kind, sums_entries = "matrices", False
    f_BL: Tensor
    bf16: bool = False  # of products with it
    soft_BL: Tensor | None = None  # what penalties see, if that is not f

    @property
    def soft(self) -> "DenseCode":
        return self if self.soft_BL is None else DenseCode(self.soft_BL, self.bf16)

    def dense(self) -> Tensor:
        return self.f_BL

    def sparse(self) -> Tensor:
        return self.f_BL.detach().to_sparse().coalesce()

    def _write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        return product(ports.own(self.f_BL, 1), W_SD, self.bf16)

    def _write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        each = (DenseCode(self.f_BL * (group_L == g), self.bf16) for g in range(groups))
        return torch.stack([one._write(W_SD, ports) for one in each], 1)

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        fires_BL = torch.gt(self.f_BL, 0, out=torch.empty_like(self.f_BL.detach(), dtype=torch.float32))
        return _present((fires_BL.new_ones(len(fires_BL)) @ fires_BL).long(), ports)  # a sum of bools takes 3 times it

    def _l1(self, weight_L: Tensor) -> Tensor:
        return (self.f_BL @ weight_L).mean()

    def _sums(self, of: Callable[[Tensor], Tensor], scale_L: Tensor, weight_L: Tensor | None) -> Tensor:
        value_BL = of(self.f_BL * scale_L)
        return value_BL.sum(1) if weight_L is None else value_BL @ weight_L

    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        return _smallest_positive(self.f_BL * norm_L, group_L.expand_as(self.f_BL), groups)


@dataclass(frozen=True)
class SparseCode(Code):
    """Codes as kept entries; an entry's value may be 0, where a row has fewer than k positive pre-activations."""

    kind = "entries"
    entries: Entries
    value_K: Tensor
    soft_K: Tensor | None = None  # what penalties see, if that is not f

    @property
    def soft(self) -> "SparseCode":
        return self if self.soft_K is None else SparseCode(self.entries, self.soft_K)

    def dense(self) -> Tensor:
        f_BL = self.value_K.new_zeros(self.entries.rows, self.entries.latents)
        return f_BL.index_put((self.entries.row_K, self.entries.latent_K), self.value_K)

    def sparse(self) -> Tensor:
        places = torch.stack([self.entries.row_K, self.entries.latent_K])
        size = (self.entries.rows, self.entries.latents)
        return torch.sparse_coo_tensor(places, self.value_K.detach(), size, check_invariants=False).coalesce()

    def _write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        latent_K = self.entries.latent_K
        present_K = ports.present_L[latent_K].to(self.value_K.dtype)
        y_BD = Decode.apply(self.value_K, W_SD, self.entries, ports.slices, ports.local_L[latent_K], present_K)
        return y_BD

    def _write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        place_K = self.entries.row_K * groups + group_L[self.entries.latent_K]
        order_K = torch.argsort(place_K, stable=True)
        split = Entries(
            place_K[order_K], self.entries.latent_K[order_K], self.entries.rows * groups, self.entries.latents
        )
        written = SparseCode(split, self.value_K[order_K])._write(W_SD, ports)
        return written.view(self.entries.rows, groups, W_SD.shape[1])

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        return _present(totals(self.entries, (self.value_K > 0).double()).long(), ports)

    def _l1(self, weight_L: Tensor) -> Tensor:
        return (self.value_K * self._of(weight_L)).sum() / self.entries.rows

    def _of(self, value_L: Tensor) -> Tensor:
        """What the latents of the entries have."""
        of_K: Tensor = OfLatents.apply(value_L, self.entries)
        return of_K

    def _sums(self, of: Callable[[Tensor], Tensor], scale_L: Tensor, weight_L: Tensor | None) -> Tensor:
        value_K = of(self.value_K * self._of(scale_L))
        value_K = value_K if weight_L is None else value_K * self._of(weight_L)
        return value_K.new_zeros(self.entries.rows).index_add(0, self.entries.row_K, value_K)

    def smallest(self, norm_L: Tensor, group_L: Tensor, groups: int) -> Tensor:
        latent_K = self.entries.latent_K
        return _smallest_positive(self.value_K * norm_L[latent_K], group_L[latent_K], groups)


@dataclass(frozen=True)
class SplitCode(Code):
    """Codes that every writer selects for itself (norm = decoupled): `of` has them, {writer: its own}.

    Taken together, a latent has its code on a row where any writer keeps it.
    """

    kind = "entries of each writer"
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

    def _write(self, W_SD: Tensor, ports: Ports) -> Tensor:
        return self.of[ports.source]._write(W_SD, ports)

    def _write_groups(self, W_SD: Tensor, ports: Ports, group_L: Tensor, groups: int) -> Tensor:
        return self.of[ports.source]._write_groups(W_SD, ports, group_L, groups)

    def fires_L(self, ports: Ports | None = None) -> Tensor:
        return (self.together if ports is None else self.of[ports.source]).fires_L(ports)

    def _l1(self, weight_L: Tensor) -> Tensor:
        return torch.stack([one._l1(own_L) for one, own_L in self._each(weight_L)]).sum()

    def _sums(self, of: Callable[[Tensor], Tensor], scale_L: Tensor, weight_L: Tensor | None) -> Tensor:
        return torch.stack([one._sums(of, own_L, weight_L) for one, own_L in self._each(scale_L)]).sum(0)

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


@dataclass(frozen=True)
class Form:
    """How codes come from pre-activations h at evaluation, in terms that other libraries have, too.

    relu        f = relu(h)
    gated       f = 1[h > 0] x relu(exp(rescale) x (h - b) + magnitude), b: the bias of a latent
    jumprelu    f = h x 1[h > threshold]
    topk        f = relu(h) where h x norm is among the k largest of the row (of other libraries' with a threshold, too)
    batch_topk  f = relu(h) where h x norm > threshold

    `k` is that of every budget. A threshold is [L], or [writers, L] where every writer selects for itself.
    """

    kind: Literal["relu", "gated", "jumprelu", "topk", "batch_topk"]
    k: tuple[int, ...] = ()
    threshold_L: Tensor | None = None
    rescale_L: Tensor | None = None
    magnitude_L: Tensor | None = None


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
        return DenseCode(f_BL)

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

    def form(self) -> Form:
        """What it does at evaluation, with the graph of its parameters.

        Raises CheckpointError where other libraries have no such activation.
        """
        raise CheckpointError("no other library has this activation", type(self).__name__, "Use Dictionary.save")

    def adopt(self, form: Form) -> None:
        """Take the values of a form of its own kind. No graph."""


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

    @property
    def rows(self) -> int:
        return self.pre.rows

    @cached_property
    def squared(self) -> dict[str, Tensor]:
        """sum over rows of |target - y|^2, {writer: scalar}, with a graph."""
        return {name: SquaredDistance.apply(self.target[name], y_BD) for name, y_BD in self.y.items()}
