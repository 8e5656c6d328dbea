"""Weights in another shape than they are kept in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import CopyError

IN_PLACE = {
    "__setitem__", "__set__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
HARMLESS = {"requires_grad_", "retain_grad", "register_hook"}


class Shown(Tensor):
    """A tensor that was put together from weights: it has their gradient, and refuses to be written into.

    What is written into a copy would be lost. Assigning the attribute that gave it puts a value into the weights.
    """

    _name = ""
    _gradient: Callable[[], Tensor | None] | None = None

    @staticmethod
    def of(value: Tensor, name: str, gradient: Callable[[], Tensor | None] | None = None) -> "Shown":
        """`name` is what to assign instead; `gradient` gives what `.grad` is to be."""
        shown = value.as_subclass(Shown)
        shown._name, shown._gradient = name, gradient
        return shown

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        value = None if self._gradient is None else self._gradient()
        return None if value is None else Shown.of(value, f"{self._name}.grad")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().as_subclass(Tensor).clone()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and type(args[0]) is Shown and _writes(func.__name__) else kwargs.get("out")
        if type(target) is Shown:
            # No TypeError, after which `weights += 1` would make a sum, and leave the weights as they are.
            raise CopyError("this is a copy of weights, and what is written would be lost", target._name, "Assign it")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return _kept(found, next((one for one in (*args, *kwargs.values()) if type(one) is Shown), None))


def _writes(name: str) -> bool:
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in HARMLESS)


def _kept(found: Any, owner: Shown | None) -> Any:
    """Views of what is shown are shown, too; all else is as it is."""
    if type(found) in (tuple, list):
        return type(found)(_kept(one, owner) for one in found)
    if owner is None:
        return found
    if isinstance(found, Tensor):
        same = found.device == owner.device and _storage(found) == _storage(owner)
        return Shown.of(found, owner._name) if same else found.as_subclass(Tensor)
    if isinstance(found, np.ndarray):  # on the same memory
        found.setflags(write=False)
    return found


def _storage(value: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return value.untyped_storage().data_ptr()
