"""What a harvest will do, known before anything is planned or spent: models found, corpus read, id computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from harvest import extend
from harvest.config import HarvestConfig
from harvest.draft import Drafter, drafter
from harvest.extend import Sibling
from harvest.survey import NOTHING, Survey, survey
from shared import config as configs
from shared import hooks, models
from shared.device import device_of
from shared.errors import ConfigError, ModelError
from shared.header import Header
from shared.log import Log
from shared.source import Model, Source

SCALE_RULE = "power of two, fourfold headroom; sink at 10 x the median norm"


@dataclass(frozen=True)
class Job:
    """A harvest, ready to be planned. `spec` is what the store's id is made of."""

    config: HarvestConfig
    checkpoints: dict[str, models.Checkpoint]
    models: dict[str, Model]
    sources: dict[str, Source]
    drafter: Drafter
    survey: Survey
    spec: dict[str, Any]
    align: str
    sibling: Sibling | None = None

    @property
    def path(self) -> Path:
        return self.config.store.folder

    def header(self, summary: dict[str, Any]) -> Header:
        """`summary` is that of the plan."""
        extends = self.sibling.extends(self.path) if self.sibling else None
        return Header(self.spec, self.models, self.sources, summary, extends=extends)


def prepare(config: HarvestConfig, log: Log) -> Job:
    """Find the models, check sites and context, survey the corpora, and compute the store's spec."""

    def say(text: str) -> None:
        log.event("prepare", text)

    device_of(config.device)  # refused before anything is written
    given = config.model_dump(mode="json", exclude_unset=True)
    checkpoints = {name: models.resolve(m.path, m.revision, say) for name, m in config.models.items()}
    skeletons = {name: models.skeleton(checkpoint) for name, checkpoint in checkpoints.items()}
    config = _expanded(config, skeletons)
    found_models: dict[str, Model] = {}
    sources: dict[str, Source] = {}
    tokenizers = {name: models.load_tokenizer(checkpoint) for name, checkpoint in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        asked = config.models[name]
        skeleton = skeletons[name]
        sites = asked.source_names(name)
        width = hooks.widths(skeleton, list(sites.values()))
        found = [Source(source, name, site, width[site], hooks.heads(skeleton, site)) for source, site in sites.items()]
        sources |= {source.name: source for source in found}
        found_models[name] = Model(
            name, asked.path, checkpoint.weights_fingerprint(), models.tokenizer_fingerprint(tokenizers[name]),
            checkpoint.dtype() if asked.dtype == "auto" else asked.dtype, models.attention(checkpoint, asked.attention),
        )  # fmt: skip
    sibling = _sibling(config, found_models, sources)
    if sibling is not None and sibling.kind == "sources":
        sibling.require_rows(given, lambda: survey(config.texts, config.rows.seed).identity)
        spec = sibling.spec(_made(config, found_models, sources))
        _check_context(checkpoints, spec["rows"]["context"])
        align = spec["rows"]["align"]
        none = Drafter({}, {}, config.rows, align)  # nothing is read: the plan is there
        return Job(config, checkpoints, found_models, sources, none, NOTHING, spec, align, sibling)
    _check_context(checkpoints, config.rows.context)
    align = _alignment(config, found_models)
    if align == "offsets":
        _require_fast(tokenizers)
    drafts = drafter(config, tokenizers, align)
    surveyed = survey(config.texts, config.rows.seed)
    spec = _spec(config, found_models, sources, surveyed.identity, drafts)
    if sibling is not None:
        spec = sibling.spec(spec)
        surveyed = surveyed.without(sibling.keys(config.rows.seed))
    return Job(config, checkpoints, found_models, sources, drafts, surveyed, spec, align, sibling)


def _sibling(config: HarvestConfig, found: Mapping[str, Model], sources: Mapping[str, Source]) -> Sibling | None:
    if config.store.extends is None:
        return None
    if config.store.url:
        way_out = "Harvest it into a folder, beside the store that it extends"
        raise ConfigError("a sibling cannot be made at a URL", config.store.url, way_out)
    replaced = {name: model.replace for name, model in config.models.items()}
    return extend.of(config.store.extends, found, sources, replaced)


def _expanded(config: HarvestConfig, skeletons: Mapping[str, nn.Module]) -> HarvestConfig:
    """The config with every pattern of sites replaced by the sites that it names."""
    data = config.model_dump()
    for name, model in config.models.items():
        if isinstance(model.sites, list):
            sites = [site for pattern in model.sites for site in hooks.expand(skeletons[name], pattern)]
            data["models"][name]["sites"] = list(dict.fromkeys(sites))
    return configs.parse(HarvestConfig, data)


def _spec(
    config: HarvestConfig, found: Mapping[str, Model], sources: Mapping[str, Source], text: Any, drafts: Drafter
) -> dict[str, Any]:
    """Everything that decides a value, and nothing else."""
    return {
        **_made(config, found, sources),
        "corpus": text,
        "chats": {name: template.identity for name, template in drafts.chats.items()},
        "rows": {**config.rows.model_dump(), "align": drafts.align},
        **(
            {"order": list(found)} if drafts.align == "greedy" else {}
        ),  # of two texts alike, it grows the later model's
        "batch": config.batch.model_dump(),
        "store": config.store.model_dump(exclude={"path", "staging", "extends"}),
    }


def _made(config: HarvestConfig, found: Mapping[str, Model], sources: Mapping[str, Source]) -> dict[str, Any]:
    """What decides the values of a row, whichever it is."""
    return {
        "format": 1,
        "models": {name: {**model.identity(), "replace": config.models[name].replace} for name, model in found.items()},
        "sources": {name: {"model": source.model, "site": source.site} for name, source in sources.items()},
        "scale": SCALE_RULE,
    }


def _check_context(checkpoints: Mapping[str, models.Checkpoint], context: int) -> None:
    for checkpoint in checkpoints.values():
        limit = checkpoint.context()
        if limit is not None and context > limit:
            value, way_out = f"{context} > {limit} of {checkpoint.path}", f"Set rows.context to {limit} or less"
            raise ModelError("rows.context is longer than the model's", value, way_out)


def _alignment(config: HarvestConfig, found: Mapping[str, Model]) -> str:
    if config.rows.align != "auto":
        return config.rows.align
    return "identical" if len({model.tokenizer for model in found.values()}) == 1 else "offsets"


def _require_fast(tokenizers: Mapping[str, models.Tokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        if not tokenizer.is_fast:
            way_out = "Save a tokenizer.json with the model, or set rows.align to identical"
            raise ModelError('rows.align "offsets" needs fast tokenizers, and this model has a slow one', name, way_out)
