from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from shared.device import Later, Outward, alone, device_of, free_in_groups, free_memory, sent, torch_threads
from shared.errors import ConfigError
from tests.device import every_device


def test_auto_is_cuda_where_there_is_one_and_else_the_cpu() -> None:
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_cannot_be_used_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        device_of(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_torch_has_its_threads_back_behind_the_block() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


def test_torch_computes_alone_in_a_thread_that_asks_for_it_and_in_no_other() -> None:
    def told(before: Callable[[], object] = int) -> int:
        with ThreadPoolExecutor(1, initializer=before) as pool:
            return pool.submit(torch.get_num_threads).result()

    with torch_threads(3):
        assert told(alone) == 1
        assert torch.get_num_threads() == told() == 3
        torch.set_num_threads(2)
        assert told(alone) == 1
        assert torch.get_num_threads() == told() == 2


@every_device
def test_what_goes_to_a_device_and_comes_back_is_the_same(device: torch.device) -> None:
    outward, waiting = Outward(device), []
    for number in range(8):  # whose memory on the device each takes over from the last
        waiting.append(
            outward.begin([sent(torch.full((64, 1 << 14), float(number)), device), torch.empty(0, device=device)])
        )
    for number, wait in enumerate(waiting):
        value, empty = wait()
        assert value.device.type == empty.device.type == "cpu" and empty.numel() == 0
        assert (value == number).all()


@every_device
def test_numbers_of_the_device_are_those_of_when_they_were_asked_for(device: torch.device) -> None:
    counts = torch.tensor([3, 5], device=device)
    told, one = Later(counts * 1), Later(counts.sum())
    counts += 1
    assert told.read() == [3, 5] and told.read() == [3, 5] and one.read() == 8


@every_device
def test_free_memory_is_some_of_what_there_is(device: torch.device) -> None:
    cuda = device.type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if cuda else psutil.virtual_memory().total
    before = free_memory(device)
    assert 2**20 < before < there
    if cuda:  # the memory of the system is everybody's: what is free there may be more a moment later
        taken = torch.ones(2**26, device=device)  # 256 MiB
        assert free_memory(device) < before - 2**27
        del taken
        assert free_memory(device) > before - 2**27  # what torch holds of it is free


def test_the_narrowest_group_around_this_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.device.free_in_groups", lambda: [2**40, 12345])
    assert free_memory(torch.device("cpu")) == 12345


V1, V2 = "31 24 0:27 / /sys/fs/cgroup{} ro - cgroup cgroup rw,memory", "30 23 0:26 {} {} rw - cgroup2 cgroup2 rw"


def group(root: Path, ours: str, mount: str, groups: dict[str, dict[str, str]]) -> Path:
    """A system with these control groups below sys/fs/cgroup: {folder: {file: text}}."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{ours}\n")
    others = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", "33 24 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"]
    (root / "proc/self/mountinfo").write_text("\n".join([*others, mount, ""]))
    for name, texts in groups.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text + "\n")
    return root


def v2(limit: str, used: int, high: str = "max") -> dict[str, str]:
    stat = "anon 1\ninactive_file 30\nactive_file 20\nshmem 7"
    return {"memory.max": limit, "memory.high": high, "memory.current": str(used), "memory.stat": stat}


def test_a_group_of_version_2_lets_take_what_its_limit_leaves_with_pages_of_files_as_free(tmp_path: Path) -> None:
    mount = V2.format("/", "/sys/fs/cgroup")
    groups = {"a": v2("2000", 1000), "a/b": v2("max", 900), "a/b/c": v2("1000", 300, high="800"), "other": v2("1", 1)}
    root = group(tmp_path, "0::/a/b/c", mount, groups)
    assert free_in_groups(root) == [1000 - 250, 800 - 250, 2000 - 950]


def test_a_group_of_version_1_does_so_too(tmp_path: Path) -> None:
    def v1(limit: int, used: int) -> dict[str, str]:
        stat = "cache 9\ntotal_inactive_file 40\ntotal_active_file 10"
        return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}

    groups = {"memory": v1(2**63 - 4096, 10**6), "memory/job_7": v1(500, 600), "memory/job_8": v1(1, 0)}
    root = group(tmp_path, "4:memory:/job_7", V1.format("/memory"), groups)
    assert free_in_groups(root) == [0, 2**63 - 4096 - 10**6 + 50]


@pytest.mark.parametrize("ours", ["0::/", "0::/docker/abc"])
def test_in_a_container_its_own_group_is_the_mount(tmp_path: Path, ours: str) -> None:
    root = group(tmp_path, ours, V2.format("/docker/abc", "/sys/fs/cgroup"), {".": v2("1000", 100)})
    assert free_in_groups(root) == [950]


def test_a_system_without_groups_or_without_limits_has_none(tmp_path: Path) -> None:
    assert free_in_groups(tmp_path / "nothing") == []
    assert free_in_groups(group(tmp_path / "a", "0::/", V2.format("/", "/sys/fs/cgroup"), {})) == []
    unlimited = {"x": v2("max", 5)}
    assert free_in_groups(group(tmp_path / "b", "0::/x", V2.format("/", "/sys/fs/cgroup"), unlimited)) == []
