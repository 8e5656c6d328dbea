"""Which latents each source reads into and writes from, and the sizes of spans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import WiringError
from train.wiring import Span, Wiring, build, from_spans, with_k

ONE, TWO, THREE = {"a": 6}, {"a": 6, "b": 4}, {"a": 6, "b": 4, "c": 5}


def spans(wiring: Wiring) -> list[tuple[str, int, str, str]]:
    return [(span.name, span.size, "".join(span.readers), "".join(span.writers)) for span in wiring.spans]


def test_the_four_wirings_are_the_spans_that_the_table_says() -> None:
    assert spans(build("autoencoder", ONE, 8)) == [("all", 8, "a", "a")]
    assert spans(build("transcoder", TWO, 8)) == [("all", 8, "a", "b")]
    assert spans(build("crosscoder", THREE, 8)) == [("all", 8, "abc", "abc")]
    assert spans(build("dedicated", THREE, 8, 2)) == [
        ("only_a", 2, "a", "a"), ("shared", 2, "abc", "abc"), ("only_b", 2, "b", "b"), ("only_c", 2, "c", "c"),
    ]  # fmt: skip


def test_a_share_is_rounded_and_not_truncated() -> None:
    assert [span.size for span in build("dedicated", TWO, 131_072, 0.05).spans] == [6_554, 117_964, 6_554]


def test_exclusive_sizes_are_integers_or_shares_of_all_or_of_each_source() -> None:
    assert [s.size for s in build("dedicated", TWO, 100, 7).spans] == [7, 86, 7]
    assert [s.size for s in build("dedicated", TWO, 100, {"a": 3, "b": 0.125}).spans] == [3, 85, 12]
    assert [s.size for s in build("dedicated", TWO, 100, {"b": 1, "a": 0.25}).spans] == [25, 74, 1]
    assert [s.size for s in build("dedicated", THREE, 100).spans] == [5, 85, 5, 5]


def test_the_slices_of_a_source_are_joined_where_they_touch() -> None:
    wiring = build("dedicated", THREE, 10, {"a": 1, "b": 2, "c": 3})
    assert wiring.slices == {
        "only_a": slice(0, 1),
        "shared": slice(1, 5),
        "only_b": slice(5, 7),
        "only_c": slice(7, 10),
    }
    assert wiring.read_by("a") == wiring.written_to("a") == (slice(0, 5),)
    assert wiring.read_by("b") == wiring.written_to("b") == (slice(1, 7),)
    assert wiring.read_by("c") == wiring.written_to("c") == (slice(1, 5), slice(7, 10))


def test_a_transcoder_has_one_reader_and_one_writer() -> None:
    wiring = build("transcoder", TWO, 8)
    assert (wiring.readers, wiring.writers) == (("a",), ("b",))
    assert (wiring.read_by("b"), wiring.written_to("a")) == ((), ())


@given(latents=st.integers(60, 10_000), share=st.floats(0.02, 0.3))
def test_spans_cover_all_latents_once_whatever_the_share(latents: int, share: float) -> None:
    wiring = build("dedicated", THREE, latents, share)
    slices = list(wiring.slices.values())
    assert wiring.latents == latents
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])] and slices[-1].stop == latents
    assert all(abs(wiring.spans[i].size - share * latents) <= 0.5 for i in (0, 2, 3))


@pytest.mark.parametrize(
    ("kind", "widths", "message"),
    [
        ("autoencoder", TWO, "autoencoder needs 1 source"), ("transcoder", ONE, "transcoder needs 2 source"),
        ("transcoder", THREE, "transcoder needs 2 source"), ("crosscoder", ONE, "crosscoder needs 2 or more"),
        ("dedicated", ONE, "dedicated needs 2 or more"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_sources_is_refused(kind: str, widths: dict[str, int], message: str) -> None:
    with pytest.raises(WiringError, match=message):
        build(kind, widths, 8)


@pytest.mark.parametrize("exclusive", [50, 0.5, {"a": 99, "b": 1}])
def test_sizes_that_leave_nothing_to_share_are_refused(exclusive: object) -> None:
    with pytest.raises(WiringError, match="no latent is left to share of 100"):
        build("dedicated", TWO, 100, exclusive)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exclusive", "told"),
    [
        (0.001, "a span needs at least one latent: only_a"),
        (0, r"wiring\.exclusive is not above 0: a 0\. Give latents"),
        (-3, r"wiring\.exclusive is not above 0: a -3\. Give latents"),
    ],
)
def test_an_exclusive_span_without_latents_is_refused(exclusive: float, told: str) -> None:
    with pytest.raises(WiringError, match=told):
        build("dedicated", TWO, 100, exclusive)


@pytest.mark.parametrize("exclusive", [{"a": 1}, {"a": 1, "b": 1, "bb": 1}])
def test_exclusive_sizes_per_source_name_every_source_and_no_other(exclusive: dict[str, int]) -> None:
    with pytest.raises(WiringError, match="names every source and no other"):
        build("dedicated", TWO, 100, exclusive)


def test_spans_of_unknown_sources_and_of_one_name_are_refused() -> None:
    with pytest.raises(WiringError, match="span all names an unknown source: z"):
        Wiring((Span("all", 2, ("a",), ("z",)),), ONE)
    with pytest.raises(WiringError, match="two spans have one name"):
        Wiring((Span("all", 2, ("a",), ("a",)), Span("all", 2, ("a",), ("a",))), ONE)
    with pytest.raises(WiringError, match="a span needs readers and writers: all"):
        Wiring((Span("all", 2, ("a",), ()),), ONE)


def test_spans_that_are_listed_have_sizes_shares_and_one_the_rest() -> None:
    both = ("a", "b")
    listed = [Span("designated", 0, both, both), Span("free", 0, both, both), Span("own", 0, ("a",), ("a",))]
    assert [s.size for s in from_spans(listed, [0.1, None, 7], TWO, 64).spans] == [6, 51, 7]
    assert [s.size for s in from_spans(listed, [10, 50, 4], TWO, 64).spans] == [10, 50, 4]
    for shares in ([10, 50, 5], [10, 50, 3], [None, None, 3], [0.5, 0.6, None]):
        with pytest.raises(WiringError, match="the sizes of spans do not add up to 64: designated "):
            from_spans(listed, shares, TWO, 64)
    with pytest.raises(WiringError, match="a span needs at least one latent: free has 0"):
        from_spans(listed, [32, None, 32], TWO, 64)


def test_a_crosscoder_may_read_some_of_its_sources() -> None:
    assert spans(build("crosscoder", THREE, 8, readers=["b"])) == [("all", 8, "b", "abc")]
    with pytest.raises(WiringError, match="span all names an unknown source: z"):
        build("crosscoder", THREE, 8, readers=["z"])
    with pytest.raises(WiringError, match=r"who reads in dedicated is fixed: a\. Leave out wiring\.readers"):
        build("dedicated", TWO, 8, 1, readers=["a"])


def test_spans_get_budgets_of_their_own_by_name() -> None:
    wiring = with_k(build("dedicated", TWO, 20, 4), {"only_a": 2, "only_b": 4})
    assert [span.k for span in wiring.spans] == [2, None, 4]
    with pytest.raises(WiringError, match=r"wiring\.k names an unknown span: all\. Spans: only_a, shared, only_b"):
        with_k(wiring, {"all": 2})
    with pytest.raises(WiringError, match="a span cannot keep so many: 5 of 4 in only_a"):
        with_k(wiring, {"only_a": 5})


def test_one_vector_for_sources_of_two_widths_is_refused() -> None:
    with pytest.raises(WiringError, match="span s cannot write one vector to these widths: a 6, b 4"):
        Wiring((Span("s", 2, ("a", "b"), ("a", "b"), tied=True),), TWO)
    assert Wiring((Span("s", 2, ("a", "b"), ("a",), tied=True),), TWO).latents == 2
