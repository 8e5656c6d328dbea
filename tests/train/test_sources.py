"""A run's sources are made of what is stored: each as it stands, or one less another in the models' own units.

Letters: B rows of a batch, D width of a source.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, StoreError
from shared.store import Store
from tests.build import make_store
from train import difference
from train.sources import Sources, in_brackets, parts

WIDTHS, FACTORS = {"chat": 6, "base": 6, "small": 4}, {"chat": 4.0, "base": 0.5, "small": 2.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("sources") / "three.zarr"
    return make_store(path, sources=WIDTHS, factor=FACTORS)


def test_a_difference_is_named_after_its_two_sources() -> None:
    assert difference("chat", "base") == "chat - base"
    assert parts("chat - base") == ("chat", "base") and parts("base_l13") == ("base_l13",)
    assert parts("a-b") == ("a-b",)  # a name of one source
    assert in_brackets("chat - base") == "(chat - base)" and in_brackets("chat") == "chat"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a - a", "a source less itself is 0: 'a - a'. Name two sources"),
        ("a - b - c", "a difference is of two sources: 'a - b - c'. Write it like 'chat - base'"),
        ("a - ", "a difference is of two sources: 'a - '. Write it like 'chat - base'"),
        (" - a", "a difference is of two sources: ' - a'. Write it like 'chat - base'"),
    ],
)
def test_what_is_no_difference_of_two_sources_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parts(name)
    assert str(error.value) == message


def test_of_python_a_source_less_itself_is_refused_where_it_is_named() -> None:
    with pytest.raises(ConfigError, match="a source less itself is 0: 'chat - chat'"):
        difference("chat", "chat")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["chat - none"], "this store has no source: none. It has: chat, base, small"),
        (["none - chat"], "this store has no source: none. It has: chat, base, small"),
        (["chat -base"], "this store has no source: chat -base. It has: chat, base, small"),
        (["chat", ""], "this store has no source: . It has: chat, base, small"),
        (
            ["base", "chat - small"],
            "a difference is of sources of one width: chat has 6, small has 4. Give them as two sources",
        ),
    ],
)
def test_a_difference_is_of_two_sources_of_the_store_with_one_width(
    store: Store, names: list[str], message: str
) -> None:
    with pytest.raises(StoreError) as error:
        Sources(store, names)
    assert str(error.value) == message


def test_every_stored_source_is_read_once_however_often_it_is_needed(store: Store) -> None:
    sources = Sources(store, ["small", "chat - base", "base", "base - chat"])
    assert sources.stored == ["small", "chat", "base"]
    assert sources.widths == {"small": 4, "chat - base": 6, "base": 6, "base - chat": 6}
    assert Sources(store, ["chat - base"]).stored == ["chat", "base"]


def test_a_difference_is_described_by_both_models_and_sites(store: Store) -> None:
    assert Sources(store, ["small", "chat - base"]).described() == {
        "small": {"model": "/models/model_small", "site": "resid.1", "width": 4},
        "chat - base": {
            "model": "/models/model_chat - /models/model_base", "site": "resid.1 - resid.1", "width": 6,
        },
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "names", [["chat"], ["chat - base"], ["base", "chat - base"], ["chat - base", "small", "base - chat", "chat"]]
)
@given(st.integers(0, 2**32))
def test_rows_are_those_of_fp64_rounded_once(store: Store, names: list[str], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sources = Sources(store, names)
    stored = {
        name: (torch.randn(5, WIDTHS[name], generator=generator) * 2.0 ** (seed % 9 - 4)).half().to(dtype)
        for name in sources.stored
    }
    exact = {name: x_BD.double() * FACTORS[name] for name, x_BD in stored.items()}
    x = sources.rows(stored)
    assert list(x) == names
    for name, x_BD in x.items():
        first, *others = name.split(" - ")
        expected_BD = exact[first] - exact[others[0]] if others else exact[first]
        assert x_BD.dtype == torch.float32 and torch.equal(x_BD, expected_BD.float())


def test_what_stood_in_the_buffers_before_counts_for_nothing(store: Store) -> None:
    sources = Sources(store, ["base", "chat - base", "chat"])
    stored = {name: torch.randn(3, 6).half() for name in sources.stored}
    x = {name: torch.full((3, 6), torch.nan) for name in sources.widths}
    for part in sources.stored:
        sources.put(part, stored[part], x)
    assert all(torch.equal(x[name], x_BD) for name, x_BD in sources.rows(stored).items())


def test_the_mean_of_a_difference_is_that_of_the_means(store: Store) -> None:
    means = {"chat": np.arange(6.0), "base": np.ones(6)}
    sources = Sources(store, ["chat - base", "base"])
    assert sources.mean("chat - base", means).tolist() == [-1, 0, 1, 2, 3, 4]
    assert sources.mean("base", means).tolist() == [1.0] * 6
