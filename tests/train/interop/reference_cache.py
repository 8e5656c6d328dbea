"""Folders as dictionary_learning's ActivationCache writes them, from a description of their layout.

Letters: N rows, D width.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_shard(folder: Path, number: int, x_ND: Tensor, dtype: bool = True) -> None:
    """shard_<number>.memmap and .meta; old ones name no dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = x_ND.view(torch.int16) if x_ND.dtype == torch.bfloat16 else x_ND
    (folder / f"shard_{number}.memmap").write_bytes(bits.contiguous().numpy().tobytes())
    meta = {"shape": list(x_ND.shape), **({"dtype": str(x_ND.dtype)} if dtype else {})}
    (folder / f"shard_{number}.meta").write_text(json.dumps(meta))


def write_cache(
    folder: Path, x_ND: Tensor, shards: Sequence[int], tokens: Tensor | None = None, ranges: Sequence[int] | None = None
) -> Path:
    """A finished cache: shards of so many rows, tokens and ranges one level above, config.json last."""
    for number, part in enumerate(x_ND.split(list(shards))):
        write_shard(folder, number, part)
    if tokens is not None:
        torch.save(tokens, folder.parent / "tokens.pt")
    if ranges is not None:
        torch.save(torch.tensor(ranges), folder.parent / "sequence_ranges.pt")
    told = {
        "batch_size": 64, "context_len": 128, "shard_size": max(shards), "d_model": x_ND.shape[1], "io": "out",
        "shuffle_shards": False, "total_size": len(x_ND), "shard_count": len(shards),
        "store_tokens": tokens is not None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    return folder
