"""The page of a run stands alone and shows the figures that measure gives."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CheckpointError
from tests.build import make_store
from train import report
from train.fit import fit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dedicated dictionary of two sources, one of three, and an autoencoder."""
    root = tmp_path_factory.mktemp("report")
    widths = {"a": 6, "b": 4, "c<5>": 5}
    store = make_store(root / "s.zarr", rows=200, shard_rows=256, chunk_rows=16, sources=widths, documents=20)
    asked: dict[str, Any] = {
        "method": {"name": "topk", "k": 3}, "steps": 6, "batch": 16, "threads": 1, "log": {"every": 2}, "device": "cpu",
    }  # fmt: skip
    wirings = {
        "two": {"kind": "dedicated", "latents": 32, "sources": ["a", "b"], "exclusive": 5},
        "three": {"kind": "dedicated", "latents": 32, "exclusive": 5},
        "one": {"kind": "autoencoder", "latents": 1200, "sources": ["a"]},
    }
    return {n: fit(store, {**asked, "wiring": w}, root / n, quiet=True).folder for n, w in wirings.items()}


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "measure.json").read_text())
    return found


class Cells(HTMLParser):
    """The text of every table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self._inside = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found.append(data)


@pytest.mark.parametrize("name", ["two", "three", "one"])
def test_a_page_needs_no_other_file(folders: dict[str, Path], name: str) -> None:
    text = page(folders[name])
    parsed = Cells(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\((?!#)|@import", text)


@pytest.mark.parametrize("name", ["two", "three", "one"])
def test_a_page_shows_the_figures_of_measure(folders: dict[str, Path], name: str) -> None:
    found, cells = figures(folders[name]), Cells(page(folders[name])).found
    for source, one in found["sources"].items():
        at = [i for i, cell in enumerate(cells) if cell == source][-1]
        counts = ["-" if one[key] is None else str(one[key]) for key in ("exclusive", "only")]
        shape = [f"{one[key]:.4f}" for key in ("cosine", "l2_ratio", "gamma")]
        row = [f"{one['fve']:.4f}", f"{one['mse']:.4g}", *shape, f"{one['l0']:.2f}", *counts]
        assert cells[at + 1 : at + 9] == row
    for span, one in found["spans"].items():
        at = cells.index(span)
        shares = [f"{one['alive']:,}", f"{one['dead']:.2%}", f"{one['dense']:.2%}", f"{one['l0']:.2f}"]
        gained = [f"{one['fve'][source]:.4f}" if source in one["fve"] else "-" for source in found["sources"]]
        assert cells[at + 1 : at + 6 + len(gained)] == [f"{one['latents']:,}", *shares, *gained]
        if "integrity" in one:
            at = len(cells) - 1 - cells[::-1].index(span)
            assert cells[at + 1] == "0" and cells[at + 4] == str(one["shadowed"])
    assert f"{found['dead']:.2%}" in cells and f"{found['dense']:.2%}" in cells
    assert f"Rows: {found['rows']:,} held out, {found['training_rows']:,} of training" in page(folders[name])


def test_a_page_has_curves_and_both_histograms_and_an_autoencoder_has_no_relative_norm(
    folders: dict[str, Path],
) -> None:
    titles = ["Loss", "Fraction of variance explained", "Latent density", "Relative decoder norm"]
    for name, pictures in (("two", 4), ("three", 4), ("one", 3)):
        text = page(folders[name])
        assert text.count("<svg") == text.count("</svg>") == pictures
        names = re.findall(r'\bid="([^"]+)"', text)
        assert len(names) == len(set(names)) > 10
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(names)
        assert [title in text for title in titles] == [True] * 3 + [name != "one"]


def test_the_histogram_of_relative_norms_names_its_sources(folders: dict[str, Path]) -> None:
    assert "R = |d_a| / (|d_a| + |d_b|)" in page(folders["two"])
    assert html.escape("R = |d_x| / (|d_a| + |d_b| + |d_c<5>|)", quote=False) in page(folders["three"])


def test_names_are_escaped(folders: dict[str, Path]) -> None:
    text = page(folders["three"])
    assert "c<5>" not in text and "c&lt;5&gt;" in text


def test_the_terminal_shows_the_same_cells_as_the_page(folders: dict[str, Path]) -> None:
    shown = report.text(figures(folders["three"]))
    cells = [cell for table in report.tables(figures(folders["three"])) for row in table for cell in row]
    assert sorted(" ".join(cells).split()) == sorted(shown.split())
    for block in shown.split("\n\n"):
        assert len({len(line) for line in block.splitlines()}) == 1  # columns stand under each other


@pytest.mark.parametrize("missing", ["measure.json", "metrics.jsonl", "config.toml", "store.json"])
def test_a_folder_that_is_no_finished_run_is_refused(folders: dict[str, Path], tmp_path: Path, missing: str) -> None:
    for name in {"measure.json", "metrics.jsonl", "config.toml", "store.json"} - {missing}:
        (tmp_path / name).write_bytes((folders["two"] / name).read_bytes())
    with pytest.raises(CheckpointError, match="no finished run here"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()
