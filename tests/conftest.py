"""What every test runs under: no hub, one torch thread, and property tests without a deadline.

Tensors of tests are so small that several threads only wait for each other. In CI the examples are the same every time.
"""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

import pytest
import torch
from hypothesis import settings

settings.register_profile("granary", deadline=None)
settings.register_profile("granary-ci", deadline=None, derandomize=True)
settings.load_profile("granary-ci" if os.environ.get("CI") else "granary")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
