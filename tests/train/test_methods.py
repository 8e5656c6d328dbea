"""What each method keeps of its pre-activations, in exact numbers.

Letters: B rows of a batch, L latents.
"""

from typing import Any

import pytest
import torch

from shared.errors import WiringError
from tests import cases
from train import method as methods
from train.code import Pre
from train.dictionary import Dictionary
from train.methods.matryoshka import group_of
from train.objective import Now
from train.trainer import Trainer
from train.wiring import build

WIRING = build("crosscoder", {"a": 20, "b": 16}, 48)


def trained(name: str, **keys: Any) -> Trainer:
    return cases.trainer("crosscoder", name, method=cases.method(name, **keys))


def pre_of(rows: list[list[float]], dictionary: Dictionary) -> Pre:
    """Pre-activations as given, whatever the rows: latents that are not named are -1."""
    h_BL = torch.full((len(rows), dictionary.latents), -1.0)
    h_BL[:, : len(rows[0])] = torch.tensor(rows)
    pre = dictionary.pre({name: torch.zeros(len(rows), width) for name, width in dictionary.wiring.widths.items()})
    pre.h_BL = h_BL  # type: ignore[misc]
    return pre


def test_the_penalty_of_standard_warms_up() -> None:
    terms = methods.parse({"name": "standard", "l1": 2.0, "l1_warmup": 4}).build(WIRING, 10).terms
    assert [terms[1].weight(step) for step in range(6)] == [0, 0.5, 1, 1.5, 2, 2]
    assert methods.parse({"name": "standard", "l1": 2.0}).build(WIRING, 10).terms[1].weight(0) == 2


def test_topk_ranks_by_code_times_norm_and_keeps_the_code() -> None:
    dictionary = trained("topk", k=2).dictionary
    norm_L = torch.ones(48)
    norm_L[0] = 10.0
    code = dictionary.activation(pre_of([[1.0, 5.0, 4.0, 0.5]], dictionary), norm_L)
    assert code.dense()[0, :5].tolist() == [1.0, 5.0, 0.0, 0.0, 0.0]


def test_topk_keeps_fewer_than_k_where_fewer_are_positive() -> None:
    dictionary = trained("topk", k=3).dictionary
    code = dictionary.activation(pre_of([[2.0, -1.0], [-1.0, -2.0]], dictionary), torch.ones(48))
    assert code.dense()[:, :2].tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert code.fires_L().tolist()[:3] == [1, 0, 0]


def test_batch_topk_shares_its_budget_between_the_rows_while_training() -> None:
    dictionary = trained("batch_topk", k=1).dictionary
    code = dictionary.activation(pre_of([[4.0, 3.0, 2.0], [1.0, 0.5, 0.0]], dictionary), torch.ones(48))
    assert code.dense()[:, :3].tolist() == [[4.0, 3.0, 0.0], [0.0, 0.0, 0.0]]


def test_batch_topk_evaluates_every_row_by_the_threshold_and_alone() -> None:
    dictionary = trained("batch_topk", k=1).dictionary
    norm_L = torch.ones(48)
    rows = [[4.0, 3.0, 2.0], [1.0, 0.5, 0.0]]
    code = dictionary.activation(pre_of(rows, dictionary), norm_L)
    with torch.no_grad():
        dictionary.activation.observe(code, norm_L)
    dictionary.eval()
    both = dictionary.activation(pre_of([[3.5, 3.0, 2.0], [9.0, 8.0, 7.0]], dictionary), norm_L).dense()
    assert both[:, :3].tolist() == [[3.5, 0.0, 0.0], [9.0, 8.0, 7.0]]  # above 3, the smallest that was kept
    alone = dictionary.activation(pre_of([[3.5, 3.0, 2.0]], dictionary), norm_L).dense()
    assert torch.equal(alone[0], both[0])
    norm_L[2] = 2.0
    assert dictionary.activation(pre_of([[3.5, 3.0, 2.0]], dictionary), norm_L).dense()[0, 2] == 2.0  # 2 x 2 > 3


def test_the_threshold_is_the_mean_of_the_smallest_kept_scores_with_weights_that_fade() -> None:
    activation: Any = trained("batch_topk", k=1, threshold_decay=0.5).dictionary.activation
    dictionary = trained("batch_topk").dictionary
    norm_L = torch.full((48,), 2.0)
    assert float(activation.threshold) == 0
    for smallest, expected in ((3.0, 6.0), (1.0, (0.5 * 6 + 2) / 1.5), (-1.0, (0.5 * 6 + 2) / 1.5)):
        code = activation(pre_of([[smallest, -1.0]], dictionary), norm_L)
        with torch.no_grad():
            activation.observe(code, norm_L)
        assert float(activation.threshold) == pytest.approx(expected)  # the third batch has no positive code


def test_batch_topk_without_a_training_step_passes_every_positive_pre_activation() -> None:
    dictionary = trained("batch_topk", k=1).dictionary.eval()
    code = dictionary.activation(pre_of([[4.0, 0.1, -1.0]], dictionary), torch.ones(48))
    assert code.dense()[0, :3].tolist() == pytest.approx([4.0, 0.1, 0.0])


def test_groups_of_a_matryoshka_take_their_share_of_every_span() -> None:
    wiring = build("dedicated", {"a": 20, "b": 16}, 48, {"a": 4, "b": 8})
    group_L = group_of(wiring, [0.25, 0.25, 0.5]).tolist()
    assert group_L == [0, 1, 2, 2] + [0] * 9 + [1] * 9 + [2] * 18 + [0, 0, 1, 1, 2, 2, 2, 2]
    assert group_of(wiring, [1.0]).tolist() == [0] * 48
    assert group_of(build("autoencoder", {"a": 20}, 7), [1 / 3, 1 / 3, 1 / 3]).tolist() == [0, 0, 1, 1, 1, 2, 2]
    with pytest.raises(WiringError, match=r"a group of latents is empty: group 0 of 48 latents"):
        group_of(wiring, [0.01, 0.99])


def test_multi_topk_reconstructs_by_four_times_as_many() -> None:
    """16 positive pre-activations, k = 2: 8 of them write a unit vector each to a; its rows are 0."""
    trainer = cases.trainer("autoencoder", "topk", method=cases.method("topk", k=2, multi=0.5))
    dictionary = trainer.dictionary
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        dictionary.decoder["a"][:16] = torch.eye(16, 20)
        dictionary.activation.bias_L[:16] = torch.arange(16.0)
    out = dictionary({"a": torch.zeros(3, 20)})
    multi = trainer.terms[-1]
    assert multi.weight(0) == 0.5 and float(trainer.terms[0](dictionary, out, Now(0, torch.zeros(48)))) == 15**2 + 14**2
    assert float(multi(dictionary, out, Now(0, torch.zeros(48)))) == sum(n**2 for n in range(8, 16))


def test_a_budget_of_all_entries_is_plain_relu() -> None:
    for name in ("topk", "batch_topk"):
        dictionary = trained(name, k=48).dictionary
        x = cases.random_rows("crosscoder", 5)
        pre = dictionary.pre(x)
        assert torch.equal(dictionary.encode(x), pre.h_BL.clamp_min(0))
