"""Rows of a model while it runs, without a store: a pool that texts refill when it is half empty.

Letters: B texts or rows of a batch, T positions, N rows of the pool, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shared.errors import ConfigError, CorpusError
from shared.hooks import Site, capture, heads, path_of, splice

Ends = Literal["in", "out", "in_and_out", "in_to_out"]
ENDS = ("in", "out", "in_and_out", "in_to_out")
Parts = tuple[Tensor, ...]  # rows of one or two sites, equally many


@dataclass(frozen=True)
class Tap:
    """Where rows of a model are taken, and which of them.

    in, out     what a module takes, or gives
    in_and_out  both, side by side: they have one width
    in_to_out   both, as a pair: an MLP's input and its output
    """

    model: nn.Module
    module: nn.Module
    tokenizer: Any  # none: of lists of token ids
    ends: Ends = "out"
    length: int = 128  # tokens of a text; what is behind is left out
    special: bool = True  # whether the tokenizer adds its special tokens
    skip_bos: bool = False  # leave rows of BOS out; of a tokenizer without one, every first row
    norm_multiple: float | None = None  # leave out what is longer than so many medians of a batch
    heads: int | None = None  # a row is so many parts of equal width

    def __post_init__(self) -> None:
        if self.ends not in ENDS:
            raise ConfigError("rows are taken in no such way", self.ends, f"Give one of {', '.join(ENDS)}")

    @property
    def sites(self) -> list[Site]:
        path = path_of(self.model, self.module)
        sides: list[Literal["in", "out"]] = ["in"] if self.ends == "in" else ["out"]
        sides = ["in", "out"] if "_" in self.ends else sides
        return [Site(side, path, side) for side in sides]

    @torch.no_grad()
    def rows(self, texts: Sequence[Any]) -> Parts:
        """The rows of texts, or of lists of token ids, [N, D] of each site, in the model's dtype and on its device."""
        inputs = encoded(self, texts)
        keep_BT = inputs["attention_mask"].bool()
        if self.skip_bos:
            keep_BT = keep_BT & ~_begins(inputs, self.tokenizer)
        with capture(self.model, self.sites) as run:
            found = run(**inputs)
        parts = tuple(x_BTD[keep_BT] for x_BTD in found.values())
        if self.norm_multiple is not None:
            length_N = torch.linalg.vector_norm(parts[0].float(), dim=-1)
            kept_N = length_N <= self.norm_multiple * length_N.median()
            parts = tuple(one[kept_N] for one in parts)
        return tuple(one.unflatten(-1, (self.heads, -1)) for one in parts) if self.heads else parts


def encoded(tap: Tap, texts: Sequence[Any]) -> dict[str, Tensor]:
    """input_ids and attention_mask of texts or lists of ids, cut to the length and padded on the right."""
    device = next(tap.model.parameters()).device
    if isinstance(texts[0], str):
        if tap.tokenizer is None:
            raise ConfigError("texts without a tokenizer", repr(texts[0][:40]), "Give tokenizer, or lists of token ids")
        ids = [tap.tokenizer(text, add_special_tokens=tap.special, verbose=False)["input_ids"] for text in texts]
    else:
        ids = [list(text) for text in texts]
    ids = [one[: tap.length] for one in ids]
    longest = max(map(len, ids))
    if not longest:
        raise CorpusError("these texts have no tokens", repr(texts[0]), "Give longer ones")
    ids_BT = torch.zeros(len(ids), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(ids), longest, dtype=torch.long)
    for number, one in enumerate(ids):
        ids_BT[number, : len(one)] = torch.tensor(one, dtype=torch.long)
        mask_BT[number, : len(one)] = 1
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


def _begins(inputs: dict[str, Tensor], tokenizer: Any) -> Tensor:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        return inputs["input_ids"] == bos
    first_BT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    first_BT[:, 0] = True
    return first_BT


class Pool(Iterator[Any]):
    """N rows at most, of which batches are drawn at random, none twice; refilled when fewer than half are unread.

    What is left when the texts end is served, too. A batch is [B, D], on the device; of two sites [B, 2, D] or a pair.
    """

    def __init__(
        self, texts: Iterable[Any], tap: Tap, rows: int, texts_at_once: int, batch: int, device: Any = "cpu",
        seed: int = 0, finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.texts, self.tap = iter(texts), tap
        self.size, self.texts_at_once, self.batch, self.device = rows, texts_at_once, batch, torch.device(device)
        self.finish = finish
        self._left: Parts = ()  # unread, in a random order
        self._generator = torch.Generator().manual_seed(seed)
        self._ended = False

    @property
    def unread(self) -> int:
        return len(self._left[0]) if self._left else 0

    def __next__(self) -> Any:
        if self.unread < self.size // 2 and not self._ended:
            self.refresh()
        if not self.unread:
            raise StopIteration
        taken = tuple(one[: self.batch] for one in self._left)
        self._left = tuple(one[self.batch :] for one in self._left)
        taken = tuple(self.finish(one) for one in taken) if self.finish else taken
        if self.tap.ends == "in_to_out":
            return taken
        return torch.stack(taken, 1) if len(taken) > 1 else taken[0]

    def refresh(self) -> None:
        """Run the model on texts until the pool is full, or they end. Then all that is unread is mixed."""
        found = [self._left] if self._left else []
        count = self.unread
        while count < self.size:
            texts = list(islice(self.texts, self.texts_at_once))
            if not texts:
                self._ended = True
                break
            parts = tuple(one.to(self.device) for one in self.tap.rows(texts))
            found.append(parts)
            count += len(parts[0])
        if not found:
            return
        whole = tuple(torch.cat(same) for same in zip(*found, strict=True))
        order_N = torch.randperm(len(whole[0]), generator=self._generator).to(self.device)
        self._left = tuple(one[order_N] for one in whole)

    def next_texts(self, count: int | None = None) -> list[Any]:
        """Texts that no row was taken of: for who wants to run the model itself. Raises StopIteration at their end."""
        if not (texts := list(islice(self.texts, self.texts_at_once if count is None else count))):
            raise StopIteration
        return texts


def heads_of(model: nn.Module, layer: int) -> int:
    """How many heads stand side by side in what goes into the output projection of a block."""
    found = heads(model, f"heads.{layer}")
    assert found is not None
    return found


@torch.no_grad()
def losses(tap: Tap, texts: Sequence[Any], change: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """The cross entropy of the next token, mean over the texts' tokens: of the model as it is, with what passes at the
    tap changed, and with zeros there. The model has a language-model head.

    `change` takes rows [B, T, D]; of a tap from what a module takes to what it gives it makes the latter of the former.
    """
    inputs = encoded(tap, texts)
    target = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)

    def entropy() -> float:
        logits_BTV = tap.model(**inputs, use_cache=False).logits[:, :-1]
        return float(cross_entropy(logits_BTV.flatten(0, 1).float(), target.flatten()))

    site = tap.sites[-1]
    caught: dict[str, Tensor] = {}
    if tap.ends == "in_to_out":
        with capture(tap.model, tap.sites[:1]) as run:
            caught = run(**inputs)

    def changed(x_BTD: Tensor) -> Tensor:
        return change(caught.get("in", x_BTD)).to(x_BTD.dtype)

    found = [entropy()]
    for way in (changed, torch.zeros_like):
        with splice(tap.model, site, way):
            found.append(entropy())
    return found[0], found[1], found[2]
