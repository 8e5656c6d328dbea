"""What is minimised: a sum of named terms.

Letters: B rows of a batch, D width of a source, L latents, K kept entries, P last batches, Q powers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from shared.device import Later
from train import parallel, shards
from train.code import DenseCode, Forward, SparseCode
from train.kernels.entries import Entries, below_each_other
from train.kernels.products import Known, SquaredDistance
from train.kernels.select import kept_per_row, top_per_row
from train.pre import Pre
from train.schedule import Schedule

if TYPE_CHECKING:
    from train.dictionary import Dictionary

AuxForm = Literal["input", "error"]
PowerForm = Literal["lp", "lp_p"]
ReconForm = Literal["squared", "norm"]
RECENT = 10  # batches over which a penalty's size is carried from one power to the next (Karvonen et al. 2024)


class Now:
    """The state of training that terms may look at.

    dead_L  latents that have not fired for `dead_rows` rows, bool
    apart   whether terms that are `apart` go backward by themselves, behind the others
    """

    def __init__(self, step: int, dead_L: Tensor, apart: bool = False) -> None:
        self.step, self.dead_L, self.apart = step, dead_L, apart
        here = dead_L.sum()
        self._counts = Later(torch.stack([here, *parallel.summed_over_latents([here])]))

    @property
    def deads(self) -> int:
        """How many latents are dead, of all ranks."""
        return int(self._counts.read()[1])

    @cached_property
    def dead(self) -> Tensor:
        """Those of this rank, in order. (torch.nonzero would wait for the device to tell how many they are.)"""
        return torch.argsort(self.dead_L.int(), descending=True, stable=True)[: int(self._counts.read()[0])]


class Term(nn.Module, ABC):
    """One addend of the loss: weight(step) x value. A final class per formula.

    One that is `apart` shares no graph with the others. Where it goes backward behind them, it may add to the gradients
    that they have left, and who calls it leaves it out where it is not finite.
    """

    apart = False

    def __init__(self, name: str, weight: Schedule) -> None:
        super().__init__()
        self.name, self.weight = name, weight

    @abstractmethod
    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        """The unweighted value, a scalar. Changes nothing."""

    def observe(self, out: Forward, now: Now) -> None:
        """Called once per training step, with no graph: the only place where its buffers change."""


class Reconstruction(Term):
    """mean over rows of sum over written sources of |x - y|^2 (squared) or |x - y| (norm), in scaled space."""

    def __init__(self, name: str, weight: Schedule, form: ReconForm = "squared") -> None:
        super().__init__(name, weight)
        self.form = form

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        if self.form == "norm":
            return error(out.target, out.y, self.form)
        return torch.stack(list(out.squared.values())).sum() / out.rows


class L1(Term):
    """mean over rows of sum over latents of f x norm x weight of the span (Lindsey et al. 2024, with norm = sum)."""

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        return out.code.soft.l1(out.norm_L * out.weight_L)


class Power(Term):
    """lp_p: the mean over rows of sum of (f x norm)^p; lp: of its 1/p-th power. p falls from 1 to `end` (p-anneal).

    p changes at `updates` steps, evenly spaced from `first` to `last`, the first of which still has p = 1. At a change
    the value keeps its size: gain <- gain x mean(value at the old p) / mean(value at the new p) over the last RECENT
    batches (Karvonen et al. 2024, https://arxiv.org/abs/2408.00113).
    """

    gain: Tensor
    recent_P2: Tensor
    seen: Tensor

    def __init__(
        self, name: str, weight: Schedule, form: PowerForm, end: float, first: int, last: int, updates: int
    ) -> None:
        super().__init__(name, weight)
        self.form = form
        # The steps from which each of the powers holds.
        self.at = [first + (last - first) * n // (updates - 1) for n in range(updates)]
        self.powers = [1 + (end - 1) * n / (updates - 1) for n in range(updates)]
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("recent_P2", torch.zeros(RECENT, 2))  # values at this p, and at the next one
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # batches since p changed

    def power(self, step: int) -> float:
        return self.powers[max(0, sum(at <= step for at in self.at) - 1)]

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        return self.gain * self._value(out, self.power(now.step))

    def _value(self, out: Forward, p: float) -> Tensor:
        sum_B = out.code.soft.sums(lambda score: _power(score, p), out.norm_L * out.weight_L)
        return (sum_B if self.form == "lp_p" else _power(sum_B, 1 / p)).mean()

    def observe(self, out: Forward, now: Now) -> None:
        p, ahead = self.power(now.step), [at for at in self.at if at > now.step]
        if not ahead:
            return
        coming = self.power(ahead[0])
        pair = [self._value(out, one) / parallel.row_ranks() for one in (p, coming)]
        self.recent_P2[self.seen % RECENT] = torch.stack(parallel.summed(pair))
        self.seen += 1
        if ahead[0] == now.step + 1:
            old, new = self.recent_P2.sum(0)
            self.gain *= torch.where((old > 0) & (new > 0), old / new, 1.0)
            self.recent_P2.zero_()
            self.seen.zero_()


class Entropy(Term):
    """The mean over rows of - sum of q log q, q = f x norm / sum of f x norm: how evenly a row's latents share it.

    A row without a positive code has 0.
    """

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        total_B = out.code.soft.sums(lambda score: score, out.norm_L)
        logs_B = out.code.soft.sums(lambda score: score * torch.where(score > 0, score, 1.0).log(), out.norm_L)
        safe_B = torch.where(total_B > 0, total_B, 1.0)
        return (safe_B.log() - logs_B / safe_B).mean()


class Frozen(Term):
    """The reconstruction error of relu(h), the code that penalties see, by the decoder as it stands: mean of
    |x - y(relu(h))|^2, summed over sources (or, as the reconstruction itself, of |x - y|).

    The auxiliary loss of Rajamanoharan et al. 2024 (https://arxiv.org/abs/2404.16014): it teaches the gate, and no
    decoder, decoder bias or skip connection.
    """

    def __init__(self, name: str, weight: Schedule, form: ReconForm) -> None:
        super().__init__(name, weight)
        self.form = form

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        y = {
            source: out.code.soft.write(W_SD.detach(), dictionary.writes[source]) + out.base[source].detach()
            for source, W_SD in dictionary.decoder.items()
        }
        return error(out.target, y, self.form)


class AuxK(Term):
    """The error that the k_aux strongest dead latents of a row could explain, squared whatever the reconstruction's is.

    e = x - y, taken as given; e_hat = sum over those latents of relu(g) x W; mean over rows of |e - e_hat|^2, summed
    over sources. A latent reaches only the sources that it writes to. 0 while no latent is dead, or where the value is
    not finite.

    input    g = h, their pre-activations of the row (Gao et al. 2024, section A.2)
    error    g = sum over readers of e . W_enc, without a bias: of the error itself (arXiv 2602.11729, section B.1.5)
    """

    apart = True

    def __init__(self, name: str, weight: Schedule, k_aux: int, form: AuxForm = "input") -> None:
        super().__init__(name, weight)
        self.k_aux, self.form = k_aux, form

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        first = next(iter(out.y.values()))
        if not now.deads:
            return first.new_zeros(())
        dead = now.dead
        error = {source: (out.target[source] - y_BD).detach() for source, y_BD in out.y.items()}
        pre = out.pre if self.form == "input" else _of_error(out.pre, error)
        k = min(self.k_aux, now.deads)
        if pre.sparse(k / now.deads):
            top = below_each_other([top_per_row(pre.columns(dead, rows), k) for rows in pre.parts_of(dead)])
            entries = Entries(top.row_K, dead[top.latent_K], len(first), len(now.dead_L))
            assert top.score_K is not None
            code = SparseCode(entries, relu(pre.with_graph(entries, top.score_K)))
            guess = {source: code.write(dictionary.decoder[source], dictionary.writes[source]) for source in error}
            value = squared_error(error, guess)
        else:  # so many of the dead that products over them alone are faster
            value = _by_products(dictionary, pre, dead, k, error, now.apart)
        return value if now.apart else _finite_or_none(value)


def _by_products(
    dictionary: Dictionary, pre: Pre, dead: Tensor, k: int, error: dict[str, Tensor], in_place: bool
) -> Tensor:
    """AuxK by products over the dead latents, part of the rows by part: each is done with before the next is begun."""
    low = pre.bias_L.dtype if not pre.bf16 else torch.bfloat16
    with torch.no_grad():
        decoder = {s: dictionary.writes[s].rows(dictionary.decoder[s], dead).to(low) for s in error}
        of_decoder = {s: torch.zeros_like(W_nD, dtype=pre.bias_L.dtype) for s, W_nD in decoder.items()}
        of_encoder = {s: pre.bias_L.new_zeros(len(dead), W_SD.shape[1]) for s, W_SD in pre.weights.items()}
        value, of_bias = pre.bias_L.new_zeros(()), pre.bias_L.new_zeros(len(dead))
        for rows in pre.parts_of(dead):
            f_Bn = kept_per_row(pre.columns(dead, rows), k).relu_()
            f_low, grad_Bn = f_Bn.to(low), torch.zeros_like(f_Bn)
            for source, W_nD in decoder.items():
                gap_BD = shards.total((f_low @ W_nD).to(f_Bn.dtype)) - error[source][rows]
                value += torch.dot(gap_BD.flatten(), gap_BD.flatten()) / pre.rows
                gap_low = gap_BD.mul_(2 / pre.rows).to(low)
                of_decoder[source] += f_low.T @ gap_low
                grad_Bn += gap_low @ W_nD.T
            grad_Bn = torch.ops.aten.threshold_backward(grad_Bn, f_Bn, 0)  # 0 where f is
            of_bias += grad_Bn.sum(0)
            grad_low = grad_Bn.to(low)
            for source, of_nD in of_encoder.items():
                of_nD += grad_low.T @ pre.x[source][rows].to(low)
    given = [
        (table[source], ports[source].local_L[dead], of_nD * ports[source].present_L[dead, None])
        for table, ports, found in (
            (pre.weights, pre.ports, of_encoder),
            (dictionary.decoder, dictionary.writes, of_decoder),
        )
        for source, of_nD in found.items()
    ]
    places, matrices = [(local_n, of_nD) for _, local_n, of_nD in given], [W_SD for W_SD, _, _ in given]
    return Known.apply(value, (dead, of_bias), places, in_place, pre.bias_L, *matrices)


def _of_error(pre: Pre, error: dict[str, Tensor]) -> Pre:
    read = {source: error[source] for source in pre.wiring.readers}
    return Pre(pre.wiring, read, pre.weights, pre.ports, torch.zeros_like(pre.bias_L), pre.kernels)


class Ghost(Term):
    """Ghost gradients: dead latents as exp(h), for methods that compute h with a graph.

    g = sum over dead latents of exp(h) x W, scaled per row to half the length of the error e = x - y; the mean over
    rows of |e - g|^2, scaled to the size of the reconstruction loss. Error and both scales are taken as given.
    0 while no latent is dead, or where the value is not finite. Jermyn & Templeton,
    https://transformer-circuits.pub/2024/jan-update/index.html
    """

    def forward(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        first = next(iter(out.y.values()))
        if not now.deads:
            return first.new_zeros(())
        ghost_BL = torch.where(now.dead_L, out.pre.dense_BL, -torch.inf).exp()
        code = DenseCode(ghost_BL, out.pre.bf16)
        error = {source: (out.target[source] - y_BD).detach() for source, y_BD in out.y.items()}
        ghost = {source: code.write(dictionary.decoder[source], dictionary.writes[source]) for source in error}
        long_B, ghost_B = _length(error), _length(ghost).detach()
        scale_B1 = torch.where(ghost_B > 0, long_B / (2 * ghost_B), 0.0)[:, None]
        value = squared_error(error, {source: scale_B1 * y_BD for source, y_BD in ghost.items()})
        loss, ghosts = parallel.summed([long_B.square().mean(), value.detach()])
        return _finite_or_none(value * (loss / ghosts.clamp_min(torch.finfo(value.dtype).tiny)))


def error(x: Mapping[str, Tensor], y: Mapping[str, Tensor], form: ReconForm) -> Tensor:
    """The mean over vectors [..., D] of the sum over sources of |x - y|^2, or of |x - y| (norm), a scalar."""
    if form == "norm":
        return torch.stack([length(x[source] - y[source]).mean() for source in y]).sum()
    vectors = next(iter(y.values())).shape[:-1].numel()
    return torch.stack([SquaredDistance.apply(x[source], y[source]) for source in y]).sum() / vectors


def squared_error(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    return error(x, y, "squared")


def length(vectors: Tensor) -> Tensor:
    """Of vectors along the last dimension; of 0 with a gradient of 0."""
    return _power(vectors.square().sum(-1), 0.5)


def _length(x: Mapping[str, Tensor]) -> Tensor:
    """Of every row over all sources together, [B]."""
    return torch.stack([x_BD.square().sum(1) for x_BD in x.values()]).sum(0).sqrt()


def _power(value: Tensor, p: float) -> Tensor:
    """value^p, and 0 with a gradient of 0 where the value is 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).pow(p), 0.0)


def _finite_or_none(value: Tensor) -> Tensor:
    """The value, or (on all ranks) a 0 without a gradient where it is not finite."""
    # Not torch.where: behind it the gradient would be 0 x inf = NaN. This waits for the device.
    return value if parallel.least(torch.isfinite(value).float()) else torch.zeros_like(value)
