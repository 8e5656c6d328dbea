"""Which entries of a matrix of scores are kept: exactly k of a row or of a batch, without a sort of all.

By torch, or on CUDA by Triton (kernels.radix).

Letters: B rows of a batch, L latents of the dictionary, N scores, G groups of them, K kept entries.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from train import parallel
from train.kernels import choice
from train.kernels.entries import Entries
from train.kernels.ranked import among_best, among_best_of_row


def by_latent(score_BL: Tensor) -> bool:
    """Whether the rows of a latent lie side by side in memory, and not the latents of a row."""
    return score_BL.T.is_contiguous() and not score_BL.is_contiguous()


EIGHT = 8  # scores of a group in which those above a threshold are looked for
APART = 61  # of so many, one is in the sample that a bound is guessed from; not in step with the latents of a row


def top_per_row(score_BL: Tensor, k: int) -> Entries:
    """The k largest of every row. Exactly B x k entries; among ties, any.

    Where ranks share latents, those of them that are among the k largest of all ranks' latents.
    """
    own = min(k, score_BL.shape[1])
    found = _top_per_row(score_BL, own)
    if parallel.latent_ranks() == 1:
        return found
    assert found.score_K is not None
    return found.some(torch.nonzero(among_best_of_row(found.score_K.view(len(score_BL), own), k).flatten()).flatten())


def _top_per_row(score_BL: Tensor, k: int) -> Entries:
    if _by_triton(score_BL):
        from train.kernels import radix

        return radix.top_per_row(score_BL, k)
    rows, latents = score_BL.shape
    best = largest(score_BL, k)
    latent_Bk, order_Bk = best.indices.sort(dim=1)
    value_Bk = best.values.gather(1, order_Bk)
    row_Bk = torch.arange(rows, device=score_BL.device)[:, None].expand_as(latent_Bk)
    return Entries(row_Bk.flatten(), latent_Bk.flatten(), rows, latents, value_Bk.flatten())


def _by_triton(score_BL: Tensor) -> bool:
    """Whether Triton selects: not from fp64."""
    return choice.by_triton(score_BL.device) and score_BL.element_size() <= 4


def largest(score_BL: Tensor, k: int) -> torch.return_types.topk:
    """The k largest of every row and where they are, [B, k], in any order.

    None of them is outside of the k groups whose largest scores are the largest, which are found in the same way:
    nothing else is sorted.
    """
    latents, device = score_BL.shape[1], score_BL.device
    group = _group(latents, k)
    if group == 1:
        return score_BL.contiguous().topk(k, dim=1, sorted=False)
    groups = latents // group
    whole_BN = score_BL[:, : groups * group]
    if by_latent(score_BL):
        largest_BG = whole_BN.T.view(group, groups, -1).amax(0).T.contiguous()
    else:
        largest_BG = whole_BN.unflatten(1, (group, groups)).amax(1)
    best_Bk = largest(largest_BG, k).indices
    members_G1 = torch.arange(0, groups * group, groups, device=device)[:, None]
    left = torch.arange(groups * group, latents, device=device).expand(len(score_BL), -1)
    place_BN = torch.cat([(best_Bk[:, None] + members_G1).flatten(1), left], 1)
    values_Bk, which_Bk = score_BL.gather(1, place_BN).topk(k, dim=1, sorted=False)
    return torch.return_types.topk((values_Bk, place_BN.gather(1, which_Bk)))


def kept_per_row(score_BL: Tensor, k: int) -> Tensor:
    """The scores where they are among the k largest of their row, and 0: [B, L]."""
    best = largest(score_BL, min(k, score_BL.shape[1]))
    value_Bk = best.values
    if parallel.latent_ranks() > 1:
        value_Bk = torch.where(among_best_of_row(value_Bk, k), value_Bk, 0.0)
    return torch.zeros_like(score_BL).scatter_(1, best.indices, value_Bk)


def _group(length: int, k: int) -> int:
    """How many scores are a group; 1: do without. As measured: tests/benchmarks/LOG.md."""
    return 1 if length < 16 * k or not k else 2 ** round(math.log2(length / k) * 3 / 8)


def top_of_batch(score_BL: Tensor, count: int) -> Entries:
    """The `count` largest of the whole matrix. Exactly `count` entries; among ties, any.

    Under torchrun those of this matrix that are among the largest of all ranks' matrices together: `count` of each on
    the mean where ranks share rows, and `count` of all where they share latents.
    """
    found = candidates(score_BL, count)
    return found if parallel.ranks() == 1 else found.some(best_of(found, count))


def candidates(score_BL: Tensor, count: int) -> Entries:
    """What of a part of the batch, or of this rank's matrix, may be among its `count` largest."""
    rows, latents = score_BL.shape
    count = min(count * parallel.row_ranks(), rows * latents)
    if _by_triton(score_BL):
        from train.kernels import radix

        return radix.top_of_all(score_BL, count)
    transposed = by_latent(score_BL)
    score_K, flat_K = _top_of_all((score_BL.T if transposed else score_BL).flatten(), count)
    return _entries(flat_K, rows, latents, transposed, score_K)


def best_of(entries: Entries, count: int) -> Tensor:
    """The numbers of the candidates that are among the `count` largest of the batch (top_of_batch), in order."""
    assert entries.score_K is not None
    count *= parallel.row_ranks()
    kept_n = entries.score_K.topk(min(count, len(entries.score_K)), sorted=False).indices.sort().values
    return kept_n if parallel.ranks() == 1 else kept_n[among_best(entries.score_K[kept_n], count)]


def _entries(flat_K: Tensor, rows: int, latents: int, transposed: bool, score_K: Tensor | None = None) -> Entries:
    """Of places in a matrix, or in the transposed one, in any order."""
    if transposed:
        flat_K = flat_K % rows * latents + flat_K // rows
    flat_K, order_K = flat_K.sort()
    scores = None if score_K is None else score_K[order_K]
    return Entries(flat_K // latents, flat_K % latents, rows, latents, scores)


def _top_of_all(score_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, and where they are, in any order.

    A CPU sorts one row on one core: there all but what is not below a bound is left out first. This waits for how much
    that is, which costs a CPU nothing.
    """
    group = _group(len(score_N), count)
    if score_N.device.type != "cpu" or group == 1:
        best = largest(score_N[None], count)
        return best.values[0], best.indices[0]
    groups = len(score_N) // group
    grouped_GN, left_N = score_N[: groups * group].view(group, groups), score_N[groups * group :]
    group_n, bound = _not_below(grouped_GN.amax(0), count)
    score_m, place_m = _inside(grouped_GN, group_n, lambda score: ~(score < bound))
    place_m = torch.cat([place_m, torch.arange(groups * group, len(score_N))])
    score_m = torch.cat([score_m, left_N])
    score_K, which_K = score_m.topk(count, sorted=False)
    return score_K, place_m[which_K]


def _not_below(score_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where scores are not below a bound, at least `count` and few more; and the bound: of a sample, and verified."""
    sample_n = score_N[::APART]
    expected = count / APART
    for sigmas in (4, 16):
        take = math.ceil(expected + sigmas * math.sqrt(expected)) + 1
        if take >= len(sample_n):
            break
        bound = sample_n.topk(take, sorted=False).values.amin()
        place_n = torch.nonzero(~(score_N < bound)).flatten()  # NaN passes, so that it is seen
        if len(place_n) >= count:
            return place_n, bound
    return torch.arange(len(score_N)), torch.full((), -torch.inf)


def above(score_BL: Tensor, threshold: Tensor | float) -> Entries:
    """The entries above a threshold, or one of every latent: as many as there are, so this waits for the device.

    What is not a number is above any, so that it is seen.
    """
    rows, latents = score_BL.shape
    transposed = by_latent(score_BL)
    score_BL = score_BL.T if transposed else score_BL
    if isinstance(threshold, float) and score_BL.numel() >= EIGHT**2:
        score_K, flat_K = _above(score_BL.flatten(), threshold)
        return _entries(flat_K, rows, latents, transposed, score_K)
    border = threshold[:, None] if transposed and isinstance(threshold, Tensor) else threshold
    return _entries(torch.nonzero(~(score_BL <= border).flatten()).flatten(), rows, latents, transposed)


def _above(score_N: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The scores above a threshold and where they are: looked for in the groups that have one."""
    groups = len(score_N) // EIGHT
    grouped_GN, left = score_N[: groups * EIGHT].view(EIGHT, groups), score_N[groups * EIGHT :]
    group_n = torch.nonzero(~(grouped_GN.amax(0) <= threshold)).flatten()
    score_m, place_m = _inside(grouped_GN, group_n, lambda score: ~(score <= threshold))
    left_m = torch.nonzero(~(left <= threshold)).flatten()
    return torch.cat([score_m, left[left_m]]), torch.cat([place_m, groups * EIGHT + left_m])


def _inside(grouped_GN: Tensor, group_n: Tensor, passes: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The scores of some groups that pass, and where they are among all."""
    inside_Gn = grouped_GN.gather(1, group_n.expand(len(grouped_GN), -1))
    member_m, which_m = torch.nonzero(passes(inside_Gn), as_tuple=True)
    return inside_Gn[member_m, which_m], member_m * grouped_GN.shape[1] + group_n[which_m]
