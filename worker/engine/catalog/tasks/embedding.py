"""A text has an embedding: a vector that is compared with those of other texts, as sentence-transformers makes it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import Architecture
from worker.engine.catalog.checkpoints.modules import SIMILARITIES, embedder_of
from worker.engine.catalog.data.rows import RowReader
from worker.engine.catalog.families import Family, Head, Kind
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.tasks.names import number_in
from worker.engine.catalog.tasks.task import LabelMap, Task

SCORED_PAIRS = RowReader(required=("text", "text_pair"), optional=())


@dataclass(frozen=True)
class Embedding(Task):
    """A row has one text, or two whose similarity its label may say. The modules after the transformer are the head."""

    name = "embedding"
    ending = "Model"
    metrics = ("spearman", "pearson", "retrieval_accuracy")
    rows: ClassVar[RowReader] = RowReader(optional=("text_pair",))
    of_metrics: ClassVar[Mapping[str, RowReader]] = {
        "spearman": SCORED_PAIRS,
        "pearson": SCORED_PAIRS,
        "retrieval_accuracy": RowReader(required=("text", "text_pair"), optional=(), label=None),
    }
    labels_need = ("text_pair",)
    merges_heads = True
    has_classes = False

    similarity: str = SIMILARITIES[0]
    """Name of the similarity of embeddings."""

    @classmethod
    def is_of(cls, info: CheckpointInfo) -> bool:
        return super().is_of(info) and embedder_of(info) is not None

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        embedder = embedder_of(info)
        if embedder is None:
            raise InvalidCheckpoint(info.source, "it is no embedding model that is run here")
        return cls(outputs, {}, similarity=embedder.similarity)

    @classmethod
    def head_on(cls, family: Family, found: Architecture) -> Head | None:
        """Return a head without modules of the class, if the class is the family's backbone alone."""
        if "patch" in family.config_names or family.decoder is not None:  # it reads images, or two texts
            return None
        head = Head(found.name, (), merges=True)
        backbone = cls.beside(family, head, found)
        names = [*found.tensors, *(name.replace("{}", "1") for name in found.layers)]
        return head if names and all(backbone.slot(name) is not None for name in names) else None

    @classmethod
    def beside(cls, family: Family, head: Head, found: Architecture) -> Family:
        """Return the backbone, whose tensors have no prefix; files may have that of classes with a head.

        A pooler that classifiers of the family lack is in files beside the others, and merges with them.
        """
        poolers = {name.rpartition(".")[0]: Kind.POOLER for name in found.all_names if name.startswith("pooler.")}
        own = family.under(head, "")
        return replace(own, outer_modules={**poolers, **own.outer_modules}, older_prefix=family.prefix or None)

    @classmethod
    def outputs_in(cls, info: CheckpointInfo, head: Head) -> int:
        """Return the width of an embedding."""
        embedder = embedder_of(info)
        return 0 if embedder is None else embedder.width

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> float:
        """Return the similarity that a label says."""
        value = number_in(label)
        if value is None:
            raise InvalidDataset(source, "the label of two texts is a finite number", place)
        return value
