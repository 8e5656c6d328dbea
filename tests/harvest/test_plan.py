"""The plan fixes every row, shard and batch, and keeps its promises over all cases.

Letters: N rows, G segments, J places, T tokens of one model.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvest import plan
from harvest.config import HarvestConfig
from harvest.corpus import Document
from harvest.draft import Drafter, key_of, piece
from harvest.plan import Plan
from harvest.segments import Speller
from shared.errors import AlignmentError
from shared.flags import BOS, FIRST, SPECIAL
from shared.source import Source
from tests.tiny import TEXTS, byte_level, hand_made, sentencepiece, wordpiece

DOCUMENTS = [Document(f"d{number}", text) for number, text in enumerate(TEXTS)]
PAIR = ("bytes", "pieces")
SOURCES = {
    "bytes": Source("bytes", "bytes", "resid.1", 32),
    "pieces": Source("pieces", "pieces", "resid.1", 24),
    "words": Source("words", "words", "resid.1", 8),
}

Spellers = Mapping[str, Speller]
Tables = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speller]:
    root = tmp_path_factory.mktemp("plan")
    kinds = {"bytes": byte_level(), "pieces": sentencepiece(), "words": wordpiece()}
    return {name: Speller(kind.load(root / name), "model", name) for name, kind in kinds.items()}


def config(**tables: Any) -> HarvestConfig:
    return HarvestConfig.model_validate({"models": {"m": {"path": "p", "sites": ["resid.1"]}}, **tables})


def build(
    spellers: Spellers, names: Sequence[str] = PAIR, documents: Sequence[Document] = DOCUMENTS,
    align: str = "offsets", limit: int = 32, **tables: Any,
) -> Plan:  # fmt: skip
    chosen = {name: spellers[name] for name in names}
    sources = [SOURCES.get(name, Source(name, name, "resid.1", 8)) for name in names]
    return assembled([documents], chosen, sources, limit, config(**tables), align)


def assembled(
    groups: Sequence[Sequence[Document]], spellers: Spellers, sources: Sequence[Source], limit: int,
    settings: HarvestConfig, align: str, shuffle: bool = False,
) -> Plan:  # fmt: skip
    """A plan of these documents, a piece of each group, in the order in which they are given unless shuffled."""
    drafter = Drafter(spellers, dict.fromkeys(spellers, limit), settings.rows, align)
    pieces, number = [], 0
    for group in groups:
        drafts = [drafter.draft(document, place) for place, document in enumerate(group, number)]
        pieces.append(piece(drafts, list(spellers), settings.rows.seed))
        if not shuffle:
            pieces[-1]["key"] = np.array([f"{draft.number:032d}" for draft in drafts], "S32")
        number += len(group)
    return plan.build(pieces, list(spellers), sources, settings, align)


def of_segment(tables: Tables, model: str, segment: int) -> np.ndarray:
    start, stop = tables[f"tokens/{model}/segment"][segment : segment + 2]
    return tables[f"tokens/{model}/id"][start:stop]


def rows_of(tables: Tables, segment: int) -> range:
    return range(*tables["segments/row"][segment : segment + 2].tolist())


# --- the tables -----------------------------------------------------------------------------------------------------


def stated_tables(models: Sequence[str]) -> dict[str, str]:
    """{array: dtype} of what STORE.md says that the plan writes."""
    text = (resources.files("shared") / "STORE.md").read_text(encoding="utf-8")
    lines = re.findall(r"^  ((?:rows|tokens|segments|documents|batches)/\S+)\s+(\w+)\s+\[", text, re.MULTILINE)
    return {name.replace("<model>", model): dtype for name, dtype in lines for model in models}


@pytest.mark.parametrize("align", ["offsets", "identical"])
def test_the_tables_are_those_of_the_format_with_its_types(spellers: Spellers, align: str) -> None:
    names = PAIR if align == "offsets" else ("pieces",)
    stated = stated_tables(names)
    assert len(stated) == 7 + 9 * len(names)
    tables = build(spellers, names, align=align).tables
    assert {name: str(values.dtype) for name, values in tables.items()} == stated
    assert all(values.ndim == 1 for values in tables.values())


def test_every_table_has_the_length_that_the_format_says(spellers: Spellers) -> None:
    made = build(spellers, store={"shard_bytes": 4096, "chunk_bytes": 1024})
    tables, summary = made.tables, made.summary
    rows, segments, documents = summary["rows"], summary["segments"], summary["documents"]
    assert len(tables["rows/document"]) == rows
    assert len(tables["segments/document"]) == segments == len(tables["segments/row"]) - 1
    assert len(tables["documents/split"]) == documents == len(tables["documents/row"]) - 1
    assert len(tables["documents/id_end"]) == documents
    assert tables["documents/id"].tobytes().decode() == "".join(f"d{n}" for n in range(documents))
    for model in PAIR:
        assert len(tables[f"rows/{model}/token"]) == rows
        assert len(tables[f"tokens/{model}/id"]) == summary["tokens"][model] == tables[f"tokens/{model}/segment"][-1]
        assert len(tables[f"tokens/{model}/end"]) == summary["tokens"][model]
        assert len(tables[f"tokens/{model}/segment"]) == segments + 1
        assert len(tables[f"batches/{model}/shard"]) == summary["shards"] + 1
        assert tables[f"batches/{model}/end"][-1] == len(tables[f"batches/{model}/segment"])


@pytest.mark.parametrize("align", ["offsets", "identical"])
@pytest.mark.parametrize("limit", [6, 32, 1000])
def test_every_row_stands_once_in_its_segment_and_its_document(spellers: Spellers, align: str, limit: int) -> None:
    names = PAIR if align == "offsets" else ("pieces",)
    tables = build(spellers, names, align=align, limit=limit).tables
    assert tables["segments/row"][0] == tables["documents/row"][0] == 0
    assert tables["segments/row"][-1] == tables["documents/row"][-1] == len(tables["rows/document"])
    assert (np.diff(tables["segments/row"]) > 0).all()
    for segment, document in enumerate(tables["segments/document"].tolist()):
        rows = rows_of(tables, segment)
        assert set(tables["rows/document"][rows.start : rows.stop].tolist()) == {document}
        for model in names:
            start, stop = tables[f"tokens/{model}/segment"][segment : segment + 2]
            token_N = tables[f"rows/{model}/token"][rows.start : rows.stop]
            assert (np.diff(token_N) > 0).all()
            assert start <= token_N[0]
            assert token_N[-1] < stop
            assert (token_N - start == tables[f"rows/{model}/position"][rows.start : rows.stop]).all()
            assert stop - start <= limit


def test_every_row_points_at_tokens_that_end_at_the_same_character(spellers: Spellers) -> None:
    tables = build(spellers, limit=20).tables
    ends = [tables[f"tokens/{model}/end"][tables[f"rows/{model}/token"]] for model in PAIR]
    assert np.array_equal(*ends)
    assert (ends[0] > 0).all()


def test_decoding_both_models_tokens_up_to_a_row_gives_the_same_text(spellers: Spellers) -> None:
    made = build(spellers, limit=40)
    assert made.summary["skipped"]["tokens_out_of_reach"] == 0
    for segment in range(made.summary["segments"]):
        for row in rows_of(made.tables, segment):
            texts = {prefix(made.tables, spellers, model, segment, row) for model in PAIR}
            assert len(texts) == 1


def prefix(tables: Tables, spellers: Spellers, model: str, segment: int, row: int) -> str:
    """What the model has read of the document at a row, by decoding all its segments up to there."""
    document = tables["segments/document"][segment]
    first = int(np.searchsorted(tables["segments/document"], document))
    ids: list[int] = []
    for before in range(first, segment):
        ids += of_segment(tables, model, before).tolist()[len(spellers[model].prefix) :]
    read = of_segment(tables, model, segment).tolist()[: tables[f"rows/{model}/position"][row] + 1]
    ids += read[len(spellers[model].prefix) :]
    text = spellers[model].tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    name = tables["documents/id"].tobytes()[: tables["documents/id_end"][document]].decode()[-2:]
    assert next(d.text for d in DOCUMENTS if d.id == name).startswith(text)
    return str(text)


def test_the_segments_of_a_document_hold_its_tokens_in_order(spellers: Spellers) -> None:
    made = build(spellers, limit=16)
    assert made.summary["skipped"]["tokens_out_of_reach"] == 0
    for model in PAIR:
        width = len(spellers[model].prefix)
        for number, document in enumerate(DOCUMENTS):
            of = np.flatnonzero(made.tables["segments/document"] == number)
            joined = np.concatenate([of_segment(made.tables, model, segment)[width:] for segment in of])
            assert joined.tolist() == spellers[model].spell(document.text).ids_T.tolist()


# --- alignment ------------------------------------------------------------------------------------------------------


def test_identical_keeps_every_token_the_special_ones_too(spellers: Spellers) -> None:
    for name, around in (("pieces", 1), ("words", 2), ("bytes", 0)):
        made = build(spellers, (name,), align="identical", limit=12)
        tables, summary = made.tables, made.summary
        assert summary["rows"] == summary["tokens"][name] == summary["read"][name] + around * summary["segments"]
        assert tables[f"rows/{name}/token"].tolist() == list(range(summary["rows"]))
        assert summary["aligned_tokens"] == {name: 1.0}
        assert summary["aligned_documents"] == 1.0


def test_identical_with_two_models_gives_both_the_same_tables(spellers: Spellers) -> None:
    tables = build({**spellers, "twin": spellers["pieces"]}, ("pieces", "twin"), align="identical").tables
    for name in ("rows/{}/token", "rows/{}/position", "rows/{}/flags", "tokens/{}/id", "tokens/{}/segment"):
        assert np.array_equal(tables[name.format("pieces")], tables[name.format("twin")])


def test_identical_refuses_models_with_other_ids(spellers: Spellers, tmp_path: Path) -> None:
    other = Speller(sentencepiece(size=590).load(tmp_path), "model", "other")
    with pytest.raises(AlignmentError, match=r'Set rows.align to "offsets"'):
        build({**spellers, "other": other}, ("pieces", "other"), align="identical")


def test_identical_refuses_models_with_other_special_tokens_around_a_text(spellers: Spellers, tmp_path: Path) -> None:
    bare = Speller(sentencepiece().load(tmp_path), "never", "bare")
    with pytest.raises(AlignmentError, match=r"different special tokens around a text: pieces and bare. Set rows.bos"):
        build({**spellers, "bare": bare}, ("pieces", "bare"), align="identical")


@pytest.mark.parametrize("align", ["offsets", "greedy"])
def test_a_bos_in_one_model_only_pairs_with_nothing_and_moves_its_positions(spellers: Spellers, align: str) -> None:
    tables = build(spellers, documents=[Document("d", "a b")], align=align).tables
    assert tables["rows/bytes/position"].tolist() == [0, 1]
    assert tables["rows/pieces/position"].tolist() == [1, 2]
    assert tables["tokens/pieces/id"].tolist()[0] == 1
    assert tables["tokens/pieces/end"].tolist() == [-1, 1, 3]
    assert tables["tokens/bytes/end"].tolist() == [1, 3]
    assert tables["rows/bytes/flags"].tolist() == [FIRST, 0]
    assert tables["rows/pieces/flags"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("align", "rows_a", "rows_b"),
    [("offsets", [0, 1, 2, 3, 4], [1, 2, 4, 5, 6]), ("greedy", [0, 2, 4], [1, 4, 6])],
)
def test_a_year_in_one_token_pairs_with_the_last_of_its_two(
    tmp_path: Path, align: str, rows_a: list[int], rows_b: list[int]
) -> None:
    one = Speller(hand_made(["In", " ", "1989", "was"]).load(tmp_path / "a"), "model", "a")
    two = Speller(hand_made(["In", " ", "198", "9", "was"], bos=True).load(tmp_path / "b"), "model", "b")
    made = build({"a": one, "b": two}, ("a", "b"), [Document("d", "In 1989 was")], align)
    assert made.tables["rows/a/token"].tolist() == rows_a
    assert made.tables["rows/b/token"].tolist() == rows_b
    assert made.summary["aligned_tokens"] == {"a": len(rows_a) / 5, "b": len(rows_b) / 6}


@pytest.mark.parametrize("align", ["offsets", "greedy"])
def test_empty_documents_between_others_leave_no_trace_but_their_number(spellers: Spellers, align: str) -> None:
    full = [Document("a", "one two"), Document("b", "three")]
    holes = [Document("e", ""), full[0], Document("f", ""), full[1], Document("g", "")]
    with_holes, without = (build(spellers, documents=documents, align=align) for documents in (holes, full))
    assert with_holes.tables.keys() == without.tables.keys()
    assert all(np.array_equal(with_holes.tables[name], without.tables[name]) for name in without.tables)
    assert with_holes.summary["skipped"]["documents_without_rows"] == 3
    assert (with_holes.summary["documents"], with_holes.summary["aligned_documents"]) == (2, 2 / 5)


def test_flags_say_what_a_token_is(spellers: Spellers) -> None:
    text = Document("d", "a</s>b")
    tables = build(spellers, ("pieces",), [text], align="identical", limit=4).tables
    assert tables["tokens/pieces/id"].tolist()[:3] == [1, spellers["pieces"].spell("a").ids_T[0], 2]
    assert tables["rows/pieces/flags"].tolist() == [FIRST | BOS | SPECIAL, 0, SPECIAL, 0]
    words = build(spellers, ("words",), [Document("d", "it is")], align="identical").tables
    assert words["rows/words/flags"].tolist() == [FIRST | SPECIAL, 0, 0, SPECIAL]  # [CLS] is no BOS
    plain = build(spellers, ("bytes",), [Document("d", "a b")], align="identical").tables
    assert plain["rows/bytes/flags"].tolist() == [FIRST, 0]


def test_the_alignment_rates_are_shares_of_the_tokens_that_were_read(spellers: Spellers) -> None:
    made = build(spellers, limit=1000)
    for model in PAIR:
        read = sum(len(spellers[model].spell(document.text).ids_T) for document in DOCUMENTS)
        assert made.summary["read"][model] == read
        assert made.summary["aligned_tokens"][model] == made.summary["rows"] / read
    assert 0.3 < made.summary["aligned_tokens"]["bytes"] < 1
    assert made.summary["aligned_documents"] == 1.0
    assert made.summary["alignment"] == "offsets"


def test_documents_that_give_no_row_are_counted_and_are_not_in_the_store(spellers: Spellers) -> None:
    documents = [Document("a", "one"), Document("b", "c▁d"), Document("c", "<|endoftext|>"), Document("d", "two")]
    made = build(spellers, documents=[*documents[:2], Document("e", "<s>"), documents[3]])
    assert made.tables["documents/id"].tobytes() == b"ad"
    assert made.summary["skipped"] == {
        "documents_not_rendered": 0, "documents_not_spelled": 1, "documents_without_rows": 1,
        "documents_repeated": 0, "tokens_out_of_reach": 0,
    }  # fmt: skip
    assert made.summary["documents"] == 2
    assert made.summary["aligned_documents"] == 0.5


def test_a_model_on_its_own_keeps_documents_that_its_normaliser_changes(spellers: Spellers) -> None:
    made = build(spellers, ("pieces",), [Document("b", "c▁d")], align="identical")
    assert made.summary["rows"] == len(spellers["pieces"].spell("c▁d").ids_T) + 1
    assert set(made.tables["tokens/pieces/end"].tolist()) == {-1}


def test_tokens_out_of_reach_are_counted_also_behind_the_last_segment(tmp_path: Path) -> None:
    one = Speller(hand_made(["a", "bbbbb"]).load(tmp_path / "a"), "model", "a")
    two = Speller(hand_made(["a", "b"]).load(tmp_path / "b"), "model", "b")

    def skipped(text: str) -> tuple[int, float]:
        made = build({"a": one, "b": two}, ("a", "b"), [Document("d", text), Document("e", "a")], limit=3)
        return made.summary["skipped"]["tokens_out_of_reach"], made.summary["aligned_documents"]

    assert skipped("aaa") == (0, 1.0)
    assert skipped("abbbbba") == (6, 0.5)  # 1 token of one model and 5 of the other
    assert skipped("aabbbbb") == (6, 0.5)
    assert skipped("bbbbb") == (6, 0.5)


def test_a_corpus_without_any_row_is_refused(spellers: Spellers) -> None:
    with pytest.raises(AlignmentError, match=r"no row came of the corpus: 1 documents not spelled\. ") as caught:
        build(spellers, documents=[Document("a", "▁")])
    assert caught.value.exit_code == 2
    with pytest.raises(AlignmentError, match=r"no row came of the corpus"):
        build(spellers, ("words",), align="identical", limit=2)  # [CLS] and [SEP] leave no room


# --- counts and splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["offsets", "identical"])
def test_a_row_count_is_met_exactly_and_more_rows_only_add_to_the_end(spellers: Spellers, align: str) -> None:
    names = PAIR if align == "offsets" else ("pieces",)
    whole = build(spellers, names, align=align, limit=9).tables
    rows = len(whole["rows/document"])
    for count in [*range(1, 30), rows - 1, rows, rows + 50]:
        tables = build(spellers, names, align=align, limit=9, rows={"count": count}).tables
        assert len(tables["rows/document"]) == min(count, rows)
        for name in ["rows/document", *(f"rows/{model}/token" for model in names)]:
            assert np.array_equal(tables[name], whole[name][:count])
        for model in names:  # a token is run only if a row's segment needs it
            assert tables[f"tokens/{model}/segment"][-1] == len(tables[f"tokens/{model}/id"])
            assert rows_of(tables, len(tables["segments/document"]) - 1).stop == min(count, rows)


def test_a_document_that_ends_the_count_counts_the_tokens_that_were_looked_at(spellers: Spellers) -> None:
    made = build(spellers, ("bytes",), align="identical", limit=8, rows={"count": 20})
    assert made.summary["read"] == {"bytes": 24}  # three segments of eight


def test_the_split_of_a_document_depends_on_no_other_document_and_no_model(spellers: Spellers) -> None:
    def split(names: Sequence[str], documents: Sequence[Document], align: str) -> dict[str, int]:
        tables = build(spellers, names, documents, align, rows={"held_out": 0.5}).tables
        ends = tables["documents/id_end"].tolist()
        text = tables["documents/id"].tobytes().decode()
        found = [text[a:b] for a, b in pairwise([0, *ends])]
        return dict(zip(found, tables["documents/split"].tolist(), strict=True))

    whole = split(PAIR, DOCUMENTS, "offsets")
    assert set(whole.values()) == {0, 1}
    assert split(("pieces",), DOCUMENTS[::-1], "identical") == whole
    assert split(PAIR, DOCUMENTS[2:5], "offsets") == {name: whole[name] for name in ("d2", "d3", "d4")}


def text_of(tables: Tables) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in tables.items()}


def ids_of(tables: Tables) -> list[str]:
    text = tables["documents/id"].tobytes().decode()
    return [text[start:stop] for start, stop in pairwise([0, *tables["documents/id_end"].tolist()])]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_seed_orders_documents_whatever_order_and_pieces_they_come_in(
    spellers: Spellers, data: st.DataObject
) -> None:
    seed, count = data.draw(st.integers(0, 3)), data.draw(st.none() | st.integers(1, 400))
    asked = config(rows={"seed": seed, "count": count})
    chosen = {name: spellers[name] for name in PAIR}
    sources = [SOURCES[name] for name in PAIR]
    wanted = assembled([DOCUMENTS], chosen, sources, 16, asked, "offsets", shuffle=True)
    ordered = sorted((document.id for document in DOCUMENTS), key=lambda name: key_of(name, seed))
    assert ids_of(wanted.tables) == ordered[: wanted.summary["documents"]]
    mixed = data.draw(st.permutations(DOCUMENTS))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mixed)), max_size=4)))
    groups = [mixed[start:stop] for start, stop in pairwise([0, *cuts, len(mixed)])]
    made = assembled(groups, chosen, sources, 16, asked, "offsets", shuffle=True)
    assert text_of(made.tables) == text_of(wanted.tables)
    assert made.summary == wanted.summary


def test_of_documents_with_one_id_the_first_is_planned_and_the_others_are_counted(spellers: Spellers) -> None:
    twice = [Document("a", "one"), Document("b", "two"), Document("a", "three")]
    settings_ = config()
    made = assembled(
        [twice[:2], twice[2:]], {"bytes": spellers["bytes"]}, [SOURCES["bytes"]], 32, settings_, "identical", True
    )
    assert made.summary["skipped"]["documents_repeated"] == 1
    texts = {spellers["bytes"].tokenizer.decode(of_segment(made.tables, "bytes", g).tolist()) for g in range(2)}
    assert texts == {"one", "two"} and sorted(ids_of(made.tables)) == ["a", "b"]


@pytest.mark.parametrize("align", ["offsets", "identical"])
def test_the_first_positions_of_every_segment_can_be_left_out(spellers: Spellers, align: str) -> None:
    names = PAIR if align == "offsets" else ("words",)
    whole = build(spellers, names, align=align, limit=12)
    for skip in (1, 3, 11):
        made = build(spellers, names, align=align, limit=12, rows={"skip": skip})
        keep_N = np.logical_and.reduce([whole.tables[f"rows/{name}/position"] >= skip for name in names])
        for name in names:
            assert np.array_equal(made.tables[f"rows/{name}/position"], whole.tables[f"rows/{name}/position"][keep_N])
            ids = [one.tables[f"tokens/{name}/id"][one.tables[f"rows/{name}/token"]] for one in (made, whole)]
            assert np.array_equal(ids[0], ids[1][keep_N])
        assert (np.diff(made.tables["segments/row"]) > 0).all()  # a segment without rows is not run


# --- several corpora ------------------------------------------------------------------------------------------------


def mixture(spellers: Spellers, count: int | None, **weights: float) -> Plan:
    corpora = {name: {"weight": weight} for name, weight in weights.items()}
    words = ["a", "quick", "brown", "fox", "jumps", "over", "it", "and", "then", "over", "another", "one"]
    documents = [
        Document(f"{name}/{number}", " ".join(words[: 3 + (7 * number + part) % 9]), part)
        for part, name in enumerate(sorted(weights))  # as the config numbers them
        for number in range(60)
    ]
    asked = config(corpora=corpora, rows={"count": count})
    return assembled([documents], {"bytes": spellers["bytes"]}, [SOURCES["bytes"]], 32, asked, "identical", True)


@pytest.mark.parametrize("count", [10, 100, 500])
def test_corpora_mix_by_their_weights_in_every_run_of_rows(spellers: Spellers, count: int) -> None:
    tables = mixture(spellers, count, web=3.0, code=1.0).tables
    names = [name.split("/")[0] for name in ids_of(tables)]
    web_N = np.array([name == "web" for name in names])[tables["rows/document"]]
    longest = int(np.diff(tables["documents/row"]).max())
    share_N = np.cumsum(web_N) / np.arange(1, count + 1)
    assert (np.abs(share_N - 0.75) * np.arange(1, count + 1) <= 2 * longest).all()


def test_a_mixture_ends_where_a_corpus_is_used_up_and_says_so(spellers: Spellers) -> None:
    alone = mixture(spellers, None, web=1.0).summary["rows"]
    made = mixture(spellers, None, web=1.0, code=9.0)
    names = [name.split("/")[0] for name in ids_of(made.tables)]
    assert names.count("code") == 60 and 0 < names.count("web") < 20
    assert alone < made.summary["rows"] < 1.3 * alone
    asked = config(corpora={"web": {}, "code": {"weight": 9.0}}, rows={"count": 10**6})
    assert plan.notes(made.summary, asked)[0].startswith("at these weights the corpora give")


def test_more_rows_of_a_mixture_only_add_to_the_end(spellers: Spellers) -> None:
    small, large = (mixture(spellers, count, web=2.0, code=1.0).tables for count in (150, 400))
    assert np.array_equal(small["rows/bytes/token"], large["rows/bytes/token"][:150])
    assert ids_of(large)[: len(ids_of(small))] == ids_of(small)


def test_each_corpus_must_give_its_share_of_the_rows() -> None:
    assert plan.wanted(config(corpora={"a": {"weight": 2}, "b": {"weight": 1}}, rows={"count": 100})) == [67, 34]
    assert plan.wanted(config(rows={"count": 7})) == [7]
    assert plan.wanted(config()) == [None]


@pytest.mark.parametrize("further", [0, 5, 40])
def test_a_stream_counts_so_far_as_its_rows_are_wanted_however_far_it_was_read(
    spellers: Spellers, further: int
) -> None:
    asked = config(corpus={"path": "org/web", "stream": True}, rows={"count": 30})
    documents = [Document(f"{number}", "a quick fox") for number in range(60)]
    per = len(spellers["bytes"].spell("a quick fox").ids_T)
    needed = -(-30 // per)
    groups = [documents[: needed + further]]
    made = assembled(groups, {"bytes": spellers["bytes"]}, [SOURCES["bytes"]], 32, asked, "identical", True)
    assert made.summary["rows"] == 30
    assert sorted(map(int, ids_of(made.tables))) == list(range(needed))


# --- shards and batches ---------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 10**7),
    widths=st.lists(st.tuples(st.sampled_from("mno"), st.integers(1, 9000)), min_size=1, max_size=4),
    chunk=st.integers(1, 2**22),
    shard=st.integers(1, 2**31),
)
@settings(deadline=None)
def test_sizes_follow_from_bytes(rows: int, widths: list[tuple[str, int]], chunk: int, shard: int) -> None:
    sources = [Source(str(number), model, "resid.1", width) for number, (model, width) in enumerate(widths)]
    made = plan.shard_sizes(rows, sources, config(store={"chunk_bytes": chunk, "shard_bytes": shard}).store)
    chunk_rows, shard_rows, shards = made["chunk_rows"], made["shard_rows"], made["shards"]
    widest = 2 * max(width for _, width in widths)
    unit = max(sum(2 * width for model, width in widths if model == one) for one, _ in widths)
    assert chunk_rows.bit_count() == 1
    assert chunk_rows == 1 or chunk_rows * widest <= chunk < 2 * chunk_rows * widest
    assert shard_rows % chunk_rows == 0
    assert shard_rows == chunk_rows or shard_rows * unit <= shard
    assert (shards - 1) * shard_rows < rows <= shards * shard_rows
    most = max(chunk_rows, shard // unit // chunk_rows * chunk_rows)
    assert shards == -(-rows // most)  # no more files than the limit asks for
    assert shards * shard_rows - rows < shards * chunk_rows  # and of nearly one size


def test_sizes_of_a_usual_store() -> None:
    sources = [Source("a", "a", "resid.1", 576), Source("b", "b", "resid.1", 640)]
    assert plan.shard_sizes(40_000, sources, config().store) == {"chunk_rows": 1024, "shard_rows": 40_960, "shards": 1}
    assert plan.shard_sizes(10_000_000, sources, config().store) == {
        "chunk_rows": 1024, "shard_rows": 833_536, "shards": 12,
    }  # fmt: skip


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_batches_run_exactly_the_segments_of_each_shard_within_the_budget(
    spellers: Spellers, budget: int, shard_bytes: int
) -> None:
    store = {"shard_bytes": shard_bytes, "chunk_bytes": 1024}
    made = build(spellers, limit=20, batch={"tokens": budget}, store=store)
    tables, summary = made.tables, made.summary
    for model in PAIR:
        lengths = np.diff(tables[f"tokens/{model}/segment"])
        assert tables[f"batches/{model}/shard"][[0, -1]].tolist() == [0, len(tables[f"batches/{model}/end"])]
        for shard in range(summary["shards"]):
            batches = batches_of(tables, model, shard)
            inside = range(shard * summary["shard_rows"], min((shard + 1) * summary["shard_rows"], summary["rows"]))
            wanted = [g for g in range(summary["segments"]) if overlap(rows_of(tables, g), inside)]
            assert Counter(segment for batch in batches for segment in batch) == Counter(wanted)
            assert all(batches)
            for batch in batches:
                longest = max(lengths[segment] for segment in batch)
                assert len(batch) == 1 or longest * len(batch) <= budget
            flat = [int(lengths[segment]) for batch in batches for segment in batch]
            assert flat == sorted(flat, reverse=True)


def batches_of(tables: Tables, model: str, shard: int) -> list[list[int]]:
    first, last = tables[f"batches/{model}/shard"][shard : shard + 2]
    ends = [0, *tables[f"batches/{model}/end"].tolist()]
    segments = tables[f"batches/{model}/segment"].tolist()
    return [segments[ends[number] : ends[number + 1]] for number in range(first, last)]


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 90))
def test_groups_hold_every_segment_once_and_waste_no_room_that_the_next_would_fit(
    lengths: list[int], budget: int
) -> None:
    batches = plan.group(np.array(lengths, np.int64), range(len(lengths)), budget)
    flat = [segment for batch in batches for segment in batch]
    assert flat == sorted(range(len(lengths)), key=lambda g: (-lengths[g], g))
    for batch, following in pairwise([*batches, []]):
        assert len(batch) == 1 or lengths[batch[0]] * len(batch) <= budget
        assert not following or lengths[batch[0]] * (len(batch) + 1) > budget


def test_bytes_on_disk_are_those_of_the_arrays() -> None:
    summary = {"rows": 10, "shards": 2, "chunk_rows": 4, "shard_rows": 8}
    sizes = plan.stored_bytes(summary, [Source("a", "m", "resid.1", 3)])
    moments = 2 * 8 * (2 + 2 * 3 + 768) * 8
    assert sizes == {"a": 12 * 3 * 2 + 16 * (4 + 1) + moments}


@pytest.mark.parametrize(
    ("rows", "held_out", "said"),
    [
        (100, 2, []),
        (60, 2, ["the corpus gives 60 rows, fewer than rows.count = 100"]),
        (100, 0, ["0 of 5 documents are held out, and training needs both kinds: give more documents, or another"]),
        (100, 5, ["5 of 5 documents are held out, and training needs both kinds: give more documents, or another"]),
    ],
)
def test_a_plan_that_will_disappoint_says_so(rows: int, held_out: int, said: list[str]) -> None:
    model = {"path": "m", "sites": "resid.1"}  # one site needs no list
    config = HarvestConfig.model_validate({"models": {"m": model}, "rows": {"count": 100}})
    notes = plan.notes({"rows": rows, "documents": 5, "documents_held_out": held_out}, config)
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said


def test_what_a_plan_says_of_documents_that_are_held_out_is_true_of_it() -> None:
    def notes(**tables: Any) -> list[str]:
        asked = {"models": {"m": {"path": "m", "sites": ["resid.1"]}}, **tables}
        return plan.notes({"rows": 9, "documents": 5, "documents_held_out": 0}, HarvestConfig.model_validate(asked))

    assert notes(rows={"held_out": 0})[0].endswith("training needs both kinds: raise rows.held_out")
    assert notes(store={"extends": "parent.zarr"}) == []  # the rest of the family may have some
