"""What single bits of a store say."""

import numpy as np

from shared import flags


def test_no_two_things_that_are_said_of_a_row_share_a_bit() -> None:
    of_row = [flags.FIRST, flags.BOS, flags.SPECIAL, flags.TEMPLATE]
    roles = 0b111000
    assert sum(of_row) == np.bitwise_or.reduce(of_row) and not sum(of_row) & roles
    assert {flags.role_flag(role) & ~roles for role in flags.ROLES} == {0}
    assert sum([flags.CLIPPED, flags.MASKED, flags.SINK]) == 7


def test_rows_are_counted_under_each_fault_they_have() -> None:
    faults_N = np.array([0, 1, 2, 4, 5, 7], np.uint8)
    assert flags.count_faults(faults_N) == {"clipped": 3, "masked": 2, "sink": 3}


def test_flags_have_words() -> None:
    assert flags.flag_names(0) == []
    assert flags.flag_names(flags.FIRST | flags.BOS | flags.SPECIAL) == ["first", "special"]
    assert flags.flag_names(flags.role_flag("assistant") | flags.TEMPLATE) == ["assistant", "template"]
    assert [flags.flag_names(flags.role_flag(role)) for role in flags.ROLES] == [[role] for role in flags.ROLES]
