"""Rows pair tokens behind which every model has read the same text, shown by decoding.

Letters: T tokens of a document in one model, M models, J places.
"""

import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from harvest.align import RULES, WINDOW, complete, greedy, identical, offsets
from harvest.segments import Speller, Tokens
from shared.errors import AlignmentError
from tests.harvest.test_segments import KINDS, decoded, texts
from tests.tiny import TEXTS, hand_made, wordpiece


@pytest.fixture(scope="module")
def spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speller]:
    root = tmp_path_factory.mktemp("align")
    return {name: Speller(kind.load(root / name), "model", name) for name, kind in KINDS.items()}


def tokens(ids: list[int], ends: list[int]) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(ends, np.int32), [b"x"] * len(ids))


def spoken(speller: Speller, text: str) -> dict[int, int]:
    """{characters: tokens} for every prefix of the tokens that ends at a whole character, by joining their bytes."""
    alphabet = {letter: byte for byte, letter in byte_letters().items()}
    found, data = {}, b""
    shift = 0
    pieces = speller.tokenizer.convert_ids_to_tokens(speller.spell(text).ids_T.tolist())
    whole = b"".join(as_bytes(piece, speller.style, alphabet) for piece in pieces)
    if whole != text.encode():
        shift = 1
        assert whole == b" " + text.encode()
    for number, piece in enumerate(pieces, 1):
        data += as_bytes(piece, speller.style, alphabet)
        try:
            prefix = data[shift:].decode()
        except UnicodeDecodeError:
            continue
        if prefix:
            found[len(prefix)] = number
    return found


def as_bytes(piece: str, style: str, alphabet: dict[str, int]) -> bytes:
    if style == "bytes":
        return bytes(alphabet[letter] for letter in piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def byte_letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


@pytest.mark.parametrize("pair", list(combinations(KINDS, 2)), ids=" + ".join)
@given(text=texts)
@settings(deadline=None, max_examples=25)
def test_at_every_place_both_models_have_read_the_same_text_and_no_such_place_is_left_out(
    spellers: dict[str, Speller], pair: tuple[str, str], text: str
) -> None:
    two = [spellers[name] for name in pair]
    read = [speller.spell(text) for speller in two]
    stops_MJ = offsets(read)
    for stops_M in stops_MJ.T.tolist():
        prefixes = [
            decoded(speller, one.ids_T[:stop].tolist(), text)
            for speller, one, stop in zip(two, read, stops_M, strict=True)
        ]
        assert prefixes[0] == prefixes[1]
        assert text.startswith(prefixes[0])
    one, other = (spoken(speller, text) for speller in two)
    common = sorted(one.keys() & other.keys())
    assert stops_MJ.tolist() == [[one[end] for end in common], [other[end] for end in common]]


@pytest.mark.parametrize("text", TEXTS)
def test_three_models_pair_where_all_three_have_read_the_same(spellers: dict[str, Speller], text: str) -> None:
    three = [spellers[name] for name in ("bytes", "pieces", "pieces, space before")]
    stops_MJ = offsets([speller.spell(text) for speller in three])
    one, two, other = (spoken(speller, text) for speller in three)
    common = sorted(one.keys() & two.keys() & other.keys())
    assert stops_MJ.T.tolist() == [[one[end], two[end], other[end]] for end in common]
    assert common[-1] == len(text)


def test_a_year_in_one_token_pairs_with_the_last_of_its_two(tmp_path: Path) -> None:
    one = Speller(hand_made(["In", " ", "1989", "was"]).load(tmp_path / "a"), "model", "a")
    two = Speller(hand_made(["In", " ", "198", "9", "was"]).load(tmp_path / "b"), "model", "b")
    read = [speller.spell("In 1989 was") for speller in (one, two)]
    assert [len(tokens.ids_T) for tokens in read] == [5, 6]
    assert offsets(read).tolist() == [[1, 2, 3, 4, 5], [1, 2, 4, 5, 6]]


def test_tokens_whose_ends_never_meet_but_at_the_last_give_one_place(tmp_path: Path) -> None:
    one = Speller(hand_made(["ab", "cd", "e"]).load(tmp_path / "a"), "model", "a")
    two = Speller(hand_made(["a", "bc", "de"]).load(tmp_path / "b"), "model", "b")
    assert offsets([speller.spell("abcde") for speller in (one, two)]).tolist() == [[3], [3]]


def test_the_tokens_inside_a_character_never_pair(spellers: dict[str, Speller]) -> None:
    read = [spellers[name].spell("😀日") for name in ("bytes", "pieces")]
    assert read[0].ends_T.tolist() == [-1, -1, -1, 1, -1, -1, 2]
    stops_MJ = offsets(read)
    assert [one.ends_T[stops_J - 1].tolist() for one, stops_J in zip(read, stops_MJ, strict=True)] == [[1, 2], [1, 2]]


def test_of_several_tokens_with_one_end_the_last_pairs() -> None:
    pair = [tokens([5, 6, 7, 8], [1, 1, 3, 3]), tokens([5, 6, 7], [1, 2, 3])]
    assert offsets(pair).tolist() == [[2, 4], [1, 3]]


def test_special_tokens_never_pair(spellers: dict[str, Speller]) -> None:
    text = "a<s>b<|endoftext|>c"
    read = [spellers[name].spell(text) for name in ("bytes", "pieces")]
    stops_MJ = offsets(read)
    for speller_name, one, stops_J in zip(("bytes", "pieces"), read, stops_MJ, strict=True):
        assert not np.isin(one.ids_T[stops_J - 1], spellers[speller_name].special).any()
    assert 4 not in read[0].ends_T[stops_MJ[0] - 1].tolist()  # <s> is special to one of them
    assert read[0].ends_T[stops_MJ[0] - 1].tolist()[-1] == len(text)


def test_word_pieces_pair_with_bytes_at_the_ends_of_words(spellers: dict[str, Speller], tmp_path: Path) -> None:
    words = Speller(wordpiece(lower=True).load(tmp_path), "model", "w")
    text = "It was 1989, AS it is"
    pair = [words.spell(text), spellers["bytes"].spell(text)]
    stops_MJ = offsets(pair)
    ends = [one.ends_T[stops_J - 1].tolist() for one, stops_J in zip(pair, stops_MJ, strict=True)]
    assert ends[0] == ends[1]
    assert {2, 6, 11, 12, 15, 18, 21} <= set(ends[0])
    assert not {3, 7, 13} & set(ends[0])  # a token of white space ends nowhere in the other model


@pytest.mark.parametrize("rule", RULES)
def test_a_document_without_tokens_has_no_place(rule: str) -> None:
    assert RULES[rule]([tokens([], []), tokens([], [])]).shape == (2, 0)


def test_models_without_a_common_end_have_no_place() -> None:
    assert offsets([tokens([1, 2], [1, 3]), tokens([1, 2], [2, -1])]).shape == (2, 0)


def test_identical_takes_every_token() -> None:
    assert identical([tokens([4, 5, 6], [1, -1, 2])]).tolist() == [[1, 2, 3]]
    assert identical([tokens([4, 5, 6], [-1] * 3)] * 3).tolist() == [[1, 2, 3]] * 3


def test_identical_refuses_other_ids() -> None:
    for other in ([4, 5], [4, 5, 7], [4, 5, 6, 6]):
        with pytest.raises(AlignmentError, match=r"do not give the same ids: model 1 and model 3. Set rows.align") as e:
            identical([tokens([4, 5, 6], [1, 2, 3])] * 2 + [tokens(other, [1] * len(other))])
        assert e.value.exit_code == 2


# --- hard cases, both rules -----------------------------------------------------------------------------------------

Pieces = list[tuple[str | bytes, int]]  # a token's bytes, and the characters up to its end

# {what: (one model, the other, stops of offsets, stops of greedy)}
HARD: dict[str, tuple[Pieces, Pieces, list[list[int]], list[list[int]]]] = {
    "a year in one token and in two": (
        [("In", 2), (" ", 3), ("1989", 7)],
        [("In", 2), (" ", 3), ("198", 6), ("9", 7)],
        [[1, 2, 3], [1, 2, 4]], [[1, 3], [1, 4]],
    ),
    "a year that both split, each in its way": (
        [("In", 2), (" 19", 5), ("89", 7), (".", 8)],
        [("In", 2), (" 198", 6), ("9", 7), (".", 8)],
        [[1, 3, 4], [1, 3, 4]], [[1, 3, 4], [1, 3, 4]],
    ),
    "CJK without spaces, one letter in bytes": (
        [("日本", 2), ("語", 3), ("の文", 5)],
        [("日", 1), ("本語", 3), ("の", 4), (b"\xe6\x96", -1), (b"\x87", 5)],
        [[2, 3], [2, 5]], [[2, 3], [2, 5]],
    ),
    "an emoji across byte tokens": (
        [("a", 1), (b"\xf0\x9f", -1), (b"\x98\x80", 2), ("b", 3)],
        [("a", 1), (b"\xf0", -1), (b"\x9f", -1), (b"\x98", -1), (b"\x80", 2), ("b", 3)],
        [[1, 3, 4], [1, 5, 6]], [[1, 3, 4], [1, 5, 6]],
    ),
    "an emoji whose bytes share a token with its neighbours": (
        [(b"a\xf0\x9f", -1), (b"\x98\x80b", 3), ("c", 4)],
        [("a", 1), ("😀", 2), ("bc", 4)],
        [[3], [3]], [[3], [3]],
    ),
    "a combining mark with its letter and without": (
        [("caf", 3), ("e\u0301", 5), ("!", 6)],
        [("cafe", 4), ("\u0301", 5), ("!", 6)],
        [[2, 3], [2, 3]], [[2, 3], [2, 3]],
    ),
    "a combining mark with the next letter": (
        [("n", 1), ("\u0303", 2), ("o", 3)],
        [("n", 1), ("\u0303o", 3)],
        [[1, 3], [1, 2]], [[1, 3], [1, 2]],
    ),
    "a BOS in one model only": (
        [("", -1), ("a", 1), (" b", 3)],
        [("a", 1), (" b", 3)],
        [[2, 3], [1, 2]], [[2, 3], [1, 2]],
    ),
    "a run of white space in one token and in two": (
        [("a", 1), ("   ", 4), ("b", 5)],
        [("a", 1), (" ", 2), ("  ", 4), ("b", 5)],
        [[1, 2, 3], [1, 3, 4]], [[1, 3], [1, 4]],
    ),
    "a run of white space that is never cut at one place": (
        [("a", 1), ("  ", 3), ("\n\n", 5), (" b", 7)],
        [("a ", 2), (" \n", 4), ("\n ", 6), ("b", 7)],
        [[4], [4]], [[1, 4], [1, 4]],
    ),
    "white space alone": ([("  \n", 3)], [("  ", 2), ("\n", 3)], [[1], [2]], [[], []]),
    "an empty document": ([], [], [[], []], [[], []]),
    "a document that is empty to one model": ([("\u200b", 1)], [], [[], []], [[], []]),
}  # fmt: skip


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("rule", ["offsets", "greedy"])
def test_hard_cases_by_hand(what: str, rule: str) -> None:
    one, two, by_offsets, by_greedy = HARD[what]
    pair = [with_ends(one), with_ends(two)]
    stops = by_offsets if rule == "offsets" else by_greedy
    assert RULES[rule](pair).tolist() == stops
    assert RULES[rule](pair[::-1]).tolist() == stops[::-1]


def with_ends(pieces: Pieces) -> Tokens:
    data = [piece if isinstance(piece, bytes) else piece.encode() for piece, _ in pieces]
    ends_T = np.array([end for _, end in pieces], np.int32)
    text = b"".join(data).decode()
    assert [end for end in ends_T.tolist() if end >= 0] == sorted(set(ends_T.tolist()) - {-1})
    for number, end in enumerate(ends_T.tolist(), 1):  # the table's own ends
        assert end < 0 or b"".join(data[:number]).decode() == text[:end]
    return Tokens(np.arange(len(data), dtype=np.int32), ends_T, data)


@pytest.mark.parametrize(
    "text", ["日本語の文章。", "😀👍🏽 👨‍👩‍👧 🇫🇷", "nai\u0308ve cafe\u0301", "In 1989, 198 of 9", "a \t\n\n   b"]
)
@pytest.mark.parametrize("rule", ["offsets", "greedy"])
def test_the_last_place_of_a_hard_text_is_its_end_in_real_tokens(
    spellers: dict[str, Speller], text: str, rule: str
) -> None:
    for names in (("bytes", "pieces"), ("bytes, trimmed offsets", "pieces, space before")):
        read = [spellers[name].spell(text) for name in names]
        stops_MJ = RULES[rule](read)
        assert stops_MJ[:, -1].tolist() == [len(one.ids_T) for one in read]
        ends = [one.ends_T[stops_J - 1].tolist() for one, stops_J in zip(read, stops_MJ, strict=True)]
        assert -1 not in ends[0] + ends[1]
        assert ends[0] == ends[1] or rule == "greedy"


# --- greedy ---------------------------------------------------------------------------------------------------------


def of(*pieces: str | bytes) -> Tokens:
    """Tokens that spell these pieces; an empty one is special."""
    data = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    return Tokens(np.arange(len(data), dtype=np.int32), np.full(len(data), -1, np.int32), data)


@pytest.mark.parametrize(
    ("one", "two", "stops"),
    [
        (["In", " 1989"], ["In", " 198", "9"], [[1, 2], [1, 3]]),
        (["ab", "cd", "e"], ["a", "bc", "de"], [[3], [3]]),  # windows on both sides
        (["", "a", "b"], ["a", "", "b", ""], [[2, 3], [1, 3]]),  # special tokens stand anywhere
        (["a", " ", "\n", "b"], ["a", " \n", "b"], [[1, 4], [1, 3]]),  # white space is skipped
        (["a", "\n", "b"], ["a", "\nb"], [[1, 3], [1, 2]]),
        (["The", " END"], ["the", " end"], [[1, 2], [1, 2]]),  # case does not count
        (["\ufb01ne"], ["fi", "ne"], [[1], [2]]),  # nor do forms of a letter
        (["a", "xx", "c"], ["a", "yy", "c"], [[1], [1]]),  # what follows a dead end is left out
        (["a", "b", "c"], ["a", "bX", "c"], [[1], [1]]),
        (["a", "  "], ["a"], [[1], [1]]),  # a document that ends with white space
        ([" "], ["a"], [[], []]),
        ([b"\xf0\x9f", b"\x98\x80"], [b"\xf0", b"\x9f\x98\x80"], [[2], [2]]),  # whole characters alone compare
        ([b"\xf0\x9f", b"\x98\x80"], [b"\xe6\x97", b"\xa5"], [[], []]),  # both would show as U+FFFD
        (["abc", "d"], ["ab", "cd"], [[2], [2]]),  # the one that is longer grows, too, where only it can
    ],
)
def test_greedy_places_by_hand(one: list[str], two: list[str], stops: list[list[int]]) -> None:
    assert greedy([of(*one), of(*two)]).tolist() == stops
    assert greedy([of(*two), of(*one)]).tolist() == stops[::-1]


def test_greedy_aligns_three_models_and_one() -> None:
    three = [of("ab", "cd", " e"), of("a", "bcd", " e"), of("abc", "d", " ", "e")]
    assert greedy(three).tolist() == [[2, 3], [2, 3], [2, 4]]
    assert greedy([of("a", " ", "b")]).tolist() == [[1, 3]]


def test_a_window_that_never_closes_ends_after_so_many_tokens() -> None:
    one, two = of(*["a"] * 500), of("b", *["a"] * 500)
    assert greedy([one, two]).shape == (2, 0)
    long = ["a"] * WINDOW
    assert greedy([of(*long), of("".join(long))]).tolist() == [[WINDOW], [1]]
    assert greedy([of(*long, "a"), of("".join(long) + "a")]).shape == (2, 0)


@pytest.mark.parametrize(
    ("one", "two", "whole"),
    [(["a", " "], ["a", ""], True), (["a", "x"], ["a", "y"], False), ([], [], True), (["x"], ["y"], False)],
)
def test_a_document_is_complete_where_no_content_is_left_behind_the_last_place(
    one: list[str], two: list[str], whole: bool
) -> None:
    pair = [of(*one), of(*two)]
    assert complete(pair, greedy(pair)) == whole


@pytest.mark.parametrize("pair", list(combinations(KINDS, 2)), ids=" + ".join)
@given(text=texts)
@settings(deadline=None, max_examples=25)
def test_offsets_and_greedy_agree_where_nothing_diverges(
    spellers: dict[str, Speller], pair: tuple[str, str], text: str
) -> None:
    """A greedy place whose tokens end at one character is one of offsets, and greedy has all of those up to its end
    that hold content on both sides and begin where the other's window begins."""
    read = [spellers[name].spell(text) for name in pair]
    known = set(map(tuple, offsets(read).T.tolist()))
    found = greedy(read).T.tolist()
    for stops in found:
        ends = {int(one.ends_T[stop - 1]) for one, stop in zip(read, stops, strict=True)}
        assert len(ends) > 1 or -1 in ends or tuple(stops) in known
        assert len({_letters(one, stop) for one, stop in zip(read, stops, strict=True)}) == 1
    single = [stops for stops in found if all(stop > 0 for stop in stops)]
    assert found == sorted(single)


def _letters(one: Tokens, stop: int) -> str:
    text = b"".join(one.pieces[:stop]).decode(errors="replace")
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


@pytest.mark.parametrize("text", [text for text in TEXTS if text.isascii()])
def test_on_plain_text_greedy_finds_every_place_of_offsets_that_holds_more_than_white_space(
    spellers: dict[str, Speller], text: str
) -> None:
    for pair in combinations(("bytes", "pieces"), 2):
        read = [spellers[name].spell(text) for name in pair]
        content = [
            stops
            for stops in offsets(read).T.tolist()
            if all(one.pieces[stop - 1].strip() for one, stop in zip(read, stops, strict=True))
        ]
        assert set(map(tuple, content)) <= set(map(tuple, greedy(read).T.tolist()))
