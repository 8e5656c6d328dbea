"""Every codec gives back every bit, and says in one line what it cannot do."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared import codec
from shared.errors import ConfigError

CHUNKS = arrays.arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 9)))  # NaN, infinities and -0 among them
every_codec = pytest.mark.parametrize("name", codec.CODECS)
every_dtype = pytest.mark.parametrize("dtype", ["<f2", "<u2"])  # uint16 holds the bits of bfloat16


@every_codec
@every_dtype
@given(chunk=CHUNKS)
def test_a_chunk_comes_back_to_the_bit(name: str, dtype: str, chunk: np.ndarray) -> None:
    found = codec.find(name)
    out = np.empty(chunk.shape, dtype)
    found.decode(found.encode(chunk.view(dtype)), out)
    assert out.tobytes() == chunk.tobytes()


@every_codec
def test_every_level_that_a_codec_knows_works_and_no_other(name: str) -> None:
    kind = codec.CODECS[name]
    chunk, out = np.arange(64, dtype="<f2").reshape(8, 8), np.empty((8, 8), "<f2")
    for level in kind.levels:
        kind(level).decode(kind(level).encode(chunk), out)
        assert np.array_equal(out, chunk)
    assert codec.find(name).level == kind.default in kind.levels
    for level in (kind.levels[0] - 1, kind.levels[-1] + 1):
        with pytest.raises(ConfigError, match=f"{name} has no such level: {level}. It knows {kind.levels[0]} to "):
            codec.find(name, level)


@pytest.mark.parametrize("name", ["zstd", "pcodec"])  # Blosc does not notice: hence the checksum before
def test_what_is_cut_short_is_refused(name: str) -> None:
    found = codec.find(name)
    chunk = np.random.default_rng(0).standard_normal((64, 8)).astype("<f2")
    data = found.encode(chunk)
    for short in (b"", data[: len(data) // 2]):
        with pytest.raises(ValueError):
            found.decode(short, np.empty((64, 8), "<f2"))


def test_values_of_one_size_compress_by_their_exponents() -> None:
    chunk = np.random.default_rng(0).standard_normal((256, 64)).astype("<f2")
    sizes = {name: len(codec.find(name).encode(chunk)) for name in codec.CODECS}
    assert all(size < 0.95 * chunk.nbytes for size in sizes.values()), sizes


def test_an_unknown_codec_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown codec: pcodex. Did you mean pcodec\?"):
        codec.find("pcodex")


def test_a_codec_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numcodecs.pcodec", None)
    with pytest.raises(ConfigError, match=r"pcodec. pip install 'granary-sae\[pack\]'"):
        codec.find("pcodec")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any("pcodec" in one for one in project["optional-dependencies"]["pack"])


@every_codec
def test_the_versions_are_those_of_the_libraries_that_encode(name: str) -> None:
    found = codec.find(name).versions
    assert list(found) == (["numcodecs", "pcodec"] if name == "pcodec" else ["numcodecs"])
    assert all(version[0].isdigit() for version in found.values())
