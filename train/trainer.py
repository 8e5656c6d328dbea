"""One update of one dictionary; the order of operations is written here, once.

Letters: B rows of a batch, D width of a source, L latents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.device import Later
from shared.log import Log
from train import parallel, shards
from train.code import Forward
from train.config import TrainConfig
from train.dictionary import Dictionary, create
from train.kernels.choice import Kernels, by_triton
from train.kernels.entries import drop_spare
from train.objective import Now, Term
from train.schedule import learning_rate


class Trainer:
    """Owns time: the step, the idle counts, the optimiser and its schedule.

    schedules -> forward -> terms -> backward (-> project) -> clip -> Adam (-> unit decoders) -> observe -> idle counts
    """

    def __init__(self, dictionary: Dictionary, terms: Sequence[Term], config: TrainConfig) -> None:
        self.dictionary, self.config = dictionary.train(), config
        dictionary.kernels = Kernels(config.kernels, config.precision, config.micro_batch)
        self.terms = list(terms)
        self._terms = nn.ModuleDict({one.name: one for one in terms}).to(dictionary.activation.bias_L.device)
        assert len(self._terms) == len(terms), "two terms have one name"
        adam = config.optimiser
        self.rate = learning_rate(adam.lr, config.steps, adam.warmup, round(adam.decay * config.steps))
        named = {name: one for name, one in dictionary.named_parameters() if one.requires_grad}
        self.parameters = list(named.values())
        self._sizes = {one: shards.sizes(dictionary.wiring, name) for name, one in named.items()}
        self.common = [one for one, sizes in self._sizes.items() if sizes is None]  # to all latents
        matrices = [one for one in self.parameters if one.ndim == 2]  # of biases and thresholds 0 is no rest
        others = [one for one in self.parameters if one.ndim != 2]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": others}]
        keys: dict[str, Any] = {"lr": adam.lr, "betas": (adam.beta1, adam.beta2), "fused": True}
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0, **keys)
        self.averages: list[Tensor] = []  # of the weights, from the first step on: before it they are not begun
        self.step = 0
        self.way = ""  # in which the last update was computed
        self.idle_L = torch.zeros(dictionary.latents, dtype=torch.int64, device=dictionary.activation.bias_L.device)

    @property
    def dead_L(self) -> Tensor:
        """Latents that have not fired for `dead_rows` rows, bool."""
        return self.idle_L >= self.config.dead_rows

    def update(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Learn from raw rows {source: float32 [B, D]}; under torchrun, from those of all ranks.

        Returns detached scalars: loss, the terms, gradient (its norm), fve/<source>; l0 and dead, of several spans also
        each, l0/<span> and dead/<span>.
        """
        if self.config.optimiser.ema and not self.step:
            self.averages = [one.detach().clone() for one in self.parameters]
        self.dictionary.activation.schedule(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        now = Now(self.step, self.dead_L, apart=True)
        out = self.dictionary(x)
        values = {term.name: term(self.dictionary, out, now) for term in self.terms}
        errors = [out.squared[source].detach() for source in out.target]
        out.y.clear()  # which nobody looks at from here on; the backward pass needs the room
        loss = self._backward(values)
        parallel.average(self.parameters if parallel.row_ranks() > 1 else self.common)
        self.dictionary.tie_gradients()
        unit = self.config.wiring.decoder == "unit"
        if unit:
            self.dictionary.project_gradients()
        gradient = self._gradient()
        # Clipped while Adam reads it, by the factor that a scaled loss would have had: it is passed over once less.
        self.optimiser.grad_scale = (gradient / self.config.optimiser.clip).clamp_min(1.0)  # type: ignore[attr-defined]
        self.optimiser.step()
        self.optimiser.zero_grad()  # here, so that trainers that wait for their turn hold none
        if unit:
            self.dictionary.normalise_decoders()
        with torch.no_grad():
            for average, weights in zip(self.averages, self.parameters, strict=False):
                average.lerp_(weights, 1 - self.config.optimiser.ema)
            self.dictionary.activation.observe(out.code, out.norm_L)
            for term in self.terms:
                term.observe(out, now)
            rows = len(next(iter(x.values())))
            record = self._record(out, {"loss": loss, **values}, errors, rows, now.dead_L)
            self.step += 1
            self.way = _way(out)
            out.pre.release()
            return {**record, "gradient": gradient.detach()}

    def _backward(self, values: dict[str, Tensor]) -> Tensor:
        """Gradients of the weighted sum of these values; returns it. What is apart and not finite is left out."""
        parts = {term: term.weight(self.step) * values[term.name] for term in self.terms}
        last = {term: part for term, part in parts.items() if term.apart and part.requires_grad}
        finite = {term: parallel.least(torch.isfinite(part.detach()).float()) for term, part in last.items()}
        told = {term: Later(one) for term, one in finite.items()}
        torch.stack([part for term, part in parts.items() if not term.apart]).sum().backward()
        for term, part in last.items():
            values[term.name] = torch.where(finite[term] > 0, values[term.name].detach(), 0.0)
            if told[term].read():
                part.backward()
        return torch.stack([term.weight(self.step) * values[term.name].detach() for term in self.terms]).sum()

    def _gradient(self) -> Tensor:
        """The length of all gradients as one vector, over all ranks."""
        squared = {one: _squared(one.grad) for one in self.parameters if one.grad is not None}
        own = torch.stack([part for one, part in squared.items() if self._sizes[one] is not None]).sum()
        [own] = parallel.summed_over_latents([own])
        return torch.stack([own, *(squared[one] for one in self.common if one in squared)]).sum().sqrt()

    def tell_way(self, log: Log, told: str) -> str:
        """Say in which way updates are computed, where that is not what was told last."""
        if self.way != told:
            log.event("way", f"step {self.step:,}: {self.way}", step=self.step, way=self.way)
        return self.way

    def _record(
        self, out: Forward, values: Mapping[str, Tensor], errors: list[Tensor], rows: int, dead_L: Tensor
    ) -> dict[str, Tensor]:
        """The figures of a batch, of all ranks' rows together; and the idle counts, which need them, too."""
        means = parallel.summed([target_BD.mean(0) / parallel.row_ranks() for target_BD in out.target.values()])
        spreads = [_squared(x_BD - mean_D) for x_BD, mean_D in zip(out.target.values(), means, strict=True)]
        shares = [value.detach() / parallel.row_ranks() for value in values.values()]
        parts = [out.code.fires_L(), torch.stack(errors), torch.stack(spreads), torch.stack(shares)]
        fires_L, error_W, spread_W, share_V = parallel.summed(parts)
        self.idle_L = torch.where(fires_L > 0, 0, self.idle_L + rows * parallel.row_ranks())
        # 1 - |x - y|^2 / |x - mean|^2 of the batch, per source: for the log. `measure` sums over all rows.
        fve = {f"fve/{source}": 1 - error_W[n] / spread_W[n] for n, source in enumerate(out.target)}
        told = dict(zip(values, share_V, strict=True))
        spans = self.dictionary.wiring.slices if len(self.dictionary.wiring.spans) > 1 else {}
        named = {"": slice(None), **{f"/{name}": one for name, one in spans.items()}}
        counts_N2 = torch.stack([torch.stack([fires_L[one].sum(), dead_L[one].sum()]) for one in named.values()])
        [counts_N2] = parallel.summed_over_latents([counts_N2])
        for (name, one), (fires, dead) in zip(named.items(), counts_N2, strict=True):
            told[f"l0{name}"] = fires / (rows * parallel.row_ranks())
            told[f"dead{name}"] = dead / (len(dead_L[one]) * parallel.latent_ranks())
        return {**told, **fve}

    @torch.no_grad()
    def trained(self) -> Dictionary:
        """The dictionary in evaluation mode, its weights averaged where averages are kept. Ends the training.

        Where ranks share latents, the first has all of them, and the others their own.
        """
        drop_spare()
        for average, weights in zip(self.averages, self.parameters, strict=False):
            weights.copy_(average)
        if self.averages and self.config.wiring.decoder == "unit":
            self.dictionary.normalise_decoders()
        return self._joined().eval()

    def _joined(self) -> Dictionary:
        """The dictionary with the latents of all ranks, on the first of them; moments make room for it."""
        own = self.dictionary
        if parallel.latent_ranks() == 1:
            return own
        self.optimiser.state.clear()
        self.averages = []
        state = {name: shards.whole(one, shards.sizes(own.wiring, name)) for name, one in own.state_dict().items()}
        if parallel.rank():
            return own
        given = (shards.joined(own.wiring), own.method, own.scale, own.norm, self.config.steps, own.alpha)
        made, _ = create(*given)
        made.load_state_dict(state)
        made.activation.schedule(max(self.step - 1, 0))
        made.kernels = own.kernels
        return made.to(self.idle_L.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on; where ranks share latents, of all of them, on the first rank."""
        return self._shared(self.own_state(), shards.whole)

    def own_state(self) -> dict[str, Any]:
        """The same of the latents that this rank has."""
        return {
            "dictionary": self.dictionary.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "terms": self._terms.state_dict(),
            "averages": {str(n): average for n, average in enumerate(self.averages)},
            "idle_L": self.idle_L,
            "step": self.step,
        }

    def _shared(self, state: Mapping[str, Any], share: Callable[[Tensor, list[int] | None], Tensor]) -> dict[str, Any]:
        """A state, its tensors by share(tensor, the sizes of the spans whose latents it has rows for)."""
        wiring, optimiser = self.dictionary.wiring, state["optimiser"]
        sizes = [self._sizes[one] for group in self.optimiser.param_groups for one in group["params"]]
        moments = {
            n: {name: one if name == "step" else share(one, sizes[n]) for name, one in of.items()}
            for n, of in optimiser["state"].items()
        }
        weights = {name: share(one, shards.sizes(wiring, name)) for name, one in state["dictionary"].items()}
        averages = {n: share(one, self._sizes[self.parameters[int(n)]]) for n, one in state["averages"].items()}
        idle_L = share(state["idle_L"], shards.of_all(wiring))
        rest = {"dictionary": weights, "averages": averages, "idle_L": idle_L}
        return {**state, "optimiser": {**optimiser, "state": moments}, **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on as many ranks or others."""
        state = self._shared(state, shards.own)
        self.dictionary.load_state_dict(state["dictionary"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._terms.load_state_dict(state["terms"])
        self.averages = [state["averages"][str(n)].to(self.idle_L.device) for n in range(len(state["averages"]))]
        self.idle_L, self.step = state["idle_L"].to(self.idle_L.device), state["step"]


def _way(out: Forward) -> str:
    way = f"codes are {out.code.kind}, products {'bf16' if out.pre.bf16 else 'fp32'}"
    triton = by_triton(out.pre.bias_L.device)  # of matrices, too: what is asked for wrongly is told
    return f"{way}, sums by triton" if triton and out.code.sums_entries else way


def _squared(values: Tensor) -> Tensor:
    """The sum of squares. A product with itself is read once, by all cores (LOG.md)."""
    flat = values.flatten()
    return torch.dot(flat, flat)
