"""Exact, mergeable statistics of rows in fp64: count, mean, M2, maximum and a histogram of norms.

Letters: N rows, D width, H bins of the norm histogram, X classes, K packed fields.
"""

from dataclasses import dataclass

import numpy as np
import torch

BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 16, -16, 48  # norms from 2^-16 to 2^32 in steps of 4.4 %
BINS = BINS_PER_OCTAVE * OCTAVES

KINDS = ("ordinary", "special", "first", "sink")
SPLITS = ("train", "held_out")
CLASSES = tuple(f"{kind}/{split}" for kind in KINDS for split in SPLITS)


def class_of(special: np.ndarray, first: np.ndarray, sink: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The index into CLASSES of each row; a row that is several things at once counts as the first of them that holds.

    The order is special, first, sink, so that sinks are those that no other rule would drop.
    """
    kind = np.select([special, first, sink], [1, 2, 3], 0)
    return kind * len(SPLITS) + held_out.astype(np.int64)


@dataclass
class Moments:
    """count, mean_D, m2_D = sum of (x - mean)^2, largest |x|, and the norms' log-binned histogram, of a set of rows.

    Two sets merge by Chan, Golub and LeVeque (1979): the result is that of their union, to fp64 rounding.
    """

    count: float
    largest: float
    mean_D: np.ndarray
    m2_D: np.ndarray
    norms_H: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0.0, 0.0, np.zeros(width), np.zeros(width), np.zeros(BINS))

    @classmethod
    def of(cls, x_ND: torch.Tensor) -> "Moments":
        """The moments of the rows of `x_ND` (any float type)."""
        return cls.unpack(
            packed(x_ND, torch.zeros(len(x_ND), dtype=torch.long, device=x_ND.device), 1)[0].cpu().numpy()
        )

    def merge(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return self
        step_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + step_D * (other.count / count)
        m2_D = self.m2_D + other.m2_D + step_D**2 * (self.count * other.count / count)
        return Moments(count, max(self.largest, other.largest), mean_D, m2_D, self.norms_H + other.norms_H)

    def without(self, part: "Moments") -> "Moments":
        """The moments of the rows that remain when those of `part`, a subset, are taken out.

        `largest` stays an upper bound, since a maximum cannot be taken back.
        """
        count = self.count - part.count
        if not count:
            return Moments.empty(len(self.mean_D))
        mean_D = (self.mean_D * self.count - part.mean_D * part.count) / count
        step_D = part.mean_D - mean_D
        m2_D = self.m2_D - part.m2_D - step_D**2 * (count * part.count / self.count)
        return Moments(count, self.largest, mean_D, np.maximum(m2_D, 0.0), self.norms_H - part.norms_H)

    def variance(self) -> float:
        """E |x - mean|^2, summed over components (population variance)."""
        return float(self.m2_D.sum() / self.count) if self.count else 0.0

    def norm_quantile(self, q: float) -> float:
        """A quantile of the norms, to the width of a bin (4.4 %), log-interpolated inside it; 0 of no rows."""
        filled = np.flatnonzero(self.norms_H)  # so that no quantile, 0 and 1 included, falls where no row is
        if not len(filled):
            return 0.0
        upto = np.cumsum(self.norms_H[filled])
        index = int(np.searchsorted(upto, q * upto[-1]))
        inside = 1.0 - (upto[index] - q * upto[-1]) / self.norms_H[filled[index]]
        return float(2.0 ** (LOWEST_OCTAVE + (filled[index] + inside) / BINS_PER_OCTAVE))

    def pack(self) -> np.ndarray:
        """One float64 vector: count, largest, mean_D, m2_D, norms_H."""
        return np.concatenate([[self.count, self.largest], self.mean_D, self.m2_D, self.norms_H])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Moments":
        width = (len(packed) - 2 - BINS) // 2
        mean_D, m2_D, norms_H = np.split(np.array(packed[2:]), [width, 2 * width])
        return cls(float(packed[0]), float(packed[1]), mean_D, m2_D, norms_H)


def packed(x_ND: torch.Tensor, class_N: torch.Tensor, classes: int) -> torch.Tensor:
    """float64 [classes, K]: the packed moments of the rows of each class, on their device, which nothing waits for.

    Every value must be finite. `class_N` (int64) counts from 0.
    """
    x_ND = x_ND.double()
    one_XN = (class_N == torch.arange(classes, device=x_ND.device)[:, None]).double()
    count_X = one_XN.sum(1)
    mean_XD = one_XN @ x_ND / count_X.clamp_min(1)[:, None]
    m2_XD = one_XN @ (x_ND - mean_XD[class_N]).square_()
    largest_X = torch.zeros_like(count_X).scatter_reduce_(0, class_N, x_ND.abs().amax(1), "amax")
    octave_N = torch.linalg.vector_norm(x_ND, dim=1).log2() - LOWEST_OCTAVE
    bin_N = (octave_N * BINS_PER_OCTAVE).floor().clamp(0, BINS - 1).long()
    norms_XH = x_ND.new_zeros(classes * BINS).scatter_add_(0, class_N * BINS + bin_N, torch.ones_like(octave_N))
    return torch.cat([count_X[:, None], largest_X[:, None], mean_XD, m2_XD, norms_XH.view(classes, BINS)], 1)


def packed_fields(width: int) -> dict[str, list[int]]:
    """Where each field stands in a packed vector: {name: [start, stop]}."""
    edges = np.cumsum([0, 1, 1, width, width, BINS]).tolist()
    return {name: edges[i : i + 2] for i, name in enumerate(("count", "largest", "mean", "m2", "norm_histogram"))}
