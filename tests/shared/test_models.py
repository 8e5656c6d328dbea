"""Models are found where they lie, refused in one line where they do not, and known by what they hold."""

import fnmatch
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared import models
from shared.errors import ModelError
from tests.tiny import FAMILIES, byte_level, save_model, sentencepiece, wordpiece


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama", byte_level())


def resolve(path: Path | str) -> models.Checkpoint:
    return models.resolve(str(path))


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_folder_is_found_and_keeps_the_path_that_the_user_gave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == models.Checkpoint(str(folder), folder)
    monkeypatch.chdir(folder.parent)
    assert resolve("model").folder == Path("model")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("{tmp}/nothing", "no such model: {tmp}/nothing. Give a folder"),
        ("./nothing", "no such model: ./nothing. Give a folder"),
        ("~/no/such/folder", "no such model: ~/no/such/folder. Give a folder"),
        ("a/b/c", "no such model: a/b/c. Give a folder"),
        ("nothing.gguf", "no such model: nothing.gguf. Give a folder"),
        ("{tmp}", "no config.json in the model folder: {tmp}. Give a folder"),
        ("package:no_such_package", "this package is not installed: no_such_package. Install it"),
        ("package:no_such.package", "this package is not installed: no_such.package. Install it"),
        ("package:", "this package is not installed: . Install it"),
        ("package:json", "no GGUF file in this package: json. Give the path"),
        ("nobody/nothing", "no such model here or on the hub: nobody/nothing. Check the path or the network ("),
        ("not a name!", "no such model here or on the hub: not a name!. Check the path or the network ("),
    ],
)
def test_a_model_that_is_nowhere_is_refused_in_one_line(tmp_path: Path, offline: None, path: str, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(path.format(tmp=tmp_path))
    assert str(caught.value).startswith(told.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    said: list[str] = []
    with pytest.raises(ModelError, match=r"cannot read this GGUF file: .*bad.gguf"):
        models.resolve(str(tmp_path / "bad.gguf"), say=said.append)
    assert said[0].startswith("converting bad.gguf once")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ['{"model_type": "unheard_of"}', '{"model', "[]", "{}", '{"model_type": "llama", "max_position_embeddings": null}'],
)
def test_a_config_that_cannot_be_read_is_refused_in_one_line(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    for ask in (models.skeleton, models.Checkpoint.context, models.Checkpoint.dtype):
        with pytest.raises(ModelError, match=f"cannot build this model: {folder}. Check its config.json") as caught:
            ask(resolve(folder))
        assert "\n" not in str(caught.value)


def test_an_attention_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot build this model"):
        models.attention(resolve(folder), "nonsense")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=f"no tokenizer for the model: {folder}. Save one") as caught:
        models.load_tokenizer(resolve(folder))
    assert "\n" not in str(caught.value)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_is_loaded_ready_to_read(tmp_path: Path, family: str) -> None:
    checkpoint = resolve(save_model(tmp_path, family, byte_level()))
    model = models.load(checkpoint, "float32", None, "cpu")
    assert not model.training
    assert not hasattr(model, "lm_head")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert checkpoint.context() == 64
    assert checkpoint.dtype() == "float32"


def test_the_weights_run_in_the_dtype_that_is_asked_for_and_are_stored_in_their_own(tmp_path: Path) -> None:
    checkpoint = resolve(save_model(tmp_path, "llama", byte_level(), dtype=torch.bfloat16))
    assert checkpoint.dtype() == "bfloat16"
    for name in ("bfloat16", "float32"):
        model = models.load(checkpoint, name, None, "cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}


def test_loaded_weights_are_the_files(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    model = models.load(resolve(folder), "float32", None, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[f"model.{name}"])


def test_a_checkpoint_that_says_no_dtype_is_taken_as_float32_and_no_limit_as_none(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))  # it has no limit of positions
    assert resolve(folder).dtype() == "float32"
    assert resolve(folder).context() is None


def test_the_attention_is_the_one_asked_for_or_the_models_own_choice(folder: Path) -> None:
    assert models.attention(resolve(folder), "eager") == "eager"
    assert models.attention(resolve(folder), None) == "sdpa"
    assert models.load(resolve(folder), "float32", "eager", "cpu").config._attn_implementation == "eager"


def test_a_checkpoint_that_lacks_a_weight_is_refused_rather_than_filled_with_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the model folder lacks weights: .* 1 of .* layers.1.mlp.up_proj.weight"):
        models.load(resolve(folder), "float32", None, "cpu")


def test_weights_that_cannot_be_read_or_do_not_fit_are_refused_in_one_line(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"cannot load the weights") as caught:
        models.load(resolve(folder), "float32", None, "cpu")
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes(b"torn" * 9)
    with pytest.raises(ModelError, match=r"cannot load the weights"):
        models.load(resolve(folder), "float32", None, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in the model folder"):
        resolve(folder).weights_fingerprint()


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_weights_does_not_depend_on_where_they_lie(folder: Path, tmp_path: Path) -> None:
    first = resolve(folder).weights_fingerprint()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "under another name")
    assert resolve(moved).weights_fingerprint() == first
    (moved / "README.md").write_text("other words")
    assert resolve(moved).weights_fingerprint() == first


def test_the_fingerprint_of_weights_changes_with_one_weight_and_with_the_config(folder: Path) -> None:
    first = resolve(folder).weights_fingerprint()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    second = resolve(folder).weights_fingerprint()
    edit_config(folder, rope_theta=5000.0)
    assert len({first, second, resolve(folder).weights_fingerprint()}) == 3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / str(n), "gpt2", byte_level(), seed=seed) for n, seed in enumerate((0, 0, 1))]
    first, same, other = (resolve(folder).weights_fingerprint() for folder in folders)
    assert first == same != other


def test_a_converted_gguf_file_is_known_by_the_files_own_hash(folder: Path) -> None:
    (folder / models.GGUF_MARK).write_text(json.dumps({"file": "m.gguf", "sha256": "abc"}))
    assert resolve(folder).weights_fingerprint() == "abc"


def tokenizer_print(folder: Path) -> str:
    return models.tokenizer_fingerprint(models.load_tokenizer(models.Checkpoint(str(folder), folder)))


def test_the_fingerprint_of_a_tokenizer_is_that_of_what_it_does(tmp_path: Path) -> None:
    kinds = {
        "bytes": byte_level(), "trimmed": byte_level(trim_offsets=True), "larger": byte_level(size=420),
        "pieces": sentencepiece(), "prepended": sentencepiece(prepend=True), "words": wordpiece(),
        "cased": wordpiece(lower=False),
    }  # fmt: skip
    prints = {name: tokenizer_print(kind.save(tmp_path / name)) for name, kind in kinds.items()}
    assert len(set(prints.values())) == len(kinds)
    assert tokenizer_print(byte_level().save(tmp_path / "a copy")) == prints["bytes"]


def test_the_fingerprint_of_a_tokenizer_does_not_change_when_it_is_used(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(models.Checkpoint("t", sentencepiece().save(tmp_path)))
    first = models.tokenizer_fingerprint(tokenizer)
    tokenizer("some text", add_special_tokens=False, return_offsets_mapping=True)
    assert models.tokenizer_fingerprint(tokenizer) == first


def test_the_fingerprint_of_a_tokenizer_does_not_know_how_it_pads_and_truncates(tmp_path: Path) -> None:
    plain = tokenizer_print(byte_level().save(tmp_path / "plain"))
    folder = byte_level().save(tmp_path / "as a training script leaves it")
    description = json.loads((folder / "tokenizer.json").read_text())
    end = "<|endoftext|>"
    padding = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": end}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    description |= {"padding": {**padding, "pad_to_multiple_of": None}, "truncation": truncation}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert tokenizer_print(folder) == plain


def test_the_fingerprint_of_a_tokenizer_changes_with_one_special_token(tmp_path: Path) -> None:
    plain = tokenizer_print(byte_level().save(tmp_path / "plain"))
    folder = byte_level().save(tmp_path / "role")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "!"}))
    assert tokenizer_print(folder) != plain


def test_a_slow_tokenizer_has_a_fingerprint_too(tmp_path: Path) -> None:
    for name in ("ByT5Tokenizer", "CanineTokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert tokenizer_print(tmp_path / "ByT5Tokenizer") == tokenizer_print(tmp_path / "ByT5Tokenizer")
    assert tokenizer_print(tmp_path / "ByT5Tokenizer") != tokenizer_print(tmp_path / "CanineTokenizer")


# --- packages, the hub and fp16 -------------------------------------------------------------------------------------


def parts_package(folder: Path, content: bytes) -> None:
    """A package whose `assemble` writes a GGUF file, and refuses one that is there and another."""
    folder.mkdir()
    (folder / "in_parts.py").write_text(f"""
CONTENT = {content!r}

def assemble(target, overwrite=False):
    if target.exists() and not overwrite:
        if target.read_bytes() != CONTENT:
            raise FileExistsError(target)
        return target
    target.write_bytes(CONTENT)
    return target
""")


@pytest.mark.parametrize("left", [None, b"GG", b"of another version"])
def test_a_package_in_parts_is_put_together_whatever_was_left_there(
    left: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_package(tmp_path / "site", b"GGUF, whole")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "cache" / "gguf" / "in_parts.gguf"
    if left is not None:
        target.parent.mkdir(parents=True)
        target.write_bytes(left)
    try:
        for _ in range(2):
            assert models._gguf_in_package("in_parts") == target
            assert target.read_bytes() == b"GGUF, whole"
            assert list(target.parent.iterdir()) == [target]
    finally:
        sys.modules.pop("in_parts", None)


def test_an_assembly_that_is_cut_off_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "in_parts.py").write_text(
        "def assemble(target, overwrite=False):\n    target.write_bytes(b'GG')\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("GRANARY_CACHE", str(tmp_path / "cache"))
    try:
        with pytest.raises(KeyboardInterrupt):
            models._gguf_in_package("in_parts")
    finally:
        sys.modules.pop("in_parts", None)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_hub_model_is_fetched_with_its_safetensors_or_else_with_its_bin(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safetensors: bool
) -> None:
    if not safetensors:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    local = tmp_path / "snapshot"

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/tiny", "v1")
        shutil.copytree(folder, local, ignore=lambda _, names: unwanted(names, allow_patterns), dirs_exist_ok=True)
        return str(local)

    def unwanted(names: list[str], patterns: list[str]) -> set[str]:
        return {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"only a model of the hub has revisions: .*, v1"):
        models.resolve(str(folder), "v1")
    found = models.resolve("someone/tiny", "v1")
    assert found == models.Checkpoint("someone/tiny", local)
    own, hub = (models.load(one, "float32", None, "cpu") for one in (resolve(folder), found))
    ids_BT = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(own(ids_BT).last_hidden_state, hub(ids_BT).last_hidden_state)
    assert (local / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("stored", "runs"),
    [(torch.float16, "float32"), (torch.bfloat16, "bfloat16"), (torch.float32, "float32")],
)
def test_a_model_never_runs_in_fp16_unless_asked(tmp_path: Path, stored: torch.dtype, runs: str) -> None:
    assert resolve(save_model(tmp_path / "m", "gpt_neox", byte_level(), dtype=stored)).dtype() == runs
