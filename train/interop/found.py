"""What was found in a file of another library, and what lies beside such files."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.dictionary import Dictionary
from train.interop.tensors import read_table


@dataclass(frozen=True)
class Found:
    """A dictionary, of what kind of file it is, and what has to be known of it."""

    dictionary: Dictionary
    kind: str
    notes: tuple[str, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)  # what classes of that library know beside it


@dataclass(frozen=True)
class Sidecar:
    """The tables beside weights: what a trainer wrote, and the arguments of a class, as the hub has them."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Path) -> "Sidecar":
        """Of a weights file: in its folder, or, of a checkpoint, in the one above."""
        above = [weights.parent, weights.parent.parent] if weights.parent.name == "checkpoints" else [weights.parent]
        tables = [read_table(folder / "config.json") for folder in above]
        table = next((one for one in tables if one), {})
        trainer = table.get("trainer") or read_table(weights.parent / "trainer_config.json").get("trainer") or {}
        return cls(trainer, {} if "trainer" in table else table)

    def get(self, *names: str) -> Any:
        """The first value that is told under one of these names, none where there is none.

        Trainers have written the arguments of their class as text: "0.1", "None".
        """
        passed = self.trainer.get("dict_class_kwargs") or {}
        for name in names:
            for table in (self.arguments, self.trainer, passed):
                value = _value(table.get(name)) if table is passed else table.get(name)
                if value is not None:
                    return value
        return None

    @property
    def kind(self) -> str | None:
        """The name of the class: `dict_class`, which is written as AutoEncoder, or as <class '...AutoEncoder'>."""
        told = self.get("dict_class")
        return None if told is None else str(told).rstrip("'>").rsplit(".", 1)[-1]


def _value(told: Any) -> Any:
    try:
        return ast.literal_eval(told) if isinstance(told, str) else told
    except (ValueError, SyntaxError):
        return told
