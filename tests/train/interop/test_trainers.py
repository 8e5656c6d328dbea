"""The trainers of the reference learn, minimise what they say, and leave everything as it is where they only look.

Letters: B rows, S sources, D width, L latents.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import ConfigError, TrainingError
from train.interop import dictionary_learning as reference
from train.interop.dictionary_learning import (
    AutoEncoder,
    AutoEncoderTopK,
    BatchTopKCrossCoderTrainer,
    BatchTopKTrainer,
    ConstrainedAdam,
    CrossCoderTrainer,
    DedicatedFeatureBatchTopKCrossCoder,
    Dictionary,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    StandardTrainerAprilUpdate,
    TopKTrainer,
    Trainer,
    evaluate,
    load_dictionary,
    trainSAE,
)

D, L, B, K, STEPS = 16, 64, 64, 4, 60
COMMON: dict[str, Any] = {
    "activation_dim": D, "dict_size": L, "warmup_steps": 5, "seed": 0, "device": "cpu", "layer": 3, "lm_name": "model",
}  # fmt: skip
ONE: dict[str, dict[str, Any]] = {
    "StandardTrainer": {"lr": 3e-3, "l1_penalty": 0.05},
    "StandardTrainerAprilUpdate": {"lr": 3e-3, "l1_penalty": 0.05},
    "GatedSAETrainer": {"lr": 3e-3, "l1_penalty": 0.05},
    "PAnnealTrainer": {"lr": 3e-3, "initial_sparsity_penalty": 0.05, "anneal_start": 20, "steps": STEPS},
    "GatedAnnealTrainer": {"lr": 3e-3, "initial_sparsity_penalty": 0.05, "anneal_start": 20, "steps": STEPS},
    "TopKTrainer": {"lr": 3e-3, "k": K, "threshold_start_step": 5},
    "JumpReluTrainer": {"lr": 3e-3, "target_l0": 8.0, "bandwidth": 0.1},
    "BatchTopKTrainer": {"lr": 3e-3, "k": K},
    "MatryoshkaBatchTopKTrainer": {"lr": 3e-3, "k": K, "group_fractions": (0.25, 0.75)},
}
TWO: dict[str, dict[str, Any]] = {
    "CrossCoderTrainer": {"lr": 3e-3, "l1_penalty": 0.02},
    "BatchTopKCrossCoderTrainer": {"lr": 3e-3, "k": K, "steps": STEPS},
}
every_trainer = pytest.mark.parametrize("name", [*ONE, *TWO])


def planted(sources: int | None = None, seed: int = 0) -> Iterator[Tensor]:
    """Batches of rows that few features make, [B, D] or [B, S, D]."""
    generator = torch.Generator().manual_seed(7)
    shape = (24, D) if sources is None else (24, sources, D)
    directions = nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        codes = (torch.rand(B, 24, generator=generator) < 0.1) * (1 + torch.rand(B, 24, generator=generator))
        yield 2 * torch.einsum("bg,g...->b...", codes, directions) + 0.3


def made(name: str, **keys: Any) -> Any:
    return getattr(reference, name)(**{**COMMON, **{**ONE, **TWO}[name], **keys})


def batches(name: str, seed: int = 0) -> Iterator[Tensor]:
    return planted(2 if name in TWO else None, seed)


def tensors(trainer: Any) -> dict[str, Tensor]:
    """All that the next step depends on."""
    state = trainer.core.own_state()
    found = {f"{part}/{n}": v for part in ("dictionary", "terms", "averages") for n, v in state[part].items()}
    for index, moments in state["optimiser"]["state"].items():
        found |= {f"optimiser/{index}/{n}": v for n, v in moments.items()}
    return {name: value.clone() for name, value in {**found, "idle_L": state["idle_L"]}.items()}


@every_trainer
def test_every_trainer_learns(name: str) -> None:
    trainer, rows = made(name), batches(name)
    x = next(batches(name, seed=1))
    before = evaluate(trainer.ae, [x])["frac_variance_explained"]
    for step in range(STEPS):
        value = trainer.update(step, next(rows))
    assert torch.isfinite(torch.tensor(value))
    assert evaluate(trainer.ae, [x])["frac_variance_explained"] > max(before, 0.3)
    for key, shown in trainer.get_logging_parameters().items():
        assert isinstance(float(shown), float), key


@every_trainer
def test_looking_changes_nothing(name: str, tmp_path: Path) -> None:
    trainer, rows, x = made(name), batches(name), next(batches(name, seed=1))
    for step in range(3):
        trainer.update(step, next(rows))
    before, shown = tensors(trainer), trainer.ae.state_dict()
    for keys in ({}, {"logging": True}, {"step": 7, "use_threshold": True}):
        trainer.loss(x, **keys)
    evaluate(trainer.ae, [x])
    trainer.get_logging_parameters()
    trainer.ae(x, output_features=True)
    trainer.ae.save_pretrained(tmp_path / "it")
    assert all(torch.equal(value, tensors(trainer)[key]) for key, value in before.items())
    assert all(
        torch.equal(v, w) or v.isnan().all()
        for v, w in zip(shown.values(), trainer.ae.state_dict().values(), strict=True)
    )


@every_trainer
def test_a_logged_loss_is_the_loss(name: str) -> None:
    trainer, x = made(name), next(batches(name))
    log = trainer.loss(x, step=3, logging=True)
    assert log.losses["loss"] == pytest.approx(float(trainer.loss(x, step=3).detach()), rel=1e-5)
    assert log.x_hat.shape == log.x.shape == x.shape and log.f.shape == (B, L)
    errors = (x - log.x_hat).norm(dim=-1)
    assert log.losses["l2_loss"] == pytest.approx(float(errors.mean()), rel=1e-4)
    assert log.losses["mse_loss"] == pytest.approx(float(errors.square().mean()), rel=1e-4)


# --- what they minimise, by formulas in fp64 --------------------------------------------------------------------


def state(trainer: Any) -> dict[str, Tensor]:
    return {n: v.double() for n, v in trainer.ae.state_dict().items() if isinstance(v, Tensor)}


def loss(trainer: Any, x: Tensor, step: int = 10**6) -> float:
    return float(trainer.loss(x, step=step).detach())


@pytest.mark.parametrize("name", ["StandardTrainer", "StandardTrainerAprilUpdate"])
def test_standard_is_a_squared_error_and_a_price_on_codes(name: str) -> None:
    trainer, x = made(name), next(planted())
    s = state(trainer)
    bias = s["bias"] if name == "StandardTrainer" else s["decoder.bias"]
    seen = x.double() - bias if name == "StandardTrainer" else x.double()
    f = (seen @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    x_hat = f @ s["decoder.weight"].T + bias
    norm = s["decoder.weight"].norm(dim=0)
    if name == "StandardTrainer":
        torch.testing.assert_close(norm, torch.ones(L).double())
    expected = (x - x_hat).square().sum(1).mean() + 0.05 * (f * norm).sum(1).mean()
    assert loss(trainer, x) == pytest.approx(float(expected), rel=1e-5)
    half = (x - x_hat).square().sum(1).mean() + 0.025 * (f * norm).sum(1).mean()
    assert loss(trainer, x, step=1000) == pytest.approx(float(half), rel=1e-5)  # half of sparsity_warmup_steps


def test_entropy_can_stand_in_the_place_of_a_price_and_ghosts_beside_it() -> None:
    trainer, x = made("StandardTrainer", l1_penalty=0.0, entropy=0.5), next(planted())
    s = state(trainer)
    f = ((x.double() - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    q = f / f.sum(1, keepdim=True)
    entropy = -(q * torch.where(q > 0, q, 1).log()).sum(1).mean()
    error = (x - (f @ s["decoder.weight"].T + s["bias"])).square().sum(1).mean()
    assert loss(trainer, x) == pytest.approx(float(error + 0.5 * entropy), rel=1e-5)
    ghost = made("StandardTrainer", ghost_grads=True)
    ghost.update(0, x)
    assert float(ghost.last["ghost"]) == 0
    ghost.core.idle_L[:7] = 10**9
    assert float(ghost.loss(x, logging=True).losses["loss"]) > float(made("StandardTrainer").loss(x).detach())


def test_gated_teaches_its_gate_by_a_frozen_decoder() -> None:
    trainer, x = made("GatedSAETrainer"), next(planted()).double()
    s = state(trainer)
    z = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    gate = (z + s["gate_bias"]).relu()
    f = (gate > 0) * (s["r_mag"].exp() * z + s["mag_bias"]).relu()

    def error(codes: Tensor) -> Tensor:
        return (x - codes @ s["decoder.weight"].T - s["decoder_bias"]).square().sum(1).mean()

    assert loss(trainer, x) == pytest.approx(float(error(f) + error(gate) + 0.05 * gate.sum(1).mean()), rel=1e-5)


def test_jumprelu_pays_for_the_distance_to_its_target() -> None:
    trainer, x = made("JumpReluTrainer"), next(planted()).double()
    s = state(trainer)
    h = x @ s["W_enc"] + s["b_enc"]
    fires = h > s["threshold"]
    error = (x - (h * fires) @ s["W_dec"] - s["b_dec"]).square().sum(1).mean()
    price = (fires.double().sum(1).mean() / 8 - 1).square()
    assert loss(trainer, x) == pytest.approx(float(error + price), rel=1e-4)


def dead_error(e: Tensor, h: Tensor, dead: Tensor, decoder: Tensor) -> Tensor:
    """AuxK over the variance of the error, D // 2 latents of a row: e [B, S, D], h [B, L], decoder [S, L, D]."""
    scores = torch.where(dead, h.relu(), -1.0)
    k = min(D // 2, int(dead.sum()))
    border = scores.topk(k, dim=1).values[:, -1:]
    f = torch.where(scores >= border, scores, 0.0).relu()
    guess = torch.einsum("bl,sld->bsd", f, decoder)
    spread = (e - e.mean(0)).square().sum((1, 2)).mean()
    return (e - guess).square().sum((1, 2)).mean() / spread


@pytest.mark.parametrize("name", ["TopKTrainer", "BatchTopKTrainer"])
def test_what_keeps_k_teaches_the_dead_the_error_over_its_variance(name: str) -> None:
    trainer, x = made(name), next(planted())
    trainer.update(0, x)
    trainer.core.idle_L[:20] = 10**9
    s = state(trainer)
    h = (x.double() - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]
    a = h.relu()
    if name == "TopKTrainer":
        f = a * (a >= a.topk(K, dim=1).values[:, -1:])
    else:
        f = a * (a >= a.flatten().topk(K * B).values[-1])
    e = x - (f @ s["decoder.weight"].T + s["b_dec"])
    aux = dead_error(e[:, None], h, torch.arange(L) < 20, s["decoder.weight"].T[None])
    assert loss(trainer, x) == pytest.approx(float(e.square().sum(1).mean() + aux / 32), rel=1e-4)
    trainer.core.idle_L.zero_()
    assert loss(trainer, x) == pytest.approx(float(e.square().sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("squared", [False, True])
def test_a_crosscoder_pays_the_mean_error_of_its_sources_and_a_price_on_codes(squared: bool) -> None:
    trainer, x = made("CrossCoderTrainer", use_mse_loss=squared), next(planted(2)).double()
    s = state(trainer)
    f = (torch.einsum("bsd,sdl->bl", x, s["encoder.weight"]) + s["encoder.bias"]).relu()
    errors = (x - torch.einsum("bl,sld->bsd", f, s["decoder.weight"]) - s["decoder.bias"]).norm(dim=2)
    price = 0.02 * (f * s["decoder.weight"].norm(dim=2).sum(0)).sum(1).mean()
    expected = (errors.square() if squared else errors).mean() + price
    assert loss(trainer, x) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_topk_crosscoder_pays_the_mean_error_and_auxk() -> None:
    trainer, x = made("BatchTopKCrossCoderTrainer"), next(planted(2))
    trainer.update(0, x)
    trainer.core.idle_L[:20] = 10**9
    s, x = state(trainer), x.double()
    h = torch.einsum("bsd,sdl->bl", x, s["encoder.weight"]) + s["encoder.bias"]
    score = h.relu() * s["decoder.weight"].norm(dim=2).sum(0)
    f = h.relu() * (score >= score.flatten().topk(K * B).values[-1])
    e = x - torch.einsum("bl,sld->bsd", f, s["decoder.weight"]) - s["decoder.bias"]
    aux = dead_error(e, h, torch.arange(L) < 20, s["decoder.weight"])
    assert loss(trainer, x) == pytest.approx(float(e.norm(dim=2).mean() + aux / 32), rel=1e-4)


# --- rules ------------------------------------------------------------------------------------------------------


def test_decoder_biases_begin_at_the_geometric_median_but_not_of_what_was_trained(tmp_path: Path) -> None:
    x = next(planted()) + 5.0
    trainer = made("BatchTopKTrainer", lr=1e-9)
    trainer.update(0, x)
    distance = lambda point: float((x - point).norm(dim=1).sum())  # noqa: E731
    assert distance(trainer.ae.b_dec.detach()) <= distance(x.mean(0)) and trainer.ae.b_dec.mean() > 4
    pretrained = made("BatchTopKCrossCoderTrainer").ae
    bias = pretrained.decoder.bias.detach().clone()
    again = made("BatchTopKCrossCoderTrainer", pretrained_ae=pretrained, lr=1e-9)
    again.update(0, next(planted(2)))
    torch.testing.assert_close(again.ae.decoder.bias.detach(), bias, atol=1e-6, rtol=0)


def test_k_falls_from_its_largest_to_k() -> None:
    trainer = made("BatchTopKCrossCoderTrainer", k_max=20, k_annealing_steps=10)
    rows, seen = planted(2), []
    for step in range(12):
        trainer.update(step, next(rows))
        seen.append(trainer.k_current_value)
    assert seen == [20, 18, 17, 15, 14, 12, 10, 9, 7, 6, 4, 4]
    never = made("BatchTopKCrossCoderTrainer", k_max=20)  # without steps it never falls in the reference
    never.update(0, next(rows))
    assert never.k_current_value == K


def test_a_threshold_of_topk_follows_its_smallest_codes() -> None:
    trainer, rows = made("TopKTrainer", threshold_start_step=1, threshold_beta=0.5), planted()
    trainer.update(0, next(rows))
    trainer.update(1, next(rows))
    assert float(trainer.ae.threshold) == -1
    trainer.update(2, x := next(rows))
    f = trainer.ae.encode(x).detach()
    smallest = f.masked_fill(f <= 0, torch.inf).min(1).values
    assert float(trainer.ae.threshold) == pytest.approx(float(smallest[smallest.isfinite()].mean()), rel=1e-5)


def test_dead_latents_begin_again_from_rows_of_the_batch() -> None:
    trainer, rows = made("StandardTrainer", resample_steps=4, lr=1e-6), planted()
    trainer.ae.encoder.bias = torch.where(torch.arange(L) < 8, -100.0, 0.0)
    for step in range(4):
        trainer.update(step, next(rows))
    assert not (trainer.ae.encode(next(rows))[:, :8] > 0).any()
    trainer.update(4, next(rows))
    assert (trainer.ae.encode(next(rows))[:, :8] > 0).any()


def test_an_argument_that_it_does_not_have_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no argument: l1_penaltie.*l1_penalty"):
        StandardTrainer(l1_penaltie=1.0)
    with pytest.raises(ConfigError, match="this trainer needs an argument: k"):
        TopKTrainer(activation_dim=D)
    with pytest.raises(ConfigError, match="p_end 0"):
        made("PAnnealTrainer", p_end=0)
    with pytest.raises(ConfigError, match="this is no such dictionary: Linear"):
        made("StandardTrainer", dict_class=nn.Linear)


# --- trainSAE ---------------------------------------------------------------------------------------------------


def test_one_config_gives_one_dictionary_and_its_folder(tmp_path: Path) -> None:
    data = [next(planted(seed=n)) for n in range(10)]
    kept = [x.clone() for x in data]
    config = {"trainer": BatchTopKTrainer, **COMMON, "k": K, "lr": 3e-3}
    asked = dict(config)
    ae, logs = trainSAE(
        data, config, save_dir=tmp_path, save_steps=4, log_steps=3, validate_every_n_steps=5, validation_data=data[:2],
        start_of_training_eval=True, return_last_eval_logs=True, epoch_idx_per_step=[0] * 5 + [1] * 5,
    )  # fmt: skip
    assert config == asked and all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_0.pt", "checkpoint_4.pt", "checkpoint_8.pt", "config.json", "eval_logs_0.pt", "eval_logs_5.pt",
        "last_eval_logs.pt", "metrics.jsonl", "model_final.pt",
    ]  # fmt: skip
    found, table = load_dictionary(tmp_path)
    assert torch.equal(found.encode(data[0]), ae.encode(data[0]))
    assert table["trainer"]["dict_class"] == "BatchTopKSAE" and table["trainer"]["k"] == K
    assert table["trainer"]["lm_name"] == "model" and table["buffer"] is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 5, 6, 9, 10]
    assert [line["epoch"] for line in lines if "epoch" in line] == [0, 1, 1]  # of steps 3, 6 and 9
    assert {"l0", "l2_loss", "frac_variance_explained", "effective_l0", "dead_features"} <= set(lines[1])
    assert logs["step"] == 10 and 0 <= logs["val/frac_deads"] <= 1
    assert torch.load(tmp_path / "last_eval_logs.pt") == logs


def test_logging_and_validating_change_no_bit_of_what_is_trained(tmp_path: Path) -> None:
    data = [next(planted(2, seed=n)) for n in range(12)]
    config = {"trainer": BatchTopKCrossCoderTrainer, **COMMON, "k": K, "k_max": 8, "k_annealing_steps": 6, "steps": 12}
    quiet = trainSAE(data, config)
    loud = trainSAE(
        data, config, save_dir=tmp_path, save_steps=1, log_steps=1, validate_every_n_steps=2, validation_data=data
    )
    for name, value in quiet.state_dict().items():
        assert torch.equal(value, loud.state_dict()[name]) or value.isnan().all(), name


def test_several_configs_give_several_dictionaries_and_folders(tmp_path: Path) -> None:
    data = [next(planted(seed=n)) for n in range(8)]
    configs = [
        {"trainer": StandardTrainer, **COMMON, "l1_penalty": 0.1}, {"trainer": TopKTrainer, **COMMON, "k": K},
    ]  # fmt: skip
    found = trainSAE(data, trainer_configs=configs, steps=6, save_steps=[2, 5], save_dir=tmp_path)
    assert [type(one) for one in found] == [AutoEncoder, AutoEncoderTopK]
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    own = {"config.json", "ae.pt", "checkpoints/ae_2.pt", "checkpoints/ae_5.pt"}
    assert names == {f"trainer_{n}/{name}" for n in (0, 1) for name in own}
    alone = trainSAE(data, configs[1], steps=6)
    assert torch.equal(alone.encode(data[0]), found[1].encode(data[0]))
    assert type(trainSAE(data, trainer_configs=configs[:1], steps=2)) is AutoEncoder


def test_a_backup_is_of_the_weights_so_far(tmp_path: Path) -> None:
    data = [10 * next(planted(seed=n)) for n in range(8)]
    config = {"trainer": StandardTrainer, **COMMON, "l1_penalty": 0.1}

    def stopping(trainer: Any, step: int) -> dict[str, float]:
        if step == 7:
            raise InterruptedError
        return {}

    asked: dict[str, Any] = {"normalize_activations": True, "log_steps": 1, "end_of_step_logging_fn": stopping}
    with pytest.raises(InterruptedError):
        trainSAE(data, trainer_configs=[config], backup_steps=5, save_dir=tmp_path, **asked)
    backup = torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True)
    assert set(backup) == {"step", "ae", "optimizer", "config", "norm_factor"} and backup["step"] == 5
    assert backup["config"]["trainer_class"] == "StandardTrainer" and backup["norm_factor"] > 10
    assert all(int(one["step"]) == 5 for one in backup["optimizer"]["state"].values())
    until = trainSAE(data, config, steps=5, normalize_activations=True)  # the factor is that of all of `data`
    found, _ = load_dictionary(tmp_path / "trainer_0", "cpu")
    torch.testing.assert_close(found(data[0]), until(data[0]), rtol=1e-4, atol=1e-3)
    f_BL = found.encode(data[0]) * backup["norm_factor"]
    torch.testing.assert_close(f_BL, until.encode(data[0]), rtol=1e-4, atol=1e-3)
    done = trainSAE(data, trainer_configs=[config], backup_steps=5, save_dir=tmp_path / "done")
    assert torch.equal(load_dictionary(tmp_path / "done/trainer_0", "cpu")[0].encode(data[0]), done.encode(data[0]))


def test_rows_that_are_divided_are_not_changed_and_the_dictionary_is_of_rows_as_they_are() -> None:
    data = [10 * next(planted(seed=n)) for n in range(STEPS)]
    kept = [x.clone() for x in data]
    config = {"trainer": TopKTrainer, **COMMON, "k": K, "lr": 1e-2}
    ae = trainSAE(iter(data), config, normalize_activations=True)
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
    assert evaluate(ae, [10 * next(planted(seed=99))])["frac_variance_explained"] > 0.3


def test_heads_have_a_trainer_each() -> None:
    data = [torch.stack([next(planted(seed=n)), 5 * next(planted(seed=n))], 1) for n in range(4)]
    config = {"trainer": BatchTopKTrainer, **COMMON, "k": K}
    one, two = trainSAE(data, trainer_configs=[config, config], activations_split_by_head=True)
    assert torch.equal(one.b_dec, trainSAE([x[:, 0] for x in data], config).b_dec)
    assert not torch.equal(one.b_dec, two.b_dec)


def test_pairs_are_learnt_from_what_is_read_to_what_is_written() -> None:
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    pairs = [(x, x @ turn) for x in (next(planted(seed=n)) for n in range(200))]
    config = {"trainer": TopKTrainer, **COMMON, "k": K, "lr": 1e-2}
    ae = trainSAE(pairs, config, transcoder=True)
    x, y = pairs[-1]
    left = (y - ae(x)).var(0).sum() / y.var(0).sum()
    assert float(left.detach()) < 0.5
    again = AutoEncoderTopK(D, L, K)
    again.load_state_dict(ae.state_dict())
    torch.testing.assert_close(again(x), ae(x))


def test_a_dedicated_crosscoder_is_trained_by_the_trainer_of_crosscoders(tmp_path: Path) -> None:
    data = [next(planted(2, seed=n)) for n in range(STEPS)]
    ae = trainSAE(
        data,
        {
            "trainer": BatchTopKCrossCoderTrainer, **COMMON, "k": K, "steps": STEPS, "lr": 3e-3,
            "dict_class": DedicatedFeatureBatchTopKCrossCoder,
            "dict_class_kwargs": {"model_a_exclusive_pct": 0.05, "model_b_exclusive_pct": 0.05},
        },
        save_dir=tmp_path, log_steps=20,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert all(line[f"partition_integrity_{end}_max"] == 0 for line in lines for end in ("encoder", "decoder"))
    found, table = load_dictionary(tmp_path)
    assert isinstance(found, DedicatedFeatureBatchTopKCrossCoder) and found.partition == ae.partition
    assert table["trainer"]["dict_class"] == "DedicatedFeatureBatchTopKCrossCoder"
    assert evaluate(ae, [next(planted(2, seed=99))])["frac_variance_explained"] > 0.3


class Mine(Dictionary):
    """A dictionary of a user's own: tied weights."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.weight = nn.Parameter(torch.randn(dict_size, activation_dim) / activation_dim**0.5)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weight

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        f = self.encode(x)
        return (self.decode(f), f) if output_features else self.decode(f)


class Linear(Mine):
    """Another one, with the decoder that a constraint needs."""

    def __init__(self, activation_dim: int, dict_size: int, bias: bool = True) -> None:
        super().__init__(activation_dim, dict_size)
        self.decoder = nn.Linear(dict_size, activation_dim, bias=bias)

    def decode(self, f: Tensor) -> Tensor:
        return self.decoder(f)


@pytest.mark.parametrize("name", ["StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer"])
def test_a_dictionary_of_ones_own_is_trained_by_trainers_that_ask_for_codes_alone(name: str, tmp_path: Path) -> None:
    data = [next(planted(seed=n)) for n in range(STEPS)]
    config = {
        "trainer": getattr(reference, name), **COMMON, **ONE[name], "dict_class": Linear,
        "dict_class_kwargs": {"bias": False},
    }  # fmt: skip
    ae = trainSAE(data, config, save_dir=tmp_path, log_steps=20)
    assert type(ae) is Linear and evaluate(ae, [next(planted(seed=99))])["frac_variance_explained"] > 0.3
    if name != "StandardTrainerAprilUpdate":
        torch.testing.assert_close(ae.decoder.weight.norm(dim=0).detach(), torch.ones(L))
    table = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (table["dict_class"], table["dict_class_kwargs"]) == ("Linear", {"bias": "False"})


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("BatchTopKTrainer", "StandardTrainer"), ("StandardTrainer", "BatchTopKTrainer"),
        ("TopKTrainer", "BatchTopKTrainer"), ("BatchTopKTrainer", "MatryoshkaBatchTopKTrainer"),
        ("CrossCoderTrainer", "StandardTrainer"), ("BatchTopKCrossCoderTrainer", "CrossCoderTrainer"),
        ("GatedSAETrainer", "JumpReluTrainer"), ("StandardTrainer", "CrossCoderTrainer"),
    ],
)  # fmt: skip
def test_a_dictionary_of_another_trainer_is_refused(name: str, other: str) -> None:
    with pytest.raises(ConfigError, match=r"^this trainer is for another dictionary: \w+\. Give one such as \w+$"):
        made(name, pretrained_ae=made(other).ae)


def test_what_a_trainer_cannot_do_with_a_dictionary_of_ones_own_is_told() -> None:
    with pytest.raises(ConfigError, match="looks at the weights of a dictionary: aux"):
        made("TopKTrainer", dict_class=lambda d, n, k: Linear(d, n))
    with pytest.raises(ConfigError, match=r"decoder vectors at the length 1: no decoder"):
        made("StandardTrainer", dict_class=Mine)
    trainer = made("StandardTrainerAprilUpdate", dict_class=Mine, resample_steps=2)
    with pytest.raises(ConfigError, match="resample_steps 2"):
        trainer.update(0, next(planted()))


def test_a_constrained_adam_moves_along_the_sphere() -> None:
    """One step from the axes: the gradient's part along a column is gone, and the column's length is 1 again."""
    decoder = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    free = nn.Parameter(torch.zeros(1))
    adam = ConstrainedAdam([decoder, free], [decoder], lr=0.1)
    assert decoder.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    (5 * decoder[0, 0] + 2 * decoder[1, 0] + free.sum()).backward()
    adam.step()
    assert decoder.grad is not None and decoder.grad.tolist() == [[0.0, 0.0], [2.0, 0.0]]
    torch.testing.assert_close(decoder[:, 0].detach(), torch.tensor([1.0, -0.1]) / 1.01**0.5)
    assert float(free.detach()) == pytest.approx(-0.1)


class MyTrainer(Trainer):
    """A trainer of a user's own, as the reference documents it."""

    def __init__(self, activation_dim: int, dict_size: int, dict_class: Any = Mine, l1: float = 0.01,
                 steps: int | None = None, seed: int | None = None) -> None:  # fmt: skip
        super().__init__(seed)
        self.ae, self.l1, self.steps, self.lr = dict_class(activation_dim, dict_size), l1, steps, 3e-3

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False, **keys: Any) -> Any:
        x_hat, f = self.ae(x, output_features=True)
        value = (x - x_hat).square().sum(-1).mean() + self.l1 * f.sum(-1).mean()
        return (x, x_hat, f, {"loss": value.item()}) if logging else value


@pytest.mark.parametrize("kind", [Mine, AutoEncoder])
def test_a_trainer_of_ones_own_trains(kind: Any, tmp_path: Path) -> None:
    data = [next(planted(seed=n)) for n in range(STEPS)]
    config: Mapping[str, Any] = {
        "trainer": MyTrainer, "activation_dim": D, "dict_size": L, "dict_class": kind, "seed": 0,
    }  # fmt: skip
    ae = trainSAE(data, trainer_configs=[config], save_dir=tmp_path, log_steps=30, steps=STEPS)
    assert type(ae) is kind and evaluate(ae, [data[0]])["frac_variance_explained"] > 0.3
    saved = torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True)
    assert all(torch.equal(value, ae.state_dict()[name]) for name, value in saved.items())
    assert json.loads((tmp_path / "trainer_0" / "config.json").read_text())["trainer"]["trainer_class"] == "MyTrainer"


def test_what_makes_no_sense_is_told() -> None:
    config = {"trainer": StandardTrainer, **COMMON}
    for keys in ({}, {"trainer_config": config, "trainer_configs": [config]}):
        with pytest.raises(ConfigError, match="takes one of two"):
            trainSAE([], **keys)
    with pytest.raises(ConfigError, match="names its trainer"):
        trainSAE([], {"activation_dim": D})
    with pytest.raises(TrainingError, match="no batch came"):
        trainSAE([], config)
    with pytest.raises(ConfigError, match="validation needs rows"):
        trainSAE([next(planted())] * 3, config, validate_every_n_steps=1)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(AutoEncoder(D, L), [])


def test_figures_are_those_of_all_batches_together() -> None:
    ae, whole = AutoEncoder(D, L), next(planted())
    ae.encoder.bias = torch.where(torch.arange(L) < 8, -100.0, 0.1)
    parts = [whole[:10], whole[10:]]
    found = evaluate(ae, iter(parts), n_batches=2)
    x_hat, f = (one.detach().double() for one in ae(whole, output_features=True))
    x = whole.double()
    assert found == pytest.approx({
        "l2_loss": float((x - x_hat).norm(dim=1).mean()), "l1_loss": float(f.sum(1).mean()),
        "l0": float((f > 0).double().sum(1).mean()), "frac_alive": 56 / 64,
        "frac_variance_explained": float(1 - (x - x_hat).var(0).sum() / x.var(0).sum()),
        "cossim": float(nn.functional.cosine_similarity(x, x_hat).mean()),
        "l2_ratio": float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()),
        "relative_reconstruction_bias": float(x_hat.square().sum() / (x * x_hat).sum()),
    }, rel=1e-5)  # fmt: skip


def test_the_old_names_are_those_of_the_same_trainers() -> None:
    assert reference.TrainerTopK is TopKTrainer and reference.TrainerJumpRelu is JumpReluTrainer
    assert reference.SAETrainer is Trainer
    kinds = (StandardTrainerAprilUpdate, GatedSAETrainer, CrossCoderTrainer)
    assert all(issubclass(kind, Trainer) for kind in kinds)
    assert copy.deepcopy(made("CrossCoderTrainer")).ae.dict_size == L


# --- calls that mean something else than they seem --------------------------------------------------------------


class Pairs(nn.Module):
    """y of x, by a known factor."""

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        return (3 * x, x.relu()) if output_features else 3 * x


def test_pairs_are_evaluated_by_what_is_to_be_made() -> None:
    x = next(planted())
    found = evaluate(Pairs(), [(x, 3 * x)])
    assert found["l2_loss"] == 0 and found["frac_variance_explained"] == 1
    assert found["l1_loss"] == pytest.approx(float(x.relu().sum(1).mean()), rel=1e-5)


def test_rows_are_evaluated_at_the_length_of_the_root_of_their_width() -> None:
    x = next(planted())
    length = float(x.norm(dim=1).mean())
    assert evaluate(Pairs(), [x], normalize_batch=True)["l2_loss"] == pytest.approx(2 * D**0.5, rel=1e-5)
    assert evaluate(Pairs(), [x])["l2_loss"] == pytest.approx(2 * length, rel=1e-5)


@pytest.mark.parametrize("name", ["StandardTrainer", "TopKTrainer", "BatchTopKTrainer"])
def test_a_transcoder_learns_what_is_to_be_made(name: str, tmp_path: Path) -> None:
    data = [(x, 2 * x.roll(1, 1)) for x, _ in zip(planted(), range(STEPS), strict=False)]
    config = {"trainer": getattr(reference, name), **COMMON, **ONE[name]}
    ae, logs = trainSAE(
        data, config, transcoder=True, save_dir=tmp_path, log_steps=5, validate_every_n_steps=30,
        validation_data=data[:2], return_last_eval_logs=True,
    )  # fmt: skip
    assert logs["val/frac_variance_explained"] > 0.3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["frac_variance_explained"] > 0.3
    assert name != "TopKTrainer" or float(ae.threshold) > 0


def test_resampling_every_step_leaves_those_alone_that_fire() -> None:
    trainer, rows = made("StandardTrainer", resample_steps=1, lr=1e-9), planted()
    trainer.update(0, next(rows))
    fires_L = trainer.core.idle_L == 0
    assert bool(fires_L.any())
    before = trainer.ae.encoder.weight.detach().clone()
    trainer.update(1, next(rows))
    changed_L = ((trainer.ae.encoder.weight.detach() - before).abs() > 1e-6).any(1)
    assert not bool((changed_L & fires_L).any())


def test_what_was_trained_is_scaled_by_what_is_said_and_has_no_arguments_of_fresh_ones() -> None:
    pretrained, mean, std = made("CrossCoderTrainer").ae, torch.rand(2, D), 1 + torch.rand(2, D)
    again = made("CrossCoderTrainer", pretrained_ae=pretrained, activation_mean=mean, activation_std=std)
    assert again.ae.has_activation_normalizer
    torch.testing.assert_close(again.ae.state_dict()["activation_mean"].float(), mean)
    for name in ("CrossCoderTrainer", "StandardTrainer"):
        with pytest.raises(ConfigError, match="pretrained_ae beside same_init_for_all_layers"):
            own = made(name).ae
            made(name, pretrained_ae=own, dict_class_kwargs={"same_init_for_all_layers": True})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validate_every_n_steps": 1}, "validation needs rows"),
        ({"start_of_training_eval": True}, "validation needs rows"),
        ({"validate_every_n_steps": 1, "validation_data": iter([])}, "can be read once only"),
    ],
)
def test_a_validation_that_cannot_be_is_told_before_the_first_step(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainSAE([], {"trainer": StandardTrainer, **COMMON}, **keys)


def test_what_a_trainer_cannot_follow_is_told() -> None:
    x = next(planted())
    mine = {"trainer": StandardTrainerAprilUpdate, **COMMON, "dict_class": Mine}
    with pytest.raises(ConfigError, match=r"dtype torch.bfloat16"):
        trainSAE([x], mine, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="normalize_activations True"):
        trainSAE([x], mine, normalize_activations=True)
    with pytest.raises(ConfigError, match="normalize_activations True"):
        config = {"trainer": StandardTrainer, **COMMON}
        trainSAE([(x, x)], config, transcoder=True, normalize_activations=True)


def test_rows_of_crosscoders_that_are_divided() -> None:
    data = [10 * next(planted(2, seed=n)) for n in range(STEPS)]
    config = {"trainer": BatchTopKCrossCoderTrainer, **COMMON, **TWO["BatchTopKCrossCoderTrainer"], "lr": 1e-2}
    ae = trainSAE(data, config, normalize_activations=True)
    assert evaluate(ae, [10 * next(planted(2, seed=99))])["frac_variance_explained"] > 0.3


def test_an_autoencoder_learns_from_rows_that_its_normaliser_scales() -> None:
    mean, data = torch.linspace(-3, 3, D), [10 * next(planted(seed=n)) for n in range(STEPS)]
    data = [mean + x_BD for x_BD in data]
    std = torch.cat(data).std(0)
    config = {"trainer": BatchTopKTrainer, **COMMON, "k": 4, "lr": 1e-2, "activation_mean": mean, "activation_std": std}
    ae = trainSAE(data, config)
    assert ae.has_activation_normalizer
    assert evaluate(ae, [mean + 10 * next(planted(seed=99))])["frac_variance_explained"] > 0.3
    with pytest.raises(ConfigError, match="normalize_activations"):
        trainSAE(data, config, normalize_activations=True)
    other = BatchTopKTrainer(**COMMON, k=4, pretrained_ae=ae, activation_mean=mean + 1, activation_std=std).ae
    torch.testing.assert_close(other.state_dict()["activation_mean"], mean + 1)


def test_a_k_that_falls_goes_on_where_weights_are_written() -> None:
    trainer, rows = made("TopKTrainer", k_max=20, k_annealing_steps=10), planted()
    trainer.update(0, next(rows))
    trainer.ae.b_dec = torch.zeros(D)
    for step in range(1, 12):
        trainer.update(step, next(rows))
        if step == 5:
            assert int(trainer.ae.state_dict()["k"]) == trainer.k_current_value > K
            trainer.ae.encoder.bias = torch.zeros(L)
    assert trainer.k_current_value == K


def test_a_call_says_the_device_and_the_precision_of_trainers_that_do_not(tmp_path: Path) -> None:
    data = [next(planted(seed=n)) for n in range(3)]
    config = {"trainer": BatchTopKTrainer, **COMMON, "k": K, "lr": 1e-2}
    del config["device"]
    whole = trainSAE(data, config, device="cpu")
    half, logs = trainSAE(
        data, config, device="cpu", autocast_dtype=torch.bfloat16, validation_data=data, save_dir=tmp_path,
        save_last_eval=False, return_last_eval_logs=True,
    )  # fmt: skip
    assert whole.b_dec.device.type == "cpu" and whole.b_dec.dtype == half.b_dec.dtype == torch.float32
    apart = (whole.encoder.weight - half.encoder.weight).norm() / whole.encoder.weight.norm()
    assert 0 < float(apart.detach()) < 0.05
    assert logs and not (tmp_path / "last_eval_logs.pt").exists()
