"""Datasets that SAELens' CacheActivationsRunner has written: the rows of one model at one hook point.

A folder of HuggingFace datasets (dataset_info.json, state.json, data-*.arrow). A record is one context:
<hook name> [C, D] in float32 or another type, and token_ids [C] (not of old versions).

Letters: N rows, B rows that are asked for, C tokens of a context, D width.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import StoreDamagedError, StoreError
from shared.hooks import of_hook_name

TOKENS = "token_ids"
PIECE = 64  # contexts that are read at once


class Cached:
    """Such a folder. Raises StoreError where it is none, StoreDamagedError where files of it are not whole."""

    made_by = "CacheActivationsRunner"

    def __init__(self, path: Path) -> None:
        import datasets

        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:  # of its files, or of Arrow
            raise StoreDamagedError("this dataset cannot be read", path, f"Cache it again ({_first(error)})") from None
        if isinstance(found, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in found)
            raise StoreError("a dataset with splits", path, f"Name one: {splits}")
        hooks = {name: one for name, one in found.features.items() if isinstance(one, datasets.Array2D)}
        if len(hooks) != 1:
            value = f"{path}: {len(hooks)} columns of activations"
            raise StoreError("not a dataset of CacheActivationsRunner", value, "It has one, [context, width]")
        self.path, self._data = path, found.with_format("arrow")
        ((self.hook_name, feature),) = hooks.items()
        self._context, self.width = (int(size) for size in feature.shape)
        self.count = len(found) * self._context
        self.dtype = torch.from_numpy(np.empty(0, feature.dtype)).dtype

    @property
    def site(self) -> str:
        """Of blocks.13.hook_resid_post: resid.13. Of a hook point that no site has: its name."""
        return of_hook_name(self.hook_name) or self.hook_name

    def take(self, rows_B: np.ndarray) -> Tensor:
        context_B, place_B = np.divmod(rows_B, self._context)
        first, last = int(context_B.min(initial=0)), int(context_B.max(initial=-1))
        x_CD = self._read(self.hook_name, first, last + 1).reshape(-1, self._context, self.width)
        return torch.from_numpy(x_CD[context_B - first, place_B])

    @cached_property
    def tokens(self) -> Tensor | None:
        if TOKENS not in self._data.features:
            return None
        return torch.from_numpy(self._read(TOKENS, 0, len(self._data)).astype(np.int64))

    @cached_property
    def ranges(self) -> Tensor:
        return torch.arange(0, self.count + 1, self._context)

    def fingerprint(self) -> str:
        """sha256 of all rows, in their order."""
        digest = hashlib.sha256()
        for start in range(0, len(self._data), PIECE):
            digest.update(self._read(self.hook_name, start, start + PIECE).data)
        return digest.hexdigest()

    def _read(self, column: str, start: int, stop: int) -> np.ndarray:
        """The values of these records, one behind the other."""
        table: Any = self._data[start:stop]
        flat = [np.empty(0)]
        for chunk in table.column(column).chunks:
            values = chunk.storage if column != TOKENS else chunk
            while values.type.num_fields:
                values = values.flatten()
            flat.append(values.to_numpy(zero_copy_only=False))
        return np.ascontiguousarray(np.concatenate(flat[1:] or flat))


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
