"""Chunks of activations in fewer bytes: what a codec is called in zarr.json, and numcodecs to compute it.

Letters: C rows of a chunk, D width of a source.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numcodecs.abc import Codec as Numcodec
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from shared import config
from shared.errors import ConfigError
from shared.layout import BYTES


@dataclass(frozen=True)
class Packing:
    """attributes.granary.codec: what the activations of a packed store are encoded with, and in chunks of what size."""

    name: str
    level: int
    chunk_rows: dict[str, int]  # of each source


class Codec(ABC):
    """One way to encode a chunk. `levels` are those that it knows, `default` is the one that is taken unasked."""

    name: str
    levels: range
    default: int
    packages: tuple[str, ...] = ("numcodecs",)  # whose versions decide the bytes

    def __init__(self, level: int) -> None:
        self.level = level
        self._numcodec = self._make()

    @abstractmethod
    def _make(self) -> Numcodec: ...

    @property
    @abstractmethod
    def zarr(self) -> list[dict[str, Any]]:
        """The codecs of a chunk as zarr.json spells them, the one that makes bytes of an array first."""

    def encode(self, chunk_CD: np.ndarray) -> bytes:
        return bytes(self._numcodec.encode(chunk_CD))

    def decode(self, data: bytes, out_CD: np.ndarray) -> None:
        """Fill `out_CD`, which must be contiguous. Check `data` by its checksum first: Blosc believes any header.

        Raises ValueError where it does not decode.
        """
        try:
            self._numcodec.decode(data, out_CD)
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}


class ZstdCodec(Codec):
    """Zstandard over the bytes as they stand."""

    name, levels, default = "zstd", range(1, 23), 3

    def _make(self) -> Numcodec:
        return Zstd(self.level)

    @property
    def zarr(self) -> list[dict[str, Any]]:
        return [BYTES, {"name": "zstd", "configuration": {"level": self.level, "checksum": False}}]


class BloscCodec(Codec):
    """Zstandard over first bytes and then second bytes: those with sign and exponent compress, mantissas do not.

    Sorted by bits instead, Blosc takes fp16 activations for incompressible (measured: 0.6 % saved, not 12 %).
    """

    name, levels, default = "blosc", range(1, 10), 5

    def _make(self) -> Numcodec:
        return Blosc("zstd", self.level, Blosc.SHUFFLE)

    @property
    def zarr(self) -> list[dict[str, Any]]:
        how = {"typesize": 2, "cname": "zstd", "clevel": self.level, "shuffle": "shuffle", "blocksize": 0}
        return [BYTES, {"name": "blosc", "configuration": how}]


class PcodecCodec(Codec):
    """Bins of numbers that share their leading bits (pcodec). zarr-python alone reads it, by the package numcodecs."""

    name, levels, default = "pcodec", range(13), 8
    packages = ("numcodecs", "pcodec")

    def _make(self) -> Numcodec:
        try:
            from numcodecs.pcodec import PCodec
        except ImportError:
            way_out = "pip install 'granary-sae[pack]', or take another codec"
            raise ConfigError("this codec needs a package that is not installed", "pcodec", way_out) from None
        return PCodec(self.level)

    @property
    def zarr(self) -> list[dict[str, Any]]:
        return [{"name": "numcodecs.pcodec", "configuration": {"level": self.level}}]


CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (ZstdCodec, BloscCodec, PcodecCodec)}


def find(name: str, level: int | None = None) -> Codec:
    """The codec `name` at this level (none: its default). Raises ConfigError where there is none such."""
    if name not in CODECS:
        raise config.unknown("unknown codec", name, CODECS)
    kind = CODECS[name]
    chosen = kind.default if level is None else level
    if chosen not in kind.levels:
        way_out = f"It knows {kind.levels[0]} to {kind.levels[-1]}"
        raise ConfigError(f"{name} has no such level", chosen, way_out)
    return kind(chosen)
