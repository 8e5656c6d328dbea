"""Does a store hold what its models compute, and do its rows pair the same text? Asked of a random sample of rows.

Letters: N rows of a batch, D width.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from harvest.bench import Bench
from harvest.cast import cast, difference
from harvest.forward import Batch
from harvest.segments import Speller
from harvest.worker import Worker
from shared import layout, models, staging, verify
from shared.device import torch_threads
from shared.errors import StoreDamagedError
from shared.flags import TEMPLATE
from shared.layout import SEALED, Unit
from shared.log import Log, bar
from shared.models import Tokenizer
from shared.store import Store
from shared.verify import Fault


def files_of(
    store: Store, full: bool, log: Log, sizes: Mapping[str, int] | None = None, url: str | None = None
) -> list[Fault]:
    """What is wrong with the store's files; every checksum where `full`. `sizes`: of files that are at a URL."""
    if not full:
        return verify.quick(store, sizes)
    total = sum(entry.size for entry in verify.read_receipts(store)[0])
    holds = staging.source(url).holds if url else None
    with bar("checksums", "bytes", total, quiet=log.quiet) as progress:
        return verify.full(store, tick=progress.update, sizes=sizes, holds=holds)


def contents(store: Store, bench: Bench, count: int, seed: int, log: Log) -> list[Fault]:
    """What is wrong with the values and the pairs of `count` random rows. The store must be finished."""
    sampled = sample(store, count, seed)
    tokenizers = {name: models.load_tokenizer(checkpoint) for name, checkpoint in bench.checkpoints.items()}
    total = len(sampled) * len(tokenizers)
    with (
        torch_threads(bench.threads),
        Worker(store, bench, log) as worker,
        bar("running again", "rows", total, quiet=log.quiet) as progress,
    ):
        return pairs(store, sampled, tokenizers) + activations(worker, sampled, progress.update)


def write_down(store: Store, faults: Sequence[Fault], log: Log) -> None:
    """Let nobody open a store with faults before it is repaired."""
    if not faults:
        return
    try:
        store.condemn([str(fault) for fault in faults], to_mend(store, faults, strict=False))
    except OSError as error:
        log.event("verify", f"this is not written into the store, which can still be trained on: {error}")


def to_mend(store: Store, faults: Sequence[Fault], strict: bool = True) -> list[Unit]:
    """The units that mend these faults and those found before. `strict`: raises StoreDamagedError where none would."""
    beyond = [str(fault) for fault in faults if fault.unit is None and fault.file != SEALED]
    if beyond and strict:
        way_out = f"harvest repair {store.path} --config FILE makes it again from the harvest's TOML file"
        raise StoreDamagedError("the plan itself is damaged", ", ".join(beyond), way_out)
    return sorted({*store.condemned[1], *(fault.unit for fault in faults if fault.unit is not None)})


def sample(store: Store, count: int, seed: int) -> np.ndarray:
    """Row numbers, sorted, without repetition."""
    return np.sort(np.random.default_rng(seed).choice(store.rows, min(count, store.rows), replace=False))


def activations(worker: Worker, sampled: np.ndarray, tick: Callable[[int], object] = int) -> list[Fault]:
    """Run the planned batches of these rows again, and compare every row they make with the stored one.

    Rows differ where |stored - computed| / |computed| is above the tolerance that the calibration measured. `tick` is
    called with sampled rows done, of each model.
    """
    store = worker.store
    faults: list[Fault] = []
    for model in store.header.models:
        for shard in np.unique(sampled // store.shard_rows).tolist():
            wanted = sampled[sampled // store.shard_rows == shard]
            differences: dict[str, list[tuple[Tensor, np.ndarray]]] = defaultdict(list)
            unreadable: dict[str, Fault] = {}
            for batch in worker.maker(model).batches.holding(shard, wanted):
                for source, x_ND in worker.maker(model).run(batch).items():
                    try:
                        difference_N = _against(store, source, batch, x_ND)
                        differences[source].append((difference_N, batch.row_N))
                    except StoreDamagedError as error:  # of a packed store, whose chunks are checked as they are read
                        what = f"cannot be read: {error.value}"
                        unreadable[source] = Fault(layout.unit_files(source, shard)[0], what, (shard, model))
            tick(len(wanted))
            faults += unreadable.values()
            for source, found in differences.items():
                faults += _judged(store, source, shard, model, found)
    return faults


def _against(store: Store, source: str, batch: Batch, x_ND: Tensor) -> Tensor:
    """Relative differences per row. Masked and clipped rows are what `cast` makes of the computed ones."""
    assert store.header.scale is not None
    scale = store.header.scale[source]
    made = cast(x_ND, scale["factor"], scale["sink_norm"], store.dtype)
    stored_ND = store.stored(source, batch.row_N)
    return difference(made.values_ND.cpu().float(), layout.floats(stored_ND).float())


def _judged(
    store: Store, source: str, shard: int, model: str, found: Sequence[tuple[Tensor, np.ndarray]]
) -> list[Fault]:
    assert store.header.scale is not None
    difference_N = torch.cat([one for one, _ in found]).numpy()
    row_N = np.concatenate([rows for _, rows in found])
    bad_N = ~(difference_N <= store.header.scale[source]["tolerance"])  # NaN is bad
    if not bad_N.any():
        return []
    what = (
        f"is not what the model computes in {bad_N.sum()} of {len(bad_N)} rows that were run again, such as row "
        f"{row_N[bad_N].min()} (largest relative difference {np.nanmax(difference_N):.2g})"
    )
    return [Fault(layout.unit_files(source, shard)[0], what, (shard, model))]


def pairs(store: Store, sampled: np.ndarray, tokenizers: Mapping[str, Tokenizer]) -> list[Fault]:
    """Decode, of each sampled row, every model's tokens from the start of the segment to the row's own.

    All must give one text. (Where two tokenizers do not spell a whole segment alike, as where one knows no upper case,
    and in a greedy alignment, letters alone are compared.) Where models read other texts around the same contents, as
    in chats, that is asked of the text from the row before it in the same message to the row's own.
    The offsets that made the pairs are not looked at.
    """
    faults = []
    texts = {name: Prefixes(store, name, tokenizer) for name, tokenizer in tokenizers.items()}
    spec = store.header.spec
    apart = bool(spec["chats"]) or any(model["replace"] for model in spec["models"].values())
    segment_N = np.searchsorted(store.column("segments/row"), sampled, "right") - 1
    for row, segment in zip(sampled.tolist(), segment_N.tolist(), strict=True):
        for one, two in pairwise(texts):
            if apart:
                steps = texts[one].step(row, segment), texts[two].step(row, segment)
                if None not in steps and letters(str(steps[0])) != letters(str(steps[1])):
                    faults.append(_unlike(one, two, row, str(steps[0]), str(steps[1])))
                continue
            wholes = texts[one].whole(segment), texts[two].whole(segment)
            prefixes = texts[one].upto(row, segment), texts[two].upto(row, segment)
            if wholes[0] != wholes[1] or store.header.plan["alignment"] == "greedy":
                prefixes = prefixes[0].in_letters(), prefixes[1].in_letters()
            if not alike(*prefixes):
                faults.append(_unlike(one, two, row, prefixes[0].text, prefixes[1].text))
    return faults


def _unlike(one: str, two: str, row: int, text: str, other: str) -> Fault:
    ends = f"{one} ends {text[-20:]!r}, {two} ends {other[-20:]!r}"
    return Fault(f"rows/{two}/token", f"pairs other text in row {row}: {ends}")


@dataclass(frozen=True)
class Read:
    """What a model has read of a segment, or (not `complete`) what it has read behind the last token that hides text.

    A special token hides text inside a segment: [UNK] has no letters, and </s> may be spelled by another model.
    """

    text: str
    complete: bool

    def in_letters(self) -> "Read":
        return Read(letters(self.text), self.complete)


def alike(one: Read, two: Read) -> bool:
    """Whether two models have read the same text, as far as it can be seen."""
    if one.text == two.text:
        return True
    by_two, by_one = not two.complete, not one.complete
    return (by_two and one.text.endswith(two.text)) or (by_one and two.text.endswith(one.text))


class Prefixes:
    """The text of a model's segments up to a row, or from the row before it."""

    def __init__(self, store: Store, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids_T, self.segment_G = store.lazily(f"tokens/{model}/id"), store.column(f"tokens/{model}/segment")
        self.token_N, self.row_G = store.lazily(f"rows/{model}/token"), store.column("segments/row")
        self.flags_N = store.lazily(f"rows/{model}/flags")
        spec = store.header.spec
        speller = Speller(tokenizer, spec["rows"]["bos"], model, spec["models"][model]["replace"])
        self.written, self.before = speller.written, len(speller.prefix)
        decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
        self.mark = str(getattr(decoder, "prefix", ""))  # WordPiece leaves its ## where a segment begins inside a word

    def whole(self, segment: int) -> str:
        return self._decode(int(self.segment_G[segment]), int(self.segment_G[segment + 1]))

    def upto(self, row: int, segment: int) -> Read:
        start, stop = int(self.segment_G[segment]), int(self.token_N[row]) + 1
        inside = range(min(start + self.before, stop), stop)
        hiding = np.flatnonzero(np.isin(self.ids_T[inside.start : stop], self.tokenizer.all_special_ids))
        if not len(hiding):
            return Read(self._decode(start, stop), True)
        return Read(self._decode(inside[int(hiding[-1])] + 1, stop), False)

    def step(self, row: int, segment: int) -> str | None:
        """Behind the row before it; none where that is in no one message with it, or the model reads other tokens."""
        if row == self.row_G[segment] or self.flags_N[row] != self.flags_N[row - 1] or self.flags_N[row] & TEMPLATE:
            return None
        start, stop = int(self.token_N[row - 1]) + 1, int(self.token_N[row]) + 1
        unlike = np.isin(self.ids_T[start:stop], [*self.written, *self.tokenizer.all_special_ids])
        return None if unlike.any() else self._decode(start, stop)

    def _decode(self, start: int, stop: int) -> str:
        ids = self.ids_T[start:stop].tolist()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.removeprefix(self.mark)


def letters(text: str) -> str:
    """What is left of a text when case, accents, white space, unseen characters and forms of a letter do not count."""
    plain = unicodedata.normalize("NFKD", text.casefold()).replace("\ufffd", "")
    return "".join(letter for letter in plain if not letter.isspace() and unicodedata.category(letter)[0] not in "MCZ")
