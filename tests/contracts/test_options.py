"""What holds for every method and wiring holds where sources are decoupled, and with a skip connection.

Letters: B rows of a batch, L latents.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import RowsError, WiringError
from tests import cases
from tests.cases import CASES
from tests.contracts.test_purity import rows, same
from train import checkpoint
from train.dictionary import Dictionary
from train.measure import Measure
from train.method import find
from train.trainer import Trainer

STEPS = 8
BUDGETED = [name for name in cases.names() if "k" in find(name).model_fields]
SKIPPED = [("transcoder", name, {"skip": True}) for name in cases.names()]
DECOUPLED = [(case, name, {"norm": "decoupled"}) for case in ("crosscoder", "dedicated of 3") for name in BUDGETED]
every_option = pytest.mark.parametrize(("case", "name", "keys"), SKIPPED + DECOUPLED)


def trainer(case: str, name: str, keys: dict[str, Any], steps: int = 0) -> Trainer:
    wires = {"kind": CASES[case][0], "latents": cases.LATENTS, **keys}
    made = cases.trainer(case, name, STEPS, dead_rows=64, wiring=wires)
    generator = torch.Generator().manual_seed(4)
    for number, (source, width) in enumerate(made.dictionary.wiring.widths.items()):
        made.dictionary.scale.mean(source).copy_(torch.randn(width, generator=generator))
        made.dictionary.scale.factor(source).fill_([0.25, 3.0, 0.7][number])
    for step in range(steps):
        made.update(rows(case, step))
    return made


@every_option
def test_a_trained_dictionary_comes_back_with_the_same_outputs(
    case: str, name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    trained = trainer(case, name, keys, STEPS).dictionary.eval()
    trained.save(tmp_path)
    loaded, x = Dictionary.load(tmp_path), rows(case, 99)
    assert same(dict(loaded.state_dict()), dict(trained.state_dict())) and loaded.config() == trained.config()
    assert torch.equal(loaded.encode(x), trained.encode(x)) and same(loaded(x).y, trained(x).y)


@every_option
def test_a_run_from_its_checkpoint_equals_the_run_without_a_break(
    case: str, name: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    whole = trainer(case, name, keys, STEPS // 2)
    path = checkpoint.save(whole, tmp_path, {}, keep=1)
    resumed = trainer(case, name, keys)
    checkpoint.load(resumed, path, {})
    for step in range(STEPS // 2, STEPS):
        assert same(resumed.update(rows(case, step)), whole.update(rows(case, step)))
    assert same(resumed.state_dict(), whole.state_dict())


@every_option
def test_codes_alone_give_what_the_forward_pass_gave_and_a_folded_dictionary_too(
    case: str, name: str, keys: dict[str, Any]
) -> None:
    made, x = trainer(case, name, keys, STEPS).dictionary.double().eval(), {}
    for source, x_BD in rows(case, 99).items():
        x[source] = x_BD.double()
    folded, f_BL, out = made.fold(), made.encode(x), made(x)
    given = (f_BL, x) if keys.get("skip") else (f_BL,)
    torch.testing.assert_close(folded.encode(x), f_BL, rtol=1e-9, atol=1e-9)
    for source, y_BD in out.y.items():
        raw_BD = made.scale.raw(source, y_BD)
        for one in (made.decode(*given), folded.decode(*given), folded(x).y):
            torch.testing.assert_close(one[source], raw_BD, rtol=1e-9, atol=1e-9)


# --- decoupled --------------------------------------------------------------------------------------------------


def test_of_decoupled_sources_each_keeps_k_for_itself_while_training() -> None:
    dictionary, x = trainer("dedicated of 3", "batch_topk", {"norm": "decoupled"}).dictionary, rows("dedicated of 3", 0)
    with torch.no_grad():
        dictionary.decoder["a"].mul_(5.0)
    out = dictionary(x)
    h_BL, seen = out.pre.h_BL.clamp_min(0), torch.zeros_like(out.pre.h_BL, dtype=torch.bool)
    for number, source in enumerate(dictionary.wiring.writers):
        score_BL = h_BL * dictionary.decoder_norms()[number]
        border = score_BL.flatten().sort(descending=True).values[3 * len(score_BL) - 1]
        f_BL = out.code.of[source].dense()  # type: ignore[attr-defined]
        assert torch.equal(f_BL, h_BL * (score_BL >= border))
        assert out.code.fires_L(dictionary.writes[source]).sum() == 3 * len(score_BL)
        seen |= f_BL > 0
    assert torch.equal(out.code.dense(), h_BL * seen)


def test_decoupled_sources_have_thresholds_and_l0_of_their_own() -> None:
    dictionary = trainer("crosscoder", "batch_topk", {"norm": "decoupled"}, STEPS).dictionary.eval()
    activation: Any = dictionary.activation
    assert activation.threshold.shape == (2, 1) and (activation.threshold > 0).all()
    activation.set_threshold(torch.tensor([1.0, 1e9]))
    measure, x = Measure(dictionary), rows("crosscoder", 99)
    measure.add(x)
    figures = measure.result()["sources"]
    right = (dictionary.pre(x).h_BL.clamp_min(0) * dictionary.decoder_norms()[0] > 1.0).double().sum(1).mean()
    assert figures["b"]["l0"] == 0 and figures["a"]["l0"] == pytest.approx(float(right)) and right > 0


def test_penalties_see_what_each_decoupled_source_keeps_by_its_own_norm() -> None:
    dictionary = trainer("crosscoder", "topk", {"norm": "decoupled"}).dictionary
    out = dictionary(rows("crosscoder", 0))
    norm_WL = dictionary.norms()
    found = [out.code.of[source].dense() @ own_L for source, own_L in zip(("a", "b"), norm_WL, strict=True)]  # type: ignore[attr-defined]
    torch.testing.assert_close(out.code.l1(norm_WL), sum(found).mean())  # type: ignore[union-attr]
    torch.testing.assert_close(out.code.sums(lambda score: score, norm_WL), sum(found))


@pytest.mark.parametrize("name", [name for name in cases.names() if name not in BUDGETED])
def test_methods_that_select_nothing_refuse_to_be_decoupled(name: str) -> None:
    with pytest.raises(WiringError, match=r"selects no latents, .* wiring\.norm decoupled. Set wiring\.norm to sum"):
        trainer("crosscoder", name, {"norm": "decoupled"})


# --- skip connection --------------------------------------------------------------------------------------------


def test_a_skip_connection_begins_at_0_and_learns_a_linear_map_that_latents_need_not() -> None:
    keys = {"wiring": {"kind": "transcoder", "latents": 8, "skip": True}, "method": {"name": "standard", "l1": 99}}
    made = cases.trainer("transcoder", "standard", 300, **keys, optimiser={"lr": 3e-2, "warmup": 10})
    assert not made.dictionary.skip["a to b"].any()
    generator = torch.Generator().manual_seed(0)
    map_DD = torch.randn(20, 16, generator=generator)
    for _ in range(300):
        x_BD = torch.randn(128, 20, generator=generator)
        record = made.update({"a": x_BD, "b": x_BD @ map_DD})
    assert record["fve/b"] > 0.999 and record["l0"] == 0
    torch.testing.assert_close(made.dictionary.skip["a to b"].detach(), map_DD.T, atol=0.1, rtol=0)


def test_codes_alone_are_not_enough_where_rows_are_passed_on() -> None:
    made = trainer("transcoder", "topk", {"skip": True}).dictionary
    with pytest.raises(RowsError, match=r"a skip connection takes rows: decode\(f\). Give them too"):
        made.decode(torch.zeros(2, cases.LATENTS))


def test_codes_and_rows_that_are_not_equally_many_are_told() -> None:
    made, x = trainer("transcoder", "topk", {"skip": True}).dictionary, rows("transcoder", 0)
    with pytest.raises(RowsError, match="codes and rows are not equally many: 2"):
        made.decode(torch.zeros(2, cases.LATENTS), {"a": x["a"][:1]})


@pytest.mark.parametrize("case", ["autoencoder", "crosscoder", "dedicated of 3"])
def test_a_skip_connection_is_refused_where_a_source_is_read_and_written(case: str) -> None:
    with pytest.raises(WiringError, match=r"a skip connection would copy a source: a.* is both read and written"):
        trainer(case, "topk", {"skip": True})
