"""The device that a user names."""

import torch

from shared.errors import ConfigError


def device_of(name: str) -> torch.device:
    """A device by its name; auto is cuda where there is one. Raises ConfigError where it cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for this kind of device
        reason = str(error).partition("\n")[0]
        raise ConfigError("this device cannot be used", name, f"Use cpu, cuda or auto ({reason})") from None
