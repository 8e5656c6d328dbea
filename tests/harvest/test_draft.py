"""What one document gives to a plan, by itself; and pieces of many."""

import numpy as np
import pytest

from harvest.config import RowsConfig
from harvest.corpus import Document
from harvest.draft import Drafter, key_of, piece, split_of
from harvest.segments import Speller
from shared.flags import BOS, FIRST, HELD_OUT, SPECIAL, TRAIN
from tests.tiny import TEXTS, byte_level, sentencepiece


@pytest.fixture(scope="module")
def spellers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speller]:
    root = tmp_path_factory.mktemp("draft")
    kinds = {"bytes": byte_level(), "pieces": sentencepiece()}
    return {name: Speller(kind.load(root / name), "model", name) for name, kind in kinds.items()}


def drafter(spellers: dict[str, Speller], align: str = "offsets", limit: int = 16, **rows: float) -> Drafter:
    return Drafter(spellers, dict.fromkeys(spellers, limit), RowsConfig.model_validate(rows), align)


def test_a_document_is_training_or_held_out_by_its_id_and_the_seed_alone() -> None:
    ids = [f"document {number}" for number in range(2000)]

    def held_out(share: float, seed: int = 0) -> list[bool]:
        return [split_of(name, RowsConfig(held_out=share, seed=seed)) == HELD_OUT for name in ids]

    chosen = held_out(0.1)
    assert 150 < sum(chosen) < 250
    assert not any(held_out(0.0))
    assert all(later for first, later in zip(chosen, held_out(0.3), strict=True) if first)
    assert chosen != held_out(0.1, seed=1)


def test_another_seed_gives_another_order_and_a_key_is_32_digits() -> None:
    names = [f"{number}" for number in range(50)]
    first = sorted(names, key=lambda name: key_of(name, 0))
    assert first != names and first != sorted(names, key=lambda name: key_of(name, 1))
    assert all(len(key_of(name, 0)) == 32 for name in names)


def test_a_draft_by_hand(spellers: dict[str, Speller]) -> None:
    made = drafter({"pieces": spellers["pieces"]}, "identical", limit=3).draft(Document("d", "a</s>b c"), 7)
    ids = spellers["pieces"].spell("a</s>b c").ids_T
    model = made.models[0]
    assert [one.tolist() for one in model.ids] == [[1, ids[0], 2], [1, *ids[2:4].tolist()]][: len(model.ids)]
    assert made.rows == [3, 3] and made.places == [2, 2] and made.lost == [0, 0, 0]
    assert model.flags[0].tolist() == [FIRST | BOS | SPECIAL, 0, SPECIAL]
    assert model.reached == [2, 4] and made.read == [4] and made.complete and made.number == 7


def test_a_document_that_cannot_be_spelled_gives_nothing(spellers: dict[str, Speller]) -> None:
    made = drafter(spellers).draft(Document("d", "c▁d"), 0)
    assert not made.spelled and made.rows == [] and made.read[0] > 0


def test_a_piece_holds_the_drafts_one_after_another(spellers: dict[str, Speller]) -> None:
    maker = drafter(spellers, held_out=0.5)
    documents = [Document(f"d{number}", text) for number, text in enumerate(TEXTS)]
    drafts = [maker.draft(document, number) for number, document in enumerate(documents)]
    made = piece(drafts, list(spellers), seed=4)
    assert made["key"].tolist() == [key_of(document.id, 4) for document in documents]
    assert made["id"].tobytes() == b"".join(f"d{number}".encode() for number in range(len(TEXTS)))
    assert set(made["split"].tolist()) == {TRAIN, HELD_OUT}
    assert made["rows"].tolist() == [sum(one.rows) for one in drafts] and made["rows"].sum() == made["rows_G"].sum()
    assert made["segments"].sum() == len(made["rows_G"]) == len(made["lost_G"]) == len(made["places_G"])
    for m, name in enumerate(spellers):
        assert made[f"{name}/tokens"].sum() == len(made[f"{name}/id_T"]) == made[f"{name}/length_G"].sum()
        assert len(made[f"{name}/position_N"]) == len(made[f"{name}/flags_N"]) == made["rows"].sum()
        assert np.array_equal(made[f"{name}/id_T"], np.concatenate([a for one in drafts for a in one.models[m].ids]))
    empty = piece([], list(spellers), seed=0)
    assert empty.keys() == made.keys() and all(len(column) == 0 for column in empty.values())
    assert all(empty[name].dtype == made[name].dtype for name in made)
