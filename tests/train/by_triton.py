"""What is computed by Triton and by torch, side by side: on a GPU, or where there is none in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.device import DEVICES
from train.kernels import choice
from train.trainer import Trainer

DEVICE = DEVICES[-1]
Ask = Callable[[str], list[str]]


@contextmanager
def asking(patch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> Iterator[Ask]:
    """Ask for Triton (1) or for torch (0), as users do: gives which of a module's functions are called from then on."""
    calls: list[str] = []

    def noted(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: calls.append(name) or of(*given)

    for name in names:
        patch.setattr(module, name, noted(name, getattr(module, name)))

    def ask(value: str) -> list[str]:
        patch.setenv(choice.TRITON, value)
        choice.by_triton.cache_clear()
        assert choice.by_triton(DEVICE) == (value == "1")
        calls.clear()  # those that tried it
        return calls

    yield ask
    choice.by_triton.cache_clear()


def updated(case: str, method: str, kernels: str = "sparse", **keys: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer after two updates, with a part of its latents dead; and the gradients and figures of the last."""
    trainer = cases.trainer(case, method, kernels=kernels, device=DEVICE.type, **keys)
    trainer.dictionary.to(DEVICE)
    trainer._terms.to(DEVICE)
    trainer.idle_L = torch.where(torch.arange(cases.LATENTS) % 3 == 0, 10**6, 0).to(DEVICE)
    trainer.optimiser.zero_grad = lambda: None  # type: ignore[method-assign]
    figures: dict[str, Tensor] = {}
    for step in range(2):
        for one in trainer.parameters:
            one.grad = None
        rows = cases.random_rows(case, 8, step)
        figures = trainer.update({name: x_BD.to(DEVICE) for name, x_BD in rows.items()})
    grads = {name: one.grad for name, one in trainer.dictionary.named_parameters() if one.grad is not None}
    return trainer, {**figures, **grads, **{f"after {n}": one for n, one in enumerate(trainer.parameters)}}
