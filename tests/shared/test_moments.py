"""Moments of parts merge to those of the whole; numpy in fp64 over all rows is the reference.

Letters: N rows, D width, H bins of the norm histogram.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.moments import (
    BINS,
    BINS_PER_OCTAVE,
    CLASSES,
    KINDS,
    LOWEST_OCTAVE,
    SPLITS,
    Moments,
    class_of,
    packed,
    packed_fields,
)
from tests.device import every_device

BIN = 2 ** (1 / BINS_PER_OCTAVE)  # the ratio of a bin's edges
TINY = 1e-12


def tables(rows: int = 0) -> st.SearchStrategy[np.ndarray]:
    """fp32 values [N, D], offsets and tiny values among them."""
    shapes = st.tuples(st.integers(rows, 12), st.integers(1, 4))
    values = st.floats(-1e4, 1e4, width=32) | st.floats(-1.0, 1.0, width=32).map(lambda x: np.float32(1000.0 + x))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


@st.composite
def tables_and_parts(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    x_ND = draw(tables())
    cuts = sorted(draw(st.lists(st.integers(0, len(x_ND)), max_size=4)))
    return x_ND, np.split(x_ND, cuts)


def of(x_ND: np.ndarray) -> Moments:
    return Moments.of(torch.from_numpy(np.ascontiguousarray(x_ND)))


def merged(parts: list[np.ndarray]) -> Moments:
    total = Moments.empty(parts[0].shape[1])
    for part in parts:
        total = total.merge(of(part))
    return total


def assert_moments_of(found: Moments, x_ND: np.ndarray, power: float = 0.0) -> None:
    """`power` is the sum of squares of what went through the arithmetic, where that is more than x_ND's own."""
    x_ND = x_ND.astype(np.float64)
    power = max(power, float((x_ND**2).sum()), 1e-30)
    assert found.count == len(x_ND)
    mean_D = x_ND.mean(0) if len(x_ND) else np.zeros(x_ND.shape[1])
    np.testing.assert_allclose(found.mean_D, mean_D, rtol=0, atol=TINY * math.sqrt(power))
    np.testing.assert_allclose(found.m2_D, ((x_ND - mean_D) ** 2).sum(0), rtol=0, atol=TINY * power)
    assert (found.m2_D >= 0).all()
    assert found.norms_H.sum() == len(x_ND)


# --- of, merge, without ---------------------------------------------------------------------------------------------


def test_three_rows_have_these_moments() -> None:
    found = of(np.array([[1.0, 0.0], [3.0, 4.0], [5.0, -12.0]]))
    assert (found.count, found.largest) == (3.0, 12.0)
    assert found.mean_D.tolist() == [3.0, -8.0 / 3.0]
    np.testing.assert_allclose(found.m2_D, [8.0, 416.0 / 3.0])
    assert found.variance() == pytest.approx((8.0 + 416.0 / 3.0) / 3.0)
    norms = [math.floor((math.log2(norm) - LOWEST_OCTAVE) * BINS_PER_OCTAVE) for norm in (1.0, 5.0, 13.0)]
    assert np.flatnonzero(found.norms_H).tolist() == norms


def test_no_rows_have_the_moments_of_nothing() -> None:
    found = of(np.empty((0, 3)))
    assert (found.count, found.largest, found.variance(), found.norm_quantile(0.5)) == (0.0, 0.0, 0.0, 0.0)
    assert found.pack().tolist() == [0.0] * (2 + 6 + BINS)
    assert found.merge(found).count == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_is_summed_in_fp64(dtype: torch.dtype) -> None:
    x_ND = torch.linspace(-300, 300, 900).reshape(300, 3).to(dtype)
    before = x_ND.clone()
    assert_moments_of(Moments.of(x_ND), x_ND.double().numpy())
    assert torch.equal(x_ND, before)


@given(tables())
def test_moments_are_those_of_numpy(x_ND: np.ndarray) -> None:
    found = of(x_ND)
    assert_moments_of(found, x_ND)
    assert found.largest == (np.abs(x_ND).max() if len(x_ND) else 0.0)


@every_device
@given(tables(), st.data())
def test_packed_moments_of_classes_are_those_of_their_rows(
    device: torch.device, x_ND: np.ndarray, data: st.DataObject
) -> None:
    class_N = data.draw(hnp.arrays(np.int64, len(x_ND), elements=st.integers(0, 2)))
    found_XK = packed(torch.from_numpy(x_ND).to(device), torch.from_numpy(class_N).to(device), 3)
    assert found_XK.device.type == device.type
    for index, found_K in enumerate(found_XK.cpu().numpy()):
        found, rows_ND = Moments.unpack(found_K), x_ND[class_N == index]
        assert_moments_of(found, rows_ND)
        assert found.largest == (np.abs(rows_ND).max() if len(rows_ND) else 0.0)
        assert np.array_equal(found.norms_H, of(rows_ND).norms_H)


@given(tables_and_parts())
def test_merged_parts_have_the_moments_of_the_whole(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    x_ND, parts = case
    found = merged(parts)
    assert_moments_of(found, x_ND)
    assert found.largest == of(x_ND).largest
    assert np.array_equal(found.norms_H, of(x_ND).norms_H)


@given(tables_and_parts())
def test_without_is_the_inverse_of_merge(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    x_ND, parts = case
    power = float((x_ND.astype(np.float64) ** 2).sum()) * (1 + len(x_ND))
    for index, part in enumerate(parts):
        rest = np.concatenate([*parts[:index], *parts[index + 1 :], x_ND[:0]])
        found = of(x_ND).without(of(part))
        assert_moments_of(found, rest, power)
        assert found.largest >= of(rest).largest
        assert np.array_equal(found.norms_H, of(rest).norms_H)


@given(tables())
def test_merge_with_nothing_and_without_nothing_change_no_count_or_histogram(x_ND: np.ndarray) -> None:
    nothing, found = Moments.empty(x_ND.shape[1]), of(x_ND)
    for same in (found.merge(nothing), nothing.merge(found), found.without(nothing)):
        assert_moments_of(same, x_ND)
    assert found.without(found).pack().tolist() == nothing.pack().tolist()


def test_a_large_mean_does_not_drown_a_small_variance() -> None:
    x_ND = 1e8 + np.array([[0.0], [1.0], [2.0], [3.0]])
    assert merged([x_ND[:1], x_ND[1:]]).m2_D.tolist() == pytest.approx([5.0], abs=1e-6)


def test_merging_changes_neither_part() -> None:
    a, b = of(np.array([[1.0], [2.0]])), of(np.array([[7.0]]))
    before = a.pack().tobytes(), b.pack().tobytes()
    a.merge(b).mean_D[:] = 0.0
    a.without(of(np.array([[1.0]])))
    assert (a.pack().tobytes(), b.pack().tobytes()) == before


# --- packing --------------------------------------------------------------------------------------------------------


@given(tables())
def test_packing_and_unpacking_is_exact(x_ND: np.ndarray) -> None:
    found = of(x_ND)
    packed = found.pack()
    assert packed.dtype == np.float64
    assert Moments.unpack(packed).pack().tobytes() == packed.tobytes()
    fields = packed_fields(x_ND.shape[1])
    assert max(stop for _, stop in fields.values()) == len(packed)
    unpacked = {name: packed[start:stop].tolist() for name, (start, stop) in fields.items()}
    assert unpacked == {
        "count": [found.count],
        "largest": [found.largest],
        "mean": found.mean_D.tolist(),
        "m2": found.m2_D.tolist(),
        "norm_histogram": found.norms_H.tolist(),
    }


def test_unpacked_moments_do_not_share_memory_with_the_packed_vector() -> None:
    packed = of(np.ones((2, 2))).pack()
    Moments.unpack(packed).mean_D[:] = 9.0
    assert packed[2:4].tolist() == [1.0, 1.0]


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "bin_"),
    [(0.0, 0), (2.0**-20, 0), (2.0**-16, 0), (2.0**-15, 16), (1.0, 256), (2.0**31.999, BINS - 1), (2.0**40, BINS - 1)],
)
def test_a_norm_falls_into_its_bin_and_the_outer_bins_take_the_rest(norm: float, bin_: int) -> None:
    assert np.flatnonzero(of(np.array([[norm]])).norms_H).tolist() == [bin_]


@given(st.lists(st.floats(2.0**-15, 2.0**30), min_size=1, max_size=20), st.floats(0.0, 1.0))
def test_a_quantile_of_norms_is_right_to_the_width_of_a_bin(norms: list[float], q: float) -> None:
    found = of(np.array(norms)[:, None]).norm_quantile(q)
    ranks = [math.ceil(q * len(norms) + nudge) - 1 for nudge in (-1e-9, 1e-9)]
    exact = [sorted(norms)[min(max(rank, 0), len(norms) - 1)] for rank in ranks]
    assert min(exact) / BIN / (1 + 1e-9) <= found <= max(exact) * BIN * (1 + 1e-9)


@given(st.lists(st.floats(2.0**-15, 2.0**30), min_size=1, max_size=20), st.lists(st.floats(0.0, 1.0), min_size=2))
def test_quantiles_of_norms_rise_with_q(norms: list[float], qs: list[float]) -> None:
    moments = of(np.array(norms)[:, None])
    found = [moments.norm_quantile(q) for q in sorted(qs)]
    assert found == sorted(found)


# --- classes --------------------------------------------------------------------------------------------------------


def test_there_are_eight_classes_with_these_names() -> None:
    kinds = ("ordinary", "special", "first", "sink")
    assert tuple(f"{kind}/{split}" for kind in kinds for split in ("train", "held_out")) == CLASSES


def test_a_row_counts_as_special_else_first_else_sink_else_ordinary() -> None:
    rows = np.array(list(itertools.product([False, True], repeat=4)))
    found = [CLASSES[index] for index in class_of(*rows.T)]
    expected = [
        f"{'special' if special else 'first' if first else 'sink' if sink else 'ordinary'}/{SPLITS[held_out]}"
        for special, first, sink, held_out in rows.tolist()
    ]
    assert found == expected


def test_no_rows_have_no_class() -> None:
    nothing = np.zeros(0, bool)
    assert class_of(nothing, nothing, nothing, nothing).shape == (0,)
    assert len(KINDS) * len(SPLITS) == len(CLASSES)
