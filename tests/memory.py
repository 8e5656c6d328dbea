"""What this process has in memory, in KiB."""

from pathlib import Path


def own() -> int:
    """Memory that no file stands behind."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def mapped(name: str) -> int:
    """Pages of mapped files whose path holds `name`."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        inside = name in line if not key.endswith(":") else inside
        total += int(rest[0]) if inside and key == "Rss:" else 0
    return total
