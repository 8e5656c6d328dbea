"""The commands that look after stores, as a user meets them."""

import re
import shutil
from pathlib import Path

import pytest

from shared.store import Store
from tests.harvest.command import Harvest, assert_one_line, config_of
from tests.harvest.pair import tree
from tests.tiny import TEXTS


@pytest.fixture
def pair(typed: Store) -> Store:
    return typed


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_aligned_tokens_side_by_side_with_norms(harvest: Harvest, pair: Store) -> None:
    records = harvest("inspect", pair.path, "--rows", "0:120", "--json").json
    assert [record["row"] for record in records] == list(range(120))
    texts = {f"doc {number}": text for number, text in enumerate(TEXTS)}
    norms = pair.column("norms/gemma")
    for record in records:
        first, second = record["models"]["llama"], record["models"]["gemma"]
        one, two = first["token"], second["token"]
        assert one.endswith(two) or two.endswith(one)
        assert one
        assert two
        assert one in texts[record["document"]]
        assert record["sources"]["gemma"] == {"norm": pytest.approx(float(norms[record["row"]])), "faults": []}
        assert second["position"] == first["position"] + 1 or record["row"] > 0
    assert records[0]["models"]["llama"]["flags"] == ["first"]
    lines = harvest("inspect", pair.path).out.splitlines()
    assert len(lines) == 21
    assert lines[0].split() == [
        "row",
        "document",
        "llama",
        "llama@",
        "gemma",
        "gemma@",
        "|early|",
        "|inner|",
        "|gemma|",
    ]


@pytest.mark.parametrize(
    ("rows", "shown"),
    [("7", [7]), ("3:5", [3, 4]), ("118:", [118, 119]), (":2", [0, 1]), ("119:999", [119])],
)
def test_inspect_takes_a_row_or_a_range(harvest: Harvest, pair: Store, rows: str, shown: list[int]) -> None:
    assert [record["row"] for record in harvest("inspect", pair.path, "--rows", rows, "--json").json] == shown


def test_inspect_finds_a_tokenizer_that_has_moved(harvest: Harvest, home: Path, pair: Store, tmp_path: Path) -> None:
    moved = shutil.copytree(home / "gemma", tmp_path / "gemma")
    expected = harvest("inspect", pair.path).out
    hidden = home / "hidden"
    (home / "gemma").rename(hidden)
    try:
        refused = harvest("inspect", pair.path)
        found = harvest("inspect", pair.path, "--model", f"gemma={moved}")
    finally:
        hidden.rename(home / "gemma")
    assert found.out == expected
    assert refused.code == 2
    assert refused.err == f"error: no such model: {home / 'gemma'}. Give --model gemma=PATH, where it lies now\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--rows", "x"], 2, "error: --rows must read START:STOP: x. Example: --rows 100:120"),
        (["--rows", "120"], 2, "error: no such rows: 120. The store has rows 0 to 119"),
        (["--rows", "5:3"], 2, "error: no such rows: 5:3. The store has rows 0 to 119"),
        (["--rows=-3"], 2, "error: no such rows: -3. The store has rows 0 to 119"),
        (["--model", "gemm=x"], 2, "error: --model must read NAME=PATH: gemm=x. The store's models are llama, gemma"),
        (["--model", "gemma"], 2, "error: --model must read NAME=PATH: gemma. The store's models are llama, gemma"),
        (["--model", "gemma={home}/llama"], 2, "error: this is not the tokenizer of gemma in the store: {home}/llama."),
    ],
)  # fmt: skip
def test_inspect_refuses_what_it_cannot_show(
    harvest: Harvest, home: Path, pair: Store, arguments: list[str], code: int, told: str
) -> None:
    done = harvest("inspect", pair.path, *(argument.format(home=home) for argument in arguments))
    assert_one_line(done, code, told.format(home=home))


# --- trust ----------------------------------------------------------------------------------------------------------


def copy_of(pair: Store, folder: Path) -> Path:
    return shutil.copytree(pair.path, folder / "x.zarr")


def test_status_tells_how_far_a_store_is(harvest: Harvest, pair: Store, tmp_path: Path) -> None:
    path = copy_of(pair, tmp_path)
    (path / "sealed").unlink()
    (path / "receipts/00000.llama.json").unlink()
    found = harvest("status", path, "--json").json
    assert (found["state"], found["units"]["llama"]) == ("unfinished", [pair.shards - 1, pair.shards])
    text = harvest("status", path).out
    assert "state  unfinished\n" in text
    assert f"llama {pair.shards - 1} of {pair.shards}" in text
    assert "made with  cpu, 1 threads\n" in text
    assert "[" not in text


def test_commands_work_from_inside_a_store(
    harvest: Harvest, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(pair, tmp_path))
    for command in ("status", "verify", "repair", "inspect"):
        done = harvest(command, ".")
        assert (done.code, done.err) == (0, ""), command


def test_a_sound_store_is_said_to_be_and_how_it_was_asked(harvest: Harvest, pair: Store) -> None:
    for asked, told in (
        ([], "receipts and sizes; --full reads every file"),
        (["--full"], "receipts, sizes and checksums"),
        (["--full", "--deep", "5"], "receipts, sizes and checksums; 5 rows run again and decoded"),
    ):
        done = harvest("verify", pair.path, *asked)
        assert (done.code, done.out) == (0, f"{pair.path}: sound ({told})\n")
    assert harvest("verify", pair.path, "--json").json == []


def test_a_fault_is_a_line_and_exit_code_1_and_repair_mends_it(harvest: Harvest, pair: Store, tmp_path: Path) -> None:
    path, name = copy_of(pair, tmp_path), "activations/gemma/c/0/0"
    before = tree(path)
    (path / name).write_bytes(bytes(len(before[name])))
    assert harvest("verify", path).code == 0
    done = harvest("verify", path, "--full")
    assert done.code == 1
    assert done.out.startswith(f"{name} has another checksum in ") and done.out.endswith(" (shard 0 of gemma)\n")
    told = f"error: 1 files of {path} are damaged: {name} has another checksum"
    for command in (("inspect", path), ("run", config_of(pair), "--store", path)):
        again = harvest(*command)
        assert (again.code, again.err.splitlines()[-1][: len(told)]) == (1, told)
        assert "nothing to do" not in again.err
    (fault,) = harvest("verify", path, "--full", "--json").json
    assert (fault["file"], fault["unit"]) == (name, [0, "gemma"])
    mended = harvest("repair", path)
    assert (mended.code, mended.out) == (0, f"{path}: 1 units made again\n")
    assert tree(path) == before
    assert harvest("verify", path, "--full").code == 0
    assert harvest("repair", path, "--full").out == f"{path}: 0 units made again\n"


def test_ls_shows_stores(harvest: Harvest, pair: Store, tmp_path: Path) -> None:
    path = copy_of(pair, tmp_path)
    assert harvest("ls", tmp_path).out.startswith(f"{path}  finished  120 rows  ")
    assert harvest("ls", tmp_path, "--json").json[0]["id"] == pair.header.id
    (tmp_path / "empty").mkdir()
    assert_one_line(harvest("ls", tmp_path / "empty"), 1, f"error: no store below this folder: {tmp_path}/empty. ")


def test_pack_prints_what_it_measured_and_the_packed_store_is_a_store(
    harvest: Harvest, pair: Store, tmp_path: Path
) -> None:
    path = tmp_path / "cold.zarr"
    done = harvest("pack", pair.path, "--out", path, "--codec", "zstd", "--level", "9")
    sizes = {
        (store, source): sum(file.stat().st_size for file in (store / "activations" / source).rglob("c/*/*")) / 1e6
        for store in (pair.path, path) for source in pair.header.sources
    }  # fmt: skip
    title, *sources, speed = done.out.splitlines()
    assert (done.code, title) == (0, f"{path}: zstd, level 9")
    for source, line in zip(pair.header.sources, sources, strict=True):
        before, after = sizes[pair.path, source], sizes[path, source]
        assert line == f"  {source}: {before:,.1f} MB -> {after:,.1f} MB, ratio {before / after:.3f}"
    assert re.fullmatch(r"  encoded at [\d,]+ MB/s, decoded at [\d,]+ MB/s \(\d+ threads\)", speed)
    again = harvest("pack", pair.path, "--out", path, "--codec", "zstd", "--level", "9", "--json").json
    assert (again["id"], again["encode_mb_s"]) == (pair.header.id, None)
    assert harvest("status", path, "--json").json["codec"] == "zstd, level 9"
    assert " MB (zstd, level 9)  id " in harvest("ls", path).out
    rows = [harvest("inspect", store, "--rows", "3:6").out for store in (pair.path, path)]
    assert rows[0] == rows[1] != ""
    assert harvest("verify", path, "--full", "--deep", "20").code == 0
    data = bytearray((path / "activations/gemma/c/1/0").read_bytes())
    data[0] ^= 1
    (path / "activations/gemma/c/1/0").write_bytes(data)
    done = harvest("verify", path, "--full")
    assert (done.code, done.out[:44]) == (1, "activations/gemma/c/1/0 has another checksum")
    assert harvest("repair", path).out == f"{path}: 1 units made again\n"
    assert harvest("verify", path, "--full").code == 0


def test_what_cannot_be_packed_gets_one_line(harvest: Harvest, pair: Store, tmp_path: Path) -> None:
    path = copy_of(pair, tmp_path)
    out = ("--out", tmp_path / "y.zarr")
    told = "error: unknown codec: zstandard. Did you mean zstd? Known: zstd, blosc, pcodec"
    assert_one_line(harvest("pack", path, *out, "--codec", "zstandard"), 2, told)
    told = "error: blosc has no such level: 10. It knows 1 to 9"
    assert_one_line(harvest("pack", path, *out, "--codec", "blosc", "--level", "10"), 2, told)
    told = f"error: another form of this store is at {path} (stored -> asked): raw -> {{'name': 'blosc', 'level': 5, "
    assert_one_line(harvest("pack", path, "--out", path), 2, told)
    (path / "sealed").unlink()
    assert_one_line(harvest("pack", path, *out), 1, "error: this store is not finished: ")
    assert [one.name for one in tmp_path.iterdir()] == ["x.zarr"]
