"""Tokens of a store as a person reads them, each with the characters that it adds."""

import shutil
from pathlib import Path

from harvest.inspect import table
from shared import models
from tests.harvest.pair import config, harvest
from tests.tiny import save_model, sentencepiece


def shown(home: Path, folder: Path, text: str, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What inspect shows of a store of one text."""
    (folder / "text.txt").write_text(text)
    asked = config(home, folder / "x.zarr", corpus={"path": str(folder / "text.txt"), "id": None})
    asked = asked.model_copy(update={"models": {name: asked.models[name] for name in names}})
    store = harvest(asked)
    tokenizers = {name: models.load_tokenizer(models.resolve(str(home / name))) for name in names}
    records = table(store, range(store.rows), tokenizers)
    return [tuple(record["models"][name]["token"] for name in names) for record in records]


def test_a_character_of_several_tokens_is_shown_at_its_last(home: Path, tmp_path: Path) -> None:
    assert shown(home, tmp_path, "a😀日b", ("llama", "gemma")) == [(c, c) for c in "a😀日b"]


def test_a_model_on_its_own_shows_each_token_and_the_parts_of_a_character(home: Path, tmp_path: Path) -> None:
    assert shown(home, tmp_path, "😀日 the", ("gemma",)) == [
        ("<s>",), *[("\ufffd",)] * 3, ("😀",), *[("\ufffd",)] * 2, ("日",), (" the",),
    ]  # fmt: skip


def test_joined_tokens_are_the_text_also_where_the_decoder_strips_the_first_space(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "llama", "llama", sentencepiece(prepend=True))
    text = "It was  as it is, 日本.\n"
    pieces = [piece for (piece,) in shown(tmp_path, tmp_path, text, ("llama",))]
    assert pieces[0] == "<s>"
    assert "".join(piece for piece in pieces[1:] if piece != "\ufffd") == f" {text}"


def test_a_slow_tokenizer_shows_its_tokens_too(home: Path, tmp_path: Path) -> None:
    slow = shutil.copytree(home / "llama", tmp_path / "llama")
    (slow / "tokenizer.json").unlink()
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert shown(tmp_path, tmp_path, "abc", ("llama",)) == [("a",), ("b",), ("c",), ("</s>",)]
