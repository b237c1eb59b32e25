"""An image has one of several labels: the likelihood is the softmax of the logits."""

from collections.abc import Sequence
from typing import Any

from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.tasks import ImageClassification, LabelMap
from worker.engine.inputs.examples import Example, Tokenized
from worker.engine.inputs.images import pixels_of
from worker.engine.runtime.resources import require_memory
from worker.engine.tasks.classification import ClassificationHead

VALUE_BYTES = 4


class ImageClassificationHead(ClassificationHead[ImageClassification]):
    """Predictions are ids of classes."""

    libraries = ("numpy", "pillow", "transformers")

    def tokenized(
        self,
        rows: Sequence[Row],
        spec: DatasetSpec,
        tokenizer: Any,
        max_length: int,
        labels: LabelMap | None,
        first: int = 0,
    ) -> Tokenized:
        """Decode the rows' images, and make pixel values of them by the checkpoint's image processor.

        Args:
            tokenizer: an `ImageProcessor`.
            max_length: number of tokens that the model makes of an image.

        Raises:
            InvalidDataset: an image cannot be decoded, or the head does not have a label.
            OutOfMemory: there is less memory than the pixel values take.
        """
        require_memory(VALUE_BYTES * tokenizer.values * len(rows))
        examples = []
        for index, row in enumerate(rows, start=first):
            if row.image is None:
                raise TypeError("the rows were read for another kind of head")
            label = None if labels is None else labels.value(row.label, spec.source, row.place)
            values = pixels_of(row.image, tokenizer)
            examples.append(Example(index, row.place, {"pixel_values": values}, label, tokens=max_length))
        return Tokenized(examples, truncated=0)


KIND = ImageClassificationHead
