"""Chats: messages -> the text that each model reads, and where in it the content of each message stands.

Letters: T tokens of a chat in one model, k messages.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from harvest.config import ChatConfig
from harvest.corpus import Document, Message
from harvest.segments import Speller, Tokens
from shared.config import fingerprint
from shared.errors import ConfigError, CorpusError, ModelError
from shared.flags import TEMPLATE, role_flag

OWN = "own"
MARK = "\ue000{}\ue001"  # stands for a content while its place is sought: private characters, which no text has


@dataclass(frozen=True)
class Rendered:
    """A chat as one model reads it. `spans` are the characters of each content, without white space around it."""

    text: str
    spans: list[tuple[int, int]]


class Template:
    """A chat template with its dates pinned."""

    def __init__(self, speller: Speller, name: str, source: str | None, day: date) -> None:
        self.tokenizer, self.name, self.day = speller.tokenizer, name, day
        bos = self.tokenizer.bos_token_id
        self._bos = str(self.tokenizer.bos_token) if bos is not None and bos in speller.prefix else ""
        given = source if source is not None else self.tokenizer.chat_template
        if not isinstance(given, str):
            way_out = "Set chat.template to the name of a model that has one, or to a file with one"
            raise ModelError("this model's tokenizer has no chat template", name, way_out)
        self.text = _pinned(given, day, name)
        self.identity = fingerprint([self.text, day.isoformat()])

    def render(self, document: Document) -> Rendered | None:
        """None where the template refuses the chat. Raises CorpusError where it changes a content or leaves one out.

        A BOS before all is left out where every segment has one (rows.bos).
        """
        whole = self._apply(document.messages)
        marks = [MARK.format(number) for number in range(len(document.messages))]
        around = self._apply([Message(one.role, mark) for one, mark in zip(document.messages, marks, strict=True)])
        if whole is None or around is None:
            return None
        for contents in (
            [one.content for one in document.messages],
            [one.content.strip() for one in document.messages],
        ):
            if (made := _filled(around, marks, contents)) is not None and made.text == whole:
                return made
        wrong = next((one for one in document.messages if one.content.strip() not in whole), document.messages[-1])
        way_out = (
            f"Use another chat.template, or leave such chats out: the message of role {wrong.role!r} cannot be placed"
        )
        raise CorpusError(f"the chat template of {self.name} changes a message", f"document {document.id!r}", way_out)

    def _apply(self, messages: Sequence[Message]) -> str | None:
        listed = [{"role": one.role, "content": one.content} for one in messages]
        options: dict[str, Any] = {"chat_template": self.text, "date_string": self.day.strftime("%d %b %Y")}
        try:
            return str(self.tokenizer.apply_chat_template(listed, tokenize=False, **options)).removeprefix(self._bos)
        except jinja2.TemplateError:  # as where roles do not alternate, or it knows no system
            return None


def templates(config: ChatConfig, spellers: Mapping[str, Speller]) -> dict[str, Template]:
    """{model: its template}: its own, or one for all, which one tokenizer alone renders. Raises ConfigError."""
    day = config.date
    if config.template == OWN:
        return {name: Template(speller, name, None, day) for name, speller in spellers.items()}
    if config.template in spellers:
        common = Template(spellers[config.template], config.template, None, day)
    else:
        path = Path(config.template)
        if not path.is_file():
            known = f"Known: {OWN}, the models {', '.join(spellers)}, or a file with a Jinja template"
            raise ConfigError("no such chat template (chat.template)", config.template, known)
        first = next(iter(spellers.values()))
        common = Template(first, path.name, path.read_text(encoding="utf-8"), day)
    return dict.fromkeys(spellers, common)


def _pinned(template: str, day: date, name: str) -> str:
    """The template with the current date, where it asks for it, replaced by `day`."""
    calls = len(re.findall(r"strftime_now\s*\(", template))
    formats = [found for _, found in re.findall(r"""strftime_now\s*\(\s*(['"])(.*?)\1\s*\)""", template)]
    if len(formats) < calls:
        way_out = "Write the date into the template, and give its file as chat.template"
        raise ModelError("this model's chat template writes a date that cannot be pinned", name, way_out)
    cases = "".join(
        f"{{%- if format == {json.dumps(one)} -%}}{day.strftime(one)}{{%- endif -%}}" for one in dict.fromkeys(formats)
    )
    return f"{{%- macro strftime_now(format) -%}}{cases}{{%- endmacro -%}}{template}" if calls else template


def _filled(around: str, marks: Sequence[str], contents: Sequence[str]) -> Rendered | None:
    """The text around the contents with the contents in it; none where a mark does not stand in it once, in order."""
    parts, spans, at = [], [], 0
    for mark, content in zip(marks, contents, strict=True):
        place = around.find(mark, at)
        if around.count(mark) != 1 or place < 0:
            return None
        parts += [around[at:place], content]
        at = place + len(mark)
        bare = content.strip()
        start = sum(map(len, parts)) - len(content) + len(content[: content.find(bare)])
        spans.append((start, start + len(bare)))
    return Rendered("".join([*parts, around[at:]]), spans)


def placed(tokens: Tokens, rendered: Rendered, messages: Sequence[Message], joint: bool) -> Tokens:
    """The tokens of a rendered chat: roles as flags, and nothing but content in the pieces.

    `joint`: ends count the characters of the contents alone, one after another, so that texts of several templates
    have the same; the tokens around them have none.
    """
    starts_k, stops_k = np.array(rendered.spans, np.int64).reshape(-1, 2).T
    own_T = tokens.ends_T.astype(np.int64)
    known_T = np.where(own_T >= 0, own_T, np.iinfo(np.int64).max)  # a token inside a character: where that ends
    ends_T = np.minimum.accumulate(known_T[::-1])[::-1]
    message_T = np.searchsorted(stops_k, ends_T)  # the first message that ends there or behind
    last_T = np.minimum(message_T, len(stops_k) - 1)
    inside_T = (message_T < len(stops_k)) & (ends_T > starts_k[last_T])
    roles = np.array([role_flag(one.role) for one in messages], np.uint8)
    marks_T = np.where(inside_T, roles[last_T], TEMPLATE).astype(np.uint8)
    begins_T = np.concatenate([[0], np.minimum(ends_T, len(rendered.text))])[:-1]
    touches_T = inside_T | ((begins_T[:, None] < stops_k) & (ends_T[:, None] > starts_k)).any(1)
    pieces = [piece if touches else b"" for piece, touches in zip(tokens.pieces, touches_T.tolist(), strict=True)]
    if not joint:
        return replace(tokens, pieces=pieces, marks_T=marks_T)
    before_k = np.cumsum(stops_k - starts_k) - (stops_k - starts_k)
    joint_T = np.where(inside_T & (own_T >= 0), before_k[last_T] + ends_T - starts_k[last_T], -1)
    return replace(tokens, ends_T=joint_T.astype(np.int32), pieces=pieces, marks_T=marks_T)
