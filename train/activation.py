"""Activations that several methods use, and those with gradients of their own.

Letters: B rows of a batch, L latents.
"""

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import relu

from train import parallel
from train.code import Activation, Code, DenseCode, Form, SparseCode, SplitCode
from train.kernels.entries import Entries, below_each_other
from train.kernels.products import OfLatents
from train.kernels.select import above, best_of, candidates, top_of_batch
from train.pre import Pre
from train.schedule import Schedule
from train.wiring import Wiring

Pick = Callable[[Tensor, int], Entries]  # (scores, the number of a writer) -> the entries that are kept


class Relu(Activation):
    """f = relu(h)."""

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        entries = pre.above()
        if entries is None:
            return DenseCode(relu(pre.dense_BL), pre.bf16)
        return SparseCode(entries, relu(pre.at(entries, entries.score_K)))

    def form(self) -> Form:
        return Form("relu")


class Gated(Activation):
    """f = 1[h > 0] x relu(exp(r) x (h - b) + m): a gate with its bias b, and a magnitude (Rajamanoharan et al. 2024).

    Penalties see relu(h), which alone moves the gate. https://arxiv.org/abs/2404.16014
    """

    def __init__(self, latents: int) -> None:
        super().__init__(latents)
        self.rescale_L = nn.Parameter(torch.zeros(latents))  # r
        self.magnitude_L = nn.Parameter(torch.zeros(latents))  # m
        self.begins |= {"rescale_L": 0.0, "magnitude_L": 0.0}

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        entries, given = pre.above(), (self.rescale_L.exp(), self.bias_L, self.magnitude_L)
        if entries is None:
            return DenseCode(self._size(pre.dense_BL, *given), pre.bf16, relu(pre.dense_BL))
        h_K = pre.at(entries, entries.score_K)
        return SparseCode(entries, self._size(h_K, *(OfLatents.apply(v, entries) for v in given)), relu(h_K))

    def _size(self, h: Tensor, factor: Tensor, bias: Tensor, magnitude: Tensor) -> Tensor:
        return (h > 0) * relu(factor * (h - bias) + magnitude)

    def _shift(self, by_L: Tensor) -> None:
        self.magnitude_L.sub_(self.rescale_L.exp() * by_L)

    def form(self) -> Form:
        return Form("gated", rescale_L=self.rescale_L, magnitude_L=self.magnitude_L)

    def adopt(self, form: Form) -> None:
        assert form.rescale_L is not None and form.magnitude_L is not None
        self.rescale_L.copy_(form.rescale_L)
        self.magnitude_L.copy_(form.magnitude_L)


class Budgets(nn.Module):
    """Which latents compete with each other, and for how many of a row: each span that has a k of its own by itself,
    all others together for the method's. While that is annealed, the others are in proportion.
    """

    group_L: Tensor

    def __init__(self, wiring: Wiring, k_at: Schedule) -> None:
        super().__init__()
        own, rest = (
            [span for span in wiring.spans if span.k is not None],
            [span for span in wiring.spans if span.k is None],
        )
        self.k_at = k_at
        self.ks: list[int | None] = [span.k for span in own] + ([None] if rest else [])
        group_L = torch.empty(wiring.latents, dtype=torch.int64)
        for number, spans in enumerate([*([span] for span in own), *([rest] if rest else [])]):
            latents = torch.cat([torch.arange(wiring.latents)[wiring.slices[span.name]] for span in spans])
            group_L[latents] = number
            self.register_buffer(f"latents_{number}", latents, persistent=False)
        self.register_buffer("group_L", group_L, persistent=False)

    def counts(self, step: int) -> list[int]:
        """Latents of a row in each group at a step."""
        k = self.k_at(step)
        share = k / self.k_at(sys.maxsize)
        return [round(k) if own is None else max(1, round(own * share)) for own in self.ks]

    def parts(self, score_BL: Tensor) -> list[Tensor]:
        """The scores of each group."""
        return [score_BL.T[self.get_buffer(f"latents_{number}")].T for number in range(len(self.ks))]

    def select(self, score_BL: Tensor, counts: Sequence[int], pick: Callable[[Tensor, int], Entries]) -> Entries:
        """pick(scores of a group, how many of a row) for every group, as entries of the whole."""
        if len(counts) == 1:
            return pick(score_BL, min(counts[0], _latents(score_BL.shape[1])))
        found = []
        for number, (count, score) in enumerate(zip(counts, self.parts(score_BL), strict=True)):
            latents = self.get_buffer(f"latents_{number}")
            one = pick(score, min(count, _latents(len(latents))))
            assert one.score_K is not None
            found.append((one.row_K, latents[one.latent_K], one.score_K))
        row_K, latent_K, score_K = (torch.cat(parts) for parts in zip(*found, strict=True))
        order_K = torch.argsort(row_K * score_BL.shape[1] + latent_K)
        return Entries(row_K[order_K], latent_K[order_K], len(score_BL), score_BL.shape[1], score_K[order_K])

    def best(self, entries: Entries, counts: Sequence[int]) -> Tensor:
        """The numbers of those candidates of a batch that groups keep, so many per row on the mean, in order."""
        if len(counts) == 1:
            return best_of(entries, counts[0] * entries.rows)
        group_K, found = self.group_L[entries.latent_K], []
        for number, count in enumerate(counts):
            own_n = torch.nonzero(group_K == number).flatten()
            found.append(own_n[best_of(entries.some(own_n), count * entries.rows)])
        return torch.cat(found).sort().values


def _latents(here: int) -> int:
    """Of all ranks, of which each has so many."""
    return here * parallel.latent_ranks()


class Selecting(Activation):
    """f = relu(h) where h x norm is among the largest, by the budgets of a wiring.

    Of norms per writer (decoupled) each selects for what is written there alone.
    """

    def __init__(self, wiring: Wiring, k: Schedule) -> None:
        super().__init__(wiring.latents)
        self.budgets, self.writers = Budgets(wiring, k), wiring.writers
        self.schedule(0)

    def schedule(self, step: int) -> None:
        self.counts = self.budgets.counts(step)

    def decouple(self) -> None:
        pass

    @property
    def k(self) -> tuple[int, ...]:
        """Of every budget, behind all schedules."""
        return tuple(self.budgets.counts(sys.maxsize))

    @abstractmethod
    def pick(self, score_BL: Tensor, writer: int) -> Entries:
        """The entries that are kept; `writer` is the number of one that selects for itself, else 0."""

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        return self.kept(pre, norm_L, self.pick)

    def kept(self, pre: Pre, norm_L: Tensor, pick: Pick) -> Code:
        if norm_L.ndim > 1:
            return self._split(pre.h_BL, norm_L, lambda entries: relu(pre.at(entries)), pick)
        if pre.kernels.micro_batch is not None:
            return self.kept_in_parts(pre, norm_L, pick)
        if pre.sparse(sum(self.counts) / _latents(len(norm_L))):
            entries = pick(pre.weighed(norm_L), 0)
            return SparseCode(entries, relu(pre.at(entries, entries.score_K)))
        f_BL = relu(pre.dense_BL)
        entries = pick(pre.weighed(norm_L), 0)
        f_BL = f_BL * torch.zeros_like(f_BL).index_put_((entries.row_K, entries.latent_K), f_BL.new_ones(()))
        return DenseCode(f_BL, pre.bf16)

    def kept_in_parts(
        self, pre: Pre, norm_L: Tensor, pick: Pick, best: Callable[[Entries], Tensor] | None = None
    ) -> Code:
        """The same, with scores of a part of the rows at once; `best` has the last word on what was picked of them."""
        found = []
        for part in pre.parts():
            entries = pick(part.weighed(norm_L), 0)
            found.append((entries, part.values(entries, entries.score_K)))
            part.release()
        entries, h_K = below_each_other([one for one, _ in found]), torch.cat([h_K for _, h_K in found])
        if best is not None:
            kept_n = best(entries)
            entries, h_K = entries.some(kept_n), h_K[kept_n]
        return SparseCode(entries, relu(pre.with_graph(entries, h_K)))

    def again(self, f_BL: Tensor, norm_L: Tensor) -> Code:
        if norm_L.ndim == 1:
            return super().again(f_BL, norm_L)
        return self._split(f_BL, norm_L, lambda entries: f_BL[entries.row_K, entries.latent_K], self.pick)

    def scores(self, pre: Pre, norm_L: Tensor) -> list[Tensor]:
        """h x norm, [B, L], once or (decoupled) for every writer. No graph."""
        return [pre.weighed(norm_L)] if norm_L.ndim == 1 else [pre.h_BL * own_L for own_L in norm_L.detach()]

    def _split(self, h_BL: Tensor, norm_WL: Tensor, at: Callable[[Entries], Tensor], pick: Pick) -> SplitCode:
        codes = {}
        for number, (writer, own_L) in enumerate(zip(self.writers, norm_WL.detach(), strict=True)):
            score_BL = h_BL * own_L
            entries = pick(score_BL, number)
            writes_K = score_BL[entries.row_K, entries.latent_K] > 0  # not those that fill up what is left of a budget
            codes[writer] = SparseCode(entries, at(entries) * writes_K)
        return SplitCode(codes)


class BatchTopK(Selecting):
    """f = relu(h) on the k x B largest relu(h) x norm of the batch; above a threshold at evaluation.

    The threshold is the mean over training steps of the smallest positive kept score, with weights decay^age, so that
    it is right from the first step on and follows k while that is annealed. Each budget has its own (decoupled: of each
    writer).
    """

    mean: Tensor
    mass: Tensor

    def __init__(self, wiring: Wiring, k: Schedule, decay: float) -> None:
        super().__init__(wiring, k)
        self.decay = decay
        self._begin(len(self.budgets.ks))

    def _begin(self, *shape: int) -> None:
        self.register_buffer("mean", torch.zeros(shape))  # sum of decay^age x (1 - decay) x score
        self.register_buffer("mass", torch.zeros(shape))  # sum of decay^age x (1 - decay)

    def decouple(self) -> None:
        self._begin(len(self.writers), len(self.budgets.ks))

    @property
    def threshold(self) -> Tensor:
        """Of each budget; 0 before the first step: then every positive pre-activation passes."""
        return self.mean / self.mass.clamp_min(1e-12)

    def set_threshold(self, threshold: Tensor) -> None:
        """Forget the mean; `threshold` is in the order of writers, then budgets."""
        self.mean.copy_(threshold.view_as(self.mean))
        self.mass.fill_(1.0)

    def form(self) -> Form:
        threshold = torch.where(self.mass > 0, self.threshold, -1.0)
        return Form("batch_topk", self.k, threshold[..., self.budgets.group_L])

    def adopt(self, form: Form) -> None:
        """A threshold below 0, as `form` gives it, too, is that of one who has not trained yet."""
        assert form.threshold_L is not None
        if (form.threshold_L >= 0).all():
            first = [int(self.budgets.get_buffer(f"latents_{number}")[0]) for number in range(len(self.budgets.ks))]
            self.set_threshold(form.threshold_L[..., first])
        else:
            self.mean.zero_()
            self.mass.zero_()

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        if pre.kernels.micro_batch is None:
            return super().forward(pre, norm_L)
        return self.kept_in_parts(
            pre,
            norm_L,
            lambda score_BL, _: self.budgets.select(
                score_BL, self.counts, lambda score, k: candidates(score, k * pre.rows)
            ),
            lambda entries: self.budgets.best(entries, self.counts),
        )

    def pick(self, score_BL: Tensor, writer: int) -> Entries:
        if self.training:
            rows = len(score_BL)
            return self.budgets.select(score_BL, self.counts, lambda score, k: top_of_batch(score, k * rows))
        own = self.threshold.view(-1, len(self.budgets.ks))[writer]
        return above(score_BL, own[self.budgets.group_L])

    def observe(self, code: Code, norm_L: Tensor) -> None:
        smallest = parallel.least(code.smallest(norm_L, self.budgets.group_L, len(self.budgets.ks)))
        kept = torch.isfinite(smallest)  # a batch without a positive code says nothing
        weight = (1 - self.decay) * kept
        self.mean.lerp_(torch.where(kept, smallest, self.mean), weight)
        self.mass.lerp_(torch.ones_like(self.mass), weight)


class JumpReLU(Activation):
    """f = h x 1[h > t]; penalties see 1[h > t] (Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435).

    d f / d t = - t / e x K((h - t) / e)        K(u) = 1 where |u| < 1/2, else 0
    d 1[h > t] / d t = - 1 / e x K((h - t) / e)        e: the bandwidth

    The threshold is kept as its logarithm, so that it stays above 0.
    """

    def __init__(self, latents: int, threshold: float, bandwidth: float) -> None:
        super().__init__(latents)
        self.log_threshold_L = nn.Parameter(torch.full((latents,), math.log(threshold)))
        self.begins |= {"log_threshold_L": math.log(threshold)}
        self.bandwidth = bandwidth

    @property
    def threshold_L(self) -> Tensor:
        return self.log_threshold_L.exp()

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        threshold_L = self.threshold_L
        entries = pre.above(threshold_L.detach() - self.bandwidth / 2)  # below, nothing has a value or a gradient
        if entries is None:
            f_BL, fires_BL = Jump.apply(pre.dense_BL, threshold_L, self.bandwidth)
            return DenseCode(f_BL, pre.bf16, fires_BL)
        threshold_K = OfLatents.apply(threshold_L, entries)
        return SparseCode(entries, *Jump.apply(pre.at(entries, entries.score_K), threshold_K, self.bandwidth))

    def form(self) -> Form:
        return Form("jumprelu", threshold_L=self.threshold_L)

    def adopt(self, form: Form) -> None:
        assert form.threshold_L is not None
        self.log_threshold_L.copy_(log_threshold(form.threshold_L))


def log_threshold(threshold_L: Tensor) -> Tensor:
    """Of a threshold of 0, or below it, that of the smallest number."""
    return threshold_L.clamp_min(torch.finfo(torch.float32).tiny).log()


class Jump(Function):
    """h x 1[h > t] and 1[h > t], of matrices [B, L] and thresholds [L], or of entries [K] and the threshold of each.

    The second teaches thresholds alone: what it costs to fire.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        fires = torch.gt(h, threshold, out=torch.empty_like(h))
        ctx.save_for_backward(h, threshold, fires)
        ctx.bandwidth = bandwidth
        return h * fires, fires

    @staticmethod
    def backward(ctx: Any, of_jump: Tensor, of_fires: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold, fires = ctx.saved_tensors
        near = torch.sub(h, threshold).abs_().lt_(ctx.bandwidth / 2)
        near.mul_(torch.addcmul(of_fires, of_jump, threshold)).div_(-ctx.bandwidth)
        return of_jump * fires, near.sum_to_size(threshold.shape), None
