"""Rows of a model while it runs: which they are, how they are drawn, and losses where they are changed.

Letters: B rows of a batch, T positions, N rows of the pool, D width.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from shared.errors import ConfigError, CorpusError, SiteError
from shared.hooks import Site, path_of, splice
from shared.live import Pool, Tap, losses
from tests.tiny import TEXTS, byte_level, save_model

WIDTH = 32
Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A small GPT-NeoX with its language-model head, and its tokenizer, which has no BOS."""
    folder = save_model(tmp_path_factory.mktemp("neox") / "neox", "gpt_neox", byte_level(), seed=3, width=WIDTH)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def tap(loaded: Loaded, **keys: Any) -> Tap:
    model, tokenizer = loaded
    return Tap(model, model.gpt_neox.layers[1], tokenizer, **{"length": 12, **keys})


def expected(loaded: Loaded, texts: list[str], length: int = 12) -> list[Tensor]:
    """The output of block 1 of each text by itself."""
    model, tokenizer = loaded
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        with torch.no_grad():
            found.append(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0])
    return found


def test_rows_are_those_of_each_text_by_itself_without_padding(loaded: Loaded) -> None:
    texts = [TEXTS[0], TEXTS[1][:9], TEXTS[2]]
    [found] = tap(loaded).rows(texts)
    torch.testing.assert_close(found, torch.cat(expected(loaded, texts)), rtol=1e-4, atol=1e-4)
    ids = [loaded[1](text)["input_ids"] for text in texts]
    torch.testing.assert_close(tap(loaded).rows(ids)[0], found)


def test_first_rows_and_long_ones_are_left_out_where_asked(loaded: Loaded) -> None:
    rows = expected(loaded, TEXTS[:3])
    [found] = tap(loaded, skip_bos=True).rows(TEXTS[:3])
    torch.testing.assert_close(found, torch.cat([one[1:] for one in rows]), rtol=1e-4, atol=1e-4)
    whole = torch.cat(rows)
    length = whole.norm(dim=1)
    [found] = tap(loaded, norm_multiple=1.1).rows(TEXTS[:3])
    kept = length <= 1.1 * length.median()
    assert 0 < int((~kept).sum()) < len(whole)
    torch.testing.assert_close(found, whole[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", ["in", "in_and_out", "in_to_out"])
def test_what_a_module_takes_stands_beside_what_it_gives(ends: str, loaded: Loaded) -> None:
    model, tokenizer = loaded
    mlp = model.gpt_neox.layers[1].mlp
    parts = Tap(model, mlp, tokenizer, ends, 12).rows(TEXTS[:3])  # type: ignore[arg-type]
    assert len(parts) == (1 if ends == "in" else 2)
    if len(parts) > 1:
        with torch.no_grad():
            torch.testing.assert_close(mlp(parts[0]), parts[1], rtol=1e-4, atol=1e-4)


def sentences(count: int) -> Iterator[str]:
    for number in range(count):
        yield TEXTS[number % len(TEXTS)]


def test_every_row_comes_once_and_the_last_ones_too(loaded: Loaded) -> None:
    count = len(TEXTS)
    pool = Pool(sentences(count), tap(loaded), rows=60, texts_at_once=2, batch=16, seed=1)
    found = list(pool)
    whole = torch.cat(expected(loaded, TEXTS))
    assert [len(one) for one in found[:-1]] == [16] * (len(found) - 1) and 0 < len(found[-1]) <= 16
    torch.testing.assert_close(
        torch.cat(found).sort(0).values, whole.sort(0).values, rtol=1e-4, atol=1e-4
    )  # each column by itself
    assert not torch.allclose(torch.cat(found), whole)  # mixed
    with pytest.raises(StopIteration):
        next(pool)


def test_it_is_refilled_when_fewer_than_half_are_unread(loaded: Loaded) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in sentences(1000):
            read.append(text)
            yield text

    pool = Pool(texts(), tap(loaded), rows=96, texts_at_once=1, batch=16)
    counts, unread = [], []
    for _ in range(8):
        next(pool)
        counts.append(len(read))
        unread.append(pool.unread)
    assert unread[0] >= 96 - 16 and counts[0] == counts[2] < counts[4]  # not before fewer than 48 are left
    assert min(unread) >= 48 - 16


def test_what_cannot_be_is_told(loaded: Loaded) -> None:
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="rows are taken in no such way: middle"):
        Tap(model, model.gpt_neox.layers[0], tokenizer, "middle")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="none of the model's: Linear"):
        Tap(model, nn.Linear(1, 1), tokenizer).rows(TEXTS[:1])
    with pytest.raises(CorpusError, match="no tokens"):
        tap(loaded).rows([""])
    assert path_of(model, model.gpt_neox.layers[1]) == "gpt_neox.layers.1"
    assert list(Pool(iter([]), tap(loaded), 10, 1, 4)) == []


def test_what_passes_is_changed_inside_of_the_block_alone(loaded: Loaded) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for side in ("in", "out"):
            site = Site("x", "gpt_neox.layers.1", side)  # type: ignore[arg-type]
            with splice(model, site, lambda x: x):
                torch.testing.assert_close(model(input_ids=ids).logits, before)
            with splice(model, site, torch.zeros_like):
                changed = model(input_ids=ids).logits
            assert not torch.allclose(changed, before)
        torch.testing.assert_close(model(input_ids=ids).logits, before)


class Named(NamedTuple):
    hidden: Tensor
    more: int


class Giving(nn.Module):
    """A module that gives its rows in some way."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x)


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x, lambda x: (x, 7), lambda x: [x, 7], lambda x: Named(x, 7),
        lambda x: BaseModelOutput(last_hidden_state=x, attentions=(x,)),
    ],
)  # fmt: skip
def test_what_a_module_gives_keeps_its_form(give: Callable[[Tensor], Any]) -> None:
    model, x = nn.Sequential(Giving(give)), torch.ones(1, 2, 3)
    with splice(model, Site("x", "0", "out"), lambda x: 5 * x):
        found = model(x)
    expected = give(5 * x)
    assert type(found) is type(expected)
    if isinstance(found, BaseModelOutput):
        assert torch.equal(found.last_hidden_state, 5 * x) and torch.equal(found.attentions[0], x)
    elif isinstance(found, Tensor):
        assert torch.equal(found, 5 * x)
    else:
        assert torch.equal(found[0], 5 * x) and found[1] == 7


def test_losses_are_the_models_own_where_nothing_is_changed(loaded: Loaded) -> None:
    model, tokenizer = loaded
    texts = [TEXTS[0], TEXTS[1][:9]]
    original, same, zero = losses(tap(loaded), texts, lambda x: x)
    assert original == pytest.approx(same) and zero != pytest.approx(original)
    parts, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:12]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        parts += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    assert original == pytest.approx(parts / tokens, rel=1e-5)
    mlp = model.gpt_neox.layers[1].mlp
    apart = copy.deepcopy(mlp)  # without the hooks that call it
    original, same, _ = losses(Tap(model, mlp, tokenizer, "in_to_out", 12), texts, apart)
    assert same == pytest.approx(original, rel=1e-5)
