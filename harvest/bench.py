"""What units are made with on this machine: models, device, threads. No part of what they are."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared import models
from shared.errors import ModelError
from shared.header import Header
from shared.models import Checkpoint, Say


@dataclass(frozen=True)
class Bench:
    """{model: its checkpoint}, where to run, and the torch threads (none: torch's own choice)."""

    checkpoints: Mapping[str, Checkpoint]
    device: str
    threads: int | None


def find(header: Header, moved: Mapping[str, str], say: Say, weights: bool = True) -> dict[str, Checkpoint]:
    """The models of a store, where it names them or where they have `moved` to.

    Raises ModelError where one is not there, or has another tokenizer or (where `weights` are needed) other weights.
    """
    found = {}
    for name, model in header.models.items():
        path, way_out = moved.get(name, model.path), f"Give --model {name}=PATH, where it lies now"
        try:
            found[name] = models.resolve(path, say=say)
            tokenizer = models.load_tokenizer(found[name])
        except ModelError as error:
            raise ModelError(error.what, error.value, way_out) from None
        if models.tokenizer_fingerprint(tokenizer) != model.tokenizer:
            raise ModelError(f"this is not the tokenizer of {name} in the store", path, way_out)
        if weights and found[name].weights_fingerprint() != model.weights:
            raise ModelError(f"these are not the weights of {name} in the store", path, way_out)
    return found
