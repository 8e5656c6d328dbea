"""A harvest to a URL gives the objects that a local one gives as files, whatever happens on the way."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from harvest import check, cli, cluster, destination, lock, work
from harvest.bench import Bench
from harvest.config import HarvestConfig, StoreConfig
from harvest.destination import AtUrl
from harvest.job import prepare
from harvest.work import Crew, Receipt, Tick
from harvest.worker import Scale
from shared import files, remote, staging
from shared.errors import RemoteError, SpaceError, StoreDamagedError, StoreError, StoreMismatchError
from shared.layout import Unit
from shared.log import Log
from shared.objects import Objects
from shared.store import Store
from tests.harvest.pair import Tree, config, harvest, tree
from tests.s3 import Bucket

LOG = Log(quiet=True)
SHARD = "activations/early/c/1/0"  # of llama, beside inner
SMALL = {"shard_bytes": 2560}  # many units
RECEIPT = "receipts/00001.llama.json"


def to(home: Path, bucket: Bucket, staging: Path | None = None, **tables: Any) -> HarvestConfig:
    store = {"staging": None if staging is None else str(staging), **tables.pop("store", {})}
    made = config(home, Path("none"), store=store, **tables).model_dump()
    made["store"]["path"] = bucket.url  # a Path would lose a slash
    return HarvestConfig.model_validate(made)


def rows_on_disk(folder: Path) -> set[str]:
    """The units, as `shard model`, that have activations in a folder."""
    names = [path.relative_to(folder).parts for path in folder.glob("activations/*/c/*/0")]
    return {f"{shard} {'gemma' if source == 'gemma' else 'llama'}" for _, source, _, shard, _ in names}


class Watched(Crew):
    """One process, and the units that it made."""

    ahead = 1

    def __init__(self, asked: HarvestConfig) -> None:
        job = prepare(asked, LOG)
        self.crew, self.units = work.OneProcess(Bench(job.checkpoints, "cpu", 1), LOG), list[Unit]()

    def scale(self, store: Store) -> Scale:
        return self.crew.scale(store)

    def make(self, store: Store, units: Sequence[Unit], tick: Tick) -> Iterator[Receipt]:
        self.units += units
        return self.crew.make(store, units, tick)


def made_by(asked: HarvestConfig) -> list[Unit]:
    """Harvest, and tell which units had to be made."""
    crew = Watched(asked)
    work.run(prepare(asked, LOG), crew, LOG)
    return sorted(crew.units)


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_the_objects_are_the_files_of_a_local_harvest_in_an_order_that_never_lies(
    home: Path, pair: Store, bucket: Bucket
) -> None:
    with bucket.requests() as asked:
        store = harvest(to(home, bucket))
    assert bucket.tree() == tree(pair.path)
    assert (store.sealed, store.header) == (True, pair.header)
    puts = [line.removeprefix("PUT ") for line in asked if line.startswith("PUT ")]
    assert puts[0] == "zarr.json" and puts[-1] == "sealed"
    for name in (name for name in puts if name.startswith("receipts/")):
        assert all(puts.index(file) < puts.index(name) for file in json.loads(bucket.read(name))["files"])


@pytest.mark.slow
def test_two_workers_make_the_same_objects(home: Path, pair: Store, bucket: Bucket) -> None:
    asked = to(home, bucket)
    job = prepare(asked, LOG)
    with cluster.local(2, Bench(job.checkpoints, "cpu", 1), LOG) as crew:
        work.run(job, crew, LOG)
    assert bucket.tree() == tree(pair.path)


def test_parts_that_share_nothing_but_the_url_make_the_same_objects(
    home: Path, pair: Store, bucket: Bucket, tmp_path: Path
) -> None:
    made = [harvest(to(home, bucket, tmp_path / str(i)), work.Part(i, 3)).sealed for i in (1, 2, 3)]
    assert made == [False, False, True]
    assert bucket.tree() == tree(pair.path)


def test_a_folder_of_the_same_name_is_another_thing_than_the_url(home: Path, bucket: Bucket, tmp_path: Path) -> None:
    asked = to(home, bucket, tmp_path / "here").store
    assert asked.folder.parent == tmp_path / "here"
    assert asked.folder != remote.place(bucket.url, tmp_path / "here")  # where a copy would lie
    assert to(home, bucket).store.folder.parent == tmp_path / "cache" / "harvest"
    assert StoreConfig(path="x.zarr", staging="y").folder == Path("x.zarr")


# --- little room ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["sending", "making"])
def test_the_disk_never_holds_more_than_four_units(
    home: Path, pair: Store, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    asked = to(home, bucket, tmp_path, store=SMALL)
    genuine, seen = Objects.put, list[int]()

    def put(self: Objects, name: str, data: bytes | Path) -> None:
        seen.append(len(rows_on_disk(asked.store.folder)))
        if slow == "sending" and "activations" in name:
            time.sleep(0.05)
        genuine(self, name, data)

    monkeypatch.setattr(Objects, "put", put)
    store = harvest(asked)
    assert store.shards > 10 and max(seen) <= 4
    assert rows_on_disk(asked.store.folder) == set()
    assert not [path for path in asked.store.folder.rglob("c/*") if path.is_file()]


def test_room_for_a_few_units_is_enough_for_a_url_and_not_for_a_folder(
    home: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 600_000)
    with pytest.raises(SpaceError, match=r"rows\.count"):
        harvest(config(home, tmp_path / "x.zarr", store=SMALL))
    assert harvest(to(home, bucket, store=SMALL)).sealed
    bucket.delete(*bucket.names())
    monkeypatch.setattr(files, "free_bytes", lambda path: 60_000)
    with pytest.raises(SpaceError, match=r"store\.staging"):
        harvest(to(home, bucket, tmp_path / "other", store=SMALL))


# --- going on -------------------------------------------------------------------------------------------------------

COMMAND = "from harvest.cli import main; main()"


def killed_when(asked: HarvestConfig, folder: Path, reached: Callable[[], bool]) -> None:
    """Run the command, and kill -9 it at that moment."""
    folder.mkdir(exist_ok=True)
    (folder / "pair.toml").write_text(tomli_w.dumps(asked.model_dump(exclude_none=True)))
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(folder / "pair.toml")],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while not reached() and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "it was too late"
        process.kill()


@pytest.fixture(scope="module")
def expected(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return tree(harvest(config(home, tmp_path_factory.mktemp("expected") / "x.zarr", store=SMALL)).path)


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("the plan", marks=pytest.mark.slow),
        "the scale",
        pytest.param("half of the units", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("lost", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["elsewhere", "here"])
def test_kill_9_and_resume_gives_the_same_objects_and_no_others(
    home: Path, bucket: Bucket, tmp_path: Path, expected: Tree, at: str, lost: bool
) -> None:
    units = len([name for name in expected if name.startswith("receipts/0")])
    asked = to(home, bucket, tmp_path / "staging", store=SMALL)
    names = bucket.names

    def receipts() -> int:
        return len([name for name in names() if name.startswith("receipts/0")])

    killed_when(
        asked, tmp_path / "run",
        {
            "the plan": lambda: len(names()) > 20,
            "the scale": lambda: any(name.startswith("activations/") for name in names()),
            "half of the units": lambda: receipts() > units // 2,
        }[at],
    )  # fmt: skip
    done, left = receipts(), {name: bucket.read(name) for name in names()}
    assert "sealed" not in left and all(expected[name] == data for name, data in left.items() if name != "zarr.json")
    if lost:
        shutil.rmtree(tmp_path / "staging")
    assert len(made_by(asked)) <= units - done
    assert bucket.tree() == expected
    assert not list((tmp_path / "staging").rglob("*.partial")) and not lock.folder_of(asked.store.folder).exists()


def test_what_could_not_be_sent_is_sent_later_and_not_made_again(
    home: Path, pair: Store, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Objects.put

    def put(self: Objects, name: str, data: bytes | Path) -> None:
        if name == RECEIPT:
            raise RemoteError("the network has gone", name, "Wait")
        genuine(self, name, data)

    with monkeypatch.context() as patched, pytest.raises(RemoteError, match="the network has gone"):
        patched.setattr(Objects, "put", put)
        harvest(to(home, bucket))
    assert RECEIPT not in bucket.names()
    here = Store.at(to(home, bucket).store.folder)
    assert here.has(1, "llama") and (here.path / SHARD).exists()
    assert made_by(to(home, bucket)) == sorted(here.missing())
    assert bucket.tree() == tree(pair.path)


def unfinished(bucket: Bucket, pair: Store) -> None:
    """A bucket that lacks `sealed` and two units."""
    bucket.fill(tree(pair.path))
    bucket.delete("sealed", "receipts/00003.gemma.json", "receipts/00000.gemma.json")


@pytest.mark.parametrize("harm", [lambda data: None, lambda data: data[:-1], lambda data: data + b"x"])
def test_a_unit_whose_files_are_missing_or_of_another_size_is_made_again(
    home: Path, pair: Store, bucket: Bucket, harm: Callable[[bytes], bytes | None]
) -> None:
    unfinished(bucket, pair)
    data = harm(bucket.read(SHARD))
    bucket.delete(SHARD) if data is None else bucket.write(SHARD, data)
    assert made_by(to(home, bucket)) == [(0, "gemma"), (1, "llama"), (3, "gemma")]
    assert bucket.tree() == tree(pair.path)


def test_no_activation_is_fetched_to_go_on_elsewhere(home: Path, pair: Store, bucket: Bucket) -> None:
    unfinished(bucket, pair)
    with bucket.requests() as asked:
        made_by(to(home, bucket))
    fetched = [line for line in asked if line.startswith("GET ")]
    assert not [line for line in fetched if "activations" in line and "zarr.json" not in line]
    assert "GET rows/document/c/0" in fetched


def test_a_bucket_that_was_emptied_is_filled_again(home: Path, pair: Store, bucket: Bucket) -> None:
    asked = to(home, bucket)
    harvest(asked)
    bucket.delete(*bucket.names())
    assert len(made_by(asked)) == 8
    assert bucket.tree() == tree(pair.path)


class Slower(Watched):
    """While it calibrates, another harvest to the same URL is faster, and finds another scale."""

    def __init__(self, asked: HarvestConfig, bucket: Bucket, faster: Tree) -> None:
        super().__init__(asked)
        self.bucket, self.faster = bucket, faster

    def scale(self, store: Store) -> Scale:
        found = self.crew.scale(store)
        self.bucket.write("zarr.json", self.faster["zarr.json"])
        return {name: {**one, "factor": 2 * one["factor"]} for name, one in found.items()}


def test_of_two_scales_the_first_counts(home: Path, pair: Store, bucket: Bucket) -> None:
    asked = to(home, bucket)
    work.run(prepare(asked, LOG), Slower(asked, bucket, tree(pair.path)), LOG)
    assert bucket.tree() == tree(pair.path)


@pytest.mark.slow
def test_two_whole_harvests_at_once_do_no_harm(home: Path, pair: Store, bucket: Bucket, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=subprocess.run, args=([sys.executable, "-c", COMMAND, "run", str(file)],))
        for file in (tmp_path / "1.toml", tmp_path / "2.toml")
    ]
    for number, thread in enumerate(threads, 1):
        asked = to(home, bucket, tmp_path / f"staging{number}")
        (tmp_path / f"{number}.toml").write_text(tomli_w.dumps(asked.model_dump(exclude_none=True)))
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.tree() == tree(pair.path)


# --- what is there already ------------------------------------------------------------------------------------------


def test_a_finished_store_is_left_alone(home: Path, pair: Store, bucket: Bucket) -> None:
    bucket.fill(tree(pair.path))
    with bucket.requests() as asked:
        assert made_by(to(home, bucket)) == []
    assert not [line for line in asked if not line.startswith("GET ")]
    assert not [line for line in asked if "/c/" in line]


def test_another_store_at_the_url_is_refused(home: Path, pair: Store, bucket: Bucket) -> None:
    bucket.fill(tree(pair.path))
    other = to(home, bucket, rows={"context": 24, "held_out": 0.3, "count": 200})
    for _ in range(2):
        with pytest.raises(StoreMismatchError, match=f"another store is at {bucket.url}.*rows.count: 300 -> 200"):
            harvest(other)
        bucket.delete("sealed")
    assert {**bucket.tree(), "sealed": b""} == {**tree(pair.path), "sealed": b""}


def test_a_url_in_use_is_refused(home: Path, bucket: Bucket) -> None:
    bucket.write("holiday.jpg", b"sun")
    with pytest.raises(StoreError, match="in use and holds no store"):
        harvest(to(home, bucket))
    assert bucket.names() == ["holiday.jpg"]


def test_a_finished_store_with_damage_is_mended_by_repair_alone(home: Path, pair: Store, bucket: Bucket) -> None:
    bucket.fill(tree(pair.path))
    bucket.delete(SHARD)
    asked = to(home, bucket)
    with pytest.raises(StoreDamagedError, match=f"{SHARD} is missing.*harvest repair {bucket.url}"):
        harvest(asked)
    crew = Watched(asked)
    with staging.outlined(bucket.url) as (path, sizes):
        store = Store.at(path)
        units = check.to_mend(store, check.files_of(store, False, LOG, sizes))
        work.repair(store, units, crew, LOG, destination.of(asked.store))
    assert units == crew.units == [(1, "llama")]
    assert bucket.tree() == tree(pair.path)


def test_it_is_begun_only_where_it_can_be_written(home: Path, bucket: Bucket) -> None:
    with pytest.raises(RemoteError, match="no such bucket"):
        AtUrl("s3://no-such-bucket/x", Path("none"))
    for wrong in ({"path": "s3:/bucket/x"}, {"staging": "s3://bucket/x"}):
        with pytest.raises(ValueError, match=r"A URL has two slashes|Give a folder of this machine"):
            StoreConfig(**wrong)


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harvest", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def test_status_verify_repair_and_pull_take_a_url(
    command: Callable[..., tuple[int, str, str]], home: Path, pair: Store, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.fill(tree(pair.path))
    status = json.loads(command("status", bucket.url, "--json")[1])
    assert (status["store"], status["state"], status["rows"]) == (bucket.url, "finished", 300)
    assert command("verify", bucket.url)[:2] == (
        0,
        f"{bucket.url}: sound (receipts and sizes; --full reads every file)\n",
    )
    code, out, _ = command("pull", bucket.url, "--stage", tmp_path)
    assert code == 0 and tree(Path(out.strip())) == tree(pair.path)
    bucket.write(SHARD, b"short")
    code, out, _ = command("verify", bucket.url)
    assert (code, out) == (1, f"{SHARD} has 5 bytes, not {(pair.path / SHARD).stat().st_size} (shard 1 of llama)\n")
    code, out, err = command("repair", bucket.url)
    assert (code, out) == (0, f"{bucket.url}: 1 units made again\n"), err
    assert bucket.tree() == tree(pair.path)


def test_a_flipped_byte_at_a_url_is_found_by_its_checksum_and_mended(
    command: Callable[..., tuple[int, str, str]], pair: Store, bucket: Bucket, tmp_path: Path
) -> None:
    right = tree(pair.path)
    flipped = bytearray(right[SHARD])
    flipped[100] ^= 4
    bucket.fill({**right, SHARD: bytes(flipped)})
    assert command("verify", bucket.url)[0] == 0
    assert command("verify", bucket.url, "--full")[:2] == (1, f"{SHARD} has another checksum (shard 1 of llama)\n")
    code, _, err = command("pull", bucket.url, "--stage", tmp_path)
    assert code == 1 and f"has another checksum: {SHARD}. harvest repair {bucket.url} --full finds every" in err
    code, out, err = command("repair", bucket.url, "--full")
    assert (code, out) == (0, f"{bucket.url}: 1 units made again\n"), err
    assert bucket.tree() == right
    sound = f"{bucket.url}: sound (receipts, sizes and checksums)\n"
    assert command("verify", bucket.url, "--full")[:2] == (0, sound)


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "URL", "--deep", "3"), ("inspect", "URL"), ("ls", "URL"), ("ls", ".", "--runs", "URL"),
        ("sites", "URL"), ("pull", "x.zarr"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_take_a_url_says_so_in_one_line(
    command: Callable[..., tuple[int, str, str]], pair: Store, bucket: Bucket, tmp_path: Path, words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if words[0] == "repair":
        bucket.fill(tree(pair.path))
    code, out, err = command(*(bucket.url if word == "URL" else word for word in words))
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert bucket.url in err or "x.zarr" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("s3")]


@pytest.mark.parametrize("words", [("status",), ("verify",), ("repair",), ("pull",)], ids=" ".join)
def test_where_there_is_no_store_commands_say_so(
    command: Callable[..., tuple[int, str, str]], bucket: Bucket, words: tuple[str, ...]
) -> None:
    code, out, err = command(*words, bucket.url)
    assert (code, out) == (1, "") and err.startswith(f"error: no Granary store here: {bucket.url}. ")
