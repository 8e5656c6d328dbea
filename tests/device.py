"""The CPU, and the GPU where there is one: what has a path of its own for each is tested on both."""

import pytest
import torch

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
CPU = DEVICES[0]

every_device = pytest.mark.parametrize("device", DEVICES, ids=str)
