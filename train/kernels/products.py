"""Products with codes and their gradients: of kept entries alone, or of whole matrices in half the precision.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S latents of one source, n some of them, K
kept entries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from train.kernels import choice
from train.kernels.entries import Entries


def product(a: Tensor, b: Tensor, bf16: bool) -> Tensor:
    """a @ b; of factors rounded to bf16, as its gradients are, or as they are."""
    return Rounded.apply(a, b) if bf16 else a @ b


class Rounded(Function):
    """a @ b and its gradients, of factors in bf16, whose sums are taken in fp32 and rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a_bf16, b_bf16)
        return (a_bf16 @ b_bf16).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a_bf16, b_bf16 = ctx.saved_tensors
        grad_bf16 = grad.bfloat16()
        of_a = (grad_bf16 @ b_bf16.T).to(grad.dtype) if ctx.needs_input_grad[0] else None
        of_b = (a_bf16.T @ grad_bf16).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return of_a, of_b


def of_source(of_L: Tensor, slices: tuple[slice, ...], dim: int = 0) -> Tensor:
    """What a tensor over the dictionary's latents has of a source's own, in their order."""
    parts = [of_L.narrow(dim, one.start, one.stop - one.start) for one in slices]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def sums_by_latent(entries: Entries, x_BD: Tensor, weight_K: Tensor) -> Tensor:
    """sum over entries of latent l of weight x x[row]: [L, D]. The gradient of an encoder, and of a decoder."""
    if choice.by_triton(x_BD.device):
        from train.kernels import fused

        return fused.sums(entries.latent_pieces, x_BD, entries.rows_by_latent_K, weight_K, entries.by_latent_K)
    order_K = entries.by_latent_K
    weights = weight_K[order_K].to(x_BD.dtype)
    starts_L = entries.latent_starts_L
    return embedding_bag(entries.rows_by_latent_K, x_BD, starts_L, mode="sum", per_sample_weights=weights)


Place = tuple[tuple[slice, ...], Tensor, Tensor]  # of a source: its latents; of each where it stands, and 1 or 0


class PreActivation(Function):
    """Pre-activations at kept entries, given their values: h = b[latent] + sum over sources of x[row] . W[latent].

    `h_K` was computed without a graph; the backward pass touches the kept entries only, and never holds a dense B x L
    gradient. `given` are the rows of every source, then its weights.
    """

    @staticmethod
    def forward(ctx: Any, h_K: Tensor, entries: Entries, places: list[Place], bias_L: Tensor, *given: Tensor) -> Tensor:
        ctx.entries, ctx.places = entries, places
        ctx.save_for_backward(*given)
        return h_K.view_as(h_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        entries, places, asked = ctx.entries, ctx.places, ctx.needs_input_grad[4:]
        x, weights = ctx.saved_tensors[: len(places)], ctx.saved_tensors[len(places) :]
        bias = totals(entries, grad_K)
        of_x: list[Tensor | None] = []
        of_weights = []
        for (slices, local_L, present_L), x_BD, W_SD, rows in zip(places, x, weights, asked, strict=False):
            of_x.append(None)
            if rows:
                value_K = grad_K * present_L[entries.latent_K].to(grad_K.dtype)
                of_x[-1] = sums_by_row(entries, W_SD, local_L[entries.latent_K], value_K)
            of_weights.append(of_source(sums_by_latent(entries, x_BD, grad_K), slices))
        return None, None, None, bias, *of_x, *of_weights


class Whole(Function):
    """Pre-activations as a matrix, given their values, with the gradients of b + sum over sources of x . W.

    `given` are the rows of every source, then its weights.
    """

    @staticmethod
    def forward(ctx: Any, h_BL: Tensor, places: list[Place], bf16: bool, bias_L: Tensor, *given: Tensor) -> Tensor:
        ctx.places, ctx.bf16 = places, bf16
        ctx.save_for_backward(*given)
        return h_BL.view_as(h_BL)

    @staticmethod
    def backward(ctx: Any, grad_BL: Tensor) -> tuple[Tensor | None, ...]:
        asked, of_x, of_weights = ctx.needs_input_grad[4:], [], []
        x, weights = ctx.saved_tensors[: len(ctx.places)], ctx.saved_tensors[len(ctx.places) :]
        for (slices, _, _), x_BD, W_SD, rows in zip(ctx.places, x, weights, asked, strict=False):
            own_BS = of_source(grad_BL, slices, 1)
            of_x.append(product(own_BS, W_SD, ctx.bf16) if rows else None)
            of_weights.append(product(own_BS.T, x_BD, ctx.bf16))
        return None, None, None, grad_BL.sum(0), *of_x, *of_weights


class OfLatents(Function):
    """What the latent of each entry has: value[latent]. Its gradient is summed without a sort."""

    @staticmethod
    def forward(ctx: Any, value_L: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return value_L[entries.latent_K]

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        return totals(ctx.entries, grad_K), None


def totals(entries: Entries, value_K: Tensor) -> Tensor:
    """The sum of the values of every latent's entries, in fp64: [L]."""
    if value_K.device.type == "cpu":
        return torch.bincount(entries.latent_K, value_K.double(), minlength=entries.latents).to(value_K.dtype)
    ones_B1 = torch.ones(entries.rows, 1, dtype=torch.float64, device=value_K.device)  # bincount waits for a GPU
    return sums_by_latent(entries, ones_B1, value_K).flatten().to(value_K.dtype)


def sums_by_row(entries: Entries, W_SD: Tensor, local_K: Tensor, weight_K: Tensor) -> Tensor:
    """sum over entries of a row of weight x W[local]: [B, D]."""
    if choice.by_triton(W_SD.device):
        from train.kernels import fused

        return fused.sums(entries.row_pieces, W_SD, local_K, weight_K)
    return embedding_bag(local_K, W_SD, entries.row_starts_B, mode="sum", per_sample_weights=weight_K)


class Known(Function):
    """A scalar that comes with its gradient: of the bias at some latents, and of each matrix at some of its rows.

    With `in_place` those of matrices are added to the ones that they have, and are then no result of the backward pass:
    nothing is done for all other rows. A place may come twice where the second has a gradient of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        of_bias: tuple[Tensor, Tensor],
        of_rows: list[tuple[Tensor, Tensor]],
        in_place: bool,
        bias_L: Tensor,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.of_bias, ctx.of_rows, ctx.in_place, ctx.bias_L, ctx.matrices = of_bias, of_rows, in_place, bias_L, matrices
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent_n, bias_n = ctx.of_bias
        bias = torch.zeros_like(ctx.bias_L).index_copy_(0, latent_n, grad * bias_n)
        grads: list[Tensor | None] = []
        for W_SD, (local_n, rows_nD) in zip(ctx.matrices, ctx.of_rows, strict=True):
            if ctx.in_place and W_SD.grad is None:
                W_SD.grad = torch.zeros_like(W_SD)
            whole_SD = W_SD.grad if ctx.in_place else torch.zeros_like(W_SD)
            whole_SD.index_add_(0, local_n, grad * rows_nD)
            grads.append(None if ctx.in_place else whole_SD)
        return None, None, None, None, bias, *grads


class Decode(Function):
    """y[row] = sum over kept entries of value x W[latent], for one source: [B, D].

    `local_K` is the entry's row in W, and `present_K` is 1, or 0 where the latent does not write to this source.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value_K: Tensor,
        W_SD: Tensor,
        entries: Entries,
        slices: tuple[slice, ...],
        local_K: Tensor,
        present_K: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(value_K, W_SD, local_K, present_K)
        ctx.entries, ctx.slices = entries, slices
        return sums_by_row(entries, W_SD, local_K, value_K * present_K)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        value_K, W_SD, local_K, present_K = ctx.saved_tensors
        entries: Entries = ctx.entries
        grad_BD = grad_BD.contiguous()
        value = weight = None
        if ctx.needs_input_grad[0]:
            value = dots(grad_BD, W_SD, entries, local_K) * present_K
        if ctx.needs_input_grad[1]:
            weight = of_source(sums_by_latent(entries, grad_BD, value_K), ctx.slices)
        return value, weight, None, None, None, None


class SquaredDistance(Function):
    """sum of |x - y|^2, a scalar: one pass over the difference each way, which is kept."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        difference_BD = y_BD - x_BD
        ctx.save_for_backward(difference_BD)
        flat = difference_BD.flatten()
        return torch.dot(flat, flat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        (difference_BD,) = ctx.saved_tensors
        y = difference_BD * (2 * grad)
        return (-y if ctx.needs_input_grad[0] else None), y


def dots(a_BD: Tensor, b_SD: Tensor, entries: Entries, local_K: Tensor) -> Tensor:
    """a[row] . b[local] per entry: the gradient of embedding_bag by its weights, which holds no K x D product.

    Latent after latent, so that a row of b, which has more of them than a, is fetched once.
    """
    if choice.by_triton(a_BD.device):
        from train.kernels import fused

        return fused.dots(entries.latent_pieces, a_BD, b_SD, entries.rows_by_latent_K, local_K, entries.by_latent_K)
    order_K, of_sum = entries.by_latent_K, 0  # among the modes of embedding_bag
    given = (a_BD, b_SD, local_K[order_K], entries.latent_starts_L, entries.rows_by_latent_K, of_sum)
    by_latent_K: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(*given)
    return torch.empty_like(by_latent_K).index_copy_(0, order_K, by_latent_K)
