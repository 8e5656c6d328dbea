"""A dictionary's formulas in fp64 and in full: dense matrices in which forbidden weights stand as zeros.

Written from the formulas alone, with no call into the kernels, so that kernels and dictionary can be held against it.

Letters: B rows of a batch, D width of a source, L latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.dictionary import Dictionary
from train.wiring import Wiring


def places(wiring: Wiring, source: str, side: str) -> Tensor:
    """bool L: the latents in which a source takes part, as `readers` or as `writers`."""
    return torch.cat([torch.full((span.size,), source in getattr(span, side)) for span in wiring.spans])


def full(weights_SD: Tensor, places_L: Tensor) -> Tensor:
    """[L, D] in fp64 from a source's own matrix, with a graph."""
    full_LD = weights_SD.new_zeros(len(places_L), weights_SD.shape[1], dtype=torch.float64)
    return full_LD.index_put((torch.nonzero(places_L).flatten(),), weights_SD.double())


@dataclass
class Dense:
    """The parameters of a dictionary as leaves in fp64, of the shapes that the dictionary itself has."""

    wiring: Wiring
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    bias: dict[str, Tensor]
    bias_L: Tensor
    own: dict[str, Tensor]  # what else the activation has per latent
    skip: dict[str, Tensor]
    x: Mapping[str, Tensor]  # the rows that a skip connection passes on

    @classmethod
    def of(cls, dictionary: Dictionary, x: Mapping[str, Tensor] | None = None) -> "Dense":
        def leaf(value: Tensor) -> Tensor:
            return value.detach().double().requires_grad_()

        tables = [
            {name: leaf(table[name]) for name in table}
            for table in (dictionary.encoder, dictionary.decoder, dictionary.bias)
        ]
        own = {name: leaf(value) for name, value in dictionary.activation.named_parameters() if name != "bias_L"}
        skip = {name: leaf(dictionary.skip[name]) for name in dictionary.skip}
        return cls(dictionary.wiring, *tables, leaf(dictionary.activation.bias_L), own, skip, x or {})

    def leaves(self) -> dict[str, Tensor]:
        """By the names that the dictionary's parameters have."""
        tables = {"encoder": self.encoder, "decoder": self.decoder, "bias": self.bias, "skip": self.skip}
        named = {f"{table}.{source}": value for table, values in tables.items() for source, value in values.items()}
        own = {f"activation.{name}": value for name, value in {"bias_L": self.bias_L, **self.own}.items()}
        return {**named, **own}

    def h(self, x: Mapping[str, Tensor]) -> Tensor:
        h_BL = self.bias_L
        for name, weights in self.encoder.items():
            full_LD = full(weights, places(self.wiring, name, "readers"))
            h_BL = h_BL + torch.einsum("bd,ld->bl", x[name].double(), full_LD)
        return h_BL

    def norm(self, kind: str) -> Tensor:
        """By the definition of each norm, latent by latent."""
        length_WL = torch.stack(
            [full(w, places(self.wiring, n, "writers")).norm(dim=1) for n, w in self.decoder.items()]
        )
        square_L = length_WL.square().sum(0)
        count_L = torch.stack([places(self.wiring, n, "writers") for n in self.decoder]).sum(0)
        return {
            "sum": length_WL.sum(0),
            "joint": torch.where(square_L > 0, square_L, 1.0).sqrt() * (square_L > 0),  # with a gradient of 0 at 0
            "mixed": torch.where(square_L > 0, square_L, 1.0).sqrt() * (square_L > 0) + 0.1 * length_WL.sum(0),
            "mean": length_WL.sum(0) / count_L,
            "none": torch.ones(len(count_L), dtype=torch.float64),
            "decoupled": length_WL,
        }[kind]

    def y(self, codes: Tensor | Mapping[str, Tensor], bias: bool = True) -> dict[str, Tensor]:
        """What codes [B, L] write, of all sources or of each."""
        made = {}
        for name, weights in self.decoder.items():
            f_BL = codes if isinstance(codes, Tensor) else codes[name]
            made[name] = torch.einsum("bl,ld->bd", f_BL, full(weights, places(self.wiring, name, "writers")))
            if bias:
                passed = [self.x[key.partition(" to ")[0]].double() @ W.T for key, W in self.skip.items()]
                made[name] = sum(passed, made[name] + self.bias[name])
        return made

    def chosen(self, f_BL: Tensor, norm_L: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor | dict[str, Tensor]:
        """The codes that a mask keeps by their scores f x norm; of norms per source, those of each."""
        if norm_L.ndim == 1:
            # Of latents that write nothing, those with a code come before those without.
            return f_BL * mask((f_BL * norm_L.clamp_min(1e-30)).detach())
        scores = {name: (f_BL * own_L).detach() for name, own_L in zip(self.decoder, norm_L, strict=True)}
        return {name: f_BL * (mask(score_BL) & (score_BL > 0)) for name, score_BL in scores.items()}


def top_mask(score_BL: Tensor, count: int) -> Tensor:
    """bool B x L: the `count` largest of every row, by a full sort."""
    order_BL = score_BL.argsort(dim=1, descending=True)
    return torch.zeros_like(score_BL, dtype=torch.bool).scatter(1, order_BL[:, :count], True)


def top_mask_of_batch(score_BL: Tensor, count: int) -> Tensor:
    return top_mask(score_BL.reshape(1, -1), count).reshape(score_BL.shape)


def kept(name: str, h_BL: Tensor, norm_L: Tensor, k: int) -> Tensor:
    """The codes of a method while it trains: what is kept is chosen by relu(h) x norm."""
    f_BL = h_BL.clamp_min(0)
    score_BL = (f_BL * norm_L).detach()
    masks = {
        "standard": lambda: torch.ones_like(score_BL, dtype=torch.bool),
        "topk": lambda: top_mask(score_BL, k),
        "batch_topk": lambda: top_mask_of_batch(score_BL, min(k * len(score_BL), score_BL.numel())),
    }
    return f_BL * masks[name]()


def aux(
    dense: Dense, x: Mapping[str, Tensor], y: Mapping[str, Tensor], dead_L: Tensor, k_aux: int, form: str = "input"
) -> Tensor:
    """AuxK from dense matrices: e = x - y as given, e_hat from the top dead pre-activations, of x as Gao et al. write
    it, or of e without a bias as the DFC paper does."""
    errors = {name: (x[name].double() - y[name]).detach() for name in y}
    h_BL = dense.h(x) if form == "input" else dense.h(errors) - dense.bias_L
    dead_only_BL = h_BL.detach().masked_fill(~dead_L, -torch.inf)
    chosen_BL = top_mask(dead_only_BL, min(k_aux, int(dead_L.sum()))) & dead_L
    return squared(errors, dense.y(h_BL.clamp_min(0) * chosen_BL, bias=False))


def squared(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """The mean over rows of |x - y|^2, summed over sources."""
    return torch.stack([(x[name].double() - y[name]).square().sum(1).mean() for name in y]).sum()


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
