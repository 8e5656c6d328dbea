"""trainSAE: trainers of the reference, or of one's own, on one stream of batches.

Letters: B rows, S sources, D width, L latents, H heads.
"""

import copy
import inspect
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared import files
from shared.errors import ConfigError, TrainingError
from train import trackers
from train.interop.dictionary_learning.crosscoders import CrossCoder
from train.interop.dictionary_learning.evaluation import evaluate, specific_latents
from train.interop.dictionary_learning.trainer import Built, Trainer, unlike
from train.interop.tensors import write_state
from train.kernels.choice import Kernels

NORM_BATCHES = 100  # behind a factor that rows are divided by
Figures = Callable[[Any, int], Mapping[str, float]]  # of a trainer at a step


@dataclass
class Run:
    """One trainer, where its files go, and who watches it."""

    trainer: Any
    folder: Path | None
    final: str  # the name of its last weights
    checkpoint: str  # and of others, by their step
    factor: float = 1.0  # that its rows are divided by
    watch: Any = None
    logs: dict[str, float] = field(default_factory=dict)  # of the last validation

    @property
    def ae(self) -> nn.Module:
        found: nn.Module = self.trainer.ae
        return getattr(found, "_orig_mod", found)

    def released(self) -> nn.Module:
        """The dictionary for rows as they are."""
        if self.factor == 1.0:
            return self.ae
        made = copy.deepcopy(self.ae)
        made.scale_biases(self.factor)  # type: ignore[operator]
        return made

    def keep(self, name: str) -> None:
        if self.folder is not None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_state(self.folder / name, self.released().state_dict())

    def backup(self, step: int) -> None:
        """What the last weights are called, while it goes on: {step, ae, optimizer, config, norm_factor}, of rows that
        are divided, in the place of the one before."""
        if self.folder is None:
            return
        told = json.loads(json.dumps(self.trainer.config, default=str))
        state = {name: value.cpu() for name, value in self.ae.state_dict().items()}
        kept = {"step": step, "ae": state, "optimizer": self.trainer.optimizer.state_dict(), "config": told}
        torch.save({**kept, "norm_factor": self.factor}, file := io.BytesIO())
        files.write_atomic(self.folder / self.final, file.getvalue())

    def begin(self, factor: float, data: Any, watched: tuple[Any, Any, Any] | None, more: Mapping[str, Any]) -> None:
        """Say what is trained, and on what; `watched`: by whom, beside files."""
        self.factor = factor
        if watched is not None:
            self.watch = trackers.watched(*watched, {**self.trainer.config, **more})
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            told = {**self.trainer.config, "norm_factor": self.factor}
            files.write_json(self.folder / "config.json", {"trainer": told, "buffer": getattr(data, "config", None)})

    def tell(self, step: int, figures: Mapping[str, float]) -> None:
        if self.watch is not None:
            self.watch.log(dict(figures), step=step)
        if self.folder is not None:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")


def trainSAE(
    data: Iterable[Any], trainer_config: Mapping[str, Any] | None = None,
    trainer_configs: Sequence[Mapping[str, Any]] | None = None, steps: int | None = None, use_wandb: bool = False,
    wandb_entity: str = "", wandb_project: str = "", wandb_group: str | None = None,
    save_steps: int | Sequence[int] | None = None, save_dir: str | Path | None = None, log_steps: int | None = None,
    activations_split_by_head: bool = False, transcoder: bool = False, validate_every_n_steps: int | None = None,
    validation_data: Iterable[Any] | None = None, normalize_activations: bool = False,
    start_of_training_eval: bool = False, end_of_step_logging_fn: Figures | None = None,
    dtype: torch.dtype = torch.float32, return_last_eval_logs: bool = False, resample_steps: int | None = None,
    warmup_steps: int | None = None, run_cfg: Mapping[str, Any] | None = None, verbose: bool = False,
    device: Any = None, autocast_dtype: torch.dtype | None = None, save_last_eval: bool = True,
    run_wandb_finish: bool = True, backup_steps: int | None = None, epoch_idx_per_step: Sequence[int] | None = None,
) -> Any:  # fmt: skip
    """Train dictionaries on batches of rows [B, D], [B, S, D] of crosscoders, or pairs (x, y) where `transcoder`.

    A config is a table {"trainer": class, and its arguments}. One gives one dictionary, several a list of them; with
    `return_last_eval_logs` each beside its last figures of validation. `steps` (none: until the batches end),
    `resample_steps`, `warmup_steps` and `device` are for trainers whose config does not say them. `dtype`, or
    `autocast_dtype`, is that of products of matrices; weights stay fp32.

    save_dir of `trainer_config`: config.json, checkpoint_{step}.pt, model_final.pt, eval_logs_{step}.pt,
    last_eval_logs.pt. Of `trainer_configs`: trainer_{i}/ with config.json, checkpoints/ae_{step}.pt, ae.pt.
    metrics.jsonl has what is logged, with the epoch of a step by `epoch_idx_per_step`. Every `backup_steps` weights and
    the optimiser's state are written under the name of the last weights. Neither `data`'s tensors nor the configs are
    changed; logging and validating change no tensor of a trainer.

    Raises ConfigError for what cannot be followed, before the first step; TrainingError where no batch comes.
    """
    if validate_every_n_steps or start_of_training_eval:
        _read_often(validation_data)
    given = {"steps": steps, "resample_steps": resample_steps, "warmup_steps": warmup_steps, "device": device}
    dtype = dtype if autocast_dtype is None else autocast_dtype
    given |= {"transcoder": True} if transcoder else {}
    runs = _runs(trainer_config, trainer_configs, given, save_dir)
    for run in runs:
        _follows(run, dtype, normalize_activations)
    factor, batches = _factor(iter(data)) if normalize_activations else (1.0, iter(data))
    for run in runs:
        if dtype != torch.float32:
            run.trainer.ae.core.kernels = Kernels(precision="bf16")
        run.begin(factor, data, (wandb_project, wandb_entity, wandb_group) if use_wandb else None, run_cfg or {})
    loop = Loop(
        runs, _steps(save_steps), _steps(backup_steps), log_steps, activations_split_by_head, end_of_step_logging_fn,
        verbose, save_last_eval, run_wandb_finish, epoch_idx_per_step,
    )  # fmt: skip
    if start_of_training_eval:
        loop.validate(0, validation_data)
    step = -1
    for step, batch in enumerate(itertools.islice(batches, steps)):
        loop.step(step, batch)
        if validate_every_n_steps and step and step % validate_every_n_steps == 0:
            loop.validate(step, validation_data)
    if step < 0:
        raise TrainingError("no batch came", "0 steps", "Give rows")
    if validation_data is not None:
        loop.validate(step + 1, validation_data, last=True)
    loop.end()
    found = [(run.released(), run.logs) if return_last_eval_logs else run.released() for run in runs]
    return found[0] if len(found) == 1 else found


@dataclass(frozen=True)
class Loop:
    """Several trainers on the same batches, and when they save and log."""

    runs: Sequence[Run]
    saves: Callable[[int], bool]
    backs_up: Callable[[int], bool]
    log_steps: int | None
    by_head: bool
    more: Figures | None
    verbose: bool
    keeps_last: bool
    finishes: bool
    epochs: Sequence[int] | None

    def step(self, step: int, batch: Any) -> None:
        logs = bool(self.log_steps and step and step % self.log_steps == 0)
        for number, run in enumerate(self.runs):
            x = _own(batch, number, self.by_head, run.factor)
            if self.saves(step):
                run.keep(run.checkpoint.format(step=step))
            if step and self.backs_up(step):
                run.backup(step)
            if logs:
                figures = {**_figures(run, x, step), **(self.more(run.trainer, step) if self.more else {})}
                figures |= {} if self.epochs is None else {"epoch": self.epochs[step]}
                run.tell(step, figures)
                if self.verbose:
                    print(f"step {step}, trainer {number}: {figures}")
            run.trainer.update(step, x)

    def validate(self, step: int, data: Any, last: bool = False) -> None:
        """Figures of all batches of `data`, and of the decoder of a crosscoder. Changes no trainer."""
        batches = list(data) if len(self.runs) > 1 else data
        for number, run in enumerate(self.runs):
            rows = (_own(batch, number, self.by_head, run.factor) for batch in batches)
            device = next(iter(run.ae.parameters())).device
            found = evaluate(run.ae, rows, device=device, n_batches=10**9)
            figures = {f"val/{name}": value for name, value in found.items()}
            figures["val/frac_deads"] = 1 - found["frac_alive"]
            if issubclass(type(run.ae), CrossCoder):
                decoder: Any = run.ae.decoder
                for layer, count in enumerate(specific_latents(decoder.weight.detach())):
                    figures[f"val/num_specific_latents_l{layer}"] = count
            run.logs = {"step": step, **figures}
            run.tell(step, figures)
            if run.folder is not None and (self.keeps_last or not last):
                torch.save(run.logs, run.folder / ("last_eval_logs.pt" if last else f"eval_logs_{step}.pt"))

    def end(self) -> None:
        for run in self.runs:
            run.keep(run.final)
            if run.watch is not None and self.finishes:
                run.watch.finish()


def _runs(one: Any, several: Any, given: Mapping[str, Any], save_dir: Any) -> list[Run]:
    """The trainers of one config, or of several."""
    asked = _asked(one, several)
    return [_run(config, given, save_dir, None if several is None else n) for n, config in enumerate(asked)]


def _asked(one: Any, several: Any) -> list[Mapping[str, Any]]:
    if (one is None) == (several is None):
        raise ConfigError("trainSAE takes one of two", "trainer_config, trainer_configs", "Give either")
    found = [one] if several is None else list(several)
    if len(found) == 1 and isinstance(found[0], list | tuple):  # a list where one config was expected
        found = list(found[0])
    if not found or any("trainer" not in config for config in found):
        raise ConfigError("a config names its trainer", "trainer", 'Give {"trainer": StandardTrainer, ...}')
    return found


def _run(config: Mapping[str, Any], given: Mapping[str, Any], save_dir: Any, number: int | None) -> Run:
    """A trainer with its arguments, and those of the call that it has and does not say."""
    kind, keys = config["trainer"], {name: value for name, value in config.items() if name != "trainer"}
    if issubclass(kind, Built):
        takes = {one.name for one in fields(kind.arguments)}
    else:
        takes = set(inspect.signature(kind.__init__).parameters)
    more = {n: v for n, v in given.items() if v is not None and n in takes and n not in keys}
    made: Trainer = kind(**{**more, **keys})
    if number is None:
        return Run(made, None if save_dir is None else Path(save_dir), "model_final.pt", "checkpoint_{step}.pt")
    folder = None if save_dir is None else Path(save_dir) / f"trainer_{number}"
    return Run(made, folder, "ae.pt", "checkpoints/ae_{step}.pt")


def _read_often(rows: Any) -> None:
    """Raises ConfigError for rows of validation that are not there, or can be read once only."""
    if rows is None:
        raise ConfigError("validation needs rows", "validation_data", "Give them, or leave validation out")
    if isinstance(rows, Iterator):
        raise ConfigError("rows of validation can be read once only", "an iterator", "Give a list, or a data loader")


def _follows(run: Run, dtype: torch.dtype, normalizes: bool) -> None:
    """Raises ConfigError for an argument of the call that a trainer cannot follow."""
    ours = issubclass(type(run.trainer), Built) and run.trainer.ours
    if dtype != torch.float32 and not ours:
        raise unlike("dtype", dtype, "A trainer or dictionary of your own computes as it does: cast it yourself")
    if normalizes and (
        getattr(run.ae, "scale_biases", None) is None or getattr(run.ae, "has_activation_normalizer", False)
    ):
        raise unlike("normalize_activations", True, "Its dictionary has no scale_biases, or scales rows itself")


def _steps(asked: int | Sequence[int] | None) -> Callable[[int], bool]:
    """At which steps weights are kept: every so many, or these."""
    if asked is None:
        return lambda step: False
    if isinstance(asked, int):
        return lambda step: step % asked == 0
    return set(asked).__contains__


def _factor(batches: Iterator[Any]) -> tuple[float, Iterator[Any]]:
    """The root of the mean of |x|^2 over the first batches, which are not lost."""
    first = list(itertools.islice(batches, NORM_BATCHES))
    if not first:
        raise TrainingError("no batch came", "0 steps", "Give rows")
    rows = [_own(batch, 0, by_head=False, factor=1.0) for batch in first]
    if isinstance(rows[0], tuple):
        raise unlike("normalize_activations", True, "Pairs are not scaled here: scale them yourself")
    squared = [one.double().square().sum(-1).mean() for one in rows]
    return float(torch.stack(squared).mean().sqrt()), itertools.chain(first, batches)


def _own(batch: Any, number: int, by_head: bool, factor: float) -> Any:
    """What one trainer gets of a batch."""
    if isinstance(batch, Mapping):  # rows of a store
        values = list(batch.values())
        batch = torch.stack(values, 1) if len(values) > 1 else values[0]
    if isinstance(batch, tuple | list):
        return tuple(one / factor for one in batch)
    x: Tensor = torch.as_tensor(batch)
    x = x[..., number, :] if by_head else x
    return x if factor == 1.0 else x / factor


def _figures(run: Run, x: Any, step: int) -> dict[str, float]:
    """Of a batch: the losses, and what the trainer logs."""
    log = run.trainer.loss(x, step=step, logging=True)
    if not isinstance(log, tuple):
        return {"loss": float(log)}
    x, x_hat, f, losses = log
    found = {"l0": float((f > 0).flatten(0, -2).float().sum(-1).mean()), **losses, **_explained(x, x_hat)}
    told = {name: value for name, value in run.trainer.get_logging_parameters().items()} if step else {}
    return {name: float(value) for name, value in {**found, **told}.items()}


@torch.no_grad()
def _explained(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    """1 - sum of var(x - x_hat) / sum of var(x), of all and of each source."""
    if x.shape != x_hat.shape:
        return {}
    x, x_hat = x.detach().to(x_hat.device), x_hat.detach()
    if x.ndim == 2:
        return {"frac_variance_explained": float(1 - (x - x_hat).var(0).sum() / x.var(0).sum())}
    each = 1 - (x - x_hat).var(0).sum(-1) / x.var(0).sum(-1)
    told = {f"cl{n}_frac_variance_explained": float(one) for n, one in enumerate(each)}
    return {"frac_variance_explained": float(each.mean()), **told}
