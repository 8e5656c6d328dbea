"""The live buffers of dictionary_learning, on hooks of ours (shared.live).

A model is one of HuggingFace with its tokenizer, or nnsight's LanguageModel with its envoys.

Letters: N rows, B rows of a batch, H heads, D width.
"""

from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.hooks import find
from shared.live import Pool, Tap, heads_of


class Buffer(Iterator[Any]):
    """Rows of a model, drawn at random from a pool that is refilled when fewer than half are unread.

    `n_ctxs` contexts of `ctx_len` tokens fill the pool, `refresh_batch_size` texts at once; a batch has
    `out_batch_size` rows. When the texts end, what is left is served.
    """

    tap: Tap
    pool: Pool
    config: dict[str, Any]

    def _begin(
        self, data: Iterable[Any], tap: Tap, n_ctxs: float, refresh_batch_size: int, out_batch_size: int, device: Any,
        seed: int, **told: Any,
    ) -> None:  # fmt: skip
        self.tap = tap
        self.pool = Pool(data, tap, int(n_ctxs) * tap.length, refresh_batch_size, out_batch_size, device, seed)
        sizes = {"n_ctxs": int(n_ctxs), "ctx_len": tap.length, "refresh_batch_size": refresh_batch_size}
        self.config = {**sizes, "out_batch_size": out_batch_size, "device": str(device), **told}

    def __next__(self) -> Any:
        return next(self.pool)

    def refresh(self) -> None:
        """Fill the pool now."""
        self.pool.refresh()

    def text_batch(self, batch_size: int | None = None) -> list[Any]:
        """The next texts, whose rows are then in no batch. Raises StopIteration at their end."""
        return self.pool.next_texts(batch_size)


@final
class ActivationBuffer(Buffer):
    """Rows [B, D] of what a submodule takes (`io` in) or gives (out); [B, 2, D] of both (in_and_out), or the pair of
    them (in_to_out), of which a transcoder makes the second from the first."""

    def __init__(
        self, data: Iterable[Any], model: Any, submodule: Any, d_submodule: int | None = None, io: Any = "out",
        n_ctxs: float = 3e4, ctx_len: int = 128, refresh_batch_size: int = 512, out_batch_size: int = 8192,
        device: Any = "cpu", remove_bos: bool = False, add_special_tokens: bool = True,
        max_activation_norm_multiple: float | None = None, tokenizer: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        tap = Tap(
            bare(model), bare(submodule), tokenizer_of(model, tokenizer), io, ctx_len, add_special_tokens, remove_bos,
            max_activation_norm_multiple,
        )  # fmt: skip
        told = {"d_submodule": d_submodule, "io": io, "remove_bos": remove_bos}
        self._begin(data, tap, n_ctxs, refresh_batch_size, out_batch_size, device, seed, **told)


@final
class NNsightActivationBuffer(Buffer):
    """The same of texts or of lists of token ids, which need no tokenizer."""

    def __init__(
        self, data: Iterable[Any], model: Any, submodule: Any, d_submodule: int | None = None, io: Any = "out",
        n_ctxs: float = 3e4, ctx_len: int = 128, refresh_batch_size: int = 512, out_batch_size: int = 8192,
        device: Any = "cpu", tokenizer: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        own = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        tap = Tap(bare(model), bare(submodule), own, io, ctx_len)
        self._begin(data, tap, n_ctxs, refresh_batch_size, out_batch_size, device, seed, d_submodule=d_submodule, io=io)


@final
class HeadActivationBuffer(Buffer):
    """Rows [B, H, D / H] of what the heads of a block give; with `apply_W_O`, [B, H, D] of what the output projection
    makes of each head alone, without its bias."""

    def __init__(
        self, data: Iterable[Any], model: Any, layer: int, n_ctxs: float = 3e4, ctx_len: int = 128,
        refresh_batch_size: int = 512, out_batch_size: int = 8192, device: Any = "cpu", apply_W_O: bool = False,
        remote: bool = False, tokenizer: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if remote:
            raise ConfigError("models run on this machine", "remote True", "Leave it out")
        whole = bare(model)
        site, count = find(whole, f"heads.{layer}"), heads_of(whole, layer)
        projection = whole.get_submodule(site.module)
        tap = Tap(whole, projection, tokenizer_of(model, tokenizer), "in", ctx_len, heads=count)
        self._begin(data, tap, n_ctxs, refresh_batch_size, out_batch_size, device, seed, layer=layer)
        if apply_W_O:
            self.pool.finish = lambda x_BHD: projected(projection, x_BHD)


def projected(projection: nn.Module, x_BHD: Tensor) -> Tensor:
    """What an output projection makes of each head alone: [B, H, D of the model]."""
    weight = projection.get_parameter("weight")
    weight_OD = weight.T if type(projection).__name__ == "Conv1D" else weight  # GPT-2's, which is the other way round
    of_head = weight_OD.unflatten(1, x_BHD.shape[1:]).to(x_BHD)
    return torch.einsum("bhd,ohd->bho", x_BHD, of_head)


def bare(one: Any) -> nn.Module:
    """The module of a model or an envoy of nnsight, or a module as it is. Raises ConfigError for what is neither."""
    for name in ("_model", "_module"):
        inner = one.__dict__.get(name)
        if isinstance(inner, nn.Module):
            return inner
    if not isinstance(one, nn.Module):
        way_out = "Give one of HuggingFace's, or of nnsight's"
        raise ConfigError("this is no model and no module", type(one).__name__, way_out)
    return one


def tokenizer_of(model: Any, given: Any) -> Any:
    """The tokenizer that is given, or the one of nnsight's model. Raises ConfigError where there is none."""
    found = given if given is not None else getattr(model, "tokenizer", None)
    if found is None:
        raise ConfigError("a model of HuggingFace has no tokenizer of its own", type(model).__name__, "Give tokenizer")
    return found
