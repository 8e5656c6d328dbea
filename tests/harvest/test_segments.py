"""Where tokens end, what stands around a segment, and where documents are cut.

Letters: T tokens of a document in one model, M models, J places.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from harvest.segments import Speller, cut
from shared import models
from shared.errors import ModelError
from tests.tiny import TEXTS, Spelling, byte_level, hand_made, sentencepiece, wordpiece

KINDS = {
    "bytes": byte_level(),
    "bytes, trimmed offsets": byte_level(trim_offsets=True),
    "bytes, space before": byte_level(prefix_space=True),
    "pieces": sentencepiece(),
    "pieces, space before": sentencepiece(prepend=True),
}

PIECES = [
    *[
        "the",
        " the",
        "The",
        " jumps",
        "fox",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "İ",
        "日本",
        "語",
        "한국",
        "한",
        "😀",
        "👍🏽",
    ],
    *[
        "👨‍👩‍👧",
        "🇫🇷",
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "1989",
        "198",
        "9",
        "0",
    ],
    *["<0x41>", "<", ">", "\x00", "\x7f", "\ufffd", "Ġ", "Ċ", "ﬁ", "Ⅷ", "...", "'s", "can't"],
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map(
    lambda parts: "".join(parts).replace("▁", "")  # which stands for a space
)


@pytest.fixture(scope="module")
def spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speller]:
    root = tmp_path_factory.mktemp("spellers")
    return {name: Speller(kind.load(root / name), "model", name) for name, kind in KINDS.items()}


def load(spelling: Spelling, folder: Path, bos: str = "model") -> Speller:
    return Speller(spelling.load(folder), bos, "m")


def decoded(speller: Speller, ids: list[int], text: str) -> str:
    """What the tokenizer itself makes of `ids`, without the space that it put before the text."""
    found = str(speller.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    whole = str(speller.tokenizer.decode(speller.spell(text).ids_T.tolist(), clean_up_tokenization_spaces=False))
    return found[len(whole) - len(text) :]


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(deadline=None, max_examples=60)
def test_a_tokens_end_counts_the_characters_that_decoding_up_to_it_gives(
    spellers: dict[str, Speller], kind: str, text: str
) -> None:
    speller = spellers[kind]
    tokens = speller.spell(text)
    assert tokens.spelled == (decoded(speller, tokens.ids_T.tolist(), text) == text)
    assert tokens.spelled  # these tokenizers change nothing
    for number, end in enumerate(tokens.ends_T.tolist()):
        before = decoded(speller, tokens.ids_T[: number + 1].tolist(), text)
        if end >= 0:
            assert before == text[:end]
        else:  # inside a character, or the space that was put before the text
            assert before not in {text[: n + 1] for n in range(len(text))} or before.endswith("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_last_token_of_a_text_ends_with_it(spellers: dict[str, Speller], kind: str, text: str) -> None:
    assert spellers[kind].spell(text).ends_T[-1] == len(text)


def test_of_the_tokens_of_a_split_character_only_the_last_has_an_end(spellers: dict[str, Speller]) -> None:
    for name in ("bytes", "pieces"):
        tokens = spellers[name].spell("a😀b")
        assert tokens.ends_T.tolist() == [1, -1, -1, -1, 2, 3], name


def test_trimmed_offsets_are_not_believed(spellers: dict[str, Speller]) -> None:
    plain, trimmed = (spellers[name].spell("a   b \n") for name in ("bytes", "bytes, trimmed offsets"))
    assert trimmed.ends_T.tolist() == plain.ends_T.tolist()
    assert trimmed.ends_T[-1] == 7  # where its offsets end at 5


def test_a_space_that_the_tokenizer_puts_before_the_text_is_no_character_of_it(spellers: dict[str, Speller]) -> None:
    for name in ("bytes, space before", "pieces, space before"):
        assert spellers[name].spell("fox").ends_T[-1] == 3
        lone = spellers[name].spell("😀")  # the space is a token of its own
        assert lone.ends_T[0] == -1
        assert lone.ends_T[-1] == 1
    assert spellers["pieces, space before"].spell(" fox").ends_T[-1] == 4


def test_special_tokens_in_the_text_have_no_end(spellers: dict[str, Speller]) -> None:
    tokens = spellers["pieces"].spell("a</s>a")
    assert tokens.ids_T[1] == 2
    assert tokens.ends_T.tolist() == [1, -1, 6]
    tokens = spellers["bytes"].spell("a<|endoftext|>a")
    assert tokens.ends_T.tolist() == [1, -1, 15]


def test_added_tokens_that_are_not_special_end_like_others(tmp_path: Path) -> None:
    for name, spelling in {"bytes": byte_level(), "pieces": sentencepiece()}.items():
        tokenizer = spelling.load(tmp_path / name)
        tokenizer.add_tokens(["\n\n\n", "é日"])
        tokens = Speller(tokenizer, "model", "m").spell("a\n\n\né日a")
        assert tokens.ends_T.tolist() == [1, 4, 6, 7], name


def test_an_empty_text_has_no_tokens(spellers: dict[str, Speller]) -> None:
    for name, speller in spellers.items():
        if "space" not in name:
            assert speller.spell("").ids_T.tolist() == [], name
            assert speller.spell("").ends_T.tolist() == [], name


def test_the_types_are_those_of_the_store(spellers: dict[str, Speller]) -> None:
    tokens = spellers["bytes"].spell("abc")
    assert (tokens.ids_T.dtype, tokens.ends_T.dtype) == (np.int32, np.int32)


def normalised(folder: Path) -> Speller:
    tokenizer = byte_level().load(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return Speller(tokenizer, "model", "m")


def test_a_text_that_a_normaliser_changes_is_not_spelled(tmp_path: Path) -> None:
    speller = normalised(tmp_path)
    assert speller.spell("café").spelled
    changed = speller.spell("cafe\u0301 and more")
    assert not changed.spelled
    assert set(changed.ends_T.tolist()) == {-1}
    assert len(changed.ids_T) > 4  # the tokens are there all the same, for a model on its own


def test_a_literal_stand_in_for_a_space_is_not_spelled(spellers: dict[str, Speller]) -> None:
    assert not spellers["pieces"].spell("a▁b").spelled
    assert spellers["bytes"].spell("a▁b").spelled


# --- ends by offsets, for tokenizers without white space in their tokens ---------------------------------------------


def test_word_pieces_end_where_their_offsets_say(tmp_path: Path) -> None:
    speller = load(wordpiece(lower=False), tmp_path)
    assert speller.style == "offsets"
    text = "It was  as it\nis."
    tokens = speller.spell(text)
    assert speller.tokenizer.convert_ids_to_tokens(tokens.ids_T.tolist()) == ["It", "was", "as", "it", "is", "."]
    assert [text[:end] for end in tokens.ends_T] == [
        "It", "It was", "It was  as", "It was  as it", "It was  as it\nis", text,
    ]  # fmt: skip


@pytest.mark.parametrize("lower", [True, False])
@given(text=texts)
@settings(deadline=None, max_examples=80)
def test_a_word_piece_ends_where_the_text_up_to_there_normalises_to_the_pieces(
    word_spellers: dict[bool, Speller], lower: bool, text: str
) -> None:
    speller = word_spellers[lower]
    backend = speller.tokenizer.backend_tokenizer
    tokens = speller.spell(text)
    pieces = speller.tokenizer.convert_ids_to_tokens(tokens.ids_T.tolist())
    spelled = ""
    assert tokens.spelled
    assert np.all(np.diff(tokens.ends_T[tokens.ends_T >= 0]) > 0)
    for piece, end in zip(pieces, tokens.ends_T.tolist(), strict=True):
        if piece == "[UNK]":
            assert end == -1
            return
        spelled += piece.removeprefix("##") if piece != "##" else piece
        if end >= 0:
            assert "".join(backend.normalizer.normalize_str(text[:end]).split()) == spelled


@pytest.fixture(scope="module")
def word_spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Speller]:
    root = tmp_path_factory.mktemp("words")
    return {lower: load(wordpiece(lower=lower), root / str(lower)) for lower in (True, False)}


def test_pieces_of_one_character_share_its_end_and_only_the_last_has_it(word_spellers: dict[bool, Speller]) -> None:
    tokenizer = word_spellers[True].tokenizer
    tokens = word_spellers[True].spell("한")  # lower-casing decomposes it into three letters
    if len(tokens.ids_T) > 1:
        assert tokens.ends_T.tolist() == [-1] * (len(tokens.ids_T) - 1) + [1], tokenizer.tokenize("한")


# --- around a segment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "bos", "around"),
    [
        (byte_level(), "model", ([], [])),
        (sentencepiece(), "model", ([1], [])),
        (wordpiece(), "model", ([2], [3])),
        (byte_level(prefix_space=True), "model", ([], [])),
        (sentencepiece(prepend=True), "model", ([1], [])),
        (sentencepiece(), "never", ([], [])),
        (wordpiece(), "never", ([], [])),
        (sentencepiece(), "always", ([1], [])),
    ],
)
def test_what_stands_around_a_segment_is_what_the_tokenizer_adds_its_bos_or_nothing(
    tmp_path: Path, spelling: Spelling, bos: str, around: tuple[list[int], list[int]]
) -> None:
    speller = load(spelling, tmp_path, bos)
    assert (speller.prefix, speller.suffix) == around


@pytest.mark.parametrize("spelling", [byte_level(), wordpiece()])
def test_a_bos_cannot_always_stand_before_the_segments_of_a_tokenizer_without_one(
    tmp_path: Path, spelling: Spelling
) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer has no BOS token: m. Set rows.bos to model or never"):
        load(spelling, tmp_path, "always")


def test_a_slow_tokenizer_gives_ids_and_no_ends(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    speller = Speller(models.load_tokenizer(models.Checkpoint("m", tmp_path)), "model", "m")
    tokens = speller.spell("né")
    assert speller.style == "none"
    assert (speller.prefix, speller.suffix) == ([], [1])
    assert tokens.ids_T.tolist() == [ord("n") + 3, 0xC3 + 3, 0xA9 + 3]
    assert tokens.ends_T.tolist() == [-1, -1, -1]


def test_hand_made_words_are_split_as_these_tests_mean(tmp_path: Path) -> None:
    assert load(hand_made(["198", "9", "1989"]), tmp_path / "a").spell("19891989").ends_T.tolist() == [4, 8]
    assert load(hand_made(["198", "9"], bos=True), tmp_path / "b").spell("1989").ends_T.tolist() == [3, 4]


# --- cuts -----------------------------------------------------------------------------------------------------------


@st.composite
def documents(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    count, places = draw(st.integers(1, 3)), draw(st.integers(0, 14))
    steps = st.lists(st.integers(1, 5), min_size=places, max_size=places)
    stops_MJ = np.array([np.cumsum(draw(steps)) for _ in range(count)], np.int64).reshape(count, places)
    return stops_MJ, draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))


def plainly(stops_MJ: np.ndarray, limits: list[int]) -> list[tuple[int, int, list[int]]]:
    """The rule, one place at a time."""
    found, start, first = [], [0] * len(limits), 0
    while first < stops_MJ.shape[1]:
        last = first
        while last < stops_MJ.shape[1] and fits(stops_MJ[:, last], start, limits):
            last += 1
        if last > first:
            found.append((first, last, start))
        else:
            last += 1
        start, first = stops_MJ[:, last - 1].tolist(), last
    return found


def fits(stop_M: Any, start_M: Any, limits: list[int]) -> bool:
    return all(stop - start <= limit for stop, start, limit in zip(stop_M, start_M, limits, strict=True))


@given(documents())
def test_a_document_is_cut_as_the_rule_says(document: tuple[np.ndarray, list[int]]) -> None:
    stops_MJ, limits = document
    assert [(first, last, start_M.tolist()) for first, last, start_M in cut(stops_MJ, limits)] == plainly(*document)


@given(documents())
def test_segments_fit_are_disjoint_and_leave_out_only_what_is_out_of_reach(
    document: tuple[np.ndarray, list[int]],
) -> None:
    stops_MJ, limits = document
    places: list[int] = []
    reached_M = np.zeros(len(limits), np.int64)
    for first, last, start_M in cut(stops_MJ, limits):
        assert fits(stops_MJ[:, last - 1], start_M, limits)
        assert (start_M >= reached_M).all()
        assert (start_M < stops_MJ[:, first]).all()
        if last < stops_MJ.shape[1]:  # as many places as fit
            assert not fits(stops_MJ[:, last], start_M, limits)
        places += range(first, last)
        reached_M = stops_MJ[:, last - 1]
    assert places == sorted(set(places))
    for left_out in sorted(set(range(stops_MJ.shape[1])) - set(places)):
        before_M = stops_MJ[:, left_out - 1] if left_out else np.zeros(len(limits), np.int64)
        assert not fits(stops_MJ[:, left_out], before_M, limits)


def test_a_document_is_cut_where_all_models_fit() -> None:
    stops_MJ = np.array([[1, 2, 3, 4, 5, 6], [2, 4, 5, 6, 7, 8]])
    assert [(a, b, s.tolist()) for a, b, s in cut(stops_MJ, [3, 4])] == [(0, 2, [0, 0]), (2, 5, [2, 4]), (5, 6, [5, 7])]


def test_a_place_that_no_segment_can_reach_is_skipped_with_the_tokens_up_to_it() -> None:
    stops_MJ = np.array([[1, 9, 10], [1, 2, 3]])
    assert [(a, b, s.tolist()) for a, b, s in cut(stops_MJ, [4, 4])] == [(0, 1, [0, 0]), (2, 3, [9, 2])]
    assert list(cut(stops_MJ, [0, 4])) == []
