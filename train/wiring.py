"""Which latents each source reads into and writes from: what sets an SAE, a transcoder, a crosscoder and a DFC apart.

autoencoder(a)        all: a reads, a writes
transcoder(a, b)      all: a reads, b writes
crosscoder(a, b, ..)  all: everyone reads and writes
dedicated(a, b, ..)   only_a | shared: everyone | only_b (| only_c ...)
spans                 as they are listed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shared.errors import WiringError


@dataclass(frozen=True)
class Span:
    """A named run of latents with the same readers and writers."""

    name: str
    size: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    k: int | None = None  # a budget of its own, of methods that keep k latents; none: of the k for all others
    weight: float = 1.0  # of its codes in a penalty
    tied: bool = False  # its latents write one vector to all writers (designated shared latents)


@dataclass(frozen=True)
class Wiring:
    """An ordered list of spans over sources of given widths. Latents are numbered through all spans."""

    spans: tuple[Span, ...]
    widths: dict[str, int]
    skip: bool = False  # writers are given a linear map of the readers, beside what the latents write

    def __post_init__(self) -> None:
        for span in self.spans:
            if span.size < 1:
                raise WiringError("a span needs at least one latent", f"{span.name} has {span.size}", "Add latents")
            if span.k is not None and not 0 < span.k <= span.size:
                raise WiringError(
                    "a span cannot keep so many", f"{span.k} of {span.size} in {span.name}", "Change its k"
                )
            if span.tied and len({self.widths.get(name) for name in span.writers}) > 1:
                told = ", ".join(f"{name} {self.widths.get(name)}" for name in span.writers)
                raise WiringError(f"span {span.name} cannot write one vector to these widths", told, "Leave out tied")
            if not span.readers or not span.writers:
                raise WiringError("a span needs readers and writers", span.name, "Name sources for both")
            strangers = sorted({*span.readers, *span.writers} - set(self.widths))
            if strangers:
                known = ", ".join(self.widths)
                raise WiringError(f"span {span.name} names an unknown source", ", ".join(strangers), f"Known: {known}")
        if len(self.slices) < len(self.spans):
            raise WiringError("two spans have one name", ", ".join(s.name for s in self.spans), "Rename one")
        if self.skip and (both := sorted(set(self.readers) & set(self.writers))):
            value = f"{', '.join(both)} is both read and written"
            raise WiringError("a skip connection would copy a source", value, "Leave out wiring.skip")

    @property
    def latents(self) -> int:
        return sum(span.size for span in self.spans)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """The sources that any span reads, in the order of `widths`."""
        return tuple(name for name in self.widths if any(name in span.readers for span in self.spans))

    @cached_property
    def writers(self) -> tuple[str, ...]:
        return tuple(name for name in self.widths if any(name in span.writers for span in self.spans))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """{span name: its latents}."""
        edges = [0]
        for span in self.spans:
            edges.append(edges[-1] + span.size)
        return {span.name: slice(a, b) for span, a, b in zip(self.spans, edges, edges[1:], strict=False)}

    def read_by(self, source: str) -> tuple[slice, ...]:
        """The latents into which `source` is read, as few slices as there are."""
        return _joined([self.slices[span.name] for span in self.spans if source in span.readers])

    def written_to(self, source: str) -> tuple[slice, ...]:
        """The latents that write to `source`."""
        return _joined([self.slices[span.name] for span in self.spans if source in span.writers])


def _joined(slices: Sequence[slice]) -> tuple[slice, ...]:
    joined: list[slice] = []
    for one in slices:
        if joined and joined[-1].stop == one.start:
            joined[-1] = slice(joined[-1].start, one.stop)
        else:
            joined.append(one)
    return tuple(joined)


def size_of(slices: Sequence[slice]) -> int:
    return sum(one.stop - one.start for one in slices)


def build(
    kind: str, widths: Mapping[str, int], latents: int, exclusive: float | int | Mapping[str, float | int] = 0.05,
    readers: Sequence[str] | None = None,
) -> Wiring:  # fmt: skip
    """A wiring by its name over sources in order. `exclusive` is for `dedicated` alone: latents (an integer) or a share
    of all latents (a fraction, rounded) that each source has to itself, as one value or per source. `readers` is for
    `crosscoder` alone: those of the sources that are read (none: all).

    Raises WiringError where the number of sources or the sizes do not fit.
    """
    if readers is not None and kind != "crosscoder":
        raise WiringError(f"who reads in {kind} is fixed", ", ".join(readers), "Leave out wiring.readers")
    names = tuple(widths)
    least, most = {"autoencoder": (1, 1), "transcoder": (2, 2)}.get(kind, (2, None))
    if len(names) < least or (most is not None and len(names) > most):
        wanted = f"{least}" if most == least else f"{least} or more"
        raise WiringError(f"{kind} needs {wanted} source(s)", ", ".join(names), "Set wiring.sources")
    if kind == "transcoder":
        return Wiring((Span("all", latents, names[:1], names[1:]),), dict(widths))
    if kind in ("autoencoder", "crosscoder"):
        return Wiring((Span("all", latents, tuple(readers or names), names),), dict(widths))
    return _dedicated(names, widths, latents, exclusive)


def _dedicated(
    names: tuple[str, ...], widths: Mapping[str, int], latents: int, exclusive: float | int | Mapping[str, float | int]
) -> Wiring:
    if isinstance(exclusive, Mapping) and set(exclusive) != set(names):
        given = ", ".join(exclusive) or "none"
        raise WiringError("wiring.exclusive names every source and no other", given, f"Sources: {', '.join(names)}")
    sizes = {name: _size(exclusive, name, latents) for name in names}
    shared = latents - sum(sizes.values())
    if shared < 1:
        given = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise WiringError(f"no latent is left to share of {latents}", given, "Lower wiring.exclusive")
    own = [Span(f"only_{name}", size, (name,), (name,)) for name, size in sizes.items()]
    return Wiring((own[0], Span("shared", shared, names, names), *own[1:]), dict(widths))


def _size(exclusive: float | int | Mapping[str, float | int], name: str, latents: int) -> int:
    size = exclusive[name] if isinstance(exclusive, Mapping) else exclusive
    if size <= 0:
        raise WiringError("wiring.exclusive is not above 0", f"{name} {size}", "Give latents (2) or a share (0.05)")
    return size if isinstance(size, int) else round(size * latents)


def from_spans(
    spans: Sequence[Span], shares: Sequence[float | int | None], widths: Mapping[str, int], latents: int
) -> Wiring:
    """A wiring of these spans, whose sizes are given by `shares`: latents (an integer), a share of all latents (a
    fraction, rounded), or, for one of them, none: what the others leave.

    Raises WiringError where the sizes do not add up.
    """
    sizes = [round(share * latents) if isinstance(share, float) else share for share in shares]
    rest = latents - sum(size for size in sizes if size is not None)
    open_ends = sizes.count(None)
    if open_ends > 1 or rest < 0 or (rest > 0 and not open_ends):
        told = ", ".join(
            f"{span.name} {'rest' if size is None else size}" for span, size in zip(spans, sizes, strict=True)
        )
        raise WiringError(f"the sizes of spans do not add up to {latents}", told, "Leave out the size of one of them")
    filled = [replace(span, size=rest if size is None else size) for span, size in zip(spans, sizes, strict=True)]
    return Wiring(tuple(filled), dict(widths))


def with_k(wiring: Wiring, k: Mapping[str, int]) -> Wiring:
    """The same with budgets of their own for these spans. Raises WiringError for a name that is none of theirs."""
    if strangers := sorted(set(k) - set(wiring.slices)):
        raise WiringError("wiring.k names an unknown span", ", ".join(strangers), f"Spans: {', '.join(wiring.slices)}")
    return replace(wiring, spans=tuple(replace(span, k=k.get(span.name, span.k)) for span in wiring.spans))


def default_decoder_norm(wiring: Wiring) -> float:
    """Length of a fresh decoder vector: 0.4 for a crosscoder (DFC paper, table 2), 1 for a single source."""
    return 0.4 if len(wiring.writers) > 1 else 1.0
