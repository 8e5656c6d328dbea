"""Latents shared by the ranks: each has every R-th latent of a span, with its weights, moments and codes.

All ranks see the same rows. They tell each other what each one's latents write, and where the border of the scores lies
that are kept (train.kernels.select); no weight of a latent, and no gradient of one, leaves its rank while they train.

Letters: L latents, S latents of one source, R ranks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from shared.errors import WiringError
from train import parallel
from train.wiring import Wiring


def total(part: Tensor) -> Tensor:
    """The sum over the ranks that share latents, of which each then computes the same loss."""
    return part if parallel.latent_ranks() == 1 else Total.apply(part)


class Total(Function):
    """The sum of a tensor over the ranks. Each of them has the gradient by the sum, which is that by its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def local(wiring: Wiring) -> Wiring:
    """What one rank has of a wiring. Raises WiringError where the latents of a span cannot be shared evenly."""
    ranks = parallel.latent_ranks()
    for span in wiring.spans:
        if span.size % ranks:
            value = f"{span.size:,} of {span.name} over {ranks} ranks"
            raise WiringError("the latents of a span cannot be shared evenly", value, "Change its size")
    return _sized(wiring, [span.size // ranks for span in wiring.spans])


def joined(wiring: Wiring) -> Wiring:
    """The wiring of which a rank has this."""
    return _sized(wiring, [span.size * parallel.latent_ranks() for span in wiring.spans])


def _sized(wiring: Wiring, sizes: Sequence[int]) -> Wiring:
    spans = tuple(replace(span, size=size) for span, size in zip(wiring.spans, sizes, strict=True))
    return replace(wiring, spans=spans)


def sizes(wiring: Wiring, name: str) -> list[int] | None:
    """The sizes of the spans whose latents a tensor of a dictionary's state has rows for; none: for no latents."""
    table, _, of = name.partition(".")
    if table in ("encoder", "decoder"):
        return [span.size for span in wiring.spans if of in (span.readers if table == "encoder" else span.writers)]
    return of_all(wiring) if table == "activation" and of.endswith("_L") else None


def of_all(wiring: Wiring) -> list[int]:
    """The sizes of all spans."""
    return [span.size for span in wiring.spans]


def random(wiring: Wiring, name: str, generator: torch.Generator) -> Tensor:
    """What this rank has of the normal numbers that one process would draw for the weights of that name."""
    mine = sizes(wiring, name)
    assert mine is not None
    rows, width = sum(mine) * parallel.latent_ranks(), wiring.widths[name.partition(".")[2]]
    return own(torch.randn(rows, width, generator=generator), mine)


def own(whole: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """What this rank has of a tensor with a row for each latent of spans, of which it has so many."""
    ranks = parallel.latent_ranks()
    if ranks == 1 or sizes is None:
        return whole
    return torch.cat([part[parallel.rank() :: ranks] for part in whole.split([ranks * size for size in sizes])])


def whole(own: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """The other way round, on the first rank, in the memory of the CPU; on the others their own."""
    ranks = parallel.latent_ranks()
    if ranks == 1 or sizes is None:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks)] if parallel.rank() == 0 else None
    dist.gather(own.contiguous(), parts)
    if parts is None:
        return own
    spans = zip(*(part.cpu().split(list(sizes)) for part in parts), strict=True)
    return torch.cat([torch.stack(of_span, 1).flatten(0, 1) for of_span in spans])
