"""Each word of a sequence has one of several labels."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.rows import Cells, Row, RowReader
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks.classification import Classification
from worker.engine.catalog.tasks.names import SHOWN_NAME, label_ids
from worker.engine.catalog.tasks.task import LabelMap

OUTSIDE = "O"
PART_OF_ENTITY = re.compile(r"([BIESLU])-(.+)", re.DOTALL)
"""Matches the label of a word in an entity: its first (B), a further (I), its last (E, L) or its only one (S, U)."""


class WordReader(RowReader):
    """Reads rows of words: a list of them, or a text whose words have spaces between them."""

    def row(self, cells: Cells) -> Row:
        is_text = isinstance(cells.values["tokens"], str)
        words = tuple(cells.text("tokens").split()) if is_text else cells.texts("tokens", "words")
        if not words:
            raise cells.problem("tokens", "has no words")
        return Row(cells.place, words, None, cells.values.get("label"))


class TokenClassification(Classification):
    """The label of a row has an id or a name for each word: a list, or a text with spaces between."""

    name = "token_classification"
    ending = "ForTokenClassification"
    metrics = (*Classification.metrics, "entity_f1")
    rows = WordReader(required=("tokens",), optional=(), lists=frozenset({"tokens"}))

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        return cls(outputs, *label_ids(info, outputs))

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> tuple[int, ...]:  # type: ignore[override]
        if isinstance(label, str):
            label = label.split()
        if not isinstance(label, list | tuple):
            raise InvalidDataset(source, f"the label is {type(label).__name__}, not a list of the words' labels", place)
        return tuple(labels.id(one, source, place) for one in label)

    def begins_at_one(self, labels: Sequence[Any]) -> bool:
        words = [word for one in labels for word in (one.split() if isinstance(one, str) else one)]
        return super().begins_at_one([int(w) if isinstance(w, str) and w.isdecimal() else w for w in words])

    def metric_problem(self, metric: str) -> str | None:
        if metric != "entity_f1" or self.parts_of_entities:
            return super().metric_problem(metric)
        if self.contradiction:
            return f"entity_f1 goes by names of labels, and {self.contradiction}"
        other = next((name for name in self.label_ids if name != OUTSIDE and not PART_OF_ENTITY.fullmatch(name)), "")
        return f"entity_f1 needs labels named O, B-… and I-…, and one is named '{other[:SHOWN_NAME]}'"

    @cached_property
    def parts_of_entities(self) -> dict[int, tuple[str, str]]:
        """The part and the type of each label that is in an entity; empty if labels have other names."""
        named = {index: PART_OF_ENTITY.fullmatch(name) for name, index in self.label_ids.items() if name != OUTSIDE}
        found = {index: (match[1], match[2]) for index, match in named.items() if match}
        is_whole = len(named) + (OUTSIDE in self.label_ids) == self.outputs and len(found) == len(named)
        return found if is_whole and not self.contradiction else {}
