"""Thresholds of BatchTopK from all rows of a store: what training leaves is a mean that trails the weights.

The threshold of a budget is the one above which k scores a row lie, over all rows. One pass counts scores in bins of
1/8192 of their size: it is right to that, and hangs on no past.

Letters: B rows of a batch, L latents.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor

from shared.log import bar
from shared.view import View
from train.activation import BatchTopK
from train.dictionary import Dictionary
from train.measure import BATCH, evaluating
from train.reader import read

SHIFT = 10  # bits of a score that no bin tells apart: of 23 behind the leading one, 13 stay
BINS = 2 ** (31 - SHIFT)  # of positive numbers in float32, whose bits have their order


def calibrate(dictionary: Dictionary, store: View, rows: np.ndarray, quiet: bool = False) -> None:
    """Set the thresholds of a BatchTopK dictionary so that its budgets are kept, on the mean, over these ascending
    rows of the store. Where fewer scores are positive, all of them pass."""
    device, names = dictionary.activation.bias_L.device, dictionary.wiring.readers
    batches = bar("calibrating", "batches", -(-len(rows) // BATCH), read(store, names, rows, BATCH), quiet)
    calibrate_on(dictionary, ({name: x_BD.to(device) for name, x_BD in x.items()} for x in batches))


@torch.no_grad()
def calibrate_on(dictionary: Dictionary, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """The same, over batches of raw rows {reader: [B, D]}."""
    activation, norm_L, seen = cast(BatchTopK, dictionary.activation), dictionary.norms(), 0
    counted: dict[tuple[int, int], Tensor] = {}
    with evaluating(dictionary):
        for x in batches:
            pre = dictionary.pre(x)
            seen += pre.rows
            for writer, score_BL in enumerate(activation.scores(pre, norm_L)):
                for group, score in enumerate(activation.budgets.parts(score_BL)):
                    bins = score[score > 0].float().view(torch.int32) >> SHIFT
                    before = counted.get((writer, group), 0)
                    counted[writer, group] = before + torch.bincount(bins, minlength=BINS)
    budgets = activation.budgets.counts(sys.maxsize)
    found = [_border(counted[writer, group], budgets[group] * seen) for writer, group in sorted(counted)]
    activation.set_threshold(torch.tensor(found))


def _border(counts: Tensor, wanted: int) -> float:
    """The largest number below the bin down to which there are nearest to `wanted` scores; 0 where all are too few."""
    above = counts.flip(0).cumsum(0)
    if int(above[-1]) <= wanted:
        return 0.0
    off = torch.where(above > 0, (above - wanted).abs(), torch.iinfo(torch.int64).max)  # an empty top is no border
    first = BINS - 1 - int(off.argmin())
    edge = torch.tensor(first << SHIFT, dtype=torch.int32).view(torch.float32)
    return float(torch.nextafter(edge, torch.zeros(())))
