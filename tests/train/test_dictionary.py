"""A dictionary equals its formula in fp64, and keeps its promises about weights, names and files.

Letters: B rows of a batch, D width of a source, L latents.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import CheckpointError, ConfigError, RowsError
from tests import cases
from tests.cases import CASES
from tests.train.dense import Dense, full, kept, places
from train.dictionary import Dictionary, create, relative_norms
from train.kernels.choice import Kernels
from train.scale import Scale
from train.wiring import build, default_decoder_norm

METHODS = ("standard", "topk", "batch_topk")
ROWS, K = 9, 3
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", cases.names())


def dictionary(case: str, name: str, norm: str = "sum", seed: int = 0) -> Dictionary:
    """Random everything, the scale included."""
    made = cases.trainer(case, name, wiring={"kind": CASES[case][0], "latents": 48, "norm": norm}).dictionary
    cases.randomise(made, seed)
    return made


def scaled(made: Dictionary, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (x_BD.double() - made.scale.mean(name).double()) * made.scale.factor(name).double()
        for name, x_BD in x.items()
    }


def raw(made: Dictionary, y: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: y_BD / made.scale.factor(name).double() + made.scale.mean(name).double() for name, y_BD in y.items()}


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@every_case
@pytest.mark.parametrize("name", METHODS)
def test_training_and_evaluation_equal_the_formula_in_fp64(case: str, name: str) -> None:
    made = dictionary(case, name)
    x, dense = cases.random_rows(case, ROWS, seed=5), Dense.of(made)
    norm_L, h_BL = dense.norm("sum"), dense.h(scaled(made, x))
    f_BL = kept(name, h_BL, norm_L, K)
    out = made(x)
    assert_near(made.encode(x), f_BL)
    for source, y_BD in dense.y(f_BL).items():
        assert_near(out.y[source], y_BD)
        assert_near(out.target[source], scaled(made, x)[source])

    with torch.no_grad():
        made.activation.observe(out.code, out.norm_L)
    made.eval()
    if name == "batch_topk":
        score_BL = h_BL.clamp_min(0) * norm_L
        smallest = score_BL[f_BL > 0].min()
        f_BL = h_BL.clamp_min(0) * (score_BL > smallest * (1 + 1e-6))  # what was kept, but for the smallest
        assert int((f_BL > 0).sum()) == K * ROWS - 1
        made.activation.get_buffer("mean").mul_(1 + 1e-6)
    assert_near(made.encode(x), f_BL)
    for source, y_BD in raw(made, dense.y(f_BL)).items():
        assert_near(made.decode(f_BL.float())[source], y_BD)


@every_case
@pytest.mark.parametrize("norm", ["sum", "joint", "mean", "none"])
def test_the_norm_of_a_latent_is_by_its_definition(case: str, norm: str) -> None:
    made = dictionary(case, "standard", norm)
    assert_near(made.norms(), Dense.of(made).norm(norm))


def test_norms_of_a_hand_made_dictionary() -> None:
    """Latents of lengths (a, b): only_a (3, -), shared (3, 4), only_b (-, 4)."""
    wires = build("dedicated", {"a": 2, "b": 2}, 3, 1)
    found = {}
    for norm in ("sum", "joint", "mean", "none"):
        made = create(wires, cases.method("standard"), Scale(wires.widths), norm, 1)[0]  # type: ignore[arg-type]
        with torch.no_grad():
            made.decoder["a"][:, 0], made.decoder["b"][:, 1] = 3.0, 4.0
        found[norm] = made.norms().tolist()
    assert found == {"sum": [3, 7, 4], "joint": [3, 5, 4], "mean": [3, 3.5, 4], "none": [1, 1, 1]}
    assert made.decoder_norms().tolist() == [[3, 3, 0], [0, 4, 4]]
    shares = relative_norms(made.decoder_norms())
    torch.testing.assert_close(shares, torch.tensor([[1, 3 / 7, 0], [0, 4 / 7, 1]]))
    assert relative_norms(torch.zeros(2, 1)).isnan().all()


@every_case
@every_method
def test_raw_rows_go_in_and_come_out(case: str, name: str) -> None:
    made = dictionary(case, name).eval()
    x = cases.random_rows(case, ROWS)
    out, decoded = made(x), made.decode(made.encode(x))
    assert decoded.keys() == set(made.wiring.writers)
    for source, y_BD in out.y.items():
        torch.testing.assert_close(decoded[source], made.scale.raw(source, y_BD), rtol=1e-4, atol=1e-4)


@every_case
def test_a_forbidden_weight_has_no_storage(case: str) -> None:
    made = dictionary(case, "topk")
    shapes = {key: tuple(parameter.shape) for key, parameter in made.named_parameters()}
    expected: dict[str, tuple[int, ...]] = {"activation.bias_L": (48,)}
    for source, width in made.wiring.widths.items():
        reads = sum(span.size for span in made.wiring.spans if source in span.readers)
        writes = sum(span.size for span in made.wiring.spans if source in span.writers)
        expected |= {f"encoder.{source}": (reads, width)} if reads else {}
        expected |= {f"decoder.{source}": (writes, width), f"bias.{source}": (width,)} if writes else {}
    assert shapes == expected


def test_sizes_of_a_dedicated_dictionary_of_three() -> None:
    wires = build("dedicated", {"a": 20, "b": 16, "c": 12}, 100, {"a": 5, "b": 10, "c": 20})
    made = create(wires, cases.method("topk"), Scale(wires.widths), "sum", 1)[0]
    assert {name: tuple(made.decoder[name].shape) for name in made.decoder} == {
        "a": (70, 20), "b": (75, 16), "c": (85, 12),
    }  # fmt: skip


# --- initialisation ---------------------------------------------------------------------------------------------


@every_case
def test_fresh_decoders_have_the_asked_length_and_encoders_are_their_share_of_them(case: str) -> None:
    wires = cases.wiring(case)
    made = create(wires, cases.method("topk"), Scale(wires.widths), "sum", 1)[0].initialise(0, 0.4)
    for source in made.decoder:
        lengths = torch.linalg.vector_norm(made.decoder[source], dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.4))
    for source in made.encoder:
        readers_S = torch.cat([torch.full((s.size,), len(s.readers)) for s in wires.spans if source in s.readers])
        if case == "transcoder":
            lengths = torch.linalg.vector_norm(made.encoder[source], dim=1)
            torch.testing.assert_close(lengths, torch.full_like(lengths, 0.4))
        else:
            torch.testing.assert_close(made.encoder[source] * readers_S[:, None], made.decoder[source])
    assert not made.activation.bias_L.any() and not any(made.bias[source].any() for source in made.bias)


def test_the_seed_alone_decides_fresh_weights() -> None:
    wires = cases.wiring("dedicated of 3")

    def fresh(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return create(wires, cases.method("topk"), Scale(wires.widths), "sum", 1)[0].initialise(seed, 1.0).state_dict()

    first, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["decoder.a"], other["decoder.a"])


def test_fresh_decoders_are_shorter_where_several_sources_are_written() -> None:
    lengths = {case: default_decoder_norm(cases.wiring(case)) for case in CASES}
    assert lengths == {
        "autoencoder": 1.0, "transcoder": 1.0, "crosscoder": 0.4, "dedicated": 0.4,
        "crosscoder of 3": 0.4, "dedicated of 3": 0.4,
    }  # fmt: skip


# --- copies and files -------------------------------------------------------------------------------------------


@every_case
def test_moving_and_copying_take_the_static_maps_along(case: str) -> None:
    made = dictionary(case, "topk").eval()
    x = cases.random_rows(case, ROWS)
    expected = made.encode(x)
    twin = copy.deepcopy(made)
    with torch.no_grad():
        made.encoder[made.wiring.readers[0]].zero_()
    assert torch.equal(twin.encode(x), expected)
    double = twin.to(torch.float64)
    found = double.encode({name: x_BD.double() for name, x_BD in x.items()})
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    assert all(ports.local_L.device == double.activation.bias_L.device for ports in double.writes.values())
    meta = twin.to("meta")
    assert {ports.local_L.device.type for ports in [*meta.reads.values(), *meta.writes.values()]} == {"meta"}


@every_case
@every_method
def test_saved_and_loaded_is_the_same_to_the_bit(case: str, name: str, tmp_path: Path) -> None:
    made = dictionary(case, name)
    x = cases.random_rows(case, ROWS)
    out = made(x)
    with torch.no_grad():
        made.activation.observe(out.code, out.norm_L)
    made.eval().save(tmp_path / "run" / "dictionary")
    loaded = Dictionary.load(tmp_path / "run" / "dictionary")
    assert not loaded.training
    state = made.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(
        torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in loaded.state_dict().items()
    )
    assert torch.equal(loaded.encode(x), made.encode(x))
    assert all(torch.equal(loaded(x).y[source], y_BD) for source, y_BD in made(x).y.items())
    assert loaded.config() == made.config() and loaded.wiring == made.wiring
    assert torch.equal(Dictionary.load(tmp_path / "run").encode(x), made.encode(x))  # by the folder of the run
    assert torch.equal(Dictionary.load(str(tmp_path / "run")).encode(x), made.encode(x))
    assert {path.name for path in (tmp_path / "run" / "dictionary").iterdir()} == {
        "config.json",
        "dictionary.safetensors",
    }


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    first, second = dictionary("dedicated", "topk", seed=0), dictionary("dedicated", "topk", seed=1)
    for one in (first, second):
        one.save(tmp_path / "dictionary")
    assert torch.equal(Dictionary.load(tmp_path / "dictionary").decoder["a"], second.decoder["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["dictionary"]


@pytest.mark.parametrize(
    "names", [("half", "float"), ("values", "keys"), ("train", "base-13"), ("type", "_"), ("b - a", "a")]
)
def test_a_source_may_have_any_name_that_a_store_allows_or_a_difference_has(
    names: tuple[str, str], tmp_path: Path
) -> None:
    wires = build("dedicated", dict(zip(names, (5, 4), strict=True)), 8, 2)
    made = create(wires, cases.method("topk"), Scale(wires.widths), "sum", 1)[0].initialise(0, 1.0).eval()
    x = {name: torch.randn(3, width) for name, width in wires.widths.items()}
    made.save(tmp_path / "d")
    loaded = Dictionary.load(tmp_path / "d")
    assert all(torch.equal(loaded(x).y[name], made(x).y[name]) for name in names)
    assert {f"encoder.{name}" for name in names} <= made.state_dict().keys()


def broken(folder: Path, change: str) -> None:
    config, weights = folder / "config.json", folder / "dictionary.safetensors"
    saved = json.loads(config.read_text())
    actions: dict[str, Any] = {
        "no config": config.unlink,
        "no weights": weights.unlink,
        "torn config": lambda: config.write_text(config.read_text()[:40]),
        "torn weights": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "empty weights": lambda: weights.write_bytes(b""),
        "other format": lambda: config.write_text(json.dumps({**saved, "format": 99})),
    }
    actions[change]()


@pytest.mark.parametrize(
    "change", ["no config", "no weights", "torn config", "torn weights", "empty weights", "other format"]
)
def test_what_is_no_whole_dictionary_is_refused_by_name(change: str, tmp_path: Path) -> None:
    dictionary("autoencoder", "topk").save(tmp_path / "dictionary")
    broken(tmp_path / "dictionary", change)
    what = "another format of dictionary: 99" if change == "other format" else f"no dictionary here: {tmp_path}"
    with pytest.raises(CheckpointError, match=what):
        Dictionary.load(tmp_path / "dictionary")
    with pytest.raises(CheckpointError, match="no dictionary here"):
        Dictionary.load(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_refused_by_name(device: str, tmp_path: Path) -> None:
    dictionary("autoencoder", "topk").save(tmp_path / "dictionary")
    with pytest.raises(ConfigError, match=f"this device cannot be used: {device}"):
        Dictionary.load(tmp_path / "dictionary", device)


@pytest.mark.parametrize("change", ["a span of another size", "no method", "no sources"])
def test_a_config_that_does_not_fit_the_weights_is_refused_by_name(change: str, tmp_path: Path) -> None:
    dictionary("dedicated", "topk").save(tmp_path / "d")
    saved = json.loads((tmp_path / "d" / "config.json").read_text())
    if change == "a span of another size":
        saved["spans"][0]["size"] += 1
    else:
        del saved[change.removeprefix("no ")]
    (tmp_path / "d" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"config and weights do not fit each other: .*d\. Save it again \("):
        Dictionary.load(tmp_path / "d")


@pytest.mark.parametrize("name", cases.names())
def test_what_a_loaded_dictionary_gives_is_ready_for_numpy(name: str, tmp_path: Path) -> None:
    dictionary("crosscoder", name).save(tmp_path / "d")
    loaded = Dictionary.load(tmp_path / "d")
    codes_BL = loaded.encode(cases.random_rows("crosscoder", 3))
    assert codes_BL.numpy().shape == (3, loaded.latents)
    assert all(rows.numpy().shape[0] == 3 for rows in loaded.decode(codes_BL).values())
    tuned = loaded.requires_grad_(True)(cases.random_rows("crosscoder", 3))
    sum(y.sum() for y in tuned.y.values()).backward()
    assert all(parameter.grad is not None for name, parameter in tuned_parameters(loaded))


def tuned_parameters(made: Dictionary) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in made.named_parameters() if not name.startswith("encoder")]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"b": None}, "no rows of a source that the dictionary takes: b. Give"),
        ({"b": torch.zeros(3, 5)}, r"rows that do not fit the dictionary: b has the shape \(3, 5\), not \(B, 16\)"),
        ({"b": torch.zeros(16)}, r"rows that do not fit the dictionary: b has the shape \(16,\), not \(B, 16\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], told: str) -> None:
    made = dictionary("crosscoder", "topk")
    given = {**cases.random_rows("crosscoder", 3), **change}
    x = {name: rows for name, rows in given.items() if rows is not None}
    for use in (made, made.encode):
        with pytest.raises(RowsError, match=told):
            use(x)
    with pytest.raises(RowsError, match=r"codes that do not fit the dictionary: \(3, 5\), not \(B, 48\)"):
        made.decode(torch.zeros(3, 5))


@every_method
def test_a_difference_is_made_of_its_two_sources_where_it_is_not_given(name: str) -> None:
    wires = build("crosscoder", {"base": 6, "chat - base": 6}, 20)
    made = create(wires, cases.method(name), Scale(wires.widths), "sum", 1)[0].initialise(0, 0.5).eval()
    x = {source: torch.randn(5, 6) for source in ("base", "chat")}
    given = {"base": x["base"], "chat - base": x["chat"] - x["base"]}
    assert torch.equal(made.encode(x), made.encode(given)) and set(made.decode(made.encode(x))) == set(given)
    assert torch.equal(made(x).target["chat - base"], made(given).target["chat - base"])
    assert torch.equal(made.encode({**x, **given}), made.encode(given))
    with pytest.raises(RowsError, match=r"no rows of a source that the dictionary takes: chat\. Give"):
        made.encode({"base": x["base"]})
    with pytest.raises(RowsError, match=r"chat has the shape \(5, 4\), not \(B, 6\)"):
        made.encode({**x, "chat": x["chat"][:, :4]})


def test_rows_may_be_arrays() -> None:
    made, x = dictionary("crosscoder", "topk"), cases.random_rows("crosscoder", 3)
    assert torch.equal(made.encode({name: rows.numpy() for name, rows in x.items()}), made.encode(x))  # type: ignore[misc]


def test_a_dictionary_tells_what_it_is() -> None:
    assert "topk; 48 latents: only_a 10, shared 28, only_b 10" in repr(dictionary("dedicated", "topk"))


@pytest.mark.parametrize("norm", ["sum", "decoupled"])
def test_products_are_rounded_while_it_trains_and_never_when_it_is_looked_at(norm: str) -> None:
    made, x = dictionary("dedicated", "topk", norm), cases.random_rows("dedicated", ROWS)
    exact = made.eval().encode(x)
    made.kernels = Kernels(precision="bf16")
    assert torch.equal(made.encode(x), exact) and not made.pre(x).bf16
    pre = made.train().pre(x)
    assert pre.bf16 and pre.weighed().dtype == torch.bfloat16 and pre.h_BL.dtype == torch.float32
    rounded = made.encode(x)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(
        rounded[(rounded > 0) & (exact > 0)], exact[(rounded > 0) & (exact > 0)], rtol=0.05, atol=0.3
    )


@pytest.mark.parametrize("codes", ["sparse", "dense"])
@pytest.mark.parametrize("name", cases.names())
@every_case
def test_codes_and_rows_have_the_gradient_to_the_rows_that_a_difference_tells(case: str, name: str, codes: Any) -> None:
    """For attribution. Gradients stay where codes do; a step of 1e-6 in fp64 lets no latent in."""
    made = dictionary(case, name).double().eval()
    made.kernels = Kernels(codes)
    x = {source: x_BD.double().requires_grad_() for source, x_BD in cases.random_rows(case, ROWS).items()}
    generator = torch.Generator().manual_seed(1)
    ways = {source: torch.randn(x_BD.shape, generator=generator, dtype=torch.float64) for source, x_BD in x.items()}

    def told(along: float) -> Tensor:
        """A sum of codes, and of rows that are written."""
        moved = {source: x_BD + along * ways[source] for source, x_BD in x.items()}
        weight_L = torch.linspace(-1, 2, made.latents, dtype=torch.float64)
        return made.encode(moved).matmul(weight_L).sum() + sum(y_BD.sin().sum() for y_BD in made(moved).y.values())

    slopes = torch.autograd.grad(told(0.0), list(x.values()), allow_unused=True)  # of what is not read there is none
    slope = sum(float((d * ways[name]).sum()) for name, d in zip(x, slopes, strict=True) if d is not None)
    difference = float(told(1e-6).detach() - told(-1e-6).detach()) / 2e-6
    assert slope == pytest.approx(difference, rel=1e-6) and slope != 0


def far_away(case: str, name: str, norm: str) -> tuple[Dictionary, dict[str, Tensor]]:
    """A trained dictionary over rows of a large mean and other units, in fp64."""
    keys = {"wiring": {"kind": CASES[case][0], "latents": cases.LATENTS, "norm": norm}}
    trainer = cases.trainer(case, name, **keys)
    generator = torch.Generator().manual_seed(5)
    raw = {}
    for number, (source, width) in enumerate(trainer.dictionary.wiring.widths.items()):
        trainer.dictionary.scale.mean(source).copy_(9 * torch.randn(width, generator=generator))
        trainer.dictionary.scale.factor(source).fill_([0.125, 3.0, 0.7][number])
    for step in range(8):
        x = cases.random_rows(case, 64, seed=step)
        raw = {source: trainer.dictionary.scale.raw(source, x_BD) for source, x_BD in x.items()}
        trainer.update(raw)
    made = trainer.dictionary.double().eval()
    return made, {source: x_BD.double() for source, x_BD in raw.items()}


@pytest.mark.parametrize("norm", ["sum", "joint"])
@pytest.mark.parametrize("name", cases.names())
@every_case
def test_a_folded_dictionary_has_no_scale_and_the_same_codes_and_rows(case: str, name: str, norm: str) -> None:
    made, x = far_away(case, name, norm)
    folded = made.fold()
    f_BL, out = made.encode(x), made(x)
    assert (f_BL > 0).any()
    torch.testing.assert_close(folded.encode(x), f_BL, rtol=1e-9, atol=1e-9)
    for source, y_BD in made.decode(f_BL).items():
        torch.testing.assert_close(folded.decode(f_BL)[source], y_BD, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(folded(x).y[source], made.scale.raw(source, out.y[source]), rtol=1e-9, atol=1e-9)
        assert torch.equal(folded.scale.raw(source, y_BD), y_BD)
    h_BL = folded.activation.bias_L + sum(
        x[source] @ full(W_SD, places(folded.wiring, source, "readers")).T for source, W_SD in folded.encoder.items()
    )
    torch.testing.assert_close(made.pre(x).h_BL, h_BL, rtol=1e-8, atol=1e-8)  # raw rows times encoders
    assert torch.equal(folded.decoder_norms(), made.decoder_norms()) and torch.equal(folded.norms(), made.norms())


@pytest.mark.parametrize("name", cases.names())
def test_a_folded_dictionary_is_saved_loaded_and_folded_again(name: str, tmp_path: Path) -> None:
    folded = far_away("dedicated", name, "sum")[0].float().fold()
    folded.save(tmp_path / "folded")
    again = Dictionary.load(tmp_path / "folded")
    for key, value in folded.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    x = cases.random_rows("dedicated", 20)
    assert torch.equal(again.encode(x), folded.encode(x)) and torch.equal(again.fold().encode(x), folded.encode(x))
    assert not any(parameter.requires_grad for parameter in again.parameters())
