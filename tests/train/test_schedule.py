"""Schedules have the values that their points say, and the learning rate starts and ends as promised."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.schedule import Schedule, constant, learning_rate, ramp

counts = st.integers(0, 50)


def test_a_schedule_is_constant_outside_its_points_and_straight_between_them() -> None:
    line = Schedule(((2, 1.0), (4, 3.0), (8, 1.0)))
    assert [line(step) for step in (0, 2, 3, 4, 5, 6, 8, 100)] == [1, 1, 2, 3, 2.5, 2, 1, 1]


def test_a_constant_is_the_same_at_every_step() -> None:
    assert [constant(0.5)(step) for step in (-3, 0, 10**9)] == [0.5] * 3


def test_a_ramp_meets_its_ends_and_one_of_no_steps_is_at_its_stop_at_once() -> None:
    assert [ramp(5, 1, 4)(step) for step in range(7)] == [5, 4, 3, 2, 1, 1, 1]
    assert [ramp(5, 1, 0)(step) for step in range(3)] == [1, 1, 1]


def test_two_points_at_one_step_are_a_jump() -> None:
    jump = Schedule(((0, 1.0), (3, 1.0), (3, 5.0)))
    assert [jump(step) for step in (2, 3, 4)] == [1, 5, 5]


def test_the_rate_warms_up_from_its_first_step_stays_and_decays_to_a_last_step_that_still_learns() -> None:
    rate = learning_rate(1.0, steps=10, warmup=2, decay=4)
    assert [rate(step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_without_warm_up_and_decay_the_rate_is_its_peak_throughout() -> None:
    assert {learning_rate(0.3, 5, 0, 0)(step) for step in range(5)} == {0.3}


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    assert [learning_rate(1.0, 4, 4, 2)(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [learning_rate(1.0, 4, 8, 2)(step) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


@given(steps=st.integers(1, 50), warmup=counts, decay=counts)
def test_the_rate_is_positive_at_most_its_peak_and_its_points_ascend(steps: int, warmup: int, decay: int) -> None:
    rate = learning_rate(2.0, steps, warmup, min(decay, steps))
    assert all(0 < rate(step) <= 2.0 for step in range(steps))
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(rate.points))
    if warmup + decay <= steps and decay > 0:
        assert rate(steps - 1) == pytest.approx(2.0 / max(1, decay)) or warmup == steps
