"""train crosscoder: the command line of crosscoder_learning, on stores and on its own caches."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from shared.errors import ConfigError
from train.interop.dictionary_learning.codes import CodeNormalization
from train.interop.dictionary_learning.crosscoders import BatchTopKCrossCoder, CrossCoder
from train.interop.dictionary_learning.crossing import BatchTopKCrossCoderTrainer, CrossCoderTrainer
from train.interop.dictionary_learning.evaluation import evaluate
from train.interop.dictionary_learning.pairs import Pairs, found
from train.interop.dictionary_learning.training import trainSAE

VALIDATION_BATCH, LOG_STEPS = 8192, 50
EXPANSION = 32  # latents per component of a row
LENGTHS = {"relu": 0.005, "batch-top-k": 1.0}  # of fresh vectors, as the script has them

Option = typer.Option


def crosscoder(
    activation_store_dir: Annotated[Path, Option(help="A store, or a folder MODEL/DATASET/layer_N_out of caches.")],
    base_model: Annotated[str, Option(help="A source of the store, or a model of it; or a folder's MODEL.")],
    instruct_model: Annotated[str, Option(help="The other one.")],
    layer: Annotated[int | None, Option(help="Block whose output the rows are; of a source by its name: none.")] = None,
    dataset: Annotated[list[str] | None, Option(help="Of a folder; repeatable. None: all that both have.")] = None,
    type_: Annotated[str, Option("--type", help="relu or batch-top-k.")] = "relu",
    expansion_factor: Annotated[
        int | None, Option(help="Latents per component of a row; none: 32, or as pretrained.")
    ] = None,
    batch_size: Annotated[int, Option(help="Rows.")] = 2048,
    mu: Annotated[float, Option(help="Price of codes (relu).")] = 1e-1,
    lr: Annotated[float, Option(help="Learning rate.")] = 1e-3,
    k: Annotated[int, Option(help="Latents of a row (batch-top-k).")] = 100,
    k_max: Annotated[int | None, Option(help="k at the first step.")] = None,
    k_annealing_steps: Annotated[int, Option(help="Steps from k-max to k.")] = 0,
    auxk_alpha: Annotated[float, Option(help="Weight of AuxK (batch-top-k).")] = 1 / 32,
    code_normalization: Annotated[
        str | None, Option(help="crosscoder, sae, mixed, none or decoupled; none: crosscoder, or as pretrained.")
    ] = None,
    use_mse_loss: Annotated[bool, Option(help="Squared errors (relu).")] = False,
    normalize: Annotated[bool, Option(help="Scale rows by their mean and spread; a pass over them.")] = False,
    same_init_for_all_layers: Annotated[bool, Option(help="Both models begin with the same vectors.")] = False,
    norm_init_scale: Annotated[float | None, Option(help="Length of fresh vectors; none: 0.005 (relu), 1.")] = None,
    init_with_transpose: Annotated[bool, Option(help="Decoders begin as the encoders.")] = True,
    encoder_layers: Annotated[list[int] | None, Option(help="Models that are read, 0 or 1; none: both.")] = None,
    resample_steps: Annotated[int | None, Option(help="Between which dead latents begin again.")] = None,
    pretrained: Annotated[Path | None, Option(help="A crosscoder to go on with.")] = None,
    max_steps: Annotated[int | None, Option(help="Steps; none: each row once.")] = None,
    validate_every_n_steps: Annotated[int | None, Option(help="Steps between figures of what is held out.")] = None,
    seed: Annotated[int, Option(help="Of weights and order.")] = 42,
    device: Annotated[str | None, Option(help="cpu or cuda; none: cuda where there is one.")] = None,
    run_name: Annotated[str | None, Option(help="Folder below checkpoints/; none: by model, layer and rates.")] = None,
    save_dir: Annotated[Path, Option(help="Where runs go.")] = Path("checkpoints"),
    workers: Annotated[int, Option(help="Taken and not needed: rows come from memory maps.")] = 0,
    wandb_entity: Annotated[str, Option(help="Show figures in W&B.")] = "",
    wandb_project: Annotated[str, Option(help="Show figures in W&B.")] = "",
    disable_wandb: Annotated[bool, Option(help="Do not.")] = False,
) -> None:  # fmt: skip
    """Train a crosscoder of two models as crosscoder_learning's script does, with its options and files.

    The rows are two sources of a store, or caches that dictionary_learning has collected. Special and first tokens of a
    store are left out, as in train run; documents that it holds out, or the last sequences of a cache, are for
    validation. train run has more: sources of several widths, any method, sweeps, reports, resume.

    Example: train crosscoder --activation-store-dir activations --base-model gemma-2-2b --instruct-model gemma-2-2b-it
    --layer 13 --expansion-factor 32 --mu 1e-1 --lr 1e-3
    """
    _train(SimpleNamespace(**locals()))


def _train(asked: Any) -> None:
    """What the options ask for."""
    if asked.type_ not in LENGTHS:
        raise ConfigError("wrong value for --type", asked.type_, f"Give {' or '.join(LENGTHS)}")
    names = (asked.base_model, asked.instruct_model)
    folder = asked.save_dir / (asked.run_name or _named(asked))
    if folder.exists():
        raise ConfigError("a run of this name is there already", folder, "Give another --run-name")
    pairs = found(asked.activation_store_dir, *names, asked.layer, asked.dataset)
    steps = asked.max_steps or max(1, int(pairs.train_N.sum()) // asked.batch_size)
    validates = asked.validate_every_n_steps is not None
    ae, logs = trainSAE(
        pairs.shuffled(asked.batch_size, asked.seed, steps), _config(asked, pairs, steps), save_dir=folder,
        log_steps=LOG_STEPS, verbose=True, validate_every_n_steps=asked.validate_every_n_steps,
        validation_data=pairs.held_out(VALIDATION_BATCH) if validates else None, return_last_eval_logs=True,
        use_wandb=bool(asked.wandb_entity or asked.wandb_project) and not asked.disable_wandb,
        wandb_entity=asked.wandb_entity, wandb_project=asked.wandb_project,
    )  # fmt: skip
    if not evaluate(ae, pairs.shuffled(asked.batch_size, asked.seed, 1), device=next(ae.parameters()).device)["l0"]:
        print("no latent fires any more: lower --mu or --lr, or --normalize the rows", file=sys.stderr)
    print(json.dumps({"folder": str(folder), "dict_class": type(ae).__name__, "dict_size": ae.dict_size, **logs}))


def _named(asked: Any) -> str:
    sparsity = f"mu{asked.mu:.1e}" if asked.type_ == "relu" else f"k{asked.k}"
    return f"{Path(asked.base_model).name}-L{asked.layer}-{sparsity}-lr{asked.lr:.0e}"


def _config(asked: Any, pairs: Pairs, steps: int) -> dict[str, Any]:
    """The config of trainSAE."""
    keys = {
        "same_init_for_all_layers": asked.same_init_for_all_layers, "init_with_transpose": asked.init_with_transpose,
        "encoder_layers": asked.encoder_layers or None,
        "norm_init_scale": asked.norm_init_scale or LENGTHS[asked.type_],
        "code_normalization": CodeNormalization.from_string(asked.code_normalization or "crosscoder"),
    }  # fmt: skip
    config: dict[str, Any] = {
        "activation_dim": pairs.width, "dict_size": (asked.expansion_factor or EXPANSION) * pairs.width, "lr": asked.lr,
        "steps": steps, "warmup_steps": min(1000, steps // 10), "resample_steps": asked.resample_steps,
        "seed": asked.seed, "device": asked.device, "layer": asked.layer,
        "lm_name": f"{asked.base_model}-{asked.instruct_model}",
    }  # fmt: skip
    kind: Any = CrossCoder if asked.type_ == "relu" else BatchTopKCrossCoder
    if asked.pretrained is None:
        config["dict_class_kwargs"] = keys
    else:
        config["pretrained_ae"] = ae = _pretrained(asked, kind)
        if asked.expansion_factor is not None and ae.dict_size != config["dict_size"]:
            value = f"{ae.dict_size} latents, not {config['dict_size']}"
            raise ConfigError("--pretrained has another size", value, "Leave --expansion-factor out")
    if asked.normalize:
        mean, std = pairs.spread()
        config |= {"activation_mean": mean.float(), "activation_std": std.float()}
    if asked.type_ == "relu":
        return {**config, "trainer": CrossCoderTrainer, "l1_penalty": asked.mu, "use_mse_loss": asked.use_mse_loss}
    return {
        **config, "trainer": BatchTopKCrossCoderTrainer, "k": asked.k, "k_max": asked.k_max,
        "k_annealing_steps": asked.k_annealing_steps, "auxk_alpha": asked.auxk_alpha,
    }  # fmt: skip


def _pretrained(asked: Any, kind: Any) -> Any:
    """What --pretrained names. Raises ConfigError for an option that asks for another one."""
    fresh = ("encoder_layers", "norm_init_scale", "same_init_for_all_layers")
    given = [f"--{name.replace('_', '-')}" for name in fresh if getattr(asked, name)]
    if given := given + ([] if asked.init_with_transpose else ["--no-init-with-transpose"]):
        raise ConfigError("an option of fresh weights beside --pretrained", given[0], "Leave it out")
    return kind.from_pretrained(asked.pretrained, code_normalization=asked.code_normalization)
