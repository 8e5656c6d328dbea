"""Other libraries in environments of their own, as tests/peers.sh makes them in the folder that GRANARY_PEERS names."""

import os
from pathlib import Path

import pytest


def python_of(library: str) -> Path:
    """Its environment's Python. Skips the test where there is none."""
    if not (folder := os.environ.get("GRANARY_PEERS")):
        pytest.skip("GRANARY_PEERS is not set: other libraries are not at hand")
    place = Path(folder) / library
    if not (place / "installed").exists():
        pytest.skip(f"{library} could not be installed into {place}")
    return place / "bin" / "python"
