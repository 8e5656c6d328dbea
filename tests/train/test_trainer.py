"""One update is what the formulas say, in the order that the trainer promises.

Letters: B rows of a batch, L latents.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError
from tests import cases
from tests.train.dense import Dense, full, kept, places
from train import objective, pre
from train import trainer as trainers
from train.activation import Budgets
from train.kernels import choice
from train.kernels.entries import borrowed
from train.schedule import learning_rate, ramp
from train.trainer import Trainer
from train.wiring import with_k

STEPS, BATCH = 6, 32
every_method = pytest.mark.parametrize("name", ["standard", "topk", "batch_topk"])
# Each method with what changes over steps: k from 8 to 3, or the weight of the penalty from 0 to 0.3.
KEYS: dict[str, dict[str, Any]] = {
    "standard": {"l1": 0.3, "l1_warmup": 4},
    "topk": {"k": 3, "k_start": 8, "k_anneal": 3, "aux": 0},
    "batch_topk": {"k": 3, "k_start": 8, "k_anneal": 3, "aux": 0},
}
ADAM = {"lr": 1e-2, "warmup": 3, "decay": 0.4, "beta1": 0.8, "beta2": 0.95, "clip": 2.0}


def made(case: str, name: str, **keys: Any) -> Trainer:
    return cases.trainer(
        case, name, STEPS, **{"method": cases.method(name, **KEYS[name]), "optimiser": ADAM, "batch": BATCH, **keys}
    )


@pytest.mark.parametrize("case", ["autoencoder", "transcoder", "dedicated of 3"])
@pytest.mark.parametrize("name", ["standard", "topk"])
def test_unit_decoders_stay_so_over_all_that_a_latent_writes(case: str, name: str) -> None:
    wires = {"kind": cases.CASES[case][0], "latents": cases.LATENTS, "decoder": "unit"}
    trainer = made(case, name, wiring=wires)
    trainer.dictionary.normalise_decoders()
    for step in range(STEPS):
        before = {n: W_SD.detach().clone() for n, W_SD in trainer.dictionary.decoder.items()}
        trainer.update(cases.random_rows(case, BATCH, seed=step))
        norm_L = torch.linalg.vector_norm(trainer.dictionary.decoder_norms(), dim=0)
        torch.testing.assert_close(norm_L, torch.ones_like(norm_L), rtol=1e-6, atol=0)
        assert not all(torch.equal(W_SD, before[n]) for n, W_SD in trainer.dictionary.decoder.items())


def test_the_part_of_a_gradient_along_a_decoder_vector_is_taken_out_over_its_sources_together() -> None:
    """Latent by latent: g - (g . d / d . d) d, with d and g over all sources that the latent writes to."""
    trainer = made("dedicated", "standard")
    dictionary, wiring = trainer.dictionary, trainer.dictionary.wiring
    with torch.no_grad():
        dictionary.decoder["a"][0] = 0  # a vector of zeros has no direction
    for W_SD in dictionary.decoder.parameters():
        W_SD.grad = torch.randn(W_SD.shape, generator=torch.Generator().manual_seed(len(W_SD)))
    grads = {n: full(W_SD.grad, places(wiring, n, "writers")) for n, W_SD in dictionary.decoder.items()}
    vectors = {n: full(W_SD.detach(), places(wiring, n, "writers")) for n, W_SD in dictionary.decoder.items()}
    dictionary.project_gradients()
    g_LX, d_LX = (torch.cat([table["a"], table["b"]], 1) for table in (grads, vectors))
    for latent in range(cases.LATENTS):
        g, d = g_LX[latent], d_LX[latent]
        right = g - (g @ d / (d @ d)) * d if d.any() else g
        for n, part in (("a", right[:20]), ("b", right[20:])):
            own = torch.cumsum(places(wiring, n, "writers"), 0)[latent] - 1
            if places(wiring, n, "writers")[latent]:
                torch.testing.assert_close(dictionary.decoder[n].grad[own].double(), part, rtol=1e-5, atol=1e-6)


class Reference:
    """Adam (Kingma and Ba 2015) on the dense formulas, in fp64, with the gradient clipped to a norm."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.name, self.dense = name, Dense.of(trainer.dictionary)
        self.first = {key: torch.zeros_like(leaf) for key, leaf in self.dense.leaves().items()}
        self.second = copy.deepcopy(self.first)
        self.gradients: list[float] = []
        self.losses: list[float] = []

    def loss(self, x: dict[str, Tensor], step: int) -> Tensor:
        norm_L = self.dense.norm("sum")
        f_BL = kept(self.name, self.dense.h(x), norm_L, round(ramp(8, 3, 3)(step)))
        y = self.dense.y(f_BL)
        loss = torch.stack([(x[source].double() - y[source]).square().sum(1).mean() for source in y]).sum()
        return loss + ramp(0, 0.3, 4)(step) * (f_BL * norm_L).sum(1).mean() if self.name == "standard" else loss

    def update(self, x: dict[str, Tensor], step: int) -> None:
        leaves = self.dense.leaves()
        loss = self.loss(x, step)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        self.losses.append(loss.item())
        self.gradients.append(norm)
        rate = learning_rate(1e-2, STEPS, warmup=3, decay=2)(step)
        for key, leaf in leaves.items():
            grad = grads[key] * min(1.0, 2.0 / norm)
            self.first[key] = 0.8 * self.first[key] + 0.2 * grad
            self.second[key] = 0.95 * self.second[key] + 0.05 * grad**2
            mean, square = self.first[key] / (1 - 0.8 ** (step + 1)), self.second[key] / (1 - 0.95 ** (step + 1))
            leaf.data -= rate * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("case", ["autoencoder", "transcoder", "dedicated of 3"])
@every_method
def test_updates_equal_adam_on_the_formulas_in_fp64(case: str, name: str) -> None:
    trainer = made(case, name)
    reference = Reference(trainer, name)
    for step in range(STEPS):
        x = cases.random_rows(case, BATCH, seed=step)
        record = trainer.update(x)
        reference.update(x, step)
        assert float(record["loss"]) == pytest.approx(reference.losses[-1], rel=1e-4)
        assert float(record["gradient"]) == pytest.approx(reference.gradients[-1], rel=1e-3)
    assert max(reference.gradients) > 2.0  # so that the clip took part
    for key, parameter in trainer.dictionary.named_parameters():
        torch.testing.assert_close(
            parameter.double(), reference.dense.leaves()[key].detach(), rtol=0, atol=2e-4, msg=key
        )


def test_every_step_has_its_own_rate_and_its_own_k() -> None:
    trainer = made("crosscoder", "topk")
    rates, ks = [], []
    for step in range(STEPS):
        record = trainer.update(cases.random_rows("crosscoder", BATCH, seed=step))
        rates.append(trainer.optimiser.param_groups[0]["lr"])
        ks.append(trainer.dictionary.activation.counts[0])
        assert float(record["l0"]) <= ks[-1]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 0.5e-2])
    assert ks == [8, 6, 5, 3, 3, 3]
    assert trainer.step == STEPS


def one_alive(dead_rows: int) -> tuple[Trainer, dict[str, Tensor]]:
    """Latent 0 fires on every row, latent 1 never, latent 2 where a row begins with 1; the rest never."""
    trainer = cases.trainer("autoencoder", "standard", dead_rows=dead_rows, optimiser={"lr": 1e-12})
    with torch.no_grad():
        trainer.dictionary.encoder["a"].zero_()
        trainer.dictionary.encoder["a"][2, 0] = 2.0
        trainer.dictionary.activation.bias_L.fill_(-1.0)
        trainer.dictionary.activation.bias_L[0] = 1.0
    quiet = {"a": torch.zeros(8, 20)}
    return trainer, quiet


def test_idle_counts_are_rows_since_a_latent_last_fired() -> None:
    trainer, quiet = one_alive(1000)
    loud = {"a": torch.zeros(8, 20)}
    loud["a"][3, 0] = 1.0
    counts = []
    for x in (quiet, quiet, loud, quiet):
        trainer.update(x)
        counts.append(trainer.idle_L[:3].tolist())
    assert counts == [[0, 8, 8], [0, 16, 16], [0, 24, 0], [0, 32, 8]]


def test_the_dead_share_is_that_which_the_update_itself_saw() -> None:
    trainer, quiet = one_alive(16)
    shares = [float(trainer.update(quiet)["dead"]) for _ in range(4)]
    assert shares == [0, 0, pytest.approx(47 / 48), pytest.approx(47 / 48)]
    assert int(trainer.dead_L.sum()) == 47


def test_dead_latents_come_back_to_life_through_auxk() -> None:
    def alive(aux: float) -> int:
        keys = {"k": 2, "aux": aux, "k_aux": 16}
        trainer = cases.trainer("autoencoder", "topk", 300, method=cases.method("topk", **keys), dead_rows=500)
        planted = cases.planted("autoencoder")
        with torch.no_grad():
            trainer.dictionary.activation.bias_L[8:] = -2.0
        for step in range(300):
            trainer.update(planted.rows(128, step))
        return int((trainer.idle_L < 500).sum())

    assert alive(1 / 32) >= alive(0) + 5


@every_method
def test_the_record_of_an_update_is_scalars_without_a_graph(name: str) -> None:
    record = made("dedicated", name).update(cases.random_rows("dedicated", BATCH))
    assert {"loss", "recon", "gradient", "l0", "dead", "fve/a", "fve/b"} <= record.keys()
    assert all(value.ndim == 0 and not value.requires_grad and math.isfinite(value) for value in record.values())


def test_the_logged_fve_and_l0_are_those_of_the_batch_before_the_update() -> None:
    trainer = made("crosscoder", "standard")
    x = cases.random_rows("crosscoder", BATCH)
    with torch.no_grad():
        out = trainer.dictionary(x)
    record = trainer.update(x)
    for source in ("a", "b"):
        error = (out.target[source] - out.y[source]).double().square().sum()
        spread = (x[source].double() - x[source].double().mean(0)).square().sum()
        assert float(record[f"fve/{source}"]) == pytest.approx(float(1 - error / spread), rel=1e-5)
    assert float(record["l0"]) == pytest.approx(float((out.code.dense() > 0).sum()) / BATCH)


@every_method
def test_a_state_that_is_put_into_a_fresh_trainer_goes_on_to_the_bit(name: str) -> None:
    trainer, other = made("dedicated", name), made("dedicated", name, wiring={"latents": 48, "decoder_norm": 2.0})
    rows = [cases.random_rows("dedicated", BATCH, seed=step) for step in range(STEPS)]
    for x in rows[:3]:
        trainer.update(x)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for x in rows[3:]:
        expected, found = trainer.update(x), other.update(x)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert other.step == STEPS and torch.equal(other.idle_L, trainer.idle_L)
    for key, value in trainer.dictionary.state_dict().items():
        assert torch.equal(other.dictionary.state_dict()[key], value)


@pytest.mark.parametrize("decoder", ["free", "unit"])
def test_what_is_saved_is_the_moving_average_of_the_weights(decoder: str) -> None:
    wires = {"kind": "dedicated", "latents": cases.LATENTS, "decoder": decoder}
    trainer = made("dedicated", "topk", wiring=wires, optimiser={**ADAM, "ema": 0.75})
    plain = made("dedicated", "topk", wiring=wires)
    expected = [one.detach().clone() for one in trainer.parameters]
    for step in range(STEPS):
        x = cases.random_rows("dedicated", BATCH, seed=step)
        trainer.update(x), plain.update(x)
        expected = [0.75 * old + 0.25 * new.detach() for old, new in zip(expected, plain.parameters, strict=True)]
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.parameters, plain.parameters, strict=True)
    )  # not trained by it
    again = made("dedicated", "topk", wiring=wires, optimiser={**ADAM, "ema": 0.75})
    again.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for one in (trainer, again):
        dictionary = one.trained()
        assert not dictionary.training
        norm_L = torch.linalg.vector_norm(dictionary.decoder_norms(), dim=0)
        for value, right in zip(one.parameters, expected, strict=True):
            if decoder == "free":
                torch.testing.assert_close(value.detach(), right)
        assert decoder == "free" or torch.allclose(norm_L, torch.ones_like(norm_L))
    assert plain.trained() is plain.dictionary


def test_weights_decay_and_what_0_is_no_rest_of_does_not() -> None:
    """One step: matrices are less by rate x decay x what they were, biases, gates and thresholds as they would be."""
    for name, case in (("gated", "dedicated"), ("jumprelu", "transcoder")):
        plain, decayed = (
            cases.trainer(case, name, STEPS, optimiser={"lr": 1e-2, "warmup": 1, "weight_decay": decay},
                          wiring={"kind": cases.CASES[case][0], "latents": cases.LATENTS, "skip": case == "transcoder"})
            for decay in (0.0, 0.5)
        )  # fmt: skip
        before = {key: value.detach().clone() for key, value in plain.dictionary.named_parameters()}
        for trainer in (plain, decayed):
            trainer.update(cases.random_rows(case, BATCH))
        rate, after = plain.optimiser.param_groups[0]["lr"], dict(decayed.dictionary.named_parameters())
        assert rate > 0
        for key, value in plain.dictionary.named_parameters():
            less = rate * 0.5 * before[key] if key.startswith(("encoder", "decoder", "skip")) else 0
            torch.testing.assert_close(after[key], value - less, rtol=1e-6, atol=1e-7, msg=key)


class Known:
    """For a device that computes nothing: there are four dead latents, and all is finite."""

    def __init__(self, values: Tensor) -> None:
        self.several = values.ndim > 0

    def read(self) -> Any:
        return [4, 4] if self.several else 1.0


@pytest.mark.parametrize("codes", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("case", ["autoencoder", "dedicated"])
def test_an_update_asks_nothing_of_the_device(
    monkeypatch: pytest.MonkeyPatch, case: str, name: str, codes: str
) -> None:
    """On the device `meta` tensors have no values: whoever asks for one, or for how many there are, raises."""
    for module in (objective, trainers):
        monkeypatch.setattr(module, "Later", Known)
    begun = cases.trainer(case, name, kernels=codes, precision="fp32")
    begun = Trainer(begun.dictionary.to("meta"), begun.terms, begun.config)
    monkeypatch.setattr(begun.optimiser, "step", lambda: None)  # fused Adam has no form for it
    for _ in range(2):
        record = begun.update({n: x_BD.to("meta") for n, x_BD in cases.random_rows(case, BATCH).items()})
    assert all(value.device.type == "meta" for value in record.values())
    assert begun.way.startswith({"sparse": "codes are entries", "dense": "codes are matrices"}[codes])
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(record["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codes", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_an_update_does_not_wait_for_the_gpu(name: str, codes: str) -> None:
    begun = cases.trainer("dedicated", name, kernels=codes, dead_rows=BATCH)
    begun = Trainer(begun.dictionary.to("cuda"), begun.terms, begun.config)
    x = {n: x_BD.to("cuda") for n, x_BD in cases.random_rows("dedicated", BATCH).items()}
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            record = begun.update(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert float(record["dead"]) > 0 and math.isfinite(float(record["loss"]))


def test_auxk_that_is_not_finite_is_left_out_of_an_update() -> None:
    wires = {"kind": "autoencoder", "latents": cases.LATENTS, "norm": "none"}
    first, second = (
        made("autoencoder", "topk", method=cases.method("topk", aux=aux), wiring=wires) for aux in (1.0, 0.0)
    )
    for trainer in (first, second):
        trainer.idle_L[:6] = trainer.config.dead_rows
        with torch.no_grad():  # what these write has a square that float32 does not hold; others are kept
            trainer.dictionary.activation.bias_L[6:] = 10.0
            trainer.dictionary.decoder["a"][:6] = 1e25
        record = trainer.update(cases.random_rows("autoencoder", BATCH))
        assert float(record["aux"]) == 0.0 and math.isfinite(float(record["gradient"]))
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()


PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # method, its keys, those of the run
    "topk": ("topk", {"multi": 0.125}, {}),
    "batch_topk": ("batch_topk", {}, {"wiring": {"latents": 300}, "kernels": "sparse"}),
    "annealed": ("batch_topk", {"k_start": 8, "k_anneal": 3}, {}),
    "matryoshka": ("matryoshka", {}, {}),
    "bf16": ("batch_topk", {}, {"precision": "bf16"}),
}


def budgets(trainer: Trainer) -> None:
    """Let a span keep latents for itself."""
    wires = with_k(trainer.dictionary.wiring, {"only_a": 2})
    trainer.dictionary.activation.budgets = Budgets(wires, trainer.dictionary.activation.budgets.k_at)
    trainer.dictionary.activation._begin(2)
    trainer.dictionary.activation.schedule(0)


@pytest.mark.parametrize("micro", [1, 7, BATCH, 100])
@pytest.mark.parametrize("name", PARTS)
def test_a_batch_in_parts_teaches_what_the_whole_does(monkeypatch: pytest.MonkeyPatch, name: str, micro: int) -> None:
    method, keys, given = PARTS[name]
    given = {"method": cases.method(method, **keys), "dead_rows": 2 * BATCH, "optimiser": ADAM, **given}
    whole, parts = (cases.trainer("dedicated", method, STEPS, **given, micro_batch=one) for one in (None, micro))
    if name == "batch_topk":
        for trainer in (whole, parts):
            budgets(trainer)
    sizes: list[int] = []
    monkeypatch.setattr(pre, "borrowed", lambda size, *of: sizes.append(size) or borrowed(size, *of))
    for step in range(STEPS):
        x, rounded = cases.random_rows("dedicated", BATCH, seed=step), name == "bf16"
        with torch.no_grad():
            one, other = (trainer.dictionary(x).code.dense() for trainer in (whole, parts))
        assert rounded or torch.equal(one > 0, other > 0)
        sizes.clear()
        told = parts.update(x)
        assert max(sizes) == min(micro, BATCH) * parts.dictionary.latents  # of the scores
        assert parts.way.startswith("codes are entries")
        expected = whole.update(x)
        for key, value in {"loss": expected["loss"]}.items() if rounded else expected.items():
            assert float(told[key]) == pytest.approx(float(value), rel=0.05 if rounded else 1e-4, abs=1e-6), key
    assert float(told["dead"]) > 0
    if not rounded:  # which a score near the border may turn
        assert parts.idle_L.equal(whole.idle_L)
        for key, value in whole.dictionary.state_dict().items():
            torch.testing.assert_close(parts.dictionary.state_dict()[key], value, rtol=2e-5, atol=2e-5, msg=key)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_a_wrong_word_about_triton_is_told_however_codes_are_held(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.TRITON, "yes")
    choice.by_triton.cache_clear()
    with pytest.raises(ConfigError, match="no such GRANARY_TRITON: yes"):
        cases.trainer("autoencoder", "topk", kernels=kernels).update(cases.random_rows("autoencoder", 8))
