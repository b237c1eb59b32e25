"""The rows on which a model is measured. They are known by their texts, and tokenised when they are needed."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from importlib.metadata import version
from itertools import pairwise

import torch

from worker.engine.catalog.contracts.statistics import Tokens
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.tasks import LabelMap
from worker.engine.checkpoints.reader import digest_processor, digest_tokenizer
from worker.engine.inputs.chats import template_version
from worker.engine.inputs.examples import BLOCK_ROWS, Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.threads import pool

FIRST_BLOCK_ROWS = 256
PROBED_ROWS = 32


class Sample:
    """The rows on which one model is measured, a sample of `population` rows in the data set.

    Args:
        rows: the rows, in the data set's seeded order.
        loaded: the model whose tokenizer is used.
        labels: reads labels; None if they are not read.

    Raises:
        InvalidDataset: the head does not have a label; the message names the row.
    """

    def __init__(
        self, rows: Sequence[Row], population: int, spec: DatasetSpec, loaded: LoadedModel, labels: LabelMap | None
    ) -> None:
        self.population = population
        self.spec = spec
        self._rows = rows
        self._tokenizer = loaded.tokenizer
        self._reading = loaded.kind
        self.max_length = loaded.max_length
        self._labels = labels
        self._tokenized: dict[int, tuple[int, int]] = {}  # truncated rows and all rows, by first row of the block
        self.tokens = tokens_of(loaded, spec)
        self._digests = {with_labels: self._digested(with_labels) for with_labels in (False, True)}

    def first(self, rows: int) -> "Sample":
        """Return a sample of the first `rows` rows."""
        if rows >= len(self):
            return self
        first = copy.copy(self)
        first._rows = self._rows[:rows]
        first._tokenized = {}
        first._digests = {with_labels: first._digested(with_labels) for with_labels in (False, True)}
        return first

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def source(self) -> str:
        return self.spec.source

    def digest(self, rows: int, *, with_labels: bool) -> str:
        """Return the sha256, in hexadecimal, over texts and labels of the first `rows` rows, which end a block."""
        return self._digests[with_labels][rows]

    def blocks(self, start: int, stop: int) -> Iterator[list[Example]]:
        """Yield the rows in these places, block by block; the next is tokenised while the caller is busy with one."""
        bounds = list(pairwise([start, *(end for end in block_ends(stop) if end > start)]))
        threads = pool(torch.get_num_threads())
        coming = threads.submit(self._tokenize, *bounds[0])
        try:
            for following in bounds[1:]:
                block = coming.result()
                coming = threads.submit(self._tokenize, *following)
                yield block
            yield coming.result()
        finally:
            wait([coming])  # the caller may stop early

    @property
    def truncated(self) -> tuple[int, int]:
        """Return the number of rows that were truncated, and the number of all rows that were tokenised."""
        found = self._tokenized.values()
        return sum(cut for cut, _ in found), sum(count for _, count in found)

    def tokenized(self, start: int) -> tuple[int, int]:
        """Return how many rows of the block that begins here were truncated, and how many it has."""
        return self._tokenized[start]

    def was_tokenized(self, start: int, truncated: int, rows: int) -> None:
        """Count a block that another process tokenised."""
        self._tokenized[start] = (truncated, rows)

    def longest(self) -> int:
        """Return the number of tokens of the longest among the rows with most bytes, which is about that of all."""
        by_bytes = sorted(self._rows, key=lambda row: row.nbytes)
        found = self._reading.tokenized(by_bytes[-PROBED_ROWS:], self.spec, self._tokenizer, self.max_length, None)
        return max(example.length for example in found.examples)

    def _tokenize(self, start: int, stop: int) -> list[Example]:
        rows = self._rows[start:stop]
        found = self._reading.tokenized(rows, self.spec, self._tokenizer, self.max_length, self._labels, start)
        self._tokenized[start] = (found.truncated, len(found.examples))
        return found.examples

    def _digested(self, with_labels: bool) -> dict[int, str]:
        """Return the sha256 of the rows up to the end of every block."""
        digest = hashlib.sha256()
        found = {}
        for start, stop in pairwise([0, *block_ends(len(self))]):
            for row in self._rows[start:stop]:
                label = None
                if with_labels and self._labels is not None:
                    label = self._labels.value(row.label, self.source, row.place)
                text, pair, *target = row.content
                digest.update(json.dumps([text, pair, label, *target]).encode() + b"\n")
            found[stop] = digest.copy().hexdigest()
        return found


def tokens_of(loaded: LoadedModel, spec: DatasetSpec) -> Tokens:
    """Return everything that the tokens of a data set's rows depend on besides the rows."""
    return Tokens(
        tokenizer=digest_processor(loaded.info) if loaded.task.reads_images else digest_tokenizer(loaded.info),
        inputs=list(loaded.tokenizer.model_input_names),
        max_length=min(loaded.max_length, spec.max_length or loaded.max_length),
        windows=spec.doc_stride or "auto" if loaded.task.reads_windows else None,
        versions={
            **{name: version(name) for name in loaded.kind.libraries},
            **(template_version(loaded.tokenizer, spec) if spec.messages is not None else {}),
        },
    )


def block_ends(rows: int) -> list[int]:
    """Return the ends of the blocks of `rows` rows: 256, 512, 1024, then every further 1024, and the last row.

    Rows are sorted by length and computed together only within a block, so that the sums up to the end of a block have
    the same bits wherever scoring stops or goes on.
    """
    ends = [FIRST_BLOCK_ROWS, 2 * FIRST_BLOCK_ROWS, *range(BLOCK_ROWS, rows, BLOCK_ROWS)]
    return [*(end for end in ends if end < rows), *([rows] if rows else [])]


def looks(rows: int) -> list[int]:
    """Return the numbers of rows after which errors are computed: 256, 512, 1024 and so on, doubling, and all rows."""
    ends = []
    end = FIRST_BLOCK_ROWS
    while end < rows:
        ends.append(end)
        end *= 2
    return [*ends, rows]
