"""A run's folder -> report.html: one self-contained page of curves, histograms and figures."""

import html
import io
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import files
from shared.errors import CheckpointError
from train.measure import FORMULAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG, STORE, METRICS, MEASURE, PAGE = "config.toml", "store.json", "metrics.jsonl", "measure.json", "report.html"
SIZE = (5.2, 3.1)  # of a picture, in inches

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .9em .25em 0; text-align: right }
th:first-child, td:first-child { text-align: left } th { border-bottom: 1px solid #999; font-weight: 600 }
.pictures { display: flex; flex-wrap: wrap; gap: 1em } .pictures svg { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto } .note { color: #666; font-size: .9em }
"""


def write(folder: Path) -> Path:
    """Write report.html into a run's folder from its metrics, figures and config. Raises CheckpointError."""
    try:
        figures, origin = files.read_json(folder / MEASURE), files.read_json(folder / STORE)
        config = (folder / CONFIG).read_text(encoding="utf-8")
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError("no finished run here", folder, f"Give the folder of a run ({error})") from None
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    page = _page(folder.name, steps, figures, origin, config)
    files.write_atomic(folder / PAGE, page.encode())
    return folder / PAGE


def _page(
    name: str, steps: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], origin: Mapping[str, Any], config: str
) -> str:
    wiring = tomllib.loads(config)["wiring"]["kind"]
    drawn = [_loss(steps), _fve(steps), _density(figures), *([_r(figures)] if figures["r"] else [])]
    pictures = [_with_own_ids(picture, n) for n, picture in enumerate(drawn)]
    sections = [
        f"<h1>{html.escape(name)}: {html.escape(wiring)}, {figures['latents']:,} latents</h1>",
        _origin(origin), "<h2>Figures</h2>", *(_table(table) for table in tables(figures)), _legend(figures),
        "<h2>Pictures</h2>", f'<div class="pictures">{"".join(pictures)}</div>',
        "<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>",
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
    return f"<!DOCTYPE html><html><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def _origin(origin: Mapping[str, Any]) -> str:
    rows = [[name, one["model"], one["site"], str(one["width"])] for name, one in origin["sources"].items()]
    names = ", ".join(Path(path).name for path in origin["paths"])
    store = f"Store {names}, {origin['rows']:,} rows, id {origin['id'][:16]}" if names else "Batches made as needed"
    return _table([["source", "model", "site", "width"], *rows]) + f'<p class="note">{html.escape(store)}</p>'


def tables(figures: Mapping[str, Any]) -> list[list[list[str]]]:
    """The figures as a person reads them: per source, per span, and of the whole. First rows are headings."""
    source = [["source", "FVE", "MSE", "cosine", "L2 ratio", "gamma", "L0", "exclusive", "only"]]
    for name, one in figures["sources"].items():
        shape = [f"{one['cosine']:.4f}", f"{one['l2_ratio']:.4f}", _short(one["gamma"], ".4f"), f"{one['l0']:.2f}"]
        counts = [_short(one[key], ",") for key in ("exclusive", "only")]
        source.append([name, _short(one["fve"], ".4f"), _short(one["mse"]), *shape, *counts])
    span = [["span", "latents", "alive", "dead", "dense", "L0", *(f"FVE {name}" for name in figures["sources"])]]
    for name, one in figures["spans"].items():
        shares = [f"{one['alive']:,}", f"{one['dead']:.2%}", f"{one['dense']:.2%}", f"{one['l0']:.2f}"]
        gained = [_short(one["fve"].get(source), ".4f") for source in figures["sources"]]
        span.append([name, f"{one['latents']:,}", *shares, *gained])
    whole = [
        ["dictionary", "latents", "L0", "dead", "dense", "held-out rows", "training rows"],
        [
            "all",
            f"{figures['latents']:,}",
            f"{figures['l0']:.2f}",
            f"{figures['dead']:.2%}",
            f"{figures['dense']:.2%}",
            f"{figures['rows']:,}",
            f"{figures['training_rows']:,}",
        ],
    ]
    return [source, span, *_exclusive(figures), whole]


def _exclusive(figures: Mapping[str, Any]) -> list[list[list[str]]]:
    """Of the spans that do not read every source, where there are any."""
    rows = [
        [name, f"{one['integrity']:.3g}", _short(one["coupling"], ".4f"), _short(one["shadow"], ".4f"),
         f"{one['shadowed']:,}"]
        for name, one in figures["spans"].items() if "integrity" in one
    ]  # fmt: skip
    return [[["exclusive span", "integrity", "coupling", "shadow", "shadowed"], *rows]] if rows else []


def _short(value: float | None, form: str = "") -> str:
    """- for what no row defines."""
    if value is None:
        return "-"
    return f"{value:{form}}" if form else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def text(figures: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    return "\n\n".join(aligned(table) for table in tables(figures))


def compared(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of several runs side by side, for a terminal: {name: figures}."""
    sources = list(dict.fromkeys(name for one in runs.values() for name in one["sources"]))
    rows = [["run", *(f"FVE {name}" for name in sources), "L0", "dead"]]
    for name, one in runs.items():
        found = [_short(one["sources"].get(source, {}).get("fve"), ".4f") for source in sources]
        rows.append([name, *found, f"{one['l0']:.2f}", f"{one['dead']:.2%}"])
    return aligned(rows)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [
        "  ".join(_aligned(cell, width, n == 0) for n, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    return "\n".join(rows)


def _aligned(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _table(table: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(table[0], 'th')}{''.join(row(cells, 'td') for cells in table[1:])}</table>"


def _legend(figures: Mapping[str, Any]) -> str:
    rows = f"Rows: {figures['rows']:,} held out, {figures['training_rows']:,} of training (for dead latents)."
    formulas = "; ".join(f"{name}: {formula}" for name, formula in FORMULAS.items())
    return f'<p class="note">{html.escape(rows)} {html.escape(formulas)}.</p>'


def _loss(steps: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: "Axes") -> None:
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], marker=_marker(steps))
        axes.set(title="Loss", xlabel="step", ylabel="loss", yscale="log")

    return _picture(draw)


def _marker(steps: Sequence[Mapping[str, Any]]) -> str:
    """A short run has few points, and one point makes no line."""
    return "." if len(steps) < 20 else ""


def _fve(steps: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: "Axes") -> None:
        for key in dict.fromkeys(key for s in steps for key in s if key.startswith("fve/")):
            told = [s for s in steps if key in s]  # a batch of equal rows has none
            values = [s[key] for s in told]
            axes.plot([s["step"] for s in told], values, marker=_marker(told), label=key.removeprefix("fve/"))
        axes.set(title="Fraction of variance explained (training batches)", xlabel="step", ylabel="FVE")
        axes.set_ylim(min(0.0, *axes.get_ylim()), 1)
        if axes.lines:
            axes.legend()

    return _picture(draw)


def _density(figures: Mapping[str, Any]) -> str:
    spans = figures["spans"]
    never = figures["density"]["never"]

    def draw(axes: "Axes") -> None:
        for name, one in spans.items():
            histogram, several = one["density"], len(spans) > 1
            axes.stairs(histogram["counts"], histogram["log10_edges"], fill=not several, label=name)
        title = f"Latent density (held out; {never:,} never fire there)"
        axes.set(title=title, xlabel="log10 of the share of rows", ylabel="latents")
        if len(spans) > 1:
            axes.set(ylabel="latents (log scale)", yscale="symlog")
            axes.legend()

    return _picture(draw)


def _r(figures: Mapping[str, Any]) -> str:
    edges, counts = figures["r"]["edges"], figures["r"]["counts"]
    shown = list(counts)[:1] if len(counts) == 2 else list(counts)  # of two sources, one says it all

    def draw(axes: "Axes") -> None:
        for source in shown:
            axes.stairs(counts[source], edges, fill=len(shown) == 1, label=source)
        others = " + ".join(f"|d_{name}|" for name in counts)
        axes.set(
            title="Relative decoder norm of live latents",
            xlabel=f"R = |d_{'x' if len(shown) > 1 else shown[0]}| / ({others})",
        )
        axes.set(ylabel="latents (log scale)", yscale="symlog")
        if len(shown) > 1:
            axes.legend()

    return _picture(draw)


def _with_own_ids(picture: str, number: int) -> str:
    """Matplotlib gives the parts of every picture the same names, which one page may have once."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1p{number}-", picture)


def _picture(draw: Any) -> str:
    """An SVG with text as text and no date, so that the same run gives the same page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "granary"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    picture = buffer.getvalue()
    return picture[picture.index("<svg") :]
