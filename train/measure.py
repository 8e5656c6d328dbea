"""Measures, defined once: over all rows at once in fp64, per source and per span.

Letters: B rows of a batch, N rows measured, D width of a source, L latents, W writers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import StoreError
from shared.log import bar
from shared.view import View
from train.dictionary import Dictionary, relative_norms
from train.exclusivity import SHADOWED, Exclusivity
from train.filter import RowsConfig, kept_rows
from train.order import Order
from train.reader import read
from train.sources import Sources

BATCH = 2048
EXCLUSIVE = 0.8  # R above which a latent counts as exclusive to a source (DFC paper, arXiv 2602.11729)
ONLY = 0.9  # the normalised difference above which it does (Minder, Dumas et al. 2025, arXiv 2504.02922)
NOTHING = np.empty(0, np.int64)  # of the training split of a store for evaluation alone
DENSE = 0.1  # share of rows above which a latent counts as dense
BINS = 20  # of the histogram of R

FORMULAS = {
    "fve": "1 - sum |x - y|^2 / sum |x - mean|^2 over the held-out rows, mean being theirs",
    "mse": "mean |x - y|^2 over the held-out rows, in the model's own units",
    "cosine": "mean cosine of x and y over the held-out rows, both less the mean that the dictionary subtracts",
    "l2_ratio": "mean |y| / |x| over the held-out rows, both less the mean that the dictionary subtracts",
    "gamma": "sum |y|^2 / sum x . y over the held-out rows, both less that mean: 1 is unbiased, less is shrunk "
    "(Rajamanoharan et al. 2024, arXiv 2404.16014)",
    "l0": "mean number of positive codes per held-out row",
    "dead": "share of latents that fire on none of the measured rows, held-out and training",
    "dense": f"share of latents that fire on more than {DENSE:.0%} of the held-out rows",
    "exclusive": f"latents that fire and whose share R of the decoder norms is above {EXCLUSIVE} at the source",
    "only": "latents that fire and whose normalised difference of decoder norms, ((n - rest) / max(n, rest) + 1) / 2 "
    f"with rest the sum over the other sources, is above {ONLY} at the source",
    "spans.*.exclusive, only": "of each source: how many of these are in the span",
    "spans.*.fve": "of each source: its FVE less that without what the span writes",
    "spans.*.integrity": "largest change of the span's pre-activations, and of what it alone writes, when the sources "
    "that it does not read are noise: 0",
    "spans.*.coupling": "sum |f - f'| / sum f of the span's codes f, and f' when those sources are noise",
    "spans.*.shadow": "median over the span's latents of the largest correlation with a latent that reads a source "
    "which the span does not: near 1 where they are not exclusive in truth",
    "spans.*.shadowed": f"latents of the span for which that correlation is above {SHADOWED}",
}


class Sums:
    """What is added up per source: rows, error, and the first two moments of the target."""

    def __init__(self, width: int) -> None:
        self.error = self.square = self.cosine = self.ratio = self.made = self.both = 0.0
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.without: dict[str, float] = {}  # the error where a span writes nothing

    def add(self, x_BD: Tensor, y_BD: Tensor, written: Mapping[str, Tensor]) -> None:
        """Rows and reconstructions in centred space (any fixed centre), and what each span writes of these, float32."""
        x_BD, y_BD = x_BD.double(), y_BD.double()
        for span, part_BD in written.items():
            left = float((x_BD - y_BD + part_BD).square().sum())
            self.without[span] = self.without.get(span, 0.0) + left
        length_B = torch.linalg.vector_norm(x_BD, dim=1)
        ratio_B = torch.linalg.vector_norm(y_BD, dim=1) / length_B
        self.ratio += float(torch.where(length_B > 0, ratio_B, 0.0).sum())
        self.made += float(y_BD.square().sum())
        self.both += float((x_BD * y_BD).sum())
        self.error += float((x_BD - y_BD).square().sum())
        self.square += float(x_BD.square().sum())
        self.sum_D += x_BD.sum(0).cpu()
        self.cosine += float(torch.cosine_similarity(x_BD, y_BD, dim=1).sum())

    def result(self, rows: int, factor: float) -> dict[str, float | None]:
        spread = self._spread(rows)
        fve = 1 - self.error / spread if spread > 0 else None  # all rows alike
        gamma = self.made / self.both if self.both else None
        shape = {"cosine": self.cosine / rows, "l2_ratio": self.ratio / rows, "gamma": gamma}
        return {"fve": fve, "mse": self.error / rows / factor**2, **shape}

    def _spread(self, rows: int) -> float:
        return self.square - float(self.sum_D.square().sum()) / rows

    def gained(self, span: str, rows: int) -> float | None:
        """What a span adds to the FVE."""
        spread = self._spread(rows)
        return (self.without[span] - self.error) / spread if spread > 0 else None


class Firings:
    """On how many of the rows of all batches each latent fires."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, self.rows = dictionary, 0
        self.fires_L = torch.zeros(dictionary.latents, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x: Mapping[str, Tensor]) -> None:
        """Raw rows {reader: [B, D]}."""
        self.rows += len(next(iter(x.values())))
        self.fires_L += self.dictionary.code(x).fires_L().cpu()


class Measure:
    """Adds up batches of rows, and gives the figures of all of them together."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.rows = 0
        self.sums = {source: Sums(dictionary.wiring.widths[source]) for source in dictionary.wiring.writers}
        self.fires_L = torch.zeros(dictionary.latents, dtype=torch.int64)
        self.firings = dict.fromkeys(self.sums, 0)  # codes that write to each source
        self.exclusivity = Exclusivity(dictionary)
        numbers = [torch.full((span.size,), n) for n, span in enumerate(dictionary.wiring.spans)]
        self._span_L = torch.cat(numbers).to(dictionary.activation.bias_L.device)

    @torch.no_grad()
    def add(self, x: Mapping[str, Tensor]) -> None:
        """Raw rows {source: [B, D]}."""
        out = self.dictionary(x)
        self.rows += len(next(iter(x.values())))
        self.fires_L += out.code.fires_L().cpu()
        spans = list(self.dictionary.wiring.slices)
        for source, sums in self.sums.items():
            ports = self.dictionary.writes[source]
            self.firings[source] += int(out.code.fires_L(ports).sum())
            parts = out.code.write_groups(self.dictionary.decoder[source], ports, self._span_L, len(spans)).unbind(1)
            sums.add(out.target[source], out.y[source], dict(zip(spans, parts, strict=True)))
        self.exclusivity.add(x, out.code)

    def result(self, also_fires_L: Tensor | None = None) -> dict[str, Any]:
        """The figures; `also_fires_L` are firings on other rows, which count against being dead."""
        alive_L = (self.fires_L if also_fires_L is None else self.fires_L + also_fires_L) > 0
        density_L = self.fires_L.double() / self.rows
        share_WL = relative_norms(self.dictionary.decoder_norms().detach().cpu())
        return {
            "rows": self.rows,
            "latents": self.dictionary.latents,
            "l0": float(density_L.sum()),
            "dead": float((~alive_L).double().mean()),
            "dense": float((density_L > DENSE).double().mean()),
            "sources": self._sources(share_WL, alive_L),
            "spans": self._spans(share_WL, alive_L, density_L),
            "density": _log_histogram(density_L),
            "r": self._r(share_WL, alive_L),
        }

    def _sources(self, share_WL: Tensor, alive_L: Tensor) -> dict[str, dict[str, float | None]]:
        figures: dict[str, dict[str, float | None]] = {}
        bins = _bins(share_WL, alive_L)
        for index, (source, sums) in enumerate(self.sums.items()):
            figures[source] = {
                **sums.result(self.rows, float(self.dictionary.scale.factor(source))),
                "l0": self.firings[source] / self.rows,
                **{kind: counts[index] if len(share_WL) > 1 else None for kind, counts in bins.items()},
            }
        return figures

    def _spans(self, share_WL: Tensor, alive_L: Tensor, density_L: Tensor) -> dict[str, dict[str, Any]]:
        wiring, exclusive = self.dictionary.wiring, self.exclusivity.result()
        writers = {span.name: span.writers for span in wiring.spans}
        return {
            name: {
                "latents": one.stop - one.start,
                "alive": int(alive_L[one].sum()),
                "l0": float(density_L[one].sum()),
                "dead": float((~alive_L[one]).double().mean()),
                "dense": float((density_L[one] > DENSE).double().mean()),
                "fve": {source: self.sums[source].gained(name, self.rows) for source in writers[name]},
                "density": _log_histogram(density_L[one]),
                **{
                    kind: dict(zip(self.sums, counts, strict=True))
                    for kind, counts in _bins(share_WL[:, one], alive_L[one]).items()
                },
                **exclusive.get(name, {}),
            }
            for name, one in self.dictionary.wiring.slices.items()
        }

    def _r(self, share_WL: Tensor, alive_L: Tensor) -> dict[str, Any]:
        """Per source, counts of live latents over R in [0, 1], in equal bins. Empty for a single writer."""
        if len(share_WL) < 2:
            return {}
        histograms = {
            source: torch.histc(share_WL[index][alive_L].float(), BINS, 0, 1).long().tolist()
            for index, source in enumerate(self.sums)
        }
        return {"edges": np.linspace(0, 1, BINS + 1).round(4).tolist(), "counts": histograms}


def _bins(share_WL: Tensor, alive_L: Tensor) -> dict[str, list[int]]:
    """How many live latents look exclusive to each source, by R (exclusive) and by the normalised difference (only)."""
    both = {"exclusive": share_WL > EXCLUSIVE, "only": normalised_difference(share_WL) > ONLY}
    return {kind: (one & alive_L).sum(1).tolist() for kind, one in both.items()}


def _log_histogram(density_L: Tensor) -> dict[str, Any]:
    """How many latents fire on which share of rows: bins of half a decade, and those that never fire apart."""
    edges = np.arange(-6, 0.25, 0.5)
    fired = density_L[density_L > 0].log10().clamp(-6, -1e-9).numpy()
    return {
        "log10_edges": edges.tolist(),
        "counts": np.histogram(fired, edges)[0].tolist(),
        "never": int((density_L == 0).sum()),
    }


def normalised_difference(share_WL: Tensor) -> Tensor:
    """((n - rest) / max(n, rest) + 1) / 2 of every source and latent, from the shares in the sum of norms, [W, L].

    1 where the source alone is written to, 1/2 where as much as all others together, 0 where it is not.
    """
    rest_WL = 1 - share_WL
    return ((share_WL - rest_WL) / torch.maximum(share_WL, rest_WL) + 1) / 2


@contextmanager
def evaluating(dictionary: Dictionary) -> Iterator[None]:
    """Evaluation mode inside, the mode of before outside."""
    training = dictionary.training
    dictionary.eval()
    try:
        yield
    finally:
        dictionary.train(training)


def measure(
    dictionary: Dictionary, store: View, most: int = 131_072, rows: RowsConfig | None = None, quiet: bool = False
) -> dict[str, Any]:
    """The figures of a dictionary on a store: FVE and the like on held-out rows, dead latents on training rows too.

    At most `most` rows of either split are read, a keyed sample where there are more, of those that the filter of the
    training (none: the default one) keeps.
    Raises StoreError where no held-out row is left.
    """
    [figures] = measure_all([dictionary], store, most, rows, quiet)
    return figures


def measure_all(
    dictionaries: Sequence[Dictionary], store: View, most: int, rows: RowsConfig | None, quiet: bool
) -> list[dict[str, Any]]:
    """The figures of each, as `measure` gives them: the rows are read once for all."""
    names = list(dict.fromkeys(name for one in dictionaries for name in one.wiring.widths))
    for one in dictionaries:
        for source, width in Sources(store, one.wiring.widths).widths.items():
            if (own := one.wiring.widths[source]) != width:
                value, way_out = f"{source} has {width}, the dictionary {own}", "Give the store it was trained on"
                raise StoreError("another width of rows than the dictionary's", value, way_out)
    device = dictionaries[0].activation.bias_L.device
    held_out, training = [Measure(one) for one in dictionaries], [Firings(one) for one in dictionaries]
    splits: list[tuple[np.ndarray, str, Sequence[Measure | Firings]]] = [
        (require_held_out(store, rows), "measuring, held out", held_out),
        (of_split(store, rows, "train"), "measuring, training", training),
    ]
    with ExitStack() as stack:
        for one in dictionaries:
            stack.enter_context(evaluating(one))
        for kept_N, what, measures in splits:
            sampled = Order(kept_N, store.chunk_rows, 1, seed=0).sample(most, seed=0) if kept_N.any() else NOTHING
            batches = read(store, names, sampled, BATCH)
            for x in bar(what, "batches", -(-len(sampled) // BATCH), batches, quiet):
                there = {name: x_BD.to(device) for name, x_BD in x.items()}
                for each in measures:
                    each.add(there)
    return [
        one.result(other.fires_L) | {"training_rows": other.rows} for one, other in zip(held_out, training, strict=True)
    ]


def of_split(store: View, rows: RowsConfig | None, split: str) -> np.ndarray:
    """The rows of a split that a filter keeps, whatever split it is for itself: a mask."""
    return kept_rows(store, (rows or RowsConfig()).model_copy(update={"split": split})).kept_N


def require_held_out(store: View, rows: RowsConfig | None) -> np.ndarray:
    """The held-out rows that measures read, a mask. Raises StoreError where there is none."""
    kept_N = of_split(store, rows, "held_out")
    if not kept_N.any():
        held_out = {one.path: one.header.plan["documents_held_out"] for one in store.stores}
        documents = ", ".join(f"{path} holds out {count} documents" for path, count in held_out.items())
        way_out = "Loosen [rows] (its documents, too, must name some), or harvest more (rows.held_out)"
        raise StoreError("no held-out row to measure on", documents, way_out)
    return kept_N
