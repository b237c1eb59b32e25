"""An image has one of several labels."""

from typing import ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.rows import Cells, Row, RowReader
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.tasks.classification import Classification


class ImageReader(RowReader):
    """Reads rows of an image."""

    def row(self, cells: Cells) -> Row:
        return Row(cells.place, "", None, cells.values.get("label"), image=cells.image("image"))


class ImageClassification(Classification):
    """The label of a row is an id or a name."""

    name = "image_classification"
    ending = "ForImageClassification"
    rows = ImageReader(required=("image",), optional=(), images=frozenset({"image"}))
    reads_images: ClassVar[bool] = True
    answers_rows: ClassVar[bool] = False

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        found = super().of(info, outputs)
        if found is None:
            problem = "a head for images is of one label out of several; config.json says otherwise"
            raise InvalidCheckpoint(info.source, f"{problem} (problem_type, or a single label)")
        return found
