"""Dead latents begin again from rows that are reconstructed badly.

The six steps of Bricken et al. 2023 (https://transformer-circuits.pub/2023/monosemantic-features/index.html), for a
wiring of several sources, each span by itself:

1  a latent is dead that has not fired for `idle_rows` rows
2  the loss of a sample of rows, over the sources that the span writes to
3  rows are drawn by loss^2, without coming twice
4  decoder: the row, over those sources together, as long as the live latents' mean (1 where decoders are unit vectors)
5  encoder: the row, over the sources that the span reads, 0.2 x the live latents' mean; biases as at the beginning
6  Adam's moments of all of these are 0

Letters: N rows of the sample, B rows of a batch, D width of a source, L latents, n dead latents of a span.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from shared.view import View
from train import parallel, reader
from train.chance import BEGIN, keyed, weighted
from train.dictionary import Weights
from train.measure import BATCH, evaluating
from train.order import Order
from train.pre import Ports
from train.trainer import Trainer
from train.wiring import Span

TINY = np.finfo(np.float64).tiny


@torch.no_grad()
def resample(trainer: Trainer, store: View, order: Order) -> dict[str, int]:
    """Let dead latents begin again. Returns how many of each span.

    The same for the same weights, seed and step, on every rank. Rows are a sample of those that `order` serves.
    """
    asked, dictionary = trainer.config.resample, trainer.dictionary
    dead_L = trainer.idle_L >= (asked.idle_rows or trainer.config.dead_rows)
    dead = {span.name: _places(dead_L, dictionary.wiring.slices[span.name]) for span in dictionary.wiring.spans}
    counts = {name: len(latents) for name, latents in dead.items()}
    if dead_L.any():
        # By one rank, since the last bits of a loss may differ between devices.
        chosen = parallel.first(lambda: _chosen(trainer, store, order, counts))
        for span in dictionary.wiring.spans:
            if counts[span.name]:
                x = _scaled_rows(trainer, store, chosen[span.name])
                _begin_again(trainer, span, dead[span.name], ~dead_L, x)
        trainer.idle_L[dead_L] = 0
    return counts


def _chosen(trainer: Trainer, store: View, order: Order, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """For every span so many rows, drawn by the square of their loss on the sources that it writes to."""
    rows = order.sample(trainer.config.resample.rows, seed=trainer.step)
    losses = row_losses(trainer, store, rows)
    return {name: rows[drawn_n] for name, drawn_n in _drawn(trainer, losses, counts).items()}


def _drawn(trainer: Trainer, losses: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """For every span the numbers of so many rows, by the square of their losses {source: [N]}."""
    found = {}
    for number, span in enumerate(trainer.dictionary.wiring.spans):
        loss_N = torch.stack([losses[source] for source in span.writers]).sum(0).numpy()
        key = keyed(trainer.config.seed, BEGIN, trainer.step, number)
        found[span.name] = weighted(key, np.square(loss_N / max(loss_N.max(), TINY)), counts[span.name])
    return found


@torch.no_grad()
def begin_again_on(trainer: Trainer, x: Mapping[str, Tensor], dead_L: Tensor) -> dict[str, int]:
    """The same with the raw rows of a batch {source: [B, D]} on one rank: of each span at most so many latents begin
    again as there are rows. Returns how many do."""
    dictionary = trainer.dictionary
    with evaluating(dictionary):
        out = dictionary(x)
    losses = {source: (out.target[source] - y_BD).double().square().sum(1).cpu() for source, y_BD in out.y.items()}
    scaled = {name: dictionary.scale.scaled(name, x_BD) for name, x_BD in x.items()}
    dead = {span.name: _places(dead_L, dictionary.wiring.slices[span.name]) for span in dictionary.wiring.spans}
    dead = {name: latents[: out.rows] for name, latents in dead.items()}
    counts = {name: len(latents) for name, latents in dead.items()}
    drawn = _drawn(trainer, losses, counts)
    for span in dictionary.wiring.spans:
        if counts[span.name]:
            places = torch.from_numpy(drawn[span.name]).to(dead_L.device)
            rows = {name: x_BD[places] for name, x_BD in scaled.items()}
            _begin_again(trainer, span, dead[span.name], ~dead_L, rows)
            trainer.idle_L[dead[span.name]] = 0
    return counts


def _places(dead_L: Tensor, latents: slice) -> Tensor:
    return torch.nonzero(dead_L[latents]).flatten() + latents.start


def row_losses(trainer: Trainer, store: View, rows: np.ndarray) -> dict[str, Tensor]:
    """{source: float64 [N], on the CPU}: |x - y|^2 of every row and written source, scaled, as at evaluation."""
    dictionary, device = trainer.dictionary, trainer.idle_L.device
    losses: dict[str, list[Tensor]] = {source: [] for source in dictionary.wiring.writers}
    with evaluating(dictionary):
        for x in reader.read(store, dictionary.wiring.widths, rows, BATCH):
            out = dictionary({name: x_BD.to(device) for name, x_BD in x.items()})
            for source, found in losses.items():
                found.append((out.target[source] - out.y[source]).double().square().sum(1).cpu())
    return {source: torch.cat(found) for source, found in losses.items()}


def _scaled_rows(trainer: Trainer, store: View, rows: np.ndarray) -> dict[str, Tensor]:
    """These rows in scaled space, in the order given, {source: [n, D]}."""
    ascending, where = np.unique(rows, return_inverse=True)
    [x] = reader.read(store, trainer.dictionary.wiring.widths, ascending, len(ascending))
    device = trainer.idle_L.device
    return {name: trainer.dictionary.scale.scaled(name, x_BD[where].to(device)) for name, x_BD in x.items()}


def _begin_again(trainer: Trainer, span: Span, latents: Tensor, live_L: Tensor, x: Mapping[str, Tensor]) -> None:
    """Steps 4 to 6 for these latents of a span, with a row for each."""
    dictionary = trainer.dictionary
    own = live_L.clone()
    own[: dictionary.wiring.slices[span.name].start] = False
    own[dictionary.wiring.slices[span.name].stop :] = False
    live = torch.nonzero(own if own.any() else live_L).flatten()
    written = {name: x[name] for name in span.writers}
    if span.tied:
        written = dict.fromkeys(written, torch.stack(list(written.values())).mean(0))
    _put(trainer, dictionary.decoder, dictionary.writes, span.writers, latents, live, written, 1.0)
    _put(trainer, dictionary.encoder, dictionary.reads, span.readers, latents, live, x, trainer.config.resample.encoder)
    for name, value in dictionary.activation.begins.items():
        _set(trainer, dictionary.activation.get_parameter(name), latents, value)


def _put(
    trainer: Trainer, table: Weights, ports: Mapping[str, Ports], sources: Iterable[str], latents: Tensor, live: Tensor,
    x: Mapping[str, Tensor], length: float,
) -> None:  # fmt: skip
    """Rows as weights of these latents, over all of these sources together `length` x the mean of the live ones."""
    sources = list(sources)
    if len(live):
        weights = (
            table[source][ports[source].local_L[live]] * ports[source].present_L[live, None] for source in sources
        )
        length *= float(_lengths(weights).mean())
    size_n1 = _lengths([x[source] for source in sources])[:, None]
    for source in sources:
        value_nD = torch.where(size_n1 > 0, x[source] / size_n1, 0.0) * length
        _set(trainer, table[source], ports[source].local_L[latents], value_nD)


def _lengths(parts: Iterable[Tensor]) -> Tensor:
    """Of rows over several sources together, [n]."""
    return torch.stack([part_nD.square().sum(1) for part_nD in parts]).sum(0).sqrt()


def _set(trainer: Trainer, parameter: Tensor, at: Tensor, value: Tensor | float) -> None:
    """Give these rows of a parameter a value, and no past."""
    parameter[at] = value
    for name, moments in trainer.optimiser.state[parameter].items():
        if name != "step":
            moments[at] = 0
