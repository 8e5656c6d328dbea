"""What a harvest is told. Every key can be given in the TOML file or by --set."""

import datetime
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared import files, remote
from shared.config import Config

SHORT_NAME = r"[A-Za-z0-9_-]+"
BUILT_IN = "python-docs"
SUFFIXES = (".txt", ".jsonl", ".parquet")  # of text files


class ModelConfig(Config):
    """One model and where it is read."""

    path: str  # a folder, a GGUF file, package:NAME (a GGUF file in an installed package), or a hub id
    sites: (
        list[str] | dict[str, str]
    )  # names or patterns (resid.{4,8}, layers.*.mlp:out); a table {source name: site} names sources
    revision: str | None = None  # of a hub id
    dtype: str = "auto"  # while it runs: auto (the weights' own, float32 for float16), float32, bfloat16, float16
    attention: str | None = None  # attention implementation of transformers; none: its own choice
    replace: dict[str, str] = Field({})  # {token: token that this model reads in its place}, all at once

    @field_validator("sites", mode="before")
    @classmethod
    def _listed(cls, sites: Any) -> Any:
        return [sites] if isinstance(sites, str) else sites

    @field_validator("sites")
    @classmethod
    def _some(cls, sites: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        if not sites:
            raise ValueError("Name at least one site, such as resid.12; harvest sites MODEL lists them")
        names = list(sites.values()) if isinstance(sites, dict) else sites
        if len(set(names)) < len(names):
            raise ValueError("Name each site of a model once")
        return sites

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError("Choose auto, float32, bfloat16 or float16")
        return dtype

    def source_names(self, model: str) -> dict[str, str]:
        """{source name: site}. A single site in a list gives its source the model's name."""
        if isinstance(self.sites, dict):
            return self.sites
        if len(self.sites) == 1:
            return {model: self.sites[0]}
        return {f"{model}_{re.sub(r'[^A-Za-z0-9_-]', '_', site)}": site for site in self.sites}


class CorpusConfig(Config):
    """The text."""

    path: str = "python-docs"  # python-docs (built in), a .txt, .jsonl or .parquet file, a folder of such, or a dataset
    text: str = "text"  # the field that holds the text, in .jsonl, .parquet and datasets
    messages: str | None = None  # the field that holds a chat: a list of {role, content}; instead of text
    id: str | None = None  # the field that holds a stable id; the text's own: its sha256; none: file name and number
    name: str | None = None  # configuration of a dataset
    split: str = "train"  # split of a dataset
    revision: str | None = None  # of a dataset
    documents: int | None = Field(None, ge=1)  # read at most so many
    stream: bool = (
        False  # read a dataset over the network while it is planned, so far as rows.count or documents needs it
    )
    repeats: Literal["refuse", "drop"] = "refuse"  # of two documents with one id; in a stream the first counts
    weight: float = Field(1.0, gt=0)  # its share of the rows, where there are several (corpora)

    @model_validator(mode="after")
    def _streams(self) -> "CorpusConfig":
        of_file = self.path == BUILT_IN or Path(self.path).suffix in SUFFIXES
        if of_file and self.stream:
            raise ValueError("A file is read as it is: leave out stream")
        if of_file and (self.name or self.revision):
            raise ValueError("A file has no configurations and no revisions: leave out name and revision")
        return self


class RowsConfig(Config):
    """How text becomes rows."""

    count: int | None = Field(None, ge=1)  # store exactly so many rows, if the corpus has them; none: all
    context: int = Field(1024, ge=2)  # tokens of a segment at most, special tokens included
    align: Literal["auto", "identical", "offsets", "greedy"] = (
        "auto"  # auto: identical, or offsets for several tokenizers
    )
    bos: Literal["model", "always", "never"] = "model"  # model: the special tokens that its tokenizer adds
    skip: int = Field(0, ge=0)  # so many positions at the start of every segment give no row
    held_out: float = Field(0.1, ge=0.0, lt=1.0)  # share of documents that training never sees
    seed: int = Field(0, ge=0, lt=2**63)  # of the order of documents

    @model_validator(mode="after")
    def _something_is_left(self) -> "RowsConfig":
        if self.skip >= self.context:
            raise ValueError(f"Let skip ({self.skip}) be less than context ({self.context}): else no position is left")
        return self


class ChatConfig(Config):
    """How chats become text (corpus.messages)."""

    template: str = (
        "own"  # own: each model's; or the name of the model, or the Jinja file, whose template all models read
    )
    date: datetime.date = datetime.date(2024, 7, 26)  # what templates take for today


class BatchConfig(Config):
    """How segments are run."""

    tokens: int = Field(8192, ge=1)  # padded tokens of one forward pass at most; a longer segment runs alone
    calibration: int = Field(8, ge=1)  # forward passes, spread over the plan, that set the scale


class StoreConfig(Config):
    """Where rows go."""

    extends: str | None = None  # a finished store that this one adds to: more rows of all its sources, or more sources
    path: str = "activations.zarr"  # the store's folder, or a URL: s3://bucket/pair.zarr
    staging: str | None = (
        None  # where units for a URL lie until they are sent (workers of --scheduler must see it); none: the cache
    )
    shard_bytes: int = Field(2**30, ge=1)  # bytes of the largest unit at most
    chunk_bytes: int = Field(2**21, ge=1)  # bytes of a chunk of the widest source at most
    dtype: Literal["float16", "bfloat16"] = "float16"  # bfloat16: a wider range, three bits less of precision
    nonfinite: Literal["fail", "mask"] = "fail"  # mask: such a row is stored as zeros, flagged and never served

    @field_validator("path")
    @classmethod
    def _no_half_url(cls, path: str) -> str:
        if re.match(r"[A-Za-z0-9+.-]{2,}:/(?!/)", path):
            raise ValueError("A URL has two slashes, such as s3://bucket/pair.zarr")
        return path

    @field_validator("staging")
    @classmethod
    def _on_this_machine(cls, staging: str | None) -> str | None:
        if staging is not None and remote.is_url(staging):
            raise ValueError("Give a folder of this machine")
        return staging

    @property
    def url(self) -> str | None:
        """Where the store goes, if not into a folder."""
        return self.path if remote.is_url(self.path) else None

    @property
    def folder(self) -> Path:
        """Where the store is made on this machine."""
        if not remote.is_url(self.path):
            return Path(self.path)
        place = remote.place(self.path, self.staging or files.cache_folder() / "harvest")
        return place.with_name(f"{place.name}.staging")  # not where a copy of it would lie


class HarvestConfig(Config):
    """The whole of a harvest."""

    models: dict[str, ModelConfig]
    corpus: CorpusConfig = CorpusConfig()
    corpora: dict[str, CorpusConfig] = Field({})  # instead of corpus: several, mixed by their weights
    rows: RowsConfig = RowsConfig()
    chat: ChatConfig = ChatConfig()
    batch: BatchConfig = BatchConfig()
    store: StoreConfig = StoreConfig()
    device: str = "auto"  # auto: cuda where there is one; no part of the store's id
    threads: int | None = Field(None, ge=1)  # of torch on the CPU; none: torch's own choice
    processes: int | None = Field(None, ge=1)  # that plan a large corpus; none: one per core

    @model_validator(mode="after")
    def _names(self) -> "HarvestConfig":
        if not self.models:
            raise ValueError("Add a table [models.NAME] with path and sites")
        sources = [name for key, model in self.models.items() for name in model.source_names(key)]
        for name in [*self.models, *sources, *self.corpora]:
            if not re.fullmatch(SHORT_NAME, name):
                raise ValueError(f"The name {name!r} may have letters, digits, _ and - only")
        if len(set(sources)) < len(sources):
            raise ValueError(f"Each source needs a name of its own, got {', '.join(sources)}")
        if self.corpora and self.corpus != CorpusConfig():
            raise ValueError("Give corpus or corpora, not both")
        if self.chat != ChatConfig() and not any(corpus.messages for corpus in self.texts.values()):
            raise ValueError("[chat] is for chats: say which field holds them (corpus.messages)")
        return self

    @property
    def texts(self) -> dict[str, CorpusConfig]:
        """{name: corpus}, by name, as their order in the file means nothing; one on its own is named corpus."""
        return dict(sorted(self.corpora.items())) or {"corpus": self.corpus}
