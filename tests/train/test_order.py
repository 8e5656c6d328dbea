"""The order of rows: promises over all cases, and tiny exact numbers."""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.errors import StoreError
from train import order as orders_of
from train.order import (
    FileOrder,
    Groups,
    Order,
    Stream,
    default_window_blocks,
    group_starts,
    own_block,
    own_document,
)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any small order: filters that empty blocks, ragged last blocks, windows larger than the store."""
    kept = draw(st.lists(st.booleans(), min_size=1, max_size=120).filter(any))
    if draw(st.booleans()):  # long runs, which empty whole blocks and windows
        kept = np.repeat(kept, draw(st.integers(1, 6))).tolist()
    return Order(np.array(kept), draw(st.integers(1, 17)), draw(st.integers(1, 9)), draw(st.integers(-5, 2**70)))


@st.composite
def segments(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Kept rows, mostly in runs, and the borders of segments of any length."""
    rng, n = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(1, 150))
    edges = np.cumsum(rng.integers(1, draw(st.integers(2, 40)), n))
    return rng.random(n) < draw(st.sampled_from([0.5, 0.9, 1.0])), np.array([0, *edges[edges < n], n])


@st.composite
def streams(draw: st.DrawFn) -> tuple[Stream, int]:
    """Any small stream, and what its batches are multiples of."""
    if draw(st.booleans()):
        (kept_N, edges), length = draw(segments()), draw(st.integers(2, 9))
        kept_N = group_starts(kept_N, edges, length)
    else:
        kept_N, length = draw(orders()).kept_N, 1
    assume(kept_N.any())
    block_rows, window = draw(st.integers(1, 17)), draw(st.integers(1, 9))
    one = Order(kept_N, block_rows, window, 3) if draw(st.booleans()) else FileOrder(kept_N, block_rows, window)
    return (one if length == 1 else Groups(one, length)), length


@pytest.mark.parametrize("position", [0, 7, 15, 19, 20, 36])
def test_the_next_window_is_at_hand_when_it_was_prepared(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, order = (Order(np.ones(20, bool), block_rows=2, window_blocks=4, seed=0) for _ in range(2))
    behind = next(start for start in (8, 16, 20, 28, 36, 40) if start > position)  # windows of 8, 8 and 4 rows
    Groups(order, 1).prepare(position)  # which asks its firsts
    expected = fresh.rows(behind, behind + 4)
    monkeypatch.setattr(orders_of, "permuted", lambda key, numbers: pytest.fail("it was not prepared"))
    assert np.array_equal(order.rows(behind, behind + 4), expected)


def test_the_order_of_a_small_store_is_frozen() -> None:
    # Recorded when the order was written: a change here changes what every resumed run reads next.
    order = Order(np.ones(10, bool), block_rows=2, window_blocks=2, seed=0)
    assert order.rows(0, 10).tolist() == [3, 1, 0, 2, 5, 8, 4, 9, 6, 7]
    assert order.rows(10, 20).tolist() == [7, 0, 6, 1, 5, 8, 9, 4, 3, 2]


@given(orders(), st.integers(0, 3))
@settings(deadline=None)
def test_every_kept_row_appears_once_per_epoch(order: Order, epoch: int) -> None:
    rows = order.rows(epoch * order.kept, (epoch + 1) * order.kept)
    assert np.array_equal(np.sort(rows), np.flatnonzero(order.kept_N))
    assert rows.dtype == np.int64


def test_every_epoch_has_another_order() -> None:
    order = Order(np.ones(50, bool), block_rows=4, window_blocks=3, seed=0)
    epochs = {tuple(order.rows(50 * epoch, 50 * (epoch + 1)).tolist()) for epoch in range(6)}
    assert len(epochs) == 6


def test_every_seed_has_another_order() -> None:
    streams = {tuple(Order(np.ones(50, bool), 4, 3, seed).rows(0, 50).tolist()) for seed in (-1, 0, 1, 2, 2**32)}
    assert len(streams) == 5


@given(orders(), st.integers(1, 80), st.integers(0, 8))
@settings(deadline=None)
def test_a_step_reached_directly_equals_running_to_it(order: Order, batch: int, step: int) -> None:
    fresh = Order(order.kept_N, order.block_rows, order.window_blocks, order.seed)
    ran = [order.step(s, batch) for s in range(step + 1)]
    assert np.array_equal(ran[-1], fresh.step(step, batch))
    assert np.array_equal(np.concatenate(ran), fresh.rows(0, (step + 1) * batch))


@given(orders(), st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_share_a_step_of_their_joint_size(order: Order, batch: int, step: int, world: int) -> None:
    ranks = [order.step(step, batch, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(ranks), order.step(step, batch * world))


@given(orders(), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_are_disjoint_within_an_epoch(order: Order, world: int) -> None:
    batch = order.kept // world
    rows = np.concatenate([order.step(0, batch, rank, world) for rank in range(world)])
    assert len(np.unique(rows)) == batch * world


def test_a_batch_larger_than_an_epoch_holds_every_row_as_often_as_it_has_epochs() -> None:
    order = Order(np.array([True, False, True, True]), block_rows=1, window_blocks=1, seed=3)
    assert Counter(order.step(0, 9).tolist()) == {0: 3, 2: 3, 3: 3}
    assert [order.epoch(position) for position in (0, 2, 3, 9)] == [0, 0, 1, 3]


def test_rows_of_a_window_come_from_its_blocks_only() -> None:
    order = Order(np.ones(100, bool), block_rows=5, window_blocks=4, seed=1)
    assert [len(set((order.rows(start, start + 20) // 5).tolist())) for start in range(0, 100, 20)] == [4] * 5


def test_nothing_kept_is_an_error_that_says_so() -> None:
    for empty in (np.zeros(4, bool), np.zeros(0, bool)):
        with pytest.raises(StoreError, match="0 of"):
            Order(empty, 2, 2, 0)


@given(orders(), st.integers(0, 150), st.integers(0, 9))
@settings(deadline=None)
def test_a_sample_is_of_distinct_kept_rows_in_file_order(order: Order, n: int, seed: int) -> None:
    rows = order.sample(n, seed)
    assert len(rows) == min(n, order.kept) and rows.dtype == np.int64
    assert (np.diff(rows) > 0).all() and order.kept_N[rows].all()
    assert np.array_equal(rows, order.sample(n, seed))


def test_a_sample_draws_every_kept_row_equally_often() -> None:
    kept_N = np.arange(1000) % 10 != 0
    order = Order(kept_N, block_rows=7, window_blocks=3, seed=0)
    counts = np.zeros(1000)
    for seed in range(300):
        counts[order.sample(90, seed)] += 1
    assert counts[~kept_N].sum() == 0
    assert abs(counts[kept_N].mean() - 30) < 1e-9 and abs(counts[kept_N].std() - np.sqrt(300 * 0.1 * 0.9)) < 1.0


@given(streams(), st.integers(0, 8), st.integers(1, 20), st.data())
@settings(deadline=None)
def test_what_is_read_a_window_around_the_front_holds_every_row_of_a_batch(
    stream: tuple[Stream, int], step: int, units: int, data: st.DataObject
) -> None:
    line, length = stream
    batch = units * length
    rows = line.served(step, batch)
    first, last = line.front(step * batch), line.front(step * batch + batch - 1)
    assert line.opened(step * batch) <= first <= last <= line.front((step + 1) * batch)
    read = np.zeros(len(line.kept_N) + 1, int)
    for begin in (line.opened(step * batch), max(first - line.window_blocks, 0)):
        read[:] = 0
        for start, count in zip(*line.reads(begin, last + line.window_blocks), strict=True):
            read[start : start + count] += 1
        assert len(rows) == 0 or read[rows].min() > 0


@given(orders(), st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_of_the_line_whole_blocks_are_read_but_those_that_keep_nothing(order: Order, start: int, count: int) -> None:
    starts, rows = order.reads(start, start + count)
    line = order.starts(start, start + count).tolist()
    kept = [at for at in line if order.kept_N[at : at + order.block_rows].any()]
    assert starts.tolist() == kept and set(rows.tolist()) <= {order.block_rows}


@given(orders(), st.integers(1, 50), st.integers(1, 3))
@settings(deadline=None)
def test_the_file_order_has_every_kept_row_once_as_the_store_has_them(order: Order, batch: int, world: int) -> None:
    line = FileOrder(order.kept_N, order.block_rows, 8)
    served = [line.served(step, batch).tolist() for step in range(line.steps(batch))]
    assert list(itertools.chain(*served)) == np.flatnonzero(order.kept_N).tolist()
    assert {len(rows) for rows in served[:-1]} <= {batch} and 0 < len(served[-1]) <= batch
    assert line.served(line.steps(batch), batch).tolist() == []
    ranks = [line.served(0, batch, rank, world).tolist() for rank in range(world)]
    assert list(itertools.chain(*ranks)) == line.served(0, batch * world).tolist()


def test_groups_are_cut_from_runs_of_kept_rows_in_one_segment() -> None:
    kept_N = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1], bool)
    edges = np.array([0, 6, 13])  # rows 4 and 5 are of one segment, rows 6 to 10 of the next
    assert np.flatnonzero(group_starts(kept_N, edges, 2)).tolist() == [0, 4, 6, 8]
    assert np.flatnonzero(group_starts(kept_N, edges, 3)).tolist() == [0, 6]
    assert np.flatnonzero(group_starts(kept_N, edges, 1)).tolist() == np.flatnonzero(kept_N).tolist()
    assert not group_starts(kept_N, edges, 6).any()


@given(segments(), st.integers(1, 9))
@settings(deadline=None)
def test_groups_are_those_that_walking_along_the_rows_finds(made: tuple[np.ndarray, np.ndarray], length: int) -> None:
    kept_N, edges = made
    expected, run = [], 0
    for row in range(len(kept_N)):
        run = (1 if row in edges else run + 1) if kept_N[row] else 0
        if run and run % length == 0:
            expected.append(row + 1 - length)
    assert np.flatnonzero(group_starts(kept_N, edges, length)).tolist() == expected


@given(segments(), st.integers(2, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 3))
@settings(deadline=None)
def test_every_group_comes_once_an_epoch_whole_and_any_step_can_be_reached_directly(
    made: tuple[np.ndarray, np.ndarray], length: int, block_rows: int, window: int, groups: int, world: int
) -> None:
    firsts_N = group_starts(*made, length)
    assume(firsts_N.any())
    firsts = Order(firsts_N, block_rows, window, seed=5)
    line, fresh = (Groups(Order(firsts_N, block_rows, window, seed=5), length) for _ in range(2))
    steps = -(-3 * firsts.kept // groups)
    seen = []
    for step in range(steps):
        rows = line.served(step, groups * length).reshape(groups, length)
        assert (np.diff(rows, axis=1) == 1).all() and (np.diff(rows[:, 0]) >= 0).all()
        assert sorted(firsts.step(step, groups).tolist()) == rows[:, 0].tolist()
        seen += rows[:, 0].tolist()
    assert np.array_equal(line.served(steps - 1, groups * length), fresh.served(steps - 1, groups * length))
    if steps * groups == 3 * firsts.kept:
        assert Counter(seen) == dict.fromkeys(np.flatnonzero(firsts_N).tolist(), 3)
    ranks = [line.served(1, groups * length, rank, world)[::length] for rank in range(world)]
    assert sorted(np.concatenate(ranks)) == line.served(1, groups * length * world)[::length].tolist()


@given(segments(), st.integers(2, 30), st.integers(1, 20), st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_a_block_is_read_as_far_as_its_last_group_reaches(
    made: tuple[np.ndarray, np.ndarray], length: int, block_rows: int, window: int, shuffled: bool
) -> None:
    firsts_N = group_starts(*made, length)
    assume(firsts_N.any())
    firsts = Order(firsts_N, block_rows, window, 1) if shuffled else FileOrder(firsts_N, block_rows, window)
    found = Groups(firsts, length).reads(0, firsts.blocks)
    expected = []
    for start in firsts.reads(0, firsts.blocks)[0].tolist():
        begins = np.flatnonzero(firsts_N[start : start + block_rows])
        stop = max(min(start + block_rows, len(firsts_N)), start + int(begins[-1]) + length)
        expected.append((start, stop - start))
    assert list(zip(*(one.tolist() for one in found), strict=True)) == expected
    assert len(expected) <= firsts.blocks


def test_groups_are_shuffled_and_every_epoch_in_another_way() -> None:
    line = Groups(Order(np.arange(90) % 3 == 0, block_rows=9, window_blocks=4, seed=0), 3)
    epochs = [[int(line.served(30 * epoch + step, 3)[0]) for step in range(30)] for epoch in range(3)]
    assert all(sorted(one) == list(range(0, 90, 3)) for one in epochs)
    assert len({tuple(one) for one in [*epochs, sorted(epochs[0])]}) == 4


@given(orders(), st.integers(0, 400), st.integers(1, 50))
@settings(deadline=None)
def test_the_front_has_the_blocks_of_the_stream_open(order: Order, position: int, batch: int) -> None:
    front = order.front(position)
    assert front <= order.front(position + batch)
    reach = order.starts(max(front - order.window_blocks, 0), front + order.window_blocks)
    assert (order.rows(position, position + 1) // order.block_rows * order.block_rows)[0] in reach


@given(orders())
@settings(deadline=None)
def test_the_line_of_blocks_holds_every_block_once_per_epoch(order: Order) -> None:
    starts = order.starts(order.blocks, 2 * order.blocks)
    assert sorted(starts.tolist()) == list(range(0, len(order.kept_N), order.block_rows))


@given(st.integers(1, 10**6), st.integers(1, 10**4))
@settings(deadline=None)
def test_the_default_window_keeps_companions_under_a_half(batch: int, block_rows: int) -> None:
    window = default_window_blocks(batch)
    assert batch * block_rows / (window * block_rows) < 0.5
    assert batch * block_rows / ((window - 1) * block_rows) >= 0.5


@pytest.mark.parametrize(("block_rows", "window_blocks", "batch"), [(32, 64, 64), (16, 128, 256), (50, 80, 40)])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_a_row_finds_as_many_of_its_own_block_as_the_formula_says(
    block_rows: int, window_blocks: int, batch: int, share: float
) -> None:
    kept_N = np.random.default_rng(0).random(block_rows * window_blocks * 4) < share
    order = Order(kept_N, block_rows, window_blocks, seed=0)
    found = []
    for step in range(20 * order.kept // batch):
        if order.opened(step * batch) == order.opened((step + 1) * batch - 1):  # the formula is for one window
            _, counts = np.unique(order.step(step, batch) // block_rows, return_counts=True)
            found.append((counts * (counts - 1)).sum() / batch)
    assert np.mean(found) == pytest.approx(own_block(order, batch), rel=0.1)
    if share == 1:
        assert own_block(order, batch) == pytest.approx(batch / window_blocks, rel=0.1)


@given(orders(), st.data())
@settings(deadline=None)
def test_the_open_window_begins_at_its_first_block_and_holds_the_row_at_the_position(
    order: Order, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, 3 * order.kept))
    opened, front = order.opened(position), order.front(position)
    assert opened <= front
    assert opened % order.blocks % order.window_blocks == 0
    window = order.starts(opened, min(opened + order.window_blocks, (order.epoch(position) + 1) * order.blocks))
    assert (order.rows(position, position + 1) // order.block_rows * order.block_rows)[0] in window


@pytest.mark.parametrize(("window_blocks", "batch"), [(8, 60), (25, 100), (100, 64)])
def test_own_document_is_what_batches_show_for_documents_of_any_length(window_blocks: int, batch: int) -> None:
    chance = np.random.default_rng(0)
    starts = np.cumsum([0, *chance.integers(1, 90, 70)])
    rows = 1600
    starts = starts[starts < rows]
    order = Order(chance.random(rows) < 0.7, 16, window_blocks, seed=0)
    document_N = np.searchsorted(starts, np.arange(rows), side="right")
    found = []
    for step in range(150 * order.kept // batch):
        if order.opened(step * batch) == order.opened((step + 1) * batch - 1):  # the formula is for one window
            _, counts = np.unique(document_N[order.step(step, batch)], return_counts=True)
            found.append((counts * (counts - 1)).sum() / batch)
    assert np.mean(found) == pytest.approx(own_document(order, starts, batch), rel=0.05)


DOCUMENTS, LENGTH = 2000, 100


def shuffled(seed: int = 0) -> tuple[Order, int]:
    """An order over 2,000 documents of a block each, 5 % of the rows in a window; and a batch."""
    return Order(np.ones(DOCUMENTS * LENGTH, bool), LENGTH, DOCUMENTS // 20, seed), 512


def histograms(rows: Iterable[np.ndarray]) -> np.ndarray:
    """How many rows of each document every batch has, [batches, documents]."""
    return np.stack([np.bincount(one // LENGTH, minlength=DOCUMENTS) for one in rows])


def test_a_row_meets_as_many_rows_of_its_document_as_the_formula_says() -> None:
    order, batch = shuffled()
    counts = histograms(order.step(step, batch) for step in range(order.kept // batch))
    found = (counts * (counts - 1)).sum() / counts.sum()
    assert found == pytest.approx(batch * order.block_rows / order.window_rows, rel=0.1)


def test_every_batch_is_a_draw_of_its_window_and_its_neighbour_tells_nothing_of_it() -> None:
    """Counts of documents vary as those of a draw without replacement (hypergeometric), in one batch and from batch to
    batch. Rows in file order do neither."""
    order, batch = shuffled()
    inside, blocks, rows = order.window_rows // batch, order.window_blocks, order.window_rows
    share = 1 / blocks  # a document is a block here
    variance = batch * share * (1 - share) * (rows - batch) / (rows - 1)

    def spread(counts: np.ndarray) -> tuple[float, float]:
        """The variance of the counts over that of a draw, and their correlation with those of the batch before."""
        off = counts - batch * share
        return float((off**2).mean() / variance), float((off[1:] * off[:-1]).mean() / (off**2).mean())

    found = [
        spread(histograms(made.step(step, batch) for step in range(inside))[:, made.starts(0, blocks) // LENGTH])
        for made in (shuffled(seed)[0] for seed in range(5))
    ]
    assert np.mean(found, 0) == pytest.approx((1.0, -batch / (rows - batch)), abs=0.05)
    in_file_order = histograms(np.arange(n * batch, (n + 1) * batch) for n in range(inside))[:, :blocks]
    assert spread(in_file_order)[0] > 10
