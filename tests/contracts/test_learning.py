"""Every method on every wiring finds planted features, where a linear code of them exists."""

import pytest
import torch
from torch.nn.functional import normalize

from tests import cases
from tests.cases import CASES, Planted
from train.compare import mmcs
from train.dictionary import Dictionary
from train.measure import Measure, evaluating
from train.method import find
from train.trainer import Trainer

STEPS, BATCH = 300, 128
FVE_BAR, MMCS_BAR = 0.9, 0.8  # measured at 0.92 and 0.81 or better, over all cases below
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", cases.names())


def fresh(case: str, name: str) -> Trainer:
    """A row has 1.2 shared features on average, and 0.4 of each source."""
    keys = {"k": 2 + CASES[case][1]} if "k" in find(name).model_fields else {}
    return cases.trainer(case, name, STEPS, method=cases.method(name, **keys), batch=BATCH)


def fve(dictionary: Dictionary, planted: Planted) -> dict[str, float]:
    """Of rows that no training saw."""
    total = Measure(dictionary)
    with evaluating(dictionary):
        total.add(planted.rows(2000, seed=10**6))
    return {source: figures["fve"] for source, figures in total.result()["sources"].items()}


def found(dictionary: Dictionary, planted: Planted) -> dict[str, float]:
    """How well the planted features of each written source are found: train.compare.mmcs."""
    directions = {source: planted.directions[source] for source in dictionary.wiring.writers}
    return {source: mmcs(d[d.any(1)], dictionary.decoder[source].detach()) for source, d in directions.items()}


@every_case
@every_method
def test_a_planted_dictionary_is_learned(case: str, name: str) -> None:
    trainer, planted = fresh(case, name), cases.planted(case)
    untrained = fve(trainer.dictionary, planted)
    for step in range(STEPS):
        record = trainer.update(planted.rows(BATCH, seed=step))
    assert all(torch.isfinite(value) for value in record.values())
    for source, share in fve(trainer.dictionary, planted).items():
        assert share > FVE_BAR, (source, share)  # the mean alone has 0
        assert share > untrained[source] + 0.3, (source, share, untrained)
    for source, cosine in found(trainer.dictionary, planted).items():
        assert cosine > MMCS_BAR, (source, cosine)


def recovered(dictionary: Dictionary, planted: Planted) -> set[tuple[str, int]]:
    """The planted features of which a latent has the direction, by a cosine above 0.9."""
    found = set()
    for source in dictionary.wiring.writers:
        d_GD, W_SD = planted.directions[source], normalize(dictionary.decoder[source].detach(), dim=1)
        best_G = (normalize(d_GD, dim=1) @ W_SD.T).amax(1)
        found |= {(source, int(feature)) for feature in torch.nonzero(best_G > 0.9)}
    return found


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "standard"])
def test_kernels_and_precision_change_nothing_that_is_learned(name: str) -> None:
    """500 steps. Measured: an FVE of entries that differs from that of matrices by 1e-9, in bf16 by 2e-4 and less."""
    planted, keys = cases.planted("crosscoder"), {"k": 2} if name == "batch_topk" else {}
    shares, features = [], []
    for kernels, precision in (("dense", "fp32"), ("sparse", "fp32"), ("sparse", "bf16")):
        method = cases.method(name, **keys)
        trainer = cases.trainer(
            "crosscoder", name, 500, method=method, batch=BATCH, kernels=kernels, precision=precision
        )
        for step in range(500):
            trainer.update(planted.rows(BATCH, seed=step))
        shares.append(fve(trainer.trained(), planted))
        features.append(recovered(trainer.dictionary, planted))
    matrices, entries, rounded = shares
    assert matrices == pytest.approx(entries, abs=1e-3) and matrices == pytest.approx(rounded, abs=3e-3)
    assert len(features[0]) > 10 and features[0] == features[1]
    assert len(features[0] ^ features[2]) <= 2  # of 32
