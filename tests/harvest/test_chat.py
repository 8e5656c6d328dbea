"""Chats pair by message and by character of its content, whatever stands around it in each model.

Letters: N rows, k messages.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvest import check
from harvest.chat import Rendered, Template, placed, templates
from harvest.config import ChatConfig
from harvest.corpus import Document, Message
from harvest.draft import drafter
from harvest.job import prepare
from harvest.segments import Speller, Tokens
from shared import files, models
from shared.errors import AlignmentError, ConfigError, CorpusError, GranaryError, ModelError
from shared.flags import ROLES, SPECIAL, TEMPLATE, role_flag
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config, harvest
from tests.tiny import Spelling, byte_level, save_model, sentencepiece

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TURNS = (  # as Gemma's: a BOS, other names of roles, contents without white space around, no system of its own
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}"
)
DATED = "Today is {{ strftime_now('%d %B %Y') }}, {{ date_string }}.\n" + CHATML
TALK = [
    [("user", "What is a fox?"), ("assistant", "  A quick brown animal.\n")],
    [
        ("user", "user"),
        ("assistant", "assistant"),
        ("user", "日本語 and 😀, naïve"),
        ("assistant", "It is what it is."),
    ],
    [("user", "In 1989 there were 198 of 9 things."), ("assistant", "")],
]
DAY = datetime.date(2024, 7, 26)


def chat(turns: Sequence[tuple[str, str]], name: str = "d") -> Document:
    messages = tuple(Message(role, content) for role, content in turns)
    return Document(name, json.dumps(turns), messages=messages)


def with_template(spelling: Spelling, template: str) -> Spelling:
    return replace(spelling, roles={**spelling.roles, "chat_template": template})


@pytest.fixture(scope="module")
def spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speller]:
    root = tmp_path_factory.mktemp("chat")
    kinds = {"bytes": with_template(byte_level(), CHATML), "pieces": with_template(sentencepiece(), TURNS)}
    return {name: Speller(kind.load(root / name), "model", name) for name, kind in kinds.items()}


def template(spellers: dict[str, Speller], name: str, text: str | None = None) -> Template:
    return Template(spellers[name], name, text, DAY)


# --- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("turns", TALK)
def test_a_content_is_found_where_it_stands_even_where_the_template_says_the_same(
    spellers: dict[str, Speller], name: str, turns: list[tuple[str, str]]
) -> None:
    made = template(spellers, name).render(chat(turns))
    assert made is not None
    assert [made.text[start:stop] for start, stop in made.spans] == [content.strip() for _, content in turns]
    assert made.text.startswith(("<|im_start|>", "<turn>"))  # the BOS belongs to the segment
    before = 0
    for (role, content), (start, stop) in zip(turns, made.spans, strict=True):
        header = made.text[before:start]  # a content that reads like its role is not taken for it
        assert header.rstrip().endswith("model" if name == "pieces" and role == "assistant" else role) or not content
        before = stop


@pytest.mark.parametrize(("bos", "start"), [("model", "<turn>user"), ("always", "<turn>user"), ("never", "<s><turn>")])
def test_a_bos_stands_before_a_segment_or_in_the_template_and_never_in_both(
    tmp_path: Path, bos: str, start: str
) -> None:
    speller = Speller(with_template(sentencepiece(), TURNS).load(tmp_path), bos, "pieces")
    made = Template(speller, "pieces", None, DAY).render(chat(TALK[0]))
    assert made is not None and made.text.startswith(start)


def test_a_bos_that_only_templates_use_stays_where_it_is(tmp_path: Path) -> None:
    # SmolLM2's BOS is the <|im_start|> before every message, and its tokenizer adds none.
    backend = byte_level().backend
    spelling = Spelling(
        backend, {"bos_token": "<|endoftext|>", "chat_template": CHATML.replace("<|im_start|>", "<|endoftext|>")}
    )
    made = Template(Speller(spelling.load(tmp_path), "model", "smol"), "smol", None, DAY).render(chat(TALK[0]))
    assert made is not None and made.text.startswith("<|endoftext|>user")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(st.one_of(TEXT, st.sampled_from(["user", " user ", "<end>", "<|im_end|>", "\n"])), min_size=1))
def test_any_content_is_found(spellers: dict[str, Speller], contents: list[str]) -> None:
    turns = [(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    for name in spellers:
        made = template(spellers, name).render(chat(turns))
        assert made is not None
        assert [made.text[start:stop] for start, stop in made.spans] == [content.strip() for content in contents]
        assert made.spans == sorted(made.spans)


def test_a_chat_that_its_template_refuses_is_none(spellers: dict[str, Speller]) -> None:
    asked = chat([("system", "Be brief."), ("user", "hi")])
    assert template(spellers, "pieces").render(asked) is None
    assert template(spellers, "bytes").render(asked) is not None


@pytest.mark.parametrize(
    "text",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("for m in messages", "for m in messages[1:]"),
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"),
        CHATML.replace("m['content']", "m['content'] | replace('fox', 'dog')"),
    ],
)
def test_a_template_that_changes_a_content_is_refused(spellers: dict[str, Speller], text: str) -> None:
    with pytest.raises(CorpusError, match=r"the chat template of bytes changes a message: document 'd'. Use another"):
        template(spellers, "bytes", text).render(chat(TALK[0]))


def test_dates_are_pinned(spellers: dict[str, Speller]) -> None:
    made = template(spellers, "bytes", DATED).render(chat(TALK[0]))
    assert made is not None and made.text.startswith("Today is 26 July 2024, 26 Jul 2024.\n<|im_start|>user\nWhat")
    other = Template(spellers["bytes"], "bytes", DATED, datetime.date(2025, 1, 2))
    assert other.identity != template(spellers, "bytes", DATED).identity
    twice = template(spellers, "bytes", "{{ strftime_now(\"%Y\") }}{{ strftime_now( '%m' ) }}" + CHATML)
    made = twice.render(chat(TALK[0]))
    assert made is not None and made.text.startswith("202407<")
    with pytest.raises(ModelError, match="writes a date that cannot be pinned: bytes"):
        template(spellers, "bytes", "{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML)


def test_one_template_for_all_is_rendered_by_one_tokenizer(spellers: dict[str, Speller], tmp_path: Path) -> None:
    own = templates(ChatConfig(), spellers)
    assert own["bytes"].text == CHATML and own["pieces"].text == TURNS
    common = templates(ChatConfig(template="pieces"), spellers)
    assert common["bytes"] is common["pieces"] and common["bytes"].text == TURNS
    (tmp_path / "mine.jinja").write_text(DATED)
    given = templates(ChatConfig(template=str(tmp_path / "mine.jinja")), spellers)
    assert given["bytes"] is given["pieces"] and "mine.jinja" in given["bytes"].name
    with pytest.raises(
        ConfigError, match=r"no such chat template \(chat.template\): piece. Known: own, the models bytes"
    ):
        templates(ChatConfig(template="piece"), spellers)


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"this model.s tokenizer has no chat template: base"):
        templates(ChatConfig(), {"base": Speller(byte_level().load(tmp_path), "model", "base")})


# --- the tokens of a chat -------------------------------------------------------------------------------------------


def test_ends_count_the_characters_of_the_contents_and_marks_are_roles() -> None:
    #         0123456789...
    text = "U:ab c/A:d e/"
    rendered = Rendered(text, [(2, 6), (9, 12)])
    ends = [1, 3, 6, 7, 9, 10, -1, 12, 13]  # "U", ":a", "b c", "/", "A:", "d", half of " e", the rest of it, "/"
    pieces = [b"U", b":a", b"b c", b"/", b"A:", b"d", b" ", b"e", b"/"]
    tokens = Tokens(np.arange(9, dtype=np.int32), np.array(ends, np.int32), pieces)
    messages = [Message("user", "ab c"), Message("assistant", "d e")]
    joint = placed(tokens, rendered, messages, joint=True)
    assert joint.ends_T.tolist() == [-1, 1, 4, -1, -1, 5, -1, 7, -1]
    user, assistant = role_flag("user"), role_flag("assistant")
    marks = [TEMPLATE, user, user, TEMPLATE, TEMPLATE, assistant, assistant, assistant, TEMPLATE]
    assert joint.marks_T is not None and joint.marks_T.tolist() == marks
    assert [bool(piece) for piece in joint.pieces] == [False, True, True, False, False, True, True, True, False]
    alone = placed(tokens, rendered, messages, joint=False)
    assert alone.ends_T.tolist() == ends and alone.marks_T is not None and alone.marks_T.tolist() == marks


def test_a_token_that_reaches_over_the_end_of_a_content_is_no_part_of_it() -> None:
    tokens = Tokens(np.arange(2, dtype=np.int32), np.array([1, 4], np.int32), [b"a", b"b</"])
    made = placed(tokens, Rendered("ab</", [(0, 2)]), [Message("user", "ab")], joint=True)
    assert made.ends_T.tolist() == [1, -1]
    assert made.marks_T is not None and made.marks_T.tolist() == [role_flag("user"), TEMPLATE]


def test_roles_have_three_bits_that_no_other_flag_has() -> None:
    found = [role_flag(role) for role in ROLES]
    assert len(set(found)) == len(ROLES) and all(flag & 0b111000 == flag > 0 for flag in found)
    assert role_flag("ipython") == role_flag("other")


# --- harvests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("talking")
    save_model(root / "llama", "llama", with_template(byte_level(), CHATML), seed=1, context=256)
    save_model(root / "gemma", "gemma3", with_template(sentencepiece(), TURNS), seed=2, width=24, context=256)
    records = [
        {"messages": [{"role": role, "content": content} for role, content in turns], "text": "no chat"}
        for turns in [*TALK, [("system", "Be brief."), ("user", "hi")]]
    ]
    (root / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def asked(talking: Path, path: Path, **tables: Any) -> Any:
    corpus = {"path": str(talking / "corpus.jsonl"), "id": None, "messages": "messages"}
    rows = {"count": None, "context": 200, **tables.pop("rows", {})}
    return config(talking, path, corpus=corpus, rows=rows, **tables)


def contents(store: Store, model: str) -> list[tuple[int, int]]:
    """(document, end) of every row: the character of the contents at which its token ends."""
    ends_T, token_N = store.column(f"tokens/{model}/end"), store.column(f"rows/{model}/token")
    return list(zip(store.column("rows/document").tolist(), ends_T[token_N].tolist(), strict=True))


def test_each_models_own_template_pairs_contents_alone(talking: Path, tmp_path: Path) -> None:
    store = harvest(asked(talking, tmp_path / "x.zarr"))
    assert store.header.plan["alignment"] == "offsets" and store.header.plan["documents"] == 3
    assert store.header.plan["skipped"]["documents_not_rendered"] == 1  # Gemma's kind knows no system
    assert store.header.plan["aligned_documents"] == 0.75
    assert contents(store, "llama") == contents(store, "gemma")
    flags = {model: store.column(f"rows/{model}/flags") for model in store.header.models}
    assert np.array_equal(flags["llama"] & 0b1111000, flags["gemma"] & 0b1111000)
    assert not (flags["llama"] & (TEMPLATE | SPECIAL)).any()
    assert set((flags["llama"] & 0b111000).tolist()) == {role_flag("user"), role_flag("assistant")}
    by_name = dict(zip(store.document_ids(), range(3), strict=True))
    last = {name: max(end for d, end in contents(store, "llama") if d == number) for name, number in by_name.items()}
    total = {f"corpus.jsonl:{i}": sum(len(content.strip()) for _, content in turns) for i, turns in enumerate(TALK)}
    assert last == total  # the last character of the last content is a row
    found = check.contents(store, check.Bench(_checkpoints(store), "cpu", 1), store.rows, 0, Log(quiet=True))
    assert found == []


def _checkpoints(store: Store) -> dict[str, models.Checkpoint]:
    return {name: models.resolve(model.path) for name, model in store.header.models.items()}


def test_a_chat_whose_second_model_is_shifted_by_one_token_does_not_pass(talking: Path, tmp_path: Path) -> None:
    store = harvest(asked(talking, tmp_path / "x.zarr"))
    name = store.path / "rows/gemma/token/c/0"
    token_N = np.fromfile(name, "<i8")
    token_N[: len(token_N) // 2] += 1
    name.write_bytes(token_N.tobytes())
    tokenizers = {name: models.load_tokenizer(one) for name, one in _checkpoints(store).items()}
    faults = check.pairs(store, np.arange(store.rows), tokenizers)
    assert faults and "pairs other text in row" in str(faults[0])


def test_under_a_common_template_its_tokens_pair_too_and_say_so(talking: Path, tmp_path: Path) -> None:
    store = harvest(asked(talking, tmp_path / "x.zarr", chat={"template": "llama"}))
    assert store.header.plan["documents"] == 4
    flags_N = store.column("rows/llama/flags")
    assert 0.2 < (flags_N & TEMPLATE > 0).mean() < 0.9
    assert contents(store, "llama") == contents(store, "gemma")
    own = harvest(asked(talking, tmp_path / "y.zarr"))
    assert own.header.id != store.header.id
    assert np.count_nonzero(flags_N & TEMPLATE == 0) >= own.rows


def test_a_greedy_alignment_needs_one_template(talking: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"greedy pairs one text, and each model has a chat template of its own"):
        prepare(asked(talking, tmp_path / "x.zarr", rows={"align": "greedy"}), Log(quiet=True))
    store = harvest(asked(talking, tmp_path / "x.zarr", rows={"align": "greedy"}, chat={"template": "llama"}))
    assert not (store.column("rows/llama/flags") & TEMPLATE).any()  # it pairs contents


def test_a_base_and_a_chat_model_of_one_tokenizer_share_every_token(talking: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama", byte_level(), seed=9, context=256)  # without a template
    pair = {
        "base": {"path": str(tmp_path / "base"), "sites": ["resid.1"]},
        "chat": {"path": str(talking / "llama"), "sites": ["resid.1"]},
    }
    with pytest.raises(ModelError, match=r"this model.s tokenizer has no chat template: base"):
        prepare(asked(talking, tmp_path / "x.zarr", models=pair), Log(quiet=True))
    store = harvest(asked(talking, tmp_path / "x.zarr", models=pair, chat={"template": "chat"}))
    assert store.header.plan["alignment"] == "identical"
    assert np.array_equal(store.column("rows/base/flags"), store.column("rows/chat/flags"))
    swapped = {**pair, "base": {**pair["base"], "replace": {"<": ">", ">": "|", "|": "<"}}}
    other = harvest(asked(talking, tmp_path / "y.zarr", models=swapped, chat={"template": "chat"}))
    ids = store.column("tokens/base/id")
    tokenizer = models.load_tokenizer(_checkpoints(store)["base"])
    less, more, bar = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "<>|")
    expected = np.select([ids == less, ids == more, ids == bar], [more, bar, less], ids)
    assert (ids == less).any() and (ids == more).any()
    assert np.array_equal(other.column("tokens/base/id"), expected)  # all at once: none is replaced twice
    assert np.array_equal(other.column("tokens/chat/id"), ids)
    bench = check.Bench(_checkpoints(other), "cpu", 1)
    assert check.contents(other, bench, other.rows, 0, Log(quiet=True)) == []


def test_what_is_replaced_is_a_token_and_so_is_what_replaces_it(talking: Path, tmp_path: Path) -> None:
    for pair in ({"a very long text": "<"}, {"<": "a very long text"}):
        with pytest.raises(ModelError, match=r"the tokenizer of bytes has no such token: 'a very long text'. It reads"):
            Speller(byte_level().load(tmp_path), "model", "bytes", pair)


def test_dates_and_templates_are_part_of_the_id(talking: Path, tmp_path: Path) -> None:
    ids = [
        prepare(asked(talking, tmp_path / "x.zarr", **tables), Log(quiet=True)).spec["chats"]
        for tables in ({}, {"chat": {"date": "2025-01-01"}}, {"chat": {"template": "llama"}})
    ]
    assert len({json.dumps(one) for one in ids}) == 3
    assert not prepare(config(talking, tmp_path / "y.zarr", corpus={"id": None}), Log(quiet=True)).spec["chats"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": "hello"}, "no messages in the field 'messages' in "),
        ({"messages": [{"role": "user"}]}, "no messages in the field 'messages' in "),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no messages in the field 'messages'"),
        ({"text": "x"}, "no field 'messages' in "),
        ({"messages": []}, "no text in the corpus"),
        ({"messages": [{"role": "user", "content": " "}]}, "no text in the corpus"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_line(talking: Path, tmp_path: Path, record: Any, told: str) -> None:
    files.write_json(tmp_path / "x.json", record)
    (tmp_path / "corpus.jsonl").write_text(json.dumps(record))
    corpus = {"path": str(tmp_path / "corpus.jsonl"), "id": None, "messages": "messages"}
    with pytest.raises(GranaryError) as caught:
        prepare(config(talking, tmp_path / "x.zarr", corpus=corpus), Log(quiet=True))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_another_template_per_model_cannot_be_identical(talking: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", "llama", with_template(byte_level(), TURNS), seed=9, context=256)
    pair = {
        "one": {"path": str(talking / "llama"), "sites": ["resid.1"]},
        "two": {"path": str(tmp_path / "other"), "sites": ["resid.1"]},
    }
    with pytest.raises(AlignmentError, match=r'do not give the same ids: .* Set rows.align to "offsets"'):
        harvest(asked(talking, tmp_path / "x.zarr", models=pair))
    store = harvest(asked(talking, tmp_path / "x.zarr", models=pair, rows={"align": "offsets"}))
    assert contents(store, "one") == contents(store, "two") and store.rows > 20


def test_drafts_know_their_messages(spellers: dict[str, Speller], tmp_path: Path) -> None:
    names = {name: {"path": name, "sites": ["resid.1"]} for name in spellers}
    settings_ = config(
        tmp_path, tmp_path / "x.zarr", models=names, corpus={"messages": "messages"}, rows={"context": 200}
    )
    made = drafter(settings_, {name: one.tokenizer for name, one in spellers.items()}, "offsets").draft(
        chat(TALK[1]), 0
    )
    assert made.rendered and made.complete and sum(made.rows) > 10
