"""Cosines of the latents of two dictionaries, and of planted features, in exact numbers."""

import itertools

import numpy as np
import pytest
import torch

from shared.errors import StoreError
from tests import cases
from train.compare import compare, largest_cosines, mcc, mmcs
from train.dictionary import Dictionary


def test_two_latents_may_stand_for_one_feature_but_not_in_an_assignment() -> None:
    """Features along x and y; latents along x, near x, and nowhere: y is not found."""
    planted = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    found = torch.tensor([[5.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert largest_cosines(planted, found).tolist() == pytest.approx([1.0, 0.8])
    assert mmcs(planted, found) == pytest.approx(0.9) and mcc(planted, found) == pytest.approx(0.9)
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    assert mmcs(twice, found[:1]) == pytest.approx((1 + 1 / 1.01**0.5) / 2)
    assert mcc(twice, found[:1]) == pytest.approx(0.5)  # one latent for two features


def test_the_assignment_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    planted, found = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    cosine = torch.cosine_similarity(planted[:, None], found[None], dim=2).numpy()
    best = max(cosine[range(4), list(one)].sum() for one in itertools.permutations(range(5), 4))
    assert mcc(planted, found) == pytest.approx(best / 4, rel=1e-6)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, found = torch.randn(50, 6), torch.randn(70, 6)
    whole = largest_cosines(planted, found)
    monkeypatch.setattr("train.compare.TOGETHER", 7)
    torch.testing.assert_close(largest_cosines(planted, found), whole)


def dictionary(case: str, seed: int) -> Dictionary:
    return cases.trainer(case, "topk", seed=seed).dictionary


def test_a_dictionary_is_like_itself_and_unlike_another() -> None:
    one, other = dictionary("dedicated", 0), dictionary("dedicated", 1)
    for source, figures in compare(one, one).items():
        assert figures["mean"] == pytest.approx(1) and figures["above_0.9"] == 1.0
        assert figures["latents"] == len(one.decoder[source])
    found = compare(one, other)
    for source, figures in found.items():
        right = torch.cosine_similarity(one.decoder[source][:, None], other.decoder[source][None], dim=2).max(1).values
        assert figures["median"] == pytest.approx(float(np.median(right.detach().numpy())), rel=1e-5)
        assert figures["above_0.7"] == pytest.approx(float((right > 0.7).double().mean()))


def test_what_one_of_them_does_not_write_is_left_out_and_nothing_in_common_is_refused() -> None:
    assert list(compare(dictionary("transcoder", 0), dictionary("dedicated", 0))) == ["b"]
    with pytest.raises(StoreError, match="write to no source of one name and width: a and b"):
        compare(dictionary("autoencoder", 0), dictionary("transcoder", 0))
