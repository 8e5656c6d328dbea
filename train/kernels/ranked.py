"""Which of the scores that ranks have selected are among the largest of all ranks together, without moving scores.

Letters: B rows of a batch, R ranks, k, n scores of a rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from train import parallel

DIGIT = 11  # bits of a score that one histogram tells apart


def among_best(value_n: Tensor, count: int) -> Tensor:
    """Whether each is among the `count` largest of all ranks' values, bool [n]; exactly `count` are, on all ranks.

    Of equal ones those of the first ranks are taken. What is not a number counts as the largest, so that it is seen.
    The border is found digit by digit, by histograms of all ranks.
    """
    key_n = _keys(value_n)
    border, left = _border(key_n, count)
    equal_n = key_n == border
    equal_R = torch.stack(parallel.gathered(equal_n.sum()))
    take = (left - equal_R[: parallel.rank()].sum()).clamp_min(0)
    return (key_n > border) | (equal_n & (equal_n.cumsum(0) <= take))


def _border(key_n: Tensor, count: int) -> tuple[Tensor, int]:
    """The `count`-th largest of all ranks' keys, and how many of those that equal it are to be taken."""
    bits, left, border = key_n.element_size() * 8, count, torch.zeros((), dtype=key_n.dtype, device=key_n.device)
    for shift in [*range(bits - DIGIT, 0, -DIGIT), 0]:
        digit_n = (key_n >> shift) - (border >> shift)  # of those that begin like the border; of a sign first
        width = DIGIT if shift else bits % DIGIT
        low = -(2 ** (width - 1)) if shift == bits - DIGIT else 0
        inside_n = digit_n[(digit_n >= low) & (digit_n < low + 2**width)]
        counts = torch.bincount((inside_n - low).long(), minlength=2**width)
        [counts] = parallel.summed_over_ranks([counts])
        at_least = counts.flip(0).cumsum(0)
        chosen = int((at_least < left).sum())  # from above
        left -= int(at_least[chosen - 1]) if chosen else 0
        border = border + ((low + 2**width - 1 - chosen) << shift)
    return border, left


def among_best_of_row(value_Bk: Tensor, k: int) -> Tensor:
    """Whether each is among the k largest of its row over all ranks' values, bool; exactly k of every row are.

    Of equal ones those of the first ranks are taken. A rank may have fewer than k.
    """
    rank = parallel.rank()
    key_Bk = _keys(value_Bk)
    key_Bk = pad(key_Bk, (0, k - value_Bk.shape[1]), value=torch.iinfo(key_Bk.dtype).min)
    key_RBk = torch.stack(parallel.gathered(key_Bk))
    border_B1 = key_RBk.movedim(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    left_B = k - (key_RBk > border_B1).sum((0, 2)) - (key_RBk[:rank] == border_B1).sum((0, 2))
    equal_Bk = key_Bk == border_B1
    kept_Bk = (key_Bk > border_B1) | (equal_Bk & (equal_Bk.cumsum(1) <= left_B[:, None]))
    return kept_Bk[:, : value_Bk.shape[1]]


def _keys(value: Tensor) -> Tensor:
    """Integers that are ordered as these numbers are, of float32 or float64: their bits, of negative ones flipped."""
    value = value.float() if value.element_size() < 4 else value
    kind = torch.int32 if value.element_size() == 4 else torch.int64
    bits, largest = value.contiguous().view(kind), torch.iinfo(kind).max
    ordered = torch.where(bits < 0, bits ^ largest, bits)
    return torch.where(value.isnan(), largest, ordered)
