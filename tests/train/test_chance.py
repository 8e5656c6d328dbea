"""Keyed random numbers: published ones, and what every permutation and every draw must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import chance
from train.chance import SHARE, drawn, keyed, normal, permutation, permuted, splitmix64, weighted


def test_splitmix64_gives_the_numbers_of_its_reference() -> None:
    # splitmix64.c by S. Vigna, seed 1234567: the first five outputs, as published at
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, np.arange(5)).tolist() == expected


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2**40))
@settings(deadline=None)
def test_so_many_are_drawn_and_fewer_of_the_same(n: int, total: int, seed: int) -> None:
    n = min(n, total)
    mask = drawn(n, total, seed)
    assert mask.dtype == bool and len(mask) == total and mask.sum() == n
    assert not (drawn(n // 2, total, seed) & ~mask).any()


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_the_smallest_numbers_are_drawn_whatever_the_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chance, "PIECE", piece)
    numbers = splitmix64(keyed(3, SHARE), np.arange(1000))
    for n in (1, 2, 500, 999):
        assert np.array_equal(np.flatnonzero(drawn(n, 1000, 3)), np.sort(np.argsort(numbers)[:n]))


def test_what_is_drawn_is_spread_evenly() -> None:
    mask = drawn(30_000, 100_000, seed=0)
    tenths = mask.reshape(10, 10_000).sum(1)  # 46 is the standard deviation of each
    assert np.abs(tenths - 3000).max() < 230 and abs(int(mask[::2].sum()) - 15_000) < 370
    assert abs(int((mask[1:] & mask[:-1]).sum()) - 9000) < 400  # neighbours know nothing of each other


def test_another_seed_draws_others() -> None:
    assert len({drawn(50, 100, seed).tobytes() for seed in range(5)}) == 5


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
@settings(deadline=None)
def test_a_permutation_holds_every_number_once(key: int, n: int) -> None:
    assert sorted(permutation(key, n).tolist()) == list(range(n))


def test_any_numbers_are_permuted_evenly() -> None:
    numbers = np.random.default_rng(0).choice(10**12, 5000, replace=False)
    found = permuted(7, numbers)
    assert np.array_equal(np.sort(found), np.sort(numbers))
    place = np.argsort(found)[np.argsort(np.argsort(numbers))]  # where each has gone
    assert np.array_equal(found[place], numbers)
    assert abs(np.corrcoef(place, np.arange(5000))[0, 1]) < 0.05  # 0.014 is the standard deviation
    assert abs(np.corrcoef(place, numbers)[0, 1]) < 0.05


def test_weights_decide_how_often_a_number_is_drawn_first() -> None:
    weight_N = np.array([0.0, 1.0, 2.0, 5.0])
    firsts = np.bincount([weighted(keyed(7, n), weight_N, 1)[0] for n in range(8000)], minlength=4) / 8000
    assert np.abs(firsts - weight_N / 8).max() < 0.02  # 0.0056 is the largest standard deviation


def test_a_number_is_drawn_once_unless_more_are_asked_for_than_there_are() -> None:
    weight_N = np.array([0.0, 1.0, 0.0, 3.0, 1e-9])
    assert sorted(weighted(1, weight_N, 3)) == [1, 3, 4]
    assert sorted(weighted(1, weight_N, 6)) == [1, 1, 3, 3, 4, 4]
    assert sorted(weighted(1, np.zeros(3), 3)) == [0, 1, 2]
    assert len(weighted(1, weight_N, 0)) == 0
    assert weighted(5, np.ones(1000), 9).tolist() == weighted(5, np.ones(1000), 9).tolist()


def test_normal_numbers_have_the_moments_of_the_normal_distribution_and_no_memory() -> None:
    drawn = normal(3, np.arange(200_000))
    moments = [float((drawn**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.01
    assert np.array_equal(normal(3, np.arange(500, 600)), drawn[500:600])
    assert abs(np.corrcoef(normal(4, np.arange(200_000)), drawn)[0, 1]) < 0.01
