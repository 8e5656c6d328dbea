"""The figures of the reference, in fp64 over all batches together. Nothing that is evaluated changes.

Letters: B rows, S sources, D width, L latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.live import Tap, losses
from train.interop.dictionary_learning.buffers import Buffer, bare, tokenizer_of

SPECIFIC = 0.9  # of the relative decoder norm, from which a latent counts as a source's own (crosscoder_learning)


class Sums:
    """Sums over rows of one source, [D] and scalars, in fp64."""

    def __init__(self) -> None:
        self.rows = 0
        self.x, self.e, self.xx, self.ee = (torch.zeros((), dtype=torch.float64) for _ in range(4))
        self.squared, self.l2, self.cosine, self.ratio, self.along = (0.0 for _ in range(5))
        self.of_hat = 0.0

    def add(self, x_BD: Tensor, hat_BD: Tensor) -> None:
        x_BD, hat_BD = x_BD.double(), hat_BD.double()
        e_BD = x_BD - hat_BD
        self.rows += len(x_BD)
        self.x, self.e = self.x + x_BD.sum(0), self.e + e_BD.sum(0)
        self.xx, self.ee = self.xx + x_BD.square().sum(0), self.ee + e_BD.square().sum(0)
        long_B, hat_B = x_BD.norm(dim=1), hat_BD.norm(dim=1)
        self.l2 += float(e_BD.norm(dim=1).sum())
        self.squared += float(e_BD.square().sum())
        self.cosine += float(((x_BD * hat_BD).sum(1) / (long_B * hat_B).clamp_min(1e-30)).sum())
        self.ratio += float((hat_B / long_B.clamp_min(1e-30)).sum())
        self.along += float((x_BD * hat_BD).sum())
        self.of_hat += float(hat_B.square().sum())

    def explained(self) -> float:
        """1 - sum of var(x - x_hat) / sum of var(x)."""
        spread = (self.xx - self.x.square() / self.rows).sum()
        left = (self.ee - self.e.square() / self.rows).sum()
        return float(1 - left / spread)


@torch.no_grad()
def evaluate(
    dictionary: nn.Module, activations: Iterable[Any], max_len: int = 128, batch_size: int = 128, io: str = "out",
    normalize_batch: bool = False, tracer_args: Any = None, device: Any = "cpu", n_batches: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Figures of a dictionary over the next `n_batches` of rows [B, D], [B, S, D] of a crosscoder, or pairs (x, y) of a
    transcoder, whose y is what is made; with `normalize_batch` rows are divided by their mean length / sqrt(D).

    l2_loss                    mean of |x - x_hat|, over rows and sources
    l1_loss, l0                mean over rows of the sum, and of the number, of codes above 0
    frac_alive                 share of latents that have a code on any row
    frac_variance_explained    1 - sum of var(x - x_hat) / sum of var(x); of source i also cl{i}_...
    cossim, l2_ratio           mean of the cosine of x and x_hat, and of |x_hat| / |x|
    relative_reconstruction_bias  sum of |x_hat|^2 / sum of x . x_hat

    Of a live buffer also loss_original, loss_reconstructed, loss_zero and frac_recovered (loss_recovered), over as many
    batches of its next texts. Raises ConfigError where no batch comes.
    """
    found = _of_rows(dictionary, activations, device, normalize_batch, n_batches)
    if not issubclass(type(activations), Buffer):
        return found
    buffer: Any = activations
    parts = []
    for _ in range(n_batches):
        try:
            texts = buffer.text_batch(batch_size)
        except StopIteration:
            break
        parts.append(_recovered(buffer.tap, texts, dictionary, max_len, normalize_batch))
    if not parts:
        return found
    original, rebuilt, zero = (sum(each) / len(parts) for each in zip(*parts, strict=True))
    told = {"loss_original": original, "loss_reconstructed": rebuilt, "loss_zero": zero}
    return {**found, **told, "frac_recovered": (rebuilt - zero) / (original - zero)}


def loss_recovered(
    text: Sequence[Any], model: Any, submodule: Any, dictionary: nn.Module, max_len: int | None = None,
    normalize_batch: bool = False, io: Any = "out", tracer_args: Any = None, tokenizer: Any = None,
) -> tuple[float, float, float]:  # fmt: skip
    """The next token's cross entropy on texts (padding apart): as the model is, with what a dictionary makes of the
    rows in their place, and with zeros there. `io` in_to_out: what it makes of a module's input stands for its output.
    """
    tap = Tap(bare(model), bare(submodule), tokenizer_of(model, tokenizer), io, max_len or 10**6)
    return _recovered(tap, text, dictionary, max_len, normalize_batch)


def _recovered(
    tap: Tap, texts: Sequence[Any], dictionary: nn.Module, max_len: int | None, normalize: bool
) -> tuple[float, float, float]:
    tap = replace(tap, length=max_len or tap.length, heads=None)

    def change(x_BTD: Tensor) -> Tensor:
        by = _factor(x_BTD) if normalize else 1.0
        made: Tensor = dictionary(x_BTD * by)
        return made / by

    return losses(tap, texts, change)


def _factor(x: Tensor) -> Tensor:
    """By which rows [..., D] have the mean length sqrt(D)."""
    return x.shape[-1] ** 0.5 / x.float().norm(dim=-1).mean()


def _of_rows(
    dictionary: nn.Module, activations: Iterable[Any], device: Any, normalize_batch: bool, n_batches: int
) -> dict[str, float]:
    sums: list[Sums] = []
    alive_L, l1, l0, rows = None, 0.0, 0.0, 0
    for given in islice(iter(activations), n_batches):
        x, goal = (
            torch.as_tensor(one).to(device) for one in (given if isinstance(given, tuple | list) else [given] * 2)
        )
        by = _factor(x) if normalize_batch else 1.0
        hat, f = dictionary(x * by, output_features=True)
        x = goal * by
        f_BL = f.flatten(0, -2)
        alive_L = (f_BL > 0).any(0) if alive_L is None else alive_L | (f_BL > 0).any(0)
        l1, l0, rows = l1 + float(f_BL.double().sum()), l0 + float((f_BL > 0).sum()), rows + len(f_BL)
        crosses = hat.ndim == 3 and f.ndim == 2
        sums = sums or [Sums() for _ in range(hat.shape[1] if crosses else 1)]
        for number, own in enumerate(sums):
            own.add(*((x[:, number], hat[:, number]) if crosses else (x.flatten(0, -2), hat.flatten(0, -2))))
    if alive_L is None:
        raise ConfigError("nothing to evaluate on", "no batch", "Give rows, or a buffer that has some left")
    found = {
        "l2_loss": sum(one.l2 for one in sums) / sum(one.rows for one in sums), "l1_loss": l1 / rows, "l0": l0 / rows,
        "frac_alive": float(alive_L.float().mean()),
        "frac_variance_explained": sum(one.explained() for one in sums) / len(sums),
        "cossim": sum(one.cosine for one in sums) / sum(one.rows for one in sums),
        "l2_ratio": sum(one.ratio for one in sums) / sum(one.rows for one in sums),
        "relative_reconstruction_bias": sum(one.of_hat for one in sums) / sum(one.along for one in sums),
    }  # fmt: skip
    each = {f"cl{n}_frac_variance_explained": one.explained() for n, one in enumerate(sums)} if len(sums) > 1 else {}
    return {**found, **each}


@torch.no_grad()
def specific_latents(decoder_SLD: Tensor) -> list[int]:
    """How many latents are a source's own: whose (2 n - sum n) / max(n, sum n - n), n = |d|, is near 1."""
    n_SL = decoder_SLD.norm(dim=2)
    rest_SL = n_SL.sum(0) - n_SL
    own_SL = 0.5 * ((n_SL - rest_SL) / torch.maximum(n_SL, rest_SL).clamp_min(1e-30) + 1)
    return [int(count) for count in (own_SL > SPECIFIC).sum(1)]
