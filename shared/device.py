"""The device and the threads that a user names."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import ConfigError


def device_of(name: str) -> torch.device:
    """A device by its name; auto is cuda where there is one. Raises ConfigError where it cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for this kind of device
        reason = str(error).partition("\n")[0].partition(". ")[0].partition("Expected one of")[0].strip()
        raise ConfigError("this device cannot be used", name, f"Use cpu, cuda or auto ({reason})") from None


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch runs on `count` threads of the CPU (none: as it was) while the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
