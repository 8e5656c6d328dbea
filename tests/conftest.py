"""What every test runs under: no hub, one torch thread, Triton interpreted, and property tests without a deadline.

Tensors of tests are so small that several threads only wait for each other. In CI the examples are the same every time.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported

import pytest
import torch
from hypothesis import settings

from tests import hub as hubs
from tests import s3

settings.register_profile("granary", deadline=None)
settings.register_profile("granary-ci", deadline=None, derandomize=True)
settings.load_profile("granary-ci" if os.environ.get("CI") else "granary")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: behind all others it would keep one process at work alone."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    with s3.server(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubs.Hub]:
    """An empty hub, which is the hub of huggingface_hub."""
    from huggingface_hub import constants

    with hubs.served() as made:
        template = f"{made.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        yield made


@pytest.fixture
def bucket(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> s3.Bucket:
    """An empty bucket, with its credentials in the environment and a cache folder of the test's own."""
    made = s3.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}", *s3_server)
    for name, value in {**made.environment, "GRANARY_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return made
