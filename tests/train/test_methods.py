"""What each method keeps of its pre-activations, in exact numbers.

Letters: B rows of a batch, L latents.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import WiringError
from tests import cases
from tests.train.dense import top_mask, top_mask_of_batch
from train import method as methods
from train.dictionary import Dictionary, create
from train.methods.matryoshka import group_of
from train.objective import Now
from train.pre import Pre
from train.scale import Scale
from train.trainer import Trainer
from train.wiring import Span, Wiring, build, with_k

WIRING = build("crosscoder", {"a": 20, "b": 16}, 48)


def trained(name: str, **keys: Any) -> Trainer:
    return cases.trainer("crosscoder", name, method=cases.method(name, **keys))


def pre_of(rows: list[list[float]], dictionary: Dictionary) -> Pre:
    """Pre-activations as given, whatever the rows: latents that are not named are -1."""
    h_BL = torch.full((len(rows), dictionary.latents), -1.0)
    h_BL[:, : len(rows[0])] = torch.tensor(rows)
    pre = dictionary.pre({name: torch.zeros(len(rows), width) for name, width in dictionary.wiring.widths.items()})
    pre.dense_BL = h_BL  # type: ignore[misc]
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
        torch.testing.assert_close(dictionary.encode(x), pre.h_BL.clamp_min(0))


# --- spans with budgets, weights and vectors of their own -------------------------------------------------------------


def with_budgets(name: str, **keys: Any) -> Dictionary:
    """only_a: 4 latents of which 1 is kept a row; shared: 38 and only_b: 6 compete for k = 2."""
    wiring = with_k(build("dedicated", {"a": 20, "b": 16}, 48, {"a": 4, "b": 6}), {"only_a": 1})
    config = cases.method(name, k=2, **keys)
    return create(wiring, config, Scale(wiring.widths), "sum", 10)[0].initialise(0, 1.0).train()


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_a_span_with_a_k_of_its_own_keeps_so_many_and_the_others_compete(name: str) -> None:
    dictionary, norm_L = with_budgets(name), torch.rand(48) + 0.5
    pre = pre_of(torch.randn(16, 48, generator=torch.Generator().manual_seed(2)).tolist(), dictionary)
    code: Any = dictionary.activation(pre, norm_L)
    kept_BL = code.dense() > 0
    score_BL = pre.h_BL.clamp_min(0) * norm_L
    for columns, k in ((slice(0, 4), 1), (slice(4, 48), 2)):
        found, score = kept_BL[:, columns], score_BL[:, columns]
        right = top_mask(score, k) if name == "topk" else top_mask_of_batch(score, k * 16)
        assert torch.equal(found & (score > 0), right & (score > 0))
    place_K = code.entries.row_K * 48 + code.entries.latent_K
    assert (place_K.diff() > 0).all()  # by row, then latent


def test_each_budget_has_a_threshold_of_its_own() -> None:
    dictionary, norm_L = with_budgets("batch_topk"), torch.ones(48)
    activation: Any = dictionary.activation
    h_BL = torch.full((4, 48), -1.0)
    h_BL[:, 0], h_BL[:, 4], h_BL[:, 5] = 9.0, 2.0, 3.0
    with torch.no_grad():
        activation.observe(activation(pre_of(h_BL.tolist(), dictionary), norm_L), norm_L)
    assert activation.threshold.tolist() == pytest.approx([9.0, 2.0])
    dictionary.eval()
    h_BL[:, 0], h_BL[:, 4] = 8.0, 2.5
    assert (activation(pre_of(h_BL.tolist(), dictionary), norm_L).dense()[0] > 0).nonzero().flatten().tolist() == [4, 5]


def test_budgets_are_annealed_in_proportion() -> None:
    activation: Any = with_budgets("topk", k_start=8, k_anneal=6).activation
    assert [activation.budgets.counts(step) for step in (0, 3, 6, 99)] == [[4, 8], [2, 5], [1, 2], [1, 2]]


def test_codes_of_a_span_with_a_budget_of_its_own_see_no_other_source() -> None:
    """Where only_a has a k of its own, what b says does not reach its codes, while training or not."""
    for name in ("topk", "batch_topk", "matryoshka"):
        dictionary = with_budgets(name)
        x = {"a": torch.randn(30, 20), "b": torch.randn(30, 16)}
        other = {**x, "b": 100 * torch.randn(30, 16)}
        for training in (True, False):
            dictionary.train(training)
            f_BL, changed_BL = dictionary.encode(x), dictionary.encode(other)
            assert torch.equal(f_BL[:, :4], changed_BL[:, :4]) and (f_BL[:, :4] > 0).any()
            assert not torch.equal(f_BL, changed_BL)


def designated(name: str, weight: float = 0.2) -> Trainer:
    """8 designated shared latents with one vector for both sources, and 40 free ones."""
    both = ("a", "b")
    wiring = Wiring(
        (Span("designated", 8, both, both, None, weight, True), Span("free", 40, both, both)), {"a": 12, "b": 12}
    )
    asked = cases.config("crosscoder", name, 30, method=cases.method(name), dead_rows=100)
    made, terms = create(wiring, asked.method, Scale(wiring.widths), "sum", 30)
    return Trainer(made.initialise(0, 0.4), list(terms), asked)


@pytest.mark.parametrize("name", cases.names())
def test_tied_latents_write_one_vector_to_the_bit_and_learn_from_both_sources(name: str, tmp_path: Path) -> None:
    trainer = designated(name)
    before = trainer.dictionary.decoder["a"][:8].detach().clone()
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        trainer.update({"a": torch.randn(64, 12, generator=generator), "b": torch.randn(64, 12, generator=generator)})
        a_SD, b_SD = trainer.dictionary.decoder["a"], trainer.dictionary.decoder["b"]
        assert torch.equal(a_SD[:8], b_SD[:8]) and not torch.equal(a_SD[8:], b_SD[8:])
    assert not torch.equal(trainer.dictionary.decoder["a"][:8], before)
    trainer.dictionary.eval().save(tmp_path / "d")
    assert Dictionary.load(tmp_path / "d").wiring == trainer.dictionary.wiring


def test_the_gradient_of_a_tied_vector_is_the_sum_over_its_sources() -> None:
    trainer = designated("standard")
    dictionary = trainer.dictionary
    for number, name in enumerate(("a", "b")):
        dictionary.decoder[name].grad = torch.full_like(dictionary.decoder[name], number + 1.0)
    dictionary.tie_gradients()
    for number, name in enumerate(("a", "b")):
        grad = dictionary.decoder[name].grad
        assert grad is not None and (grad[:8] == 3).all() and (grad[8:] == number + 1).all()


@pytest.mark.parametrize("name", ["standard", "gated", "p_anneal", "gated_anneal", "jumprelu"])
def test_the_weight_of_a_span_is_that_of_its_codes_in_the_penalty(name: str) -> None:
    """A span of weight 0 costs nothing, one of half the weight half."""
    x = {"a": torch.randn(40, 12), "b": torch.randn(40, 12)}
    keys = {"penalty": "l0", "threshold": 0.1} if name == "jumprelu" else {}
    values = []
    for weight in (0.0, 0.5, 1.0):
        trainer = designated(name, weight)
        built = cases.method(name, **keys).build(trainer.dictionary.wiring, 30)
        term = next(one for one in built.terms if one.name in ("l1", "lp", "price"))
        trainer.dictionary.activation = built.activation
        with torch.no_grad():
            trainer.dictionary.activation.bias_L += 0.5
            values.append(float(term(trainer.dictionary, trainer.dictionary(x), Now(0, torch.zeros(48)))))
    assert values[0] < values[1] < values[2] and values[1] - values[0] == pytest.approx(values[2] - values[1], rel=1e-5)
