import pytest
import torch

from shared.device import Outward, device_of, sent, torch_threads
from shared.errors import ConfigError
from tests.device import every_device


def test_auto_is_cuda_where_there_is_one_and_else_the_cpu() -> None:
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_cannot_be_used_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        device_of(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_torch_has_its_threads_back_behind_the_block() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


@every_device
def test_what_goes_to_a_device_and_comes_back_is_the_same(device: torch.device) -> None:
    outward, waiting = Outward(device), []
    for number in range(8):  # whose memory on the device each takes over from the last
        waiting.append(
            outward.begin([sent(torch.full((64, 1 << 14), float(number)), device), torch.empty(0, device=device)])
        )
    for number, wait in enumerate(waiting):
        value, empty = wait()
        assert value.device.type == empty.device.type == "cpu" and empty.numel() == 0
        assert (value == number).all()
