"""What activations make of pre-activations, in exact numbers, and the gradients that they have of their own.

Letters: B rows of a batch, L latents.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from train.activation import Gated, Jump, JumpReLU, Relu


def pre(rows: list[list[float]]) -> Any:
    return of(torch.tensor(rows))


def of(h_BL: Tensor) -> Any:
    return SimpleNamespace(dense_BL=h_BL, bf16=False, above=lambda less_L=None: None)


def test_relu_is_seen_by_penalties_as_it_is() -> None:
    code: Any = Relu(3)(pre([[1.0, -1.0, 0.0]]), torch.ones(3))
    assert code.f_BL.tolist() == code.soft.f_BL.tolist() == [[1.0, 0.0, 0.0]]


def test_a_gate_opens_by_its_own_bias_and_lets_a_magnitude_through() -> None:
    """Inner products 2, 0.5 and -1; gate biases -1, -1, 3; magnitudes exp(r) x inner + m."""
    gated = Gated(3)
    with torch.no_grad():
        gated.bias_L[:] = torch.tensor([-1.0, -1.0, 3.0])
        gated.rescale_L[:] = torch.tensor([2.0, 2.0, 1.0]).log()
        gated.magnitude_L[:] = torch.tensor([0.5, 9.0, 1.5])
    code: Any = gated(pre([[1.0, -0.5, 2.0]]), torch.ones(3))
    assert code.f_BL[0].tolist() == [4.5, 0.0, 0.5]  # 2 x 2 + 0.5; closed; 1 x -1 + 1.5
    assert code.soft.f_BL[0].tolist() == [1.0, 0.0, 2.0]
    gated.magnitude_L.data[2] = -5.0
    assert gated(pre([[1.0, -0.5, 2.0]]), torch.ones(3)).dense()[0, 2] == 0.0  # open, but below 0


def test_reconstruction_does_not_move_a_gate() -> None:
    gated, h_BL = Gated(2), torch.tensor([[1.0, 2.0]])
    code = gated(of(h_BL + gated.bias_L), torch.ones(2))
    code.dense().sum().backward()
    assert gated.bias_L.grad is not None and not gated.bias_L.grad.any()
    assert gated.magnitude_L.grad is not None and gated.magnitude_L.grad.tolist() == [1.0, 1.0]


def test_a_threshold_lets_through_what_is_above_it() -> None:
    jump = JumpReLU(4, threshold=0.5, bandwidth=0.1)
    code: Any = jump(pre([[0.4, 0.6, -1.0, 2.0]]), torch.ones(4))
    assert code.f_BL[0].tolist() == pytest.approx([0.0, 0.6, 0.0, 2.0])
    assert code.soft.f_BL[0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert jump.threshold_L.tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("bandwidth", [0.001, 0.4])
@pytest.mark.parametrize("each", [False, True])
def test_the_gradients_of_a_threshold_are_those_of_the_paper(bandwidth: float, each: bool) -> None:
    """h in units of the bandwidth from the threshold: far below, just inside below, above, at the edge, far above.

    As a row of a matrix, and as entries with the threshold of each.
    """
    offsets = [-3.0, -0.49, 0.49, 0.51, 3.0]
    h = torch.tensor([1.5 + bandwidth * one for one in offsets], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((len(h),), 1.5, dtype=torch.float64, requires_grad=True)
    jump, fires = Jump.apply(h if each else h[None], threshold, bandwidth)
    near = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    by_h, by_threshold = torch.autograd.grad(jump.sum(), [h, threshold], retain_graph=True)
    assert by_h.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(by_threshold, -1.5 / bandwidth * near)
    by_h, by_threshold = torch.autograd.grad(fires.sum(), [h, threshold])
    assert not by_h.any()
    torch.testing.assert_close(by_threshold, -1 / bandwidth * near)
