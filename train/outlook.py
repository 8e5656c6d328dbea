"""What runs on a store would read and take, told before they begin."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from shared import files
from shared.device import free_memory
from shared.view import View
from train import measure, plan, prepare, report
from train.order import own_block, own_document
from train.plan import gb
from train.prepare import Ready
from train.sources import Sources
from train.sweep import Asked


def outlook(store: View, asked: Sequence[Asked], memory: int | None, place: Path) -> dict[str, Any]:
    """What these runs on a store would read and take, below the folder `place`. Tries a few steps, and writes nothing.

    Raises what `train.fit.sweep` would.
    """
    runs = prepare.ready(store, [one.config for one in asked])
    found = plan.costs(runs)
    begun = [0] * len(runs)
    planned = plan.passes(runs, found, begun, memory)
    device = runs[0].device
    return {
        "store": store.place, "rows": store.rows,
        "orders": [_order(store, [runs[n] for n in one]) for one in _alike(runs)],
        "runs": [_run(one.name, run, cost) for one, run, cost in zip(asked, runs, found, strict=True)],
        "passes": [[asked[n].name for n in one] for one in planned], "parted_by": plan.parted(runs, begun, planned),
        "device": str(device), "memory_bytes": max(plan.taken(one, runs, found) for one in planned),
        "memory_measured": all(one.step_bytes is not None for one in found), "free_bytes": free_memory(device),
        "seconds": sum(cost.step_s * run.config.steps for cost, run in zip(found, runs, strict=True)),
        "disk_bytes": sum(plan.disk_bytes(run, cost) for run, cost in zip(runs, found, strict=True)),
        "disk_free_bytes": files.free_bytes(place),
    }  # fmt: skip


def _alike(runs: Sequence[Ready]) -> list[list[int]]:
    """Runs that are served in one order."""
    groups: dict[int, list[int]] = {}
    for n, one in enumerate(runs):
        groups.setdefault(id(one.order), []).append(n)
    return list(groups.values())


def _order(store: View, runs: Sequence[Ready]) -> dict[str, Any]:
    """What runs that share an order are served."""
    order, asked = runs[0].order, runs[0].config
    sources = list(dict.fromkeys(name for one in runs for name in one.sources))
    row_bytes = store.dtype.itemsize * sum(store.source(part).width for part in Sources(store, sources).stored)
    return {
        "runs": len(runs), "sources": sources, "kept": order.kept, "dropped": runs[0].dropped,
        "held_out": int(measure.require_held_out(store, asked.rows).sum()), "batch": asked.batch,
        "steps_per_epoch": order.kept / asked.batch, "block_rows": order.block_rows,
        "window_rows": order.window_rows, "window_bytes": order.window_rows * row_bytes,
        "windows_in_memory_bytes": plan.windows_bytes(runs),
        "own_block": own_block(order, asked.batch),
        "own_document": own_document(order, store.column("documents/row")[:-1], asked.batch),
    }  # fmt: skip


def _run(name: str, run: Ready, cost: plan.Cost) -> dict[str, Any]:
    asked = run.config
    return {
        "run": name, "method": asked.method.name, "wiring": asked.wiring.kind, "latents": asked.wiring.latents,
        "steps": asked.steps, "epochs": asked.steps * asked.batch / run.order.kept,
        **asdict(cost), "disk_bytes": plan.disk_bytes(run, cost), "notes": run.notes,
    }  # fmt: skip


def text(told: Mapping[str, Any]) -> str:
    """An outlook for a terminal."""
    lines = [f"store    {told['store']}: {told['rows']:,} rows"]
    for one in told["orders"]:
        lines += _order_lines(one)
    heads = ["run", "steps", "epochs", "parameters", "memory", "in a step", "s/step", "disk"]
    lines += ["", report.aligned([heads, *(_row(one) for one in told["runs"])]), ""]
    if len(told["runs"]) > 1:
        why = f", since they differ in {told['parted_by']}" if told["parted_by"] else ""
        lines.append(f"at once  {' + '.join(str(len(one)) for one in told['passes'])} runs{why}")
    notes = [f"note     {one['run']}: {note}" for one in told["runs"] for note in one["notes"]]
    what = "" if told["memory_measured"] else " and what a step takes, which this system does not tell"
    return "\n".join([
        *lines,
        f"memory   {gb(told['memory_bytes'])}{what} of {gb(told['free_bytes'])} free on {told['device']}",
        f"time     {timedelta(seconds=round(told['seconds']))} of steps, reading and measuring not counted",
        f"disk     {gb(told['disk_bytes'])} of {gb(told['disk_free_bytes'])} free",
        *notes,
    ])  # fmt: skip


def _order_lines(one: Mapping[str, Any]) -> list[str]:
    dropped = ", ".join(f"{rule} {count:,}" for rule, count in one["dropped"].items() if count) or "none"
    window = f"{one['window_rows']:,} rows ({gb(one['window_bytes'])}) in blocks of {one['block_rows']:,}"
    if one["windows_in_memory_bytes"]:
        window += f"; two of them in memory, {gb(one['windows_in_memory_bytes'])}"
    sources = ", ".join(one["sources"])
    return [
        f"rows     {one['kept']:,} kept (dropped: {dropped}); {one['held_out']:,} held out, to be measured",
        f"order    {one['steps_per_epoch']:,.1f} batches of {one['batch']:,} per epoch: {sources}",
        f"windows  {window}",
        f"mixing   in its batch a row finds {one['own_block']:.2f} rows of its own block, "
        f"{one['own_document']:.2f} of its own document",
    ]


def _row(one: Mapping[str, Any]) -> list[str]:
    step = "-" if one["step_bytes"] is None else gb(one["step_bytes"])
    sizes = [gb(one["state_bytes"]), step, f"{one['step_s']:.3g}", gb(one["disk_bytes"])]
    return [one["run"], f"{one['steps']:,}", f"{one['epochs']:.1f}", f"{one['parameters']:,}", *sizes]
