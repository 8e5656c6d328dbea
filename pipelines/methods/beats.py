"""Whether dictionaries beat what takes no training: for every run of a sweep a row of a table.

On held-out documents, per source: the fraction of variance that the run explains, the same dictionary as it began, and
PCA with as many components as the run has latents on a row of the source. The mean of the rows explains 0.

    python pipelines/methods/beats.py runs/quickstart.zarr runs/methods
"""

import sys
from pathlib import Path

import numpy as np
import typer

from shared import files
from shared.errors import CheckpointError, GranaryError
from shared.mixture import open_mixture
from shared.view import View
from train import prepare, reader, report, run
from train.calibrate import calibrate
from train.config import TrainConfig
from train.filter import RowsConfig, kept_rows
from train.measure import BATCH, measure


def pca(store: View, source: str, rows: RowsConfig) -> np.ndarray:
    """FVE on the held-out rows by the leading 0, 1, 2, ... principal components of the training rows, [D + 1], fp64."""
    train, held_out = (
        _rows(store, source, rows.model_copy(update={"split": split})) for split in ("train", "held_out")
    )
    mean = train.mean(0)
    _, vectors = np.linalg.eigh((train - mean).T @ (train - mean))
    explained = np.square((held_out - mean) @ vectors[:, ::-1]).sum(0).cumsum()
    left = np.square(held_out - mean).sum() - np.concatenate([[0.0], explained])
    return np.asarray(1 - left / np.square(held_out - held_out.mean(0)).sum())


def _rows(store: View, source: str, rows: RowsConfig) -> np.ndarray:
    read = reader.read(store, [source], np.flatnonzero(kept_rows(store, rows).kept_N), BATCH)
    return np.concatenate([x[source].double().numpy() for x in read])


def untrained(store: View, config: TrainConfig) -> dict[str, float]:
    """{source: FVE} of the dictionary with which a run began."""
    [ready] = prepare.ready(store, [config])
    fresh = prepare.fresh(store, ready, {}).dictionary.eval()
    if "calibrate" in type(config.method).model_fields:  # without a threshold all would pass
        calibrate(fresh, store, np.flatnonzero(ready.order.kept_N), quiet=True)
    sources = measure(fresh, store, config.log.measure_rows, config.rows, quiet=True)["sources"]
    return {name: one["fve"] for name, one in sources.items()}


def table(store: View, folders: list[Path]) -> tuple[list[list[str]], bool]:
    """The rows, first their headings, and whether every run beats everything."""
    by_pca: dict[str, np.ndarray] = {}  # of a source and a filter of rows
    rows, beats = [["run", "source", "L0", "FVE", "PCA", "untrained"]], True
    for folder in folders:
        if not run.finished(folder):
            raise CheckpointError("this run is not finished", folder, f"train resume {folder}")
        config = run.config_of(folder)
        before = untrained(store, config)
        for source, one in files.read_json(folder / report.MEASURE)["sources"].items():
            if (key := f"{source} {config.rows}") not in by_pca:
                by_pca[key] = pca(store, source, config.rows)
            components = min(int(np.ceil(one["l0"])), len(by_pca[key]) - 1)
            others = [float(by_pca[key][components]), before[source]]
            beats &= one["fve"] > max(0.0, *others)
            figures = [f"{one['fve']:.3f}", *(f"{value:.3f}" for value in others)]
            rows.append([folder.name, source, f"{one['l0']:.1f}", *figures])
    return rows, beats


def main(store: Path, sweep: Path) -> None:
    """Exit code 1 where a run does not beat all of them on every source."""
    rows, beats = table(open_mixture(store), run.folders_of(sweep))
    typer.echo(report.aligned(rows))
    typer.echo("every run beats the mean, an untrained dictionary and PCA" if beats else "NOT every run beats them")
    raise SystemExit(0 if beats else 1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except GranaryError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
