"""Files of crosscoders: those of crosscoder_learning in all their eras, of dfc_learning, and of Kissane's crosscoders.

E1  encoder.weight (S, D, L)  encoder.bias (L,)  decoder.weight (S, L, D)  decoder.bias (S, D)
E2  and k, threshold of those by BatchTopK; which decoder norm ranks latents is in config.json alone
E3  and code_normalization_id
E4 to E7  and a normaliser (train.interop.normaliser)

Those of dfc_learning have _partition_config, too: shares of all latents, cut off to whole ones, in the order
A | B | shared. Here latents are in the order A | shared | B.

Letters: S sources, D width, L latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from shared.errors import CheckpointError
from train import method as methods
from train.code import Form
from train.dictionary import Dictionary, Norm, create
from train.interop import normaliser
from train.interop.found import Found, Sidecar
from train.interop.normaliser import Normaliser
from train.interop.tensors import Taken
from train.scale import Scale
from train.wiring import Span, Wiring

NORMS: dict[int, tuple[str, Norm]] = {
    1: ("CROSSCODER", "sum"), 2: ("SAE", "joint"), 3: ("MIXED", "mixed"), 4: ("NONE", "none"),
    5: ("DECOUPLED", "decoupled"),
}  # fmt: skip
BY_NAME = dict(NORMS.values())
PARTITION = "_partition_config"
SHARES = ("model_a_exclusive_pct", "model_b_exclusive_pct")
SIZES = ("model_a_exclusive_size", "model_b_exclusive_size")  # which this project writes: a share may lose a latent
KISSANE = ("W_enc", "W_dec")


@dataclass(frozen=True)
class Ranking:
    """What weighs latents against each other: norm of this name, of `mixed` unit x (joint + alpha x sum)."""

    name: str  # in its own library
    norm: Norm
    alpha: float = 0.1
    unit: float = 1.0
    alphas: tuple[float, float] = (1.0, 0.1)  # there: of the joint norm and of the sum


def is_crosscoder(state: Taken) -> bool:
    """Whether weights of encoders have a dimension for sources."""
    return any(isinstance(state.left.get(n), Tensor) and state.left[n].ndim == 3 for n in ("encoder.weight", "W_enc"))


def read(state: Taken, sidecar: Sidecar, names: Sequence[str] | None = None) -> Found:
    """The crosscoder of a state, with sources of these names (none: a, b, ...).

    Raises CheckpointError where something that decides its values is in neither the weights nor what lies beside them.
    """
    if KISSANE[0] in state:
        return _kissane(state, names)
    encoder, bias_L = state.tensor("encoder.weight", None, None, None), state.tensor("encoder.bias")
    if bias_L.ndim == 2:
        way_out = "Nothing but a day's files have it: train it again"
        raise CheckpointError("a crosscoder with a bias for every source (E0)", state.path, way_out)
    decoder = state.tensor("decoder.weight", None, len(bias_L), None)
    sources, latents, width = decoder.shape
    bias_SD = state.tensor("decoder.bias", sources, width)
    readers = _readers(state, sidecar, len(encoder), sources)
    form = _form(state, sidecar, latents, sources)
    ranked, era, notes = _ranking(state, sidecar, form.kind)
    scaled, later = normaliser.taken(state, sources, width)
    if later == "E4" and form.kind == "relu":
        way_out = "No description tells what its decoder gave back"
        raise CheckpointError("a crosscoder without k whose rows are scaled as in E4", state.path, way_out)
    if processor := sidecar.get("latent_processor"):
        raise CheckpointError("a latent_processor is not in these files", processor, "Apply it yourself")
    sizes = partition(state, sidecar, latents)
    state.done()
    names = named(names, sources)
    wiring = wired(names, [names[n] for n in readers], width, latents, sizes)
    made = _made(wiring, form, ranked)
    _fill(made, encoder, bias_L, decoder, bias_SD, readers, sizes, state)
    made.activation.adopt(_form_in(made, form, ranked))
    if scaled is not None:
        made = _scaled(made, scaled)
        notes = (*notes, f"rows are scaled as {later} does")
    kind = "CrossCoder" if form.kind == "relu" else "BatchTopKCrossCoder"
    kind = f"DedicatedFeature{kind.replace('CrossCoder', '')}CrossCoder" if sizes else kind
    off = torch.full((sources, width), torch.nan)
    told = {
        "code_normalization": ranked.name, "alphas": ranked.alphas,
        "std": off if scaled is None else scaled.std_SD if later == "E7" else even_spreads(made),
        "target_rms": 1.0 if scaled is None or later != "E7" else scaled.target,
    }  # fmt: skip
    return Found(made.eval().requires_grad_(False), f"{kind}, {later or era}, {ranked.name}", notes, told)


def even_spreads(made: Dictionary) -> Tensor:
    """Spreads that are the same for all coordinates and lead to the factor of each source, [S, D]; the target is 1."""
    width = next(iter(made.wiring.widths.values()))
    factor_S = torch.stack([made.scale.factor(name).double() for name in made.wiring.widths])
    even_S = ((factor_S.pow(-2) - normaliser.SMALL) / width).sqrt()
    return even_S.float()[:, None].expand(-1, width)


def named(names: Sequence[str] | None, sources: int) -> tuple[str, ...]:
    """The names of so many sources: a, b, ... where none are given. Raises CheckpointError for another number."""
    found = tuple(names or ascii_lowercase[:sources])
    if len(found) != sources or len(set(found)) < sources:
        raise CheckpointError("names of sources do not fit", ", ".join(found), f"This crosscoder has {sources}")
    return found


def _readers(state: Taken, sidecar: Sidecar, read_sources: int, sources: int) -> list[int]:
    """The numbers of the sources that are read."""
    told = sidecar.get("encoder_layers")
    if told is None and read_sources == sources:
        return list(range(sources))
    if told is None or len(told) != read_sources:
        value = f"{read_sources} of {sources} sources are read"
        raise CheckpointError("which ones is not in the weights", value, "Put its config.json with encoder_layers here")
    return [int(number) for number in told]


def _form(state: Taken, sidecar: Sidecar, latents: int, sources: int) -> Form:
    if "threshold" not in state:
        return Form("relu")
    threshold = state.tensor("threshold", finite=False)
    k = int(state.plain("k")) if "k" in state else sidecar.get("k")
    if k is None:
        raise CheckpointError("k is in neither the weights nor a config.json", state.path, "Put config.json beside it")
    each = threshold.reshape(-1, 1).expand(-1, latents)
    return Form("batch_topk", (int(k),), each if threshold.ndim else each[0])


def _ranking(state: Taken, sidecar: Sidecar, kind: str) -> tuple[Ranking, str, tuple[str, ...]]:
    """By the weights, else by what lies beside them; of files that are older than the choice: CROSSCODER."""
    told, era, notes = None, "E3", tuple[str, ...]()
    if "code_normalization_id" in state:
        told = NORMS.get(number := int(state.plain("code_normalization_id")), (f"number {number}", "sum"))[0]
    elif (named := sidecar.get("code_normalization", "sparsity_loss_type")) is not None:
        told, era = str(named).rsplit(".", 1)[-1].upper(), "E2"
    elif kind == "relu" or "activation_dim" in sidecar.arguments:
        told, era, notes = "CROSSCODER", "E1", ("decoder norms are those of E1, CROSSCODER: no file says another",)
    if told is None:
        way_out = "Put its config.json beside it, which has code_normalization or sparsity_loss_type"
        raise CheckpointError("the decoder norm that ranks latents is not in these weights", state.path, way_out)
    if told not in BY_NAME:
        raise CheckpointError("an unknown code normalisation", told, f"Known: {', '.join(BY_NAME)}")
    alphas = _alphas(state, sidecar) if told == "MIXED" else (1.0, 0.1)
    return ranking(told, alphas, kind != "relu"), era, notes


def ranking(name: str, alphas: tuple[float, float], ranked: bool) -> Ranking:
    """By the name of a code normalisation; of MIXED alphas[0] x joint + alphas[1] x sum.

    Where latents are not `ranked` DECOUPLED weighs codes by the sum of norms, as CROSSCODER does.
    """
    if name != "MIXED":
        return Ranking(name, "sum" if name == "DECOUPLED" and not ranked else BY_NAME[name])
    joint, total = alphas
    if not (joint > 0 or total > 0):
        raise CheckpointError("the weights of MIXED leave no norm", f"{joint}, {total}", "One of them is above 0")
    if joint == 0:
        return Ranking("MIXED", "sum", unit=total, alphas=alphas)
    return Ranking("MIXED", "mixed", total / joint, joint, alphas)


def _alphas(state: Taken, sidecar: Sidecar) -> tuple[float, float]:
    """Of the joint norm, and of the sum. Raises CheckpointError where no file has the two."""
    parts = [sidecar.get(f"code_normalization_alpha_{one}", f"sparsity_loss_alpha_{one}") for one in ("sae", "cc")]
    if None in parts:
        way_out = "Put its config.json beside it, which has code_normalization_alpha_sae and _cc"
        raise CheckpointError("the two weights of MIXED are not in these weights", state.path, way_out)
    return float(parts[0]), float(parts[1])


def partition(state: Taken, sidecar: Sidecar, latents: int) -> tuple[int, int] | None:
    """How many latents A alone and B alone have, of a dedicated crosscoder: shares are cut off, as its writer does."""
    if PARTITION in state:
        table: Mapping[str, Any] = state.plain(PARTITION)
        return _cut(latents, *(table[name] for name in SHARES))
    if sidecar.kind is None or not sidecar.kind.startswith("Dedicated"):
        return None
    sizes = [sidecar.get(name) for name in SIZES]
    if None not in sizes:
        return int(sizes[0]), int(sizes[1])
    told = [sidecar.get(name) for name in SHARES]
    if None in told:
        way_out = f"Put its config.json beside it, which has {SHARES[0]}"
        raise CheckpointError("which latents are dedicated is not in these weights", state.path, way_out)
    return _cut(latents, *told)


def _cut(latents: int, a: float, b: float) -> tuple[int, int]:
    return int(latents * a), int(latents * b)


def wired(
    names: tuple[str, ...], readers: list[str], width: int, latents: int, sizes: tuple[int, int] | None
) -> Wiring:
    widths = dict.fromkeys(names, width)
    if sizes is None:
        return Wiring((Span("all", latents, tuple(readers), names),), widths)
    if len(names) != 2 or len(readers) != 2:
        raise CheckpointError("a dedicated crosscoder is of two sources", ", ".join(names), "Is it another file?")
    only_a, only_b = sizes
    spans = [
        Span(f"only_{names[0]}", only_a, names[:1], names[:1]),
        Span("shared", latents - only_a - only_b, names, names),
        Span(f"only_{names[1]}", only_b, names[1:], names[1:]),
    ]
    return Wiring(tuple(span for span in spans if span.size), widths)


def order(latents: int, sizes: tuple[int, int] | None) -> Tensor:
    """Of each latent here, where it stands in the file: A | shared | B of A | B | shared. [L]"""
    if sizes is None:
        return torch.arange(latents)
    a, b = sizes
    return torch.cat([torch.arange(a), torch.arange(a + b, latents), torch.arange(a, a + b)])


def _made(wiring: Wiring, form: Form, ranking: Ranking) -> Dictionary:
    method = {"name": "batch_topk", "k": form.k[0]} if form.k else {"name": "standard"}
    made, _ = create(wiring, methods.parse(method), Scale(wiring.widths), ranking.norm, 1, ranking.alpha)
    return made


@torch.no_grad()
def _fill(
    made: Dictionary, encoder: Tensor, bias_L: Tensor, decoder: Tensor, bias_SD: Tensor, readers: list[int],
    sizes: tuple[int, int] | None, state: Taken,
) -> None:  # fmt: skip
    """Put a file's weights, (sources, D, L) and (sources, L, D), where they belong. What is forbidden must be 0."""
    order_L, names = order(len(bias_L), sizes), list(made.wiring.widths)
    made.activation.bias_L.copy_(bias_L[order_L])
    for number, source in enumerate(names):
        tables = [(made.decoder, made.writes, decoder[number])]
        if number in readers:
            tables.append((made.encoder, made.reads, encoder[readers.index(number)].T))
        for table, ports, whole_LD in tables:
            table[source].copy_(ports[source].own(whole_LD[order_L]))
            own = ports[source].present_L.bool()
            worst = float(whole_LD[order_L][~own].abs().max()) if not own.all() else 0.0
            if worst > 0:
                value = f"up to {worst:.3g} of {source} in {state.path}"
                way_out = "It is no dedicated crosscoder, or one whose training has broken its partition"
                raise CheckpointError("weights where its partition allows none", value, way_out)
        made.bias[source].copy_(bias_SD[number])


def _form_in(made: Dictionary, form: Form, ranking: Ranking) -> Form:
    """The form with thresholds in the units of this ranking."""
    if form.threshold_L is None:
        return form
    split = ranking.norm == "decoupled"
    if form.threshold_L.ndim == 2 and not split:
        raise CheckpointError("a threshold of each source", ranking.name, "Only DECOUPLED has such: its id is wrong")
    shape = (len(made.wiring.writers), -1) if split else (-1,)
    return Form(form.kind, form.k, (form.threshold_L / ranking.unit).expand(*shape))


@torch.no_grad()
def _scaled(made: Dictionary, scaled: Normaliser) -> Dictionary:
    """With the scale of a file: as the dictionary's own, or, one of each coordinate, in its weights, where the decoder
    norms by which latents are ranked stay those of scaled space."""
    each = scaled.factor.ndim == 2
    if each:
        made.folded_WL = made.decoder_norms().clone()
    for number, source in enumerate(made.wiring.widths):
        mean_D, factor = scaled.mean_SD[number].double(), scaled.factor[number].double()
        if not each:
            made.scale.mean(source).copy_(mean_D)
            made.scale.factor(source).copy_(factor)
            continue
        if source in made.encoder:
            W_SD = made.encoder[source]
            W_SD.copy_(W_SD.double() * factor)
            made.activation.shift(made.reads[source].spread(W_SD.double() @ mean_D).float())
        made.decoder[source].copy_(made.decoder[source].double() / factor)
        made.bias[source].copy_(made.bias[source].double() / factor + mean_D)
    return made


def _kissane(state: Taken, names: Sequence[str] | None) -> Found:
    """W_enc (S, D, L), b_enc (L,), W_dec (L, S, D), b_dec (S, D), by ReLU."""
    encoder = state.tensor("W_enc", None, None, None)
    sources, width, latents = encoder.shape
    bias_L, decoder = state.tensor("b_enc", latents), state.tensor("W_dec", latents, sources, width)
    bias_SD = state.tensor("b_dec", sources, width)
    state.done()
    names = named(names, sources)
    made = _made(wired(names, list(names), width, latents, None), Form("relu"), Ranking("CROSSCODER", "sum"))
    _fill(made, encoder, bias_L, decoder.transpose(0, 1), bias_SD, list(range(sources)), None, state)
    note = "its rows were scaled by a number per model, which is not in its files: Dictionary.scale takes them"
    return Found(made.eval().requires_grad_(False), "CrossCoder of Kissane et al.", (note,))
