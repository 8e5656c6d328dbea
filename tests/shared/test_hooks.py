"""What the hooks catch is what the model computes, in every family, padded or not.

Letters: B segments of a batch, T positions, D width.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from shared import hooks, models
from shared.errors import ActivationError, GranaryError, SiteError
from tests.tiny import FAMILIES, byte_level, save_model

WIDTH, LAYERS = 32, 3
LENGTHS = (11, 4, 7)  # of the segments of a padded batch
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # another length of padding sums fp32 in another order; values are about 1

Models = dict[str, nn.Module]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(root / name, name, byte_level(), seed=1) for name in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Models:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(loaded: Models, family: str) -> Iterator[nn.Module]:
    yield loaded[family]
    assert count_hooks(loaded[family]) == 0


@pytest.fixture
def llama(folders: dict[str, Path]) -> nn.Module:
    """A model of one's own, to be changed."""
    return load(folders["llama"])


def load(folder: Path) -> nn.Module:
    return models.load(models.resolve(str(folder)), "float32", None, "cpu")


def count_hooks(model: nn.Module) -> int:
    """Ours: transformers leaves some of its own, from the first time that it is asked for hidden states."""
    tables = [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
    return sum(hook.__module__ == hooks.__name__ for table in tables for hook in table.values())


def segment(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 400, (1, length), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> tuple[Tensor, Tensor]:
    """Segments of LENGTHS, right-padded with id 0."""
    ids_BT, mask_BT = torch.zeros(2, len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for b, length in enumerate(LENGTHS):
        ids_BT[b, :length], mask_BT[b, :length] = segment(length, seed=b)[0], 1
    return ids_BT, mask_BT


def catch(model: nn.Module, names: Sequence[str], ids_BT: Tensor, mask_BT: Tensor | None = None) -> dict[str, Tensor]:
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    sites = [hooks.find(model, name) for name in names]
    with torch.inference_mode(), hooks.capture(model, sites) as run:
        return run(input_ids=ids_BT, attention_mask=mask_BT)


def own_states(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        states = model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False)
    return tuple(states.hidden_states)


RESID = [f"resid.{number}" for number in range(LAYERS)]


# --- against the model's own hidden states --------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_every_block_but_the_last_equals_the_models_own_hidden_state(model: nn.Module, padded: bool) -> None:
    ids_BT, mask_BT = padded_batch() if padded else (segment(9), torch.ones(1, 9, dtype=torch.long))
    caught = catch(model, RESID, ids_BT, mask_BT)
    states = own_states(model, ids_BT, mask_BT)
    for number in range(LAYERS - 1):
        torch.testing.assert_close(caught[f"resid.{number}"], states[number + 1], **EXACT)


def test_the_last_block_stands_before_the_final_norm_which_bert_has_not(model: nn.Module, family: str) -> None:
    ids_BT = segment(9)
    caught, states = catch(model, RESID, ids_BT), own_states(model, ids_BT, torch.ones_like(ids_BT))
    last = caught[f"resid.{LAYERS - 1}"]
    norm = {"llama": "norm", "gemma3": "norm", "qwen3": "norm", "gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
    if family == "bert":
        torch.testing.assert_close(last, states[-1], **EXACT)
        return
    assert not torch.allclose(last, states[-1], atol=0.1)
    with torch.inference_mode():
        torch.testing.assert_close(model.get_submodule(norm[family])(last), states[-1], **EXACT)


def test_a_segment_gives_the_same_rows_alone_and_in_a_padded_batch(model: nn.Module) -> None:
    ids_BT, mask_BT = padded_batch()
    names = [*RESID, "resid_in.1", "attn_out.1", "mlp_in.1", "mlp_out.1"]
    together = catch(model, names, ids_BT, mask_BT)
    for b, length in enumerate(LENGTHS):
        alone = catch(model, names, segment(length, seed=b))
        for name in names:
            torch.testing.assert_close(together[name][b, :length], alone[name][0], **CLOSE)


# --- against an independent computation -----------------------------------------------------------------------------


def test_a_block_reads_what_the_block_before_it_wrote(model: nn.Module) -> None:
    caught = catch(model, [*RESID, "resid_in.0", "resid_in.1", "resid_in.2"], segment(9))
    states = own_states(model, segment(9), torch.ones(1, 9, dtype=torch.long))
    torch.testing.assert_close(caught["resid_in.0"], states[0], **EXACT)
    torch.testing.assert_close(caught["resid_in.1"], caught["resid.0"], **EXACT)
    torch.testing.assert_close(caught["resid_in.2"], caught["resid.1"], **EXACT)


def parts(model: nn.Module, number: int) -> dict[str, Tensor]:
    kinds = {name.removesuffix(f".{number}"): name for name in (f"{kind}.{number}" for kind in hooks.KINDS)}
    caught = catch(model, list(kinds.values()), segment(9))
    return {kind: caught[name] for kind, name in kinds.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("number", range(LAYERS))
def test_a_block_adds_its_attention_and_its_mlp_to_what_it_reads(loaded: Models, name: str, number: int) -> None:
    x = parts(loaded[name], number)
    torch.testing.assert_close(x["resid"], x["resid_in"] + x["attn_out"] + x["mlp_out"], **CLOSE)


def test_gemma_normalises_attention_and_mlp_before_it_adds_them(loaded: Models) -> None:
    x, block = parts(loaded["gemma3"], 1), loaded["gemma3"].get_submodule("layers.1")
    with torch.inference_mode():
        middle = x["resid_in"] + block.post_attention_layernorm(x["attn_out"])
        whole = middle + block.post_feedforward_layernorm(x["mlp_out"])
        torch.testing.assert_close(x["mlp_in"], block.pre_feedforward_layernorm(middle), **CLOSE)
    torch.testing.assert_close(x["resid"], whole, **CLOSE)


def test_in_bert_attention_and_mlp_are_read_at_their_dense_layers_before_sum_and_norm(loaded: Models) -> None:
    x, block = parts(loaded["bert"], 1), loaded["bert"].get_submodule("encoder.layer.1")
    with torch.inference_mode():
        middle = block.attention.output.LayerNorm(x["attn_out"] + x["resid_in"])
        torch.testing.assert_close(x["mlp_in"], middle, **CLOSE)
        torch.testing.assert_close(x["mlp_out"], block.output.dense(block.intermediate(middle)), **CLOSE)
        torch.testing.assert_close(x["resid"], block.output.LayerNorm(x["mlp_out"] + middle), **CLOSE)


def test_the_mlp_turns_mlp_in_into_mlp_out(loaded: Models) -> None:
    for name, path in {"llama": "layers.1.mlp", "gpt2": "h.1.mlp", "gpt_neox": "layers.1.mlp"}.items():
        x = parts(loaded[name], 1)
        with torch.inference_mode():
            torch.testing.assert_close(loaded[name].get_submodule(path)(x["mlp_in"]), x["mlp_out"], **CLOSE)


def test_values_that_a_model_adds_to_in_place_later_are_kept_as_they_were() -> None:
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.15
    )
    torch.manual_seed(0)
    falcon = transformers.FalconModel(config).eval()  # its blocks compute mlp_output += attention_output
    ids_BT = segment(5) % 50
    alone = catch(falcon, ["mlp_out.0"], ids_BT)["mlp_out.0"]
    torch.testing.assert_close(catch(falcon, ["mlp_out.0", "resid.1"], ids_BT)["mlp_out.0"], alone, **EXACT)


# --- Tensor or tuple ------------------------------------------------------------------------------------------------


class Tupled(nn.Module):
    """A block that gives a tuple, and takes one from the block before it, as blocks did before transformers 5."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
        return self.block(x[0] if isinstance(x, tuple) else x, *args, **kwargs), "weights"


def test_a_block_that_gives_a_tuple_gives_the_same_rows(folders: dict[str, Path], family: str) -> None:
    model = load(folders[family])
    plain = catch(model, [*RESID, "resid_in.1"], *padded_batch())
    blocks = hooks.blocks(model)[1]
    for number in range(LAYERS):
        kind = getattr(blocks[number], "attention_type", None)
        blocks[number] = Tupled(blocks[number])
        blocks[number].attention_type = kind
    tupled = catch(model, [*RESID, "resid_in.1"], *padded_batch())
    for name, value in plain.items():
        torch.testing.assert_close(tupled[name], value, **EXACT)


def test_the_first_of_a_tuple_and_the_last_hidden_state_of_a_record_are_unwrapped() -> None:
    x = torch.ones(1, 2, 3)
    record = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)
    assert all(hooks.unwrap(value, "s") is x for value in (x, (x, None), [x], record, (record, 1)))
    for value in (None, (), "text", (None, x)):
        with pytest.raises(ActivationError, match=r"s carries no tensor of activations"):
            hooks.unwrap(value, "s")


# --- what is not run ------------------------------------------------------------------------------------------------


class Mine(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("reached")


def test_a_block_behind_the_last_site_is_never_reached(folders: dict[str, Path], family: str) -> None:
    model = load(folders[family])
    expected = catch(model, ["resid.0", "resid.1"], segment(5))
    hooks.blocks(model)[1][2].forward = Mine().forward
    for name, value in catch(model, ["resid.1", "resid.0"], segment(5)).items():
        torch.testing.assert_close(value, expected[name], **EXACT)
    with pytest.raises(AssertionError, match=r"reached"):
        catch(model, ["resid.2"], segment(5))
    assert count_hooks(model) == 0


def test_the_input_of_a_block_is_read_without_running_it(llama: nn.Module) -> None:
    hooks.blocks(llama)[1][1].forward = Mine().forward
    assert catch(llama, ["resid_in.1"], segment(5))["resid_in.1"].shape == (1, 5, WIDTH)


def test_neither_the_final_norm_nor_a_head_is_reached(llama: nn.Module) -> None:
    llama.norm.forward = Mine().forward
    assert catch(llama, ["resid.2"], segment(5))["resid.2"].shape == (1, 5, WIDTH)


def test_a_loaded_model_has_no_language_model_head(model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    assert not [name for name in names if "lm_head" in name or "embed_out" in name or name.startswith("cls")]
    assert all(parameter.shape[0] != 400 or "emb" in name or name.startswith("wte")
               for name, parameter in model.named_parameters() if parameter.ndim == 2)  # fmt: skip


# --- the life of hooks ----------------------------------------------------------------------------------------------


def test_hooks_are_gone_behind_the_block_also_when_it_fails(loaded: Models) -> None:
    model = loaded["llama"]
    sites = [hooks.find(model, name) for name in ("resid.0", "resid_in.2")]
    with hooks.capture(model, sites):
        assert count_hooks(model) == 2
    assert count_hooks(model) == 0
    with pytest.raises(KeyError), hooks.capture(model, sites):
        raise KeyError
    assert count_hooks(model) == 0


def test_runs_under_one_capture_do_not_mix(loaded: Models) -> None:
    model = loaded["gpt2"]
    sites = [hooks.find(model, name) for name in ("resid.0", "resid.1")]
    with torch.inference_mode(), hooks.capture(model, sites) as run:
        first = run(input_ids=segment(5), attention_mask=torch.ones(1, 5))
        kept = {name: value.clone() for name, value in first.items()}
        second = run(input_ids=segment(6, seed=1), attention_mask=torch.ones(1, 6))
    assert {name: tuple(value.shape) for name, value in second.items()} == dict.fromkeys(kept, (1, 6, WIDTH))
    for name, value in kept.items():
        torch.testing.assert_close(first[name], value, **EXACT)


def test_a_site_that_a_forward_pass_does_not_reach_is_named(llama: nn.Module) -> None:
    llama.aside = nn.Linear(2, 2)
    with pytest.raises(SiteError, match=r"were not reached by a forward pass: aside"):
        catch(llama, ["resid.0", "aside"], segment(5))


def test_a_module_without_a_row_per_position_is_refused(loaded: Models) -> None:
    with pytest.raises(ActivationError, match=r"wpe:out has no row per position"):
        catch(loaded["gpt2"], ["wpe:out"], *padded_batch())


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_dotted_path_reads_a_module_on_either_side(loaded: Models) -> None:
    model = loaded["llama"]
    names = ["layers.1", "layers.1:out", "layers.1:in", "layers.1.mlp.down_proj:in", "norm:in", "resid.1", "resid_in.1"]
    caught = catch(model, names, *padded_batch())
    torch.testing.assert_close(caught["layers.1"], caught["resid.1"], **EXACT)
    torch.testing.assert_close(caught["layers.1:out"], caught["resid.1"], **EXACT)
    torch.testing.assert_close(caught["layers.1:in"], caught["resid_in.1"], **EXACT)
    torch.testing.assert_close(caught["norm:in"], catch(model, ["resid.2"], *padded_batch())["resid.2"], **EXACT)
    assert caught["layers.1.mlp.down_proj:in"].shape[-1] == 2 * WIDTH


def test_an_attention_that_takes_its_input_by_name_is_read_on_the_way_in(loaded: Models) -> None:
    model = loaded["llama"]
    caught = catch(model, ["layers.1.self_attn:in", "resid_in.1"], segment(5))
    with torch.inference_mode():
        expected = model.get_submodule("layers.1.input_layernorm")(caught["resid_in.1"])
    torch.testing.assert_close(caught["layers.1.self_attn:in"], expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resid.3", "Its 3 blocks are resid.0 to resid.2"),
        ("mlp_out.17", "Its 3 blocks are mlp_out.0 to mlp_out.2"),
        ("resi.1", "Did you mean .*resid.1"),
        ("resid_out.1", "Did you mean .*resid_in.1"),
        ("layers.1.mpl", "Did you mean .*layers.1.mlp"),
        ("layers.1.mlp:inn", "Did you mean .*layers.1.mlp"),
        ("", "Known: resid.0"),
        (":in", "Known: resid.0|Did you mean"),
        ("resid.-1", "Did you mean .*resid.1"),
        ("modell.layers.1", "Did you mean .*layers.1"),
    ],
)
def test_a_wrong_site_is_refused_with_the_nearest_ones(loaded: Models, name: str, told: str) -> None:
    with pytest.raises(SiteError, match=told) as caught:
        hooks.find(loaded["llama"], name)
    assert caught.value.exit_code == 2
    assert caught.value.value == name
    assert "\n" not in str(caught.value)


def test_a_kind_that_the_blocks_have_not_is_refused_with_the_nearest(llama: nn.Module) -> None:
    for block in hooks.blocks(llama)[1]:
        del block.mlp
    with pytest.raises(SiteError, match=r"the model has no site: mlp_out.1"):
        hooks.find(llama, "mlp_out.1")


def test_widths_on_the_meta_device_equal_those_of_the_real_model(
    loaded: Models, folders: dict[str, Path], family: str
) -> None:
    skeleton = models.skeleton(models.resolve(str(folders[family])))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    found = hooks.list_sites(skeleton)
    assert list(found) == [
        f"{kind}.{n}" for n in range(LAYERS) for kind in ("resid", "resid_in", "attn_out", "heads", "mlp_in", "mlp_out")
    ]
    real = {name: value.shape[-1] for name, value in catch(loaded[family], list(found), segment(5)).items()}
    assert found == real == dict.fromkeys(found, WIDTH)
    assert hooks.list_sites(loaded[family]) == found


def test_the_width_of_a_dotted_path_is_its_own(loaded: Models) -> None:
    assert hooks.widths(loaded["gpt2"], ["h.0.mlp.c_fc", "h.0.attn.c_attn:out", "resid.0"]) == {
        "h.0.mlp.c_fc": 2 * WIDTH, "h.0.attn.c_attn:out": 3 * WIDTH, "resid.0": WIDTH,
    }  # fmt: skip


def test_a_model_without_a_list_of_blocks_is_told_so() -> None:
    class Config:
        num_hidden_layers = 2

    model = nn.Sequential(nn.Linear(2, 2))
    model.config = Config()
    with pytest.raises(SiteError, match=r"cannot find the model's blocks: Sequential"):
        hooks.blocks(model)


# --- the check at start ---------------------------------------------------------------------------------------------


def test_the_self_check_passes_an_untouched_model(model: nn.Module) -> None:
    hooks.self_check(model, [*RESID, "mlp_out.1"], *padded_batch())


def tamper(model: nn.Module, number: int, position: tuple[int, int]) -> None:
    """From its second call on, a block adds 1 at one position: so not where the hook reads it first."""
    block, calls = hooks.blocks(model)[1][number], iter(range(99))
    genuine = block.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        out = genuine(*args, **kwargs).clone()
        out[position] += 1.0 if next(calls) else 0.0
        return out

    block.forward = forward


@pytest.mark.parametrize("number", [0, 1])
def test_the_self_check_refuses_a_block_that_gives_another_value_than_the_model_says(
    llama: nn.Module, number: int
) -> None:
    tamper(llama, number, (0, 3))
    with pytest.raises(ActivationError, match=rf"resid.{number} is not the model's own hidden state: largest .* 1\b"):
        hooks.self_check(llama, RESID, *padded_batch())


def test_the_self_check_looks_at_no_padding_and_at_no_last_block(llama: nn.Module) -> None:
    tamper(llama, 1, (1, LENGTHS[1]))  # the first padded position of the second segment
    tamper(llama, 2, (0, 0))
    hooks.self_check(llama, RESID, *padded_batch())


def test_the_self_check_compares_what_is_finite_of_a_model_that_overflows(llama: nn.Module) -> None:
    with torch.no_grad():
        llama.embed_tokens.weight[segment(LENGTHS[0])[0, 4]] = torch.nan  # and so all of segment 0
    hooks.self_check(llama, RESID, *padded_batch())
    tamper(llama, 1, (1, 2))
    with pytest.raises(GranaryError, match=r"resid.1 is not the model's own hidden state: largest .* 1\b"):
        hooks.self_check(llama, RESID, *padded_batch())


class Towers(nn.Module):
    """A model of several modalities: lists of blocks at `paths`, all of one length."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2)
        for path in paths:
            outer = nn.Module()
            outer.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
            self.add_module(path, outer)


def test_the_blocks_are_those_of_the_text_and_two_candidates_are_refused() -> None:
    assert hooks.blocks(Towers("vision_tower", "language_model"))[0] == "language_model.layers"
    assert hooks.blocks(Towers("encoder"))[0] == "encoder.layers"
    with pytest.raises(SiteError, match=r"cannot find the model's blocks: Towers \(one.layers or two.layers\)"):
        hooks.blocks(Towers("one", "two"))
    nested = Towers("model")
    for block in nested.model.layers:
        block.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert hooks.blocks(nested)[0] == "model.layers"


# --- heads and patterns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(LAYERS))
def test_the_output_projection_turns_the_heads_into_what_the_attention_gives(model: nn.Module, number: int) -> None:
    caught = catch(model, [f"heads.{number}", f"attn_out.{number}"], segment(9))
    site = hooks.find(model, f"heads.{number}")
    with torch.inference_mode():
        projected = model.get_submodule(site.module)(caught[f"heads.{number}"])
    torch.testing.assert_close(projected, caught[f"attn_out.{number}"], **CLOSE)


def test_heads_have_the_models_own_number_and_size(loaded: Models) -> None:
    widths = {name: hooks.widths(one, ["heads.0"])["heads.0"] for name, one in loaded.items()}
    assert widths == {**dict.fromkeys(FAMILIES, WIDTH), "gemma3": 32, "qwen3": 32}
    for name, one in loaded.items():
        assert hooks.heads(one, "heads.1") == 4, name
        assert hooks.heads(one, "resid.1") is None
    wide = save_and_load_gemma(24)
    assert (hooks.widths(wide, ["heads.0", "attn_out.0"]), hooks.heads(wide, "heads.0")) == (
        {"heads.0": 32, "attn_out.0": 24}, 4,
    )  # fmt: skip


def save_and_load_gemma(width: int) -> nn.Module:
    """4 heads of 8 in a model of another width, as Gemma and Qwen3 have them."""
    with tempfile.TemporaryDirectory() as folder:
        return models.load(
            models.resolve(str(save_model(Path(folder), "gemma3", byte_level(), width=width))), "float32", None, "cpu"
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("head", range(4))
def test_another_query_of_one_head_changes_the_rows_of_that_head_alone(loaded: Models, name: str, head: int) -> None:
    """With grouped keys and values, too."""
    changed = copy.deepcopy(loaded[name])
    with torch.no_grad():
        changed.get_submodule("layers.0.self_attn.q_proj").weight[head * 8 : (head + 1) * 8].mul_(-1.5)
    before, after = (catch(one, ["heads.0"], segment(9))["heads.0"] for one in (loaded[name], changed))
    differs = (before != after).any(0).any(0).view(4, 8).any(1)
    assert differs.tolist() == [number == head for number in range(4)]


@pytest.mark.parametrize(
    ("pattern", "sites"),
    [
        ("resid.1", ["resid.1"]),
        ("resid.{2,0}", ["resid.2", "resid.0"]),
        ("resid.*", ["resid.0", "resid.1", "resid.2"]),
        ("{attn,mlp}_out.{0,1}", ["attn_out.0", "attn_out.1", "mlp_out.0", "mlp_out.1"]),
        ("layers.*.mlp:out", ["layers.0.mlp:out", "layers.1.mlp:out", "layers.2.mlp:out"]),
        ("model.layers.{0,2}.mlp:in", ["layers.0.mlp:in", "layers.2.mlp:in"]),  # one name for one site
        ("model.layers.*.mlp", ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]),
        ("layers.{0,2}.self_attn.*_proj:in", [f"layers.{n}.self_attn.{p}_proj:in" for n in (0, 2) for p in "qkvo"]),
    ],
)
def test_a_pattern_names_sites_in_the_models_order(llama: nn.Module, pattern: str, sites: list[str]) -> None:
    assert hooks.expand(llama, pattern) == sites
    assert all(hooks.find(llama, site) for site in sites)


def test_a_pattern_that_matches_nothing_is_refused_and_a_path_with_the_models_prefix_is_found(llama: nn.Module) -> None:
    with pytest.raises(SiteError, match=r"the model has no site like this: resd\.\*\. See harvest sites MODEL"):
        hooks.expand(llama, "resd.*")
    assert hooks.find(llama, "model.layers.1.mlp:in").module == "layers.1.mlp"


@pytest.mark.parametrize(
    ("site", "point"),
    [
        ("resid.4", "blocks.4.hook_resid_post"), ("resid_in.4", "blocks.4.hook_resid_pre"),
        ("attn_out.0", "blocks.0.hook_attn_out"), ("heads.2", "blocks.2.attn.hook_z"), ("layers.3.mlp:out", None),
        ("", None),
    ],
)  # fmt: skip
def test_sites_have_the_names_of_transformer_lens_where_it_has_them(site: str, point: str | None) -> None:
    assert hooks.hook_name(site) == point
    assert point is None or hooks.of_hook_name(point) == site


@pytest.mark.parametrize("name", ["blocks.4.hook_mlp_in", "hook_embed", "blocks.x.hook_resid_post", ""])
def test_a_hook_point_that_no_site_has(name: str) -> None:
    assert hooks.of_hook_name(name) is None
