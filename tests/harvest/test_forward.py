"""The planned batches of a store: every row is made once, from its own token, at its own place.

Letters: B segments of a batch, T positions, N rows, G segments, D width.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harvest.forward import Batch, Batches, reshaped, rows
from shared.store import Store

MODELS = ("llama", "gemma")


def every(store: Store, model: str) -> Iterator[tuple[int, Batch]]:
    batches = Batches(store, model)
    return ((shard, batch) for shard in range(store.shards) for batch in batches.of(shard))


@pytest.mark.parametrize("model", MODELS)
def test_every_row_of_a_shard_is_made_exactly_once(pair: Store, model: str) -> None:
    made: list[list[int]] = [[] for _ in range(pair.shards)]
    for shard, batch in every(pair, model):
        made[shard] += batch.row_N.tolist()
    assert [sorted(numbers) for numbers in made] == [list(pair.rows_of(shard)) for shard in range(pair.shards)]


@pytest.mark.parametrize("model", MODELS)
def test_the_token_at_a_rows_place_is_the_rows_own(pair: Store, model: str) -> None:
    ids, token = pair.column(f"tokens/{model}/id"), pair.column(f"rows/{model}/token")
    for _, batch in every(pair, model):
        assert batch.ids_BT.flatten()[batch.place_N].tolist() == ids[token[batch.row_N]].tolist()
        assert batch.mask_BT.flatten()[batch.place_N].all()


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_holds_whole_segments_padded_on_the_right_within_the_budget(pair: Store, model: str) -> None:
    ids, segment = pair.column(f"tokens/{model}/id"), pair.column(f"tokens/{model}/segment")
    whole = {tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(segment)}
    seen = set()
    for _, batch in every(pair, model):
        lengths_B = batch.mask_BT.sum(1)
        positions_T = torch.arange(batch.ids_BT.shape[1])
        assert torch.equal(batch.mask_BT, (positions_T < lengths_B[:, None]).long())
        assert lengths_B.tolist() == sorted(lengths_B.tolist(), reverse=True)
        assert int(lengths_B[0]) == batch.ids_BT.shape[1]
        assert batch.ids_BT.numel() <= 100 or len(lengths_B) == 1
        seen |= {tuple(row[:n].tolist()) for row, n in zip(batch.ids_BT, lengths_B.tolist(), strict=True)}
    assert seen == whole


def test_batches_for_the_calibration_are_spread_over_the_plan(pair: Store) -> None:
    total = sum(1 for _ in every(pair, "llama"))
    batches = Batches(pair, "llama")
    keys = [batch.row_N.tolist() for _, batch in every(pair, "llama")]

    def places(count: int) -> list[int]:
        return [keys.index(batch.row_N.tolist()) for batch in batches.spread(count)]

    assert places(total + 5) == list(range(total))
    assert places(2) == [0, total - 1]
    assert np.diff(places(4)).min() >= total // 3 - 1


def test_rows_are_taken_from_their_places_under_the_names_of_their_sources(pair: Store) -> None:
    batch = next(Batches(pair, "gemma").of(0))
    place_BTD = torch.arange(batch.ids_BT.numel()).view(*batch.ids_BT.shape, 1).expand(-1, -1, 3)
    asked: dict[str, Tensor] = {}

    def model(**inputs: Any) -> dict[str, Tensor]:
        asked.update(inputs)
        return {"resid.1": place_BTD, "mlp_out.0": -place_BTD}

    found = rows(model, batch, {"resid.1": "late", "mlp_out.0": "early"}, "cpu")
    assert torch.equal(found["late"], batch.place_N[:, None].expand(-1, 3))
    assert torch.equal(found["early"], -found["late"])
    assert asked.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(asked["input_ids"], batch.ids_BT)


@pytest.mark.parametrize("model", MODELS)
def test_a_reshaped_batch_makes_some_of_the_same_rows_in_another_shape(pair: Store, model: str) -> None:
    for _, batch in every(pair, model):
        other = reshaped(batch)
        assert other.ids_BT.shape != batch.ids_BT.shape
        assert 0 < len(other.row_N) <= len(batch.row_N)
        assert other.row_N.tolist() == batch.row_N[: len(other.row_N)].tolist()
        here, there = (one.ids_BT.flatten()[one.place_N[: len(other.row_N)]] for one in (batch, other))
        assert torch.equal(here, there)


def test_the_batches_that_hold_a_row_make_it(pair: Store) -> None:
    batches = Batches(pair, "llama")
    for row in (0, 85, 299):
        shard = row // pair.shard_rows
        (found,) = batches.holding(shard, np.array([row]))
        assert row in found.row_N
