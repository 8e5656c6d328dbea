import pytest
import torch

from shared.device import device_of, torch_threads
from shared.errors import ConfigError


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
