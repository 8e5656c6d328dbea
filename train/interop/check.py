"""Eight quick checks that dedicated crosscoders are what they promise, on this machine and with this version of torch.

Letters: B rows, S sources, D width, L latents.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shared.errors import GranaryError
from train.interop.dictionary_learning.dedicated import DedicatedFeatureBatchTopKCrossCoder
from train.interop.dictionary_learning.partition import FeaturePartition

D, L, B, K = 64, 1000, 16, 50
FORBIDDEN = ((0, slice(50, 100)), (1, slice(0, 50)))  # model, latents


def run() -> Iterator[tuple[str, str]]:
    """(what was checked, what was wrong with it, or nothing)."""
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            yield name, "" if check() else "it does not hold"
        except (GranaryError, RuntimeError, ValueError, TypeError) as error:
            yield name, str(error).splitlines()[0]


def _made() -> DedicatedFeatureBatchTopKCrossCoder:
    return DedicatedFeatureBatchTopKCrossCoder(D, L, 2, k=K, model_a_exclusive_pct=0.05, model_b_exclusive_pct=0.05)


def _forbidden(encoder_SDL: Tensor | None, decoder_SLD: Tensor | None) -> bool:
    """Whether nothing stands where the partition allows no weight."""
    assert encoder_SDL is not None and decoder_SLD is not None
    return not any(
        bool(encoder_SDL[model, :, latents].any()) or bool(decoder_SLD[model, latents].any())
        for model, latents in FORBIDDEN
    )


def _tables() -> bool:
    return set(_made().state_dict()) >= {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


def _partition() -> bool:
    whole = FeaturePartition.from_percentages(L, 0.05, 0.05)
    large = FeaturePartition.from_percentages(131_072, 0.05, 0.05)
    return whole == FeaturePartition(L, 50, 50) and large.shared_size == 117_964


def _sizes() -> bool:
    made = _made()
    return made.get_partition_statistics()["shared"] == 900 and int(made.k) == K


def _zeros() -> bool:
    made = _made()
    return _forbidden(made.encoder.weight, made.decoder.weight)


def _shapes() -> bool:
    made, x = _made(), torch.randn(B, 2, D)
    x_hat, f = made(x, output_features=True)
    kept = made.encode(x, use_threshold=False)
    return x_hat.shape == x.shape and f.shape == (B, L) and int((kept > 0).sum()) == K * B


def _gradients() -> bool:
    made, x = _made(), torch.randn(B, 2, D)
    (made(x) - x).square().sum().backward()
    encoder, decoder = made.encoder.weight.grad, made.decoder.weight.grad
    return _forbidden(encoder, decoder) and bool(encoder[0, :, :50].any()) and bool(decoder[1, 50:100].any())


def _isolation() -> bool:
    made, x, f = _made(), torch.randn(B, 2, D), torch.zeros(B, L)
    f[:, 10:20] = torch.rand(B, 10)
    (made.decode(f) - x).square().sum().backward()
    decoder = made.decoder.weight.grad
    return not bool(decoder[1, :50].any()) and bool(decoder[0, 10:20].any())


def _step() -> bool:
    made, x = _made(), torch.randn(B, 2, D)
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    before = made.encoder.weight.detach().clone()
    (made(x) - x).square().sum().backward()
    optimiser.step()
    moved = bool((made.encoder.weight.detach() != before).any())
    return moved and _forbidden(made.encoder.weight, made.decoder.weight)


CHECKS: dict[str, Callable[[], bool]] = {
    "it has the tensors of the reference": _tables,
    "shares become whole numbers of latents": _partition,
    "it is made with 5 % and 5 %": _sizes,
    "no weight stands where the partition allows none": _zeros,
    "rows and codes have their shapes, and k of a row are kept": _shapes,
    "no gradient stands there, and there is one elsewhere": _gradients,
    "latents of one model have no gradient from the other": _isolation,
    "a step of Adam leaves it so": _step,
}
