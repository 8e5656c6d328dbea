"""fp16 without faith: what it holds is exact, what it cannot hold is flagged.

Letters: N rows, D width.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harvest.cast import calibrated, cast, difference, factor_for
from shared.flags import CLIPPED, MASKED, SINK

FP16_MAX = 65_504.0
FP16, BF16 = torch.float16, torch.bfloat16


def bf16() -> Tensor:
    """Every finite bf16 value >= 0."""
    return torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def faults(x_ND: Tensor, factor: float = 1.0, sink_norm: float = math.inf) -> list[int]:
    return list(cast(x_ND, factor, sink_norm).faults_N.tolist())


# --- the factor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "factor"),
    [
        (0.0, 1.0), (1e-40, 1.0), (1.0, 1.0), (16_376.0, 1.0), (16_377.0, 2.0), (32_752.0, 2.0), (32_753.0, 4.0),
        (65_504.0, 4.0), (88_064.0, 8.0), (131_008.0, 8.0), (131_009.0, 16.0), (696_320.0, 64.0), (3e38, 2.0**114),
    ],
)  # fmt: skip
def test_the_factor_is_the_smallest_power_of_two_with_fourfold_headroom(largest: float, factor: float) -> None:
    assert factor_for(largest, FP16) == factor


@pytest.mark.parametrize("power", range(40))
def test_the_factor_is_exact_at_its_boundaries_in_fp32(power: int) -> None:
    boundary = np.float32(16_376 * 2.0**power)
    assert factor_for(float(boundary), FP16) == 2.0**power
    assert factor_for(float(np.nextafter(boundary, np.float32(np.inf))), FP16) == 2.0 ** (power + 1)


@given(st.floats(0, 3.4028234663852886e38, width=32))
def test_whatever_was_seen_fits_four_times_and_not_with_a_smaller_factor(largest: float) -> None:
    factor = factor_for(largest, FP16)
    assert math.log2(factor).is_integer()
    assert factor >= 1
    assert 4 * largest / factor <= FP16_MAX
    assert factor == 1 or 4 * largest / (factor / 2) > FP16_MAX


# --- the rows -------------------------------------------------------------------------------------------------------


def test_a_large_value_fits_with_its_factor_and_is_clipped_and_flagged_without() -> None:
    x_ND = torch.tensor([[7e5, -1.0], [3.0, 4.0], [-7e5, 2.0]])
    fits = cast(x_ND, factor_for(7e5, FP16), math.inf)
    assert fits.values_ND.tolist() == [[10_936.0, -0.015625], [0.046875, 0.0625], [-10_936.0, 0.03125]]
    assert fits.faults_N.tolist() == [0, 0, 0]
    clipped = cast(x_ND, 1.0, math.inf)
    assert clipped.values_ND.tolist() == [[65_504.0, -1.0], [3.0, 4.0], [-65_504.0, 2.0]]
    assert clipped.faults_N.tolist() == [CLIPPED, 0, CLIPPED]
    assert clipped.x_ND.tolist() == x_ND.tolist()  # moments and norms see the value itself
    assert clipped.norms_N.tolist() == pytest.approx([math.hypot(7e5, 1), 5.0, math.hypot(7e5, 2)])


def test_the_largest_value_of_fp16_is_not_clipped_and_the_next_is() -> None:
    above = float(np.nextafter(np.float32(FP16_MAX), np.float32(np.inf)))
    assert faults(torch.tensor([[FP16_MAX], [above], [65_519.0], [1e30]])) == [0, CLIPPED, CLIPPED, CLIPPED]
    assert faults(torch.tensor([[2 * FP16_MAX], [2 * above]]), factor=2.0) == [0, CLIPPED]
    assert torch.isfinite(cast(torch.full((1, 3), 3e38), 1.0, math.inf).values_ND).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_zeroed_and_flagged_and_others_are_left_alone(bad: float) -> None:
    done = cast(torch.tensor([[1.0, 2.0], [1.0, bad], [bad, bad]]), 2.0, 0.5)
    assert done.faults_N.tolist() == [SINK, MASKED, MASKED]
    assert done.values_ND.tolist() == [[0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert done.x_ND.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert done.norms_N.tolist() == pytest.approx([math.sqrt(5), 0.0, 0.0])


def test_a_sink_is_a_row_whose_norm_is_above_the_bound() -> None:
    assert faults(torch.tensor([[3.0, 4.0], [3.0, 4.1], [30.0, 40.0]]), factor=8.0, sink_norm=5.0) == [0, SINK, SINK]
    assert faults(torch.tensor([[1e6, 0.0]]), sink_norm=5.0) == [SINK | CLIPPED]


def test_every_bf16_value_that_fp16_spans_is_held_exactly() -> None:
    x_N = bf16()
    exact_N = x_N[(x_N.float() >= 2.0**-14) & (x_N.float() <= FP16_MAX)]
    assert len(exact_N) == 30 * 128 == 3840
    for sign in (1, -1):
        done = cast(sign * exact_N[:, None], 1.0, math.inf)
        assert torch.equal(done.values_ND.float(), sign * exact_N.float()[:, None])
        assert not done.faults_N.any()


@pytest.mark.parametrize("factor", [2.0, 16.0, 64.0])
def test_division_by_a_power_of_two_moves_that_span_and_loses_nothing(factor: float) -> None:
    x_N = bf16()
    exact_N = x_N[(x_N.float() >= factor * 2.0**-14) & (x_N.float() <= factor * FP16_MAX)]
    done = cast(exact_N[:, None], factor, math.inf)
    assert torch.equal(done.values_ND.float() * factor, exact_N.float()[:, None])


@given(st.lists(st.floats(-60_000, 60_000, width=32), min_size=1, max_size=5), st.integers(0, 8))
def test_un_scaled_values_are_the_models_own_to_fp16_rounding(values: list[float], power: int) -> None:
    done = cast(torch.tensor([values]), 2.0**power, math.inf)
    restored_D = done.values_ND[0].double() * 2.0**power
    for value, restored in zip(values, restored_D.tolist(), strict=True):
        assert abs(restored - value) <= max(abs(value) * 2.0**-11, 2.0 ** (power - 25))


def test_the_rows_that_are_given_are_not_changed() -> None:
    x_ND = torch.tensor([[1e6, math.nan], [1e6, 2.0]])
    before = x_ND.clone()
    cast(x_ND, 1.0, 1.0)
    assert torch.equal(x_ND[1], before[1])
    assert torch.equal(x_ND.isnan(), before.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_taken_in_fp32_whatever_the_models_dtype(dtype: torch.dtype) -> None:
    done = cast(torch.full((1, 2304), 2000.0, dtype=dtype), 1.0, math.inf)  # its fp16 norm is infinite
    assert done.norms_N.dtype == torch.float32
    assert done.norms_N.tolist() == pytest.approx([96_000.0])
    assert done.values_ND.dtype == torch.float16


def test_what_falls_below_the_smallest_normal_number_is_counted_and_zeros_are_not() -> None:
    smallest = 2.0**-14
    x_ND = torch.tensor([[smallest, smallest * 0.999, 0.0], [-(2.0**-24), 1e-9, -1.0]])
    done = cast(x_ND, 1.0, math.inf)
    assert done.subnormal == 3
    assert done.values_ND.tolist()[1][:2] == [-(2.0**-24), 0.0]  # the last one is lost
    assert cast(x_ND, 2.0, math.inf).subnormal == 4
    assert cast(x_ND, 1.0, math.inf, BF16).subnormal == 0
    assert cast(torch.tensor([[2.0**-126, 1e-39]]), 1.0, math.inf, BF16).subnormal == 1


def test_as_bfloat16_no_model_value_is_scaled_or_clipped() -> None:
    assert factor_for(696_320.0, BF16) == factor_for(8e37, BF16) == 1.0
    x_N = bf16()
    done = cast(x_N[:, None], 1.0, math.inf, BF16)
    assert torch.equal(done.values_ND[:, 0], x_N) and done.values_ND.dtype == BF16
    assert not done.faults_N.any()
    beyond = cast(
        torch.tensor([[3.4e38], [-3.4e38]]), 1.0, math.inf, BF16
    )  # fp32 holds it, bfloat16 would round to inf
    assert beyond.faults_N.tolist() == [CLIPPED, CLIPPED]
    assert beyond.values_ND.abs().float().tolist() == [[torch.finfo(BF16).max]] * 2


# --- the calibration ------------------------------------------------------------------------------------------------


def test_the_calibration_takes_the_median_of_the_norms_that_are_not_zero() -> None:
    norms = [torch.tensor([0.0, 3.0]), torch.tensor([1.0, 500.0, 2.0, 0.0])]
    assert calibrated(norms, 70_000.0, 0.01, FP16) == {
        "factor": 8.0, "largest": 70_000.0, "median_norm": 2.0, "sink_norm": 20.0, "tolerance": 0.08,
    }  # fmt: skip


def test_rows_that_are_all_zero_give_a_scale_that_json_can_hold_and_no_sink() -> None:
    scale = calibrated([torch.zeros(3)], 0.0, 0.0, FP16)
    assert scale["factor"] == 1.0
    assert json.loads(json.dumps(scale, allow_nan=False)) == scale
    assert faults(torch.tensor([[1e6], [1.0]]), 64.0, scale["sink_norm"]) == [0, 0]
    assert scale["tolerance"] == 2**-9  # what fp16 itself rounds, fourfold
    assert calibrated([torch.zeros(3)], 0.0, 0.0, BF16)["tolerance"] == 2**-6


def test_the_difference_of_two_rows_is_relative_to_the_first() -> None:
    x_ND = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    y_ND = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = difference(x_ND, y_ND)
    assert found[:3].tolist() == pytest.approx([0.1, 0.0, 2**0.5])
    assert found[3] > 1e20
