"""What is not what the models compute, or pairs other text, is found; repair makes exactly those units again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest import bench, check, work
from harvest.bench import Bench
from harvest.check import Read
from harvest.job import prepare
from harvest.pack import pack
from shared import codec, verify
from shared.errors import StoreDamagedError, StoreMismatchError
from shared.layout import crc32c
from shared.log import Log
from shared.store import Store
from shared.verify import Fault
from tests.harvest.pair import config, harvest, tree
from tests.tiny import TEXTS, save_model, wordpiece

LOG = Log(quiet=True)


@pytest.fixture
def copy(pair: Store, tmp_path: Path) -> Store:
    return Store.at(shutil.copytree(pair.path, tmp_path / "x.zarr"))


def bench_of(store: Store) -> Bench:
    return Bench(bench.find(store.header, {}, print), "cpu", 1)


def deep(store: Store, count: int = 300) -> list[Fault]:
    return check.contents(store, bench_of(store), count, 0, LOG)


def refit(store: Store, name: str, values: np.ndarray, unit: tuple[int, str] | None = None) -> None:
    """Change a file, and its receipt and seal as one would who wants to hide it."""
    data = values.tobytes()
    (store.path / name).write_bytes(data)
    receipt = store.path / ("receipts/plan.json" if unit is None else f"receipts/{unit[0]:05d}.{unit[1]}.json")
    content = json.loads(receipt.read_text())
    content["files"][name] = {"size": len(data), "crc32c": crc32c([data])}
    receipt.write_text(json.dumps(content))
    sealed = json.loads((store.path / "sealed").read_text())
    sealed["receipts"][receipt.name] = crc32c([receipt.read_bytes()])
    sealed["files"][name] = [len(data), crc32c([data])]
    (store.path / "sealed").write_text(json.dumps(sealed))


def test_a_sound_store_passes_with_all_its_rows(pair: Store) -> None:
    assert deep(pair) == []


def test_identical_models_pass(home: Path, tmp_path: Path) -> None:
    models = {name: {"path": str(home / "llama"), "sites": ["resid.1"]} for name in ("one", "two")}
    assert deep(harvest(config(home, tmp_path / "x.zarr", models=models))) == []


def test_a_zeroed_file_that_was_made_to_fit_is_found_by_running_the_model(copy: Store, pair: Store) -> None:
    name = "activations/inner/c/2/0"
    refit(copy, name, np.zeros_like(np.fromfile(copy.path / name, "<u1")), (2, "llama"))
    assert verify.full(copy) == []
    (fault,) = deep(copy)
    assert fault.unit == (2, "llama")
    assert fault.what.startswith("is not what the model computes in ")
    assert "such as row 160 (largest relative difference 1)" in fault.what
    work.repair(copy, check.to_mend(copy, [fault]), work.OneProcess(bench_of(copy), LOG), LOG)
    assert tree(copy.path) == tree(pair.path)


def test_a_model_shifted_by_one_row_is_found_and_placed(copy: Store) -> None:
    shard = np.fromfile(copy.path / "activations/gemma/c/0/0", "<f2")
    index = shard[80 * 24 :]  # behind 80 rows of 24
    refit(copy, "activations/gemma/c/0/0", np.concatenate([np.roll(shard[: 80 * 24], 24), index]), (0, "gemma"))
    (fault,) = deep(copy)
    assert (fault.file, fault.unit) == ("activations/gemma/c/0/0", (0, "gemma"))


def test_a_model_paired_one_token_on_is_found_by_decoding(copy: Store) -> None:
    token = np.fromfile(copy.path / "rows/gemma/token/c/1", "<i8")
    refit(copy, "rows/gemma/token/c/1", token - 1)
    faults = deep(copy)
    assert {fault.file for fault in faults} == {"rows/gemma/token"}
    rows = {int(fault.what.split("row ")[1].split(":")[0]) for fault in faults}
    assert rows and rows <= set(range(80, 160))
    assert "llama ends '" in faults[0].what
    with pytest.raises(StoreDamagedError, match="the plan itself is damaged: rows/gemma/token pairs other text"):
        check.to_mend(copy, faults)


def with_bert(home: Path, path: Path, texts: Sequence[str]) -> Store:
    """The two models of `pair` and an encoder with word pieces, on texts of one's own."""
    save_model(path / "bert", "bert", wordpiece(), seed=3)
    lines = "".join(json.dumps({"text": text, "id": f"doc {number}"}) + "\n" for number, text in enumerate(texts))
    (path / "corpus.jsonl").write_text(lines)
    folders = {"llama": home / "llama", "gemma": home / "gemma", "bert": path / "bert"}
    models = {name: {"path": str(folder), "sites": ["resid.1"]} for name, folder in folders.items()}
    corpus = {"path": str(path / "corpus.jsonl")}
    return harvest(config(home, path / "x.zarr", models=models, corpus=corpus, rows={"count": None, "context": 12}))


def test_word_pieces_pass_also_where_a_segment_begins_inside_a_word(home: Path, tmp_path: Path) -> None:
    store = with_bert(home, tmp_path, TEXTS)
    begins = store.column("tokens/bert/id")[store.column("tokens/bert/segment")[:-1] + 1]
    pieces = wordpiece().load(tmp_path / "w").convert_ids_to_tokens(begins.tolist())
    assert sum(piece.startswith("##") for piece in pieces) >= 5
    assert store.rows > 300 and deep(store, store.rows) == []


def test_text_that_a_special_token_hides_is_not_missed_behind_it(home: Path, tmp_path: Path) -> None:
    """[UNK] has no letters, and </s> is text to two of the three."""
    store = with_bert(home, tmp_path, ["it is \U0001f98a what</s> it was", "<s>as it is", "then\ufffd\u200d and then"])
    ids = store.column("tokens/bert/id").tolist()
    assert wordpiece().backend.token_to_id("[UNK]") in ids
    assert {1, 2} <= set(store.column("tokens/gemma/id").tolist())
    assert store.header.plan["documents"] == 3 and deep(store, store.rows) == []


@pytest.mark.parametrize("model", ["gemma", "bert"])
def test_word_pieces_that_are_paired_one_token_on_are_found(home: Path, tmp_path: Path, model: str) -> None:
    store = with_bert(home, tmp_path, TEXTS)
    token = np.fromfile(store.path / f"rows/{model}/token/c/0", "<i8")
    refit(store, f"rows/{model}/token/c/0", token - 1)
    rows = {int(fault.what.split("row ")[1].split(":")[0]) for fault in deep(store, store.rows)}
    assert rows and rows <= set(store.rows_of(0))
    assert len(rows) > 0.9 * store.shard_rows


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (Read("a b c", True), Read("a b c", True), True),
        (Read("a b c", True), Read("b c", True), False),
        (Read("a b c", True), Read("b c", False), True),
        (Read("a b c", False), Read("b c", True), False),
        (Read("a b c", False), Read("b c", False), True),
        (Read("a b c", True), Read("b", False), False),
    ],
)
def test_texts_are_compared_as_far_as_they_can_be_seen(one: Read, two: Read, same: bool) -> None:
    assert check.alike(one, two) == check.alike(two, one) == same


def test_the_sample_is_random_by_its_seed_and_without_repetition(pair: Store) -> None:
    one, again, other = (check.sample(pair, 20, seed).tolist() for seed in (0, 0, 1))
    assert one == again != other
    assert one == sorted(set(one)) and len(one) == 20
    assert check.sample(pair, 10**6, 0).tolist() == list(range(300))


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("Ünder  the\n", "under the", True),
        ("the cat", "the ca", False),
        ("ﬁne", "fine", True),
        ("日本", "日", False),
        ("a\u200db\ufe0f\ufffd", "ab", True),
        ("का", "क", True),  # what BERT's normaliser takes out
    ],
)
def test_letters_leave_out_what_tokenizers_do_not_keep(one: str, two: str, same: bool) -> None:
    assert (check.letters(one) == check.letters(two)) == same


# --- repair ---------------------------------------------------------------------------------------------------------


def overwrite(path: Path, name: str, start: int, data: bytes) -> None:
    content = bytearray((path / name).read_bytes())
    content[start : start + len(data)] = data
    (path / name).write_bytes(content)


def swap(path: Path, one: str, two: str) -> None:
    (path / one).rename(path / "x")
    (path / two).rename(path / one)
    (path / "x").rename(path / two)


UNIT_FILES = ("activations/gemma/c/{}/0", "norms/gemma/c/{}", "faults/gemma/c/{}", "moments/gemma/c/{}/0/0")
BREAKS: dict[str, tuple[Callable[[Path], Any], bool]] = {  # what is done, and whether quick finds it
    "a flipped bit": (lambda path: overwrite(path, "activations/inner/c/1/0", 99, b"\x81"), False),
    "a truncated file": (lambda path: (path / "norms/early/c/0").write_bytes(b""), True),
    "a zeroed block": (lambda path: overwrite(path, "activations/early/c/0/0", 512, bytes(512)), False),
    "a deleted shard": (lambda path: (path / "activations/gemma/c/3/0").unlink(), True),
    "swapped shards": (lambda path: swap(path, "activations/gemma/c/0/0", "activations/gemma/c/1/0"), False),
    "shards swapped with their receipts": (
        lambda path: [
            swap(path, one.format("0" * zeros + "0"), one.format("0" * zeros + "1"))
            for one, zeros in [*((file, 0) for file in UNIT_FILES), ("receipts/{}.gemma.json", 4)]
        ],
        True,
    ),
    "a receipt from another plan": (
        lambda path: overwrite(path, "receipts/00002.llama.json", 9, b"0123456789abcdef"),
        True,
    ),
    "a deleted receipt": (lambda path: (path / "receipts/00001.gemma.json").unlink(), True),
    "a torn seal": (lambda path: (path / "sealed").write_bytes(b'{"id": '), True),
    "a lost seal": (lambda path: (path / "sealed").unlink(), True),
}


@pytest.mark.parametrize("what", BREAKS)
def test_repair_makes_the_store_what_it_was_and_nobody_trains_on_it_before(
    copy: Store, pair: Store, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(pair.path)
    BREAKS[what][0](copy.path)
    changed = {name for name in before if tree(copy.path).get(name) != before[name]}
    quick, full = verify.quick(copy), verify.full(copy)
    assert bool(quick) == BREAKS[what][1] or what == "a lost seal"
    assert full or what == "a lost seal"
    check.write_down(copy, full, LOG)
    with pytest.raises(Exception, match=r"damaged|not finished"):
        Store.open(copy.path)
    units = check.to_mend(copy, full)
    made: list[tuple[int, str]] = []
    genuine = Store.put
    monkeypatch.setattr(
        Store, "put", lambda self, shard, *rest: (made.append((shard, rest[0])), genuine(self, shard, *rest))[1]
    )
    mended = work.repair(copy, units, work.OneProcess(bench_of(copy), LOG), LOG)
    assert sorted(made) == units
    assert {name.split("/c/")[0] for name in changed if "/c/" in name} <= {
        f"{kind}/{source.name}"
        for _, model in units
        for source in pair.sources_of(model)
        for kind in ("activations", "norms", "faults", "moments")
    }
    assert tree(mended.path) == before
    assert Store.open(copy.path).condemned == ([], [])


def test_a_plan_that_is_damaged_cannot_be_repaired_unit_by_unit(copy: Store) -> None:
    overwrite(copy.path, "rows/document/c/0", 0, b"\x05")
    faults = verify.full(copy)
    with pytest.raises(StoreDamagedError, match="the plan itself is damaged: rows/document/c/0 has another checksum"):
        check.to_mend(copy, faults)
    check.write_down(copy, faults, LOG)
    with pytest.raises(StoreDamagedError):
        Store.open(copy.path)


@pytest.mark.parametrize(
    "name",
    [
        "rows/document/c/0",
        "tokens/llama/id/zarr.json",
        "receipts/plan.json",
        "activations/gemma/zarr.json",
        "documents/id/c/0",
    ],
)
@pytest.mark.parametrize("how", ["gone", "other bytes"])
def test_a_damaged_plan_is_made_again_from_what_it_was_made_from(
    home: Path, pair: Store, copy: Store, name: str, how: str
) -> None:
    before = tree(pair.path)
    file = copy.path / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"[" + file.read_bytes()[1:])
    faults = verify.full(copy)
    assert faults
    check.write_down(copy, faults, LOG)
    mended = work.mend_plan(copy, prepare(config(home, copy.path), LOG), LOG)
    assert mended == [name]
    assert check.to_mend(copy, verify.full(copy)) == []
    done = work.repair(copy, [], work.OneProcess(bench_of(copy), LOG), LOG)
    assert tree(done.path) == before and not (copy.path.parent / f"{copy.path.name}.plan").exists()


def test_a_packed_store_stays_packed_when_its_plan_is_mended(home: Path, pair: Store, tmp_path: Path) -> None:
    pack(pair, tmp_path / "cold.zarr", codec.find("zstd", None), LOG)
    cold = Store.open(tmp_path / "cold.zarr")
    before = tree(cold.path)
    (cold.path / "rows/document/c/0").unlink()
    mended = work.mend_plan(cold, prepare(config(home, cold.path), LOG), LOG)
    assert mended == ["rows/document/c/0"] and tree(cold.path) == before


def test_the_plan_of_another_harvest_mends_nothing(home: Path, copy: Store) -> None:
    with pytest.raises(StoreMismatchError, match=r"rows.count: 300 -> 200"):
        work.mend_plan(copy, prepare(config(home, copy.path, rows={"count": 200}), LOG), LOG)


def test_a_store_that_cannot_be_written_is_still_checked(
    copy: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: Store, *_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Store, "condemn", refused)
    check.write_down(copy, [Fault("x", "is missing")], Log())
    assert "this is not written into the store, which can still be trained on: read-only" in capsys.readouterr().err


def test_a_greedy_store_pairs_the_same_letters_and_has_another_id(home: Path, pair: Store, tmp_path: Path) -> None:
    store = harvest(config(home, tmp_path / "x.zarr", rows={"align": "greedy", "count": None}))
    assert store.header.plan["alignment"] == "greedy"
    assert store.header.id != pair.header.id
    assert deep(store, store.rows) == []
    token = np.fromfile(store.path / "rows/gemma/token/c/0", "<i8")
    refit(store, "rows/gemma/token/c/0", token - 1)
    assert {fault.file for fault in deep(store, store.rows)} == {"rows/gemma/token"}
