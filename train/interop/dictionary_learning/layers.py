"""The encoder and the decoder of a crosscoder, as layers of their own.

Letters: B rows, S sources, D width, L latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from train.interop.dictionary_learning.shaped import LinearShown


class CrossCoderEncoder(LinearShown):
    """weight [S, D, L] and bias [L] of a crosscoder. Called: relu(sum over sources of x~ W + b), [B, L]."""

    def __call__(self, x: Tensor, return_no_sum: bool = False, select_features: Sequence[int] | None = None) -> Any:
        """Of x~ [B, S, D]; with `return_no_sum` also of each source by itself, [B, S, L]."""
        weight, bias = self.weight, self.bias
        if select_features is not None:
            weight, bias = weight[..., list(select_features)], bias[list(select_features)]
        h_BSL = torch.einsum("bsd,sdl->bsl", x, weight)
        f_BL = relu(h_BSL.sum(1) + bias)
        return (f_BL, relu(h_BSL + bias)) if return_no_sum else f_BL


class CrossCoderDecoder(LinearShown):
    """weight [S, L, D] and bias [S, D] of a crosscoder. Called: f W + b, [B, S, D]."""

    def __call__(self, f: Tensor, select_features: Sequence[int] | None = None, add_bias: bool = True) -> Tensor:
        """Of codes [B, L], or of those of each source, [B, S, L]: x~, which is not scaled back."""
        owner: Any = object.__getattribute__(self, "_owner")
        x_hat: Tensor = owner.decode(f, False, add_bias, select_features)
        return x_hat
