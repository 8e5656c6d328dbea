"""Running statistics by the names that crosscoder_learning gives their tests.

Letters: N rows, D width.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.interop.dictionary_learning import RunningStatWelford

N = 50_000


def parts(x_ND: Tensor, seed: int = 0) -> list[Tensor]:
    """In batches of 1 to 2,048 rows."""
    sizes, generator = [], torch.Generator().manual_seed(seed)
    while sum(sizes) < len(x_ND):
        sizes.append(int(torch.randint(1, 2049, (), generator=generator)))
    sizes[-1] -= sum(sizes) - len(x_ND)
    return list(x_ND.split(sizes))


@pytest.mark.parametrize("width", [5, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_streaming_matches_reference(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x_ND = (100 * torch.randn(N, width, generator=generator) + 30).to(dtype)
    stats = RunningStatWelford(width, dtype=torch.float64)
    for part in parts(x_ND):
        stats.update(part)
    assert stats.n == N
    torch.testing.assert_close(stats.mean, x_ND.double().mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats.std(), x_ND.double().std(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats.var(unbiased=False), x_ND.double().var(0, unbiased=False), rtol=1e-6, atol=1e-9)


def test_merge_two_accumulators() -> None:
    x_ND = torch.randn(1000, 7, generator=torch.Generator().manual_seed(1)) * 5 - 2
    one, two = RunningStatWelford(), RunningStatWelford()
    one.update(x_ND[:300])
    two.update(x_ND[300:].view(2, 350, 7))
    one.merge(two)
    assert one.n == 1000
    torch.testing.assert_close(one.mean, x_ND.double().mean(0))
    torch.testing.assert_close(one.std(), x_ND.double().std(0))
    empty = RunningStatWelford()
    empty.merge(one)
    assert torch.equal(empty.mean, one.mean)


def test_edge_cases() -> None:
    stats = RunningStatWelford(2)
    stats.update(torch.zeros(0, 2))
    assert stats.n == 0 and stats.var().isnan().all()
    stats.update(torch.tensor([[1.0, -1.0]]))
    assert stats.n == 1 and stats.var().isnan().all() and stats.mean.tolist() == [1.0, -1.0]
    stats.update(torch.tensor([[3.0, -5.0]]))
    assert stats.mean.tolist() == [2.0, -3.0]
    torch.testing.assert_close(stats.std(), torch.tensor([2.0, 8.0]).double().sqrt())


def test_a_state_goes_on_where_it_was(tmp_path: Path) -> None:
    x_ND = torch.randn(100, 3)
    whole, first = RunningStatWelford(3), RunningStatWelford(3)
    whole.update(x_ND)
    first.update(x_ND[:40])
    first.save_state(tmp_path)
    again = RunningStatWelford.load_or_create_state(tmp_path)
    again.update(x_ND[40:])
    assert again.n == 100
    torch.testing.assert_close(again.std(), whole.std())
    assert torch.load(tmp_path / "std.pt").shape == (3,)
    assert RunningStatWelford.load_or_create_state(tmp_path / "nowhere", shape=3).n == 0


def test_rows_in_half_precision_with_outliers_have_a_finite_spread() -> None:
    x_ND = torch.tensor([[60_000.0], [-60_000.0], [1.0]]).half()
    stats = RunningStatWelford(1)
    stats.update(x_ND)
    torch.testing.assert_close(stats.std(), x_ND.double().std(0))
