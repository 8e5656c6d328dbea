"""What decides a value is part of a model's identity; what things are called, and where they lie, is not."""

from dataclasses import fields, replace

from shared.source import Model

MODEL = Model("chat", "models/chat", "w", "t", "float32", "sdpa")


def test_the_name_and_the_place_of_a_model_are_no_part_of_its_identity() -> None:
    for field in fields(Model):
        changed = replace(MODEL, **{field.name: "other"}).identity() != MODEL.identity()
        assert changed == (field.name not in ("name", "path"))
