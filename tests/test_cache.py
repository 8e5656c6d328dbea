"""Caches by the names that dictionary_learning gives their tests: shards of its folders, and rows of a harvest.

Letters: N rows, D width.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from shared import models
from shared.errors import RowsError, StoreDamagedError, StoreError
from shared.store import Store
from tests.build import make_store
from tests.harvest.pair import harvest, one
from tests.tiny import TEXTS, byte_level, save_model
from tests.train.interop.reference_cache import write_cache, write_shard
from train.interop.dictionary_learning import (
    ActivationCache,
    ActivationCacheTuple,
    PairedActivationCache,
)

N, D = 100, 128


def values(dtype: torch.dtype, rows: int = N, width: int = D, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_ND = 50 * torch.randn(rows, width, generator=generator)
    return x_ND.clamp(-128, 127).to(dtype)


def exact(dtype: torch.dtype, folder: Path) -> None:
    x_ND = values(dtype)
    write_shard(folder, 0, x_ND)
    cache = ActivationCache(folder)
    assert len(cache) == N and cache[:].shape == (N, D) and cache[:].dtype == dtype
    assert torch.equal(cache[:], x_ND)


def test_activation_shard_float16(tmp_path: Path) -> None:
    exact(torch.float16, tmp_path)


def test_activation_shard_bfloat16(tmp_path: Path) -> None:
    exact(torch.bfloat16, tmp_path)


def test_activation_shard_float32(tmp_path: Path) -> None:
    exact(torch.float32, tmp_path)
    old = values(torch.float32, seed=1)
    write_shard(tmp_path / "old", 0, old, dtype=False)
    assert torch.equal(ActivationCache(tmp_path / "old")[:], old)


def test_activation_shard_int8(tmp_path: Path) -> None:
    exact(torch.int8, tmp_path)


def test_activation_shard_indexing(tmp_path: Path) -> None:
    x_ND = values(torch.float16)
    write_shard(tmp_path, 0, x_ND)
    cache = ActivationCache(tmp_path)
    assert torch.equal(cache[7], x_ND[7])
    assert torch.equal(cache[10:20], x_ND[10:20])
    assert torch.equal(cache[[5, 1, 5]], x_ND[[5, 1, 5]])


def test_activation_shard_multiple_shards(tmp_path: Path) -> None:
    parts = [values(torch.float16, rows, seed=rows) for rows in (40, 60)]
    for number, part in enumerate(parts):
        write_shard(tmp_path, number, part)
    cache = ActivationCache(tmp_path)
    assert torch.equal(cache[:40], parts[0]) and torch.equal(cache[40:], parts[1])


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """A tiny GPT-2 without a BOS, and five of the texts harvested at one of its blocks."""
    home = tmp_path_factory.mktemp("gpt2")
    save_model(home / "llama", "gpt2", byte_level(), seed=1)
    lines = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(TEXTS)]
    (home / "corpus.jsonl").write_text("\n".join(lines))
    store = harvest(one(home, home / "one.zarr", ["resid.1"], rows={"count": None, "held_out": 0.0, "context": 24}))
    return home, store


def test_activation_cache_with_normalizer(collected: tuple[Path, Store]) -> None:
    """As many rows as tokens, the tokens themselves, rows as the model gives them, and mean and unbiased spread."""
    home, store = collected
    cache = ActivationCache(store.path)
    ids, segment = store.column("tokens/llama/id"), store.column("tokens/llama/segment")
    checkpoint = models.resolve(str(home / "llama"))
    model = models.load(checkpoint, "float32", "eager", "cpu")
    expected, tokens = [], []
    with torch.no_grad():
        for start, stop in itertools.pairwise(segment):
            piece = torch.from_numpy(ids[start:stop].astype(np.int64))[None]
            states = model(input_ids=piece, output_hidden_states=True).hidden_states
            expected.append(states[2][0])
            tokens.append(piece[0])
    whole_ND, tokens_N = torch.cat(expected), torch.cat(tokens)
    assert len(cache) == len(tokens_N)
    assert torch.equal(cache.tokens, tokens_N)
    torch.testing.assert_close(cache[:], whole_ND, rtol=2e-3, atol=2e-3)  # fp16
    torch.testing.assert_close(cache.mean, whole_ND.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.std, whole_ND.std(0), rtol=1e-5, atol=1e-5)


def test_sequence_ranges_no_bos_token(collected: tuple[Path, Store]) -> None:
    _, store = collected
    cache = ActivationCache(store.path)
    ranges = cache.sequence_ranges
    assert ranges is not None
    assert int(ranges[0]) == 0 and int(ranges[-1]) == len(cache)
    assert bool((ranges[1:] > ranges[:-1]).all())
    assert torch.equal(ranges, torch.from_numpy(np.asarray(store.column("tokens/llama/segment"), np.int64)))


def test_sequence_ranges_with_bos_token(tmp_path: Path) -> None:
    """They are there, too: a row knows its sequence whether its tokenizer has a BOS or not."""
    cache = ActivationCache(make_store(tmp_path / "s.zarr", rows=60, sources={"a": 4}).path)
    ranges = cache.sequence_ranges
    assert ranges is not None and int(ranges[-1]) == 60


def test_activation_cache_slice_indexing_cross_shard(tmp_path: Path) -> None:
    x_ND = values(torch.bfloat16, 50, 6)
    cache = ActivationCache(write_cache(tmp_path / "layer_1_out", x_ND, [12, 20, 18]))
    for one_slice in (slice(5, 15), slice(5, 40), slice(0, 50, 3), slice(12, 32), slice(32, 50), slice(None)):
        rows = [cache[n] for n in range(*one_slice.indices(50))]
        assert torch.equal(cache[one_slice], torch.stack(rows))
    assert cache[10:10].shape == (0, 6)


# --- what those tests left out ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[ActivationCache, np.ndarray]]:
    """A folder of the reference and a source of a store, each with its rows."""
    place = tmp_path_factory.mktemp("both")
    x_ND = values(torch.float32, 50, 6)
    store = make_store(place / "s.zarr", rows=50, sources={"a": 6, "b": 4}, factor={"a": 2.0})
    return [
        (ActivationCache(write_cache(place / "layer_1_out", x_ND, [12, 20, 18])), x_ND.numpy()),
        (ActivationCache(store.path, "a"), store.read(0, 50)["a"].numpy()),
    ]


indices = st.one_of(
    st.integers(-50, 49), st.slices(50), st.lists(st.integers(-50, 49), max_size=20),
    st.lists(st.booleans(), min_size=50, max_size=50).map(np.array),
)  # fmt: skip


@given(index=indices, of_torch=st.booleans())
@settings(max_examples=150, deadline=None)
def test_an_index_is_as_numpy_has_it(
    both: list[tuple[ActivationCache, np.ndarray]], index: int | slice | list[int] | np.ndarray, of_torch: bool
) -> None:
    given_ = index if isinstance(index, slice | int) else np.asarray(index, None if len(index) else int)
    asked = torch.as_tensor(given_) if of_torch and not isinstance(index, slice) else index
    for cache, x_ND in both:
        assert np.array_equal(cache[asked].numpy(), x_ND[given_])
        assert cache[asked].shape == x_ND[given_].shape


def test_rows_that_are_not_there_are_told(both: list[tuple[ActivationCache, np.ndarray]]) -> None:
    for cache, _ in both:
        for index in (50, -51, [3, 50], torch.tensor([-51])):
            with pytest.raises(IndexError):
                cache[index]
        for index in (1.5, "a", np.zeros(3, bool), np.zeros((2, 2), int)):
            with pytest.raises(IndexError):
                cache[index]


def test_torchs_loader_reads_a_batch_at_once(both: list[tuple[ActivationCache, np.ndarray]]) -> None:
    for cache, x_ND in both:
        batches = list(DataLoader(cache, batch_size=16, shuffle=True, num_workers=0))
        found = torch.cat(batches).numpy()
        assert found.shape == x_ND.shape
        assert np.array_equal(np.sort(found, axis=0), np.sort(x_ND, axis=0))


def test_statistics_are_of_the_rows_and_not_of_what_was_summed_in_half_precision(tmp_path: Path) -> None:
    x_ND = 3000 * torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) + 500
    cache = ActivationCache(write_cache(tmp_path / "layer_1_out", x_ND.half(), [500]))
    for name in ("mean.pt", "std.pt"):
        torch.save(torch.full((6,), torch.inf), tmp_path / "layer_1_out" / name)
    torch.testing.assert_close(cache.mean, x_ND.half().double().mean(0).float())
    torch.testing.assert_close(cache.std, x_ND.half().double().std(0).float())
    assert cache.running_stats.n == 500


def test_a_torn_folder_is_told(tmp_path: Path) -> None:
    x_ND = values(torch.float16, 50, 6)

    def folder(name: str) -> Path:
        return write_cache(tmp_path / name / "layer_1_out", x_ND, [20, 30], torch.arange(50))

    (torn := folder("torn")).joinpath("shard_1.memmap").write_bytes(b"half")
    with pytest.raises(StoreDamagedError, match=r"a shard is torn: .* has 4 bytes of 360"):
        ActivationCache(torn)
    (lacking := folder("lacking")).joinpath("shard_0.meta").unlink()
    with pytest.raises(StoreDamagedError, match=r"a shard is missing: .*shard_0\.meta"):
        ActivationCache(lacking)
    (short := folder("short")).joinpath("shard_1.meta").unlink()
    with pytest.raises(StoreDamagedError, match="rows are missing: 20 of 50"):
        ActivationCache(short)
    write_shard(mixed := folder("mixed"), 1, x_ND[20:].float())
    with pytest.raises(StoreDamagedError, match="shards of several kinds"):
        ActivationCache(mixed)
    torch.save(torch.arange(49), (odd := folder("odd")).parent / "tokens.pt")
    with pytest.raises(StoreDamagedError, match="tokens are of other rows: 49"):
        ActivationCache(odd).tokens  # noqa: B018
    with pytest.raises(StoreError, match="no activations here"):
        ActivationCache(tmp_path)
    store = make_store(tmp_path / "s.zarr", rows=20)
    with pytest.raises(StoreError, match="this store has several sources: a, b"):
        ActivationCache(store.path)
    with pytest.raises(StoreError, match="this store has no source: c"):
        ActivationCache(store.path / "c")


def test_a_pair_is_of_the_same_tokens(tmp_path: Path) -> None:
    tokens = torch.arange(50)
    x, y = values(torch.float16, 50, 6), values(torch.float16, 44, 6, seed=1)
    base = write_cache(tmp_path / "base" / "layer_1_out", x, [20, 30], tokens, [0, 10, 50])
    chat = write_cache(tmp_path / "chat" / "layer_1_out", y, [44], tokens[:44], [0, 10, 44])
    pair = PairedActivationCache(tmp_path / "base", tmp_path / "chat", "layer_1_out")
    assert len(pair) == 44 and torch.equal(pair[:], torch.stack([x[:44], y], 1)) and pair[3].shape == (2, 6)
    assert torch.equal(pair.tokens, tokens[:44].expand(2, -1))
    assert pair.sequence_ranges is not None and pair.sequence_ranges.tolist() == [0, 10, 44]
    torch.testing.assert_close(pair.mean[0], x[:44].double().mean(0).float())
    torch.testing.assert_close(pair.std[1], y.double().std(0).float())
    torch.save(torch.cat([tokens[:40], tokens[:4]]), chat.parent / "tokens.pt")
    with pytest.raises(StoreError, match="of other tokens: row 40: 40 and 0"):
        PairedActivationCache(base, chat)
    (chat.parent / "tokens.pt").unlink()
    with pytest.raises(StoreError, match="nothing tells whether"):
        PairedActivationCache(base, chat)
    assert len(PairedActivationCache(base, chat, verify=False)) == 44


def test_two_sources_of_a_store_are_a_pair(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=40, sources={"base": 6, "chat": 6, "small": 4})
    pair, rows = PairedActivationCache(store.path / "base", store.path / "chat"), store.read(0, 40)
    assert torch.equal(pair[[3, 1]], torch.stack([rows["base"], rows["chat"]], 1)[[3, 1]])
    three = ActivationCacheTuple(store.path / "base", store.path / "chat", store.path / "base")
    assert three[:].shape == (40, 3, 6) and torch.equal(three[5][2], rows["base"][5])
    with pytest.raises(RowsError, match="several widths: 6, 4"):
        PairedActivationCache(store.path / "base", store.path / "small")
    other = make_store(tmp_path / "t.zarr", rows=30, sources={"base": 6})
    with pytest.raises(StoreError, match="not equally many rows"):
        ActivationCacheTuple(store.path / "base", other.path)
