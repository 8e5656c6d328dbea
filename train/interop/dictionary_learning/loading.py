"""A dictionary of the reference by its folder, whatever its class."""

from pathlib import Path
from typing import Any

from shared.errors import CheckpointError
from train.interop import formats
from train.interop.dictionary_learning import autoencoders, crosscoders, dedicated
from train.interop.dictionary_learning.shaped import Shaped
from train.interop.tensors import read_table

CLASSES: dict[str, type[Shaped]] = {
    one.__name__: one
    for one in (
        autoencoders.AutoEncoder, autoencoders.AutoEncoderNew, autoencoders.GatedAutoEncoder,
        autoencoders.JumpReluAutoEncoder, autoencoders.AutoEncoderTopK, autoencoders.BatchTopKSAE,
        autoencoders.MatryoshkaBatchTopKSAE, crosscoders.CrossCoder, crosscoders.BatchTopKCrossCoder,
        dedicated.DedicatedFeatureCrossCoder, dedicated.DedicatedFeatureBatchTopKCrossCoder,
    )
}  # fmt: skip


def load_dictionary(base_path: str | Path, device: Any = "cpu") -> tuple[Shaped, dict[str, Any]]:
    """The dictionary of a folder with its weights, as what they are, and its config.json.

    Raises CheckpointError where they are of another library, or of nobody.
    """
    found = formats.load(base_path)
    kind = found.kind.partition(",")[0]
    if kind not in CLASSES:
        raise CheckpointError("this is no dictionary of dictionary_learning", found.kind, "Use train.interop.load")
    folder = Path(base_path) if Path(base_path).is_dir() else Path(base_path).parent
    return CLASSES[kind].of(found).to(device), read_table(folder / "config.json")
