"""The format of kept statistics: `statistics/<address>/` holds safetensors files, and `about.json` describes them.

The worker writes them, the API lists them and hands them out.
"""

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import AwareDatetime, Field

from worker.engine.catalog.methods import STATISTICS
from worker.engine.catalog.primitives.strict import Strict

FOLDER = "statistics"
"""Name of the folder of statistics within the data folder."""
ABOUT = "about.json"
ASSEMBLED = ".assembled-"
"""Beginning of the names of entries that are not there yet, or any more."""
ADDRESS = re.compile("[0-9a-f]{64}")
FORMAT = 3  # raise it when the same facts would give other numbers
Output = Literal["head_outputs", "logits", "predictions"]
"""Outputs of models that are kept too: of heads to be aligned, of heads to be searched with, and for metrics."""
HEAD_OUTPUTS: Output = "head_outputs"
LOGITS: Output = "logits"
PREDICTIONS: Output = "predictions"
NODE_SUMS = "node_sums"
"""Name of what shards keep of the scores of mask nodes until these are whole; it is not listed."""

if TYPE_CHECKING:
    KeptName = str
else:
    KeptName = Literal[(*map(str, STATISTICS), *get_args(Output))]


class Tokens(Strict):
    """Everything that a row's tokens, or the pixel values of its image, depend on, besides the row."""

    tokenizer: str
    """sha256 over the tokenizer's files, or over the image processor's."""
    inputs: list[str]
    """The outputs of the tokenizer, or of the image processor, that the model takes."""
    max_length: int
    windows: int | Literal["auto"] | None = None
    """`doc_stride` of the rows, if a longer row is read in windows; None if it is cut."""
    versions: dict[str, str]
    """Versions of the libraries that make them."""


class Facts(Strict):
    """Everything that a statistic depends on: the same facts give the same statistic. None stands for no influence."""

    statistic: KeptName | Literal["node_sums"]
    checkpoint: str
    """Digest of the checkpoint."""
    piece: str | None = None
    """The rows of a shard's sums and the way they are batched, see `worker.engine.scoring.pieces`."""
    rows: str
    """sha256 over the rows' texts or images, in order, and over their labels where these are read. Of outputs: over
    what the model reads of each row, and what it is judged by."""
    tokens: Tokens
    precision: str
    estimator: str | None = None
    seed: int | None = None
    """Seed from which the labels of the estimator `sampled` are drawn."""
    population: int | None = None
    """Number of rows of the data set, which standard errors depend on."""
    paper: bool | None = None
    """Whether batches are those of the published code."""
    settings: str | None = None
    """sha256 over the checkpoint's files beside the weights; of outputs only."""
    read_as: str | None = None
    """Kind of head, and settings of its metric where that runs the model in a way of its own; of outputs only."""
    hardware: dict[str, str] | None = None
    """The device and the library on which the bits of outputs depend, see `worker.engine.runtime.device.hardware`."""

    @property
    def address(self) -> str:
        """The sha256 of the facts, in hexadecimal."""
        content = {"format": FORMAT, **self.model_dump(mode="json", exclude_none=True)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Origin(Strict):
    """The job's inputs when a statistic was first measured, for people; they are no part of its address."""

    checkpoint: str
    """Reference of the checkpoint."""
    dataset: str
    """Reference of the data set."""
    examples: int
    """Number of rows."""
    batch_tokens: int | None = None
    """Number of padded tokens that were computed together; only scores of mask nodes have it."""


class KeptFile(Strict):
    name: Annotated[str, Field(pattern=r"^\d{5}\.safetensors$")]
    bytes: int
    sha256: str


class About(Strict):
    """Content of `about.json`."""

    facts: Facts
    origin: Origin
    files: list[KeptFile]
    """The statistic's parts, in their order."""
    created_at: AwareDatetime

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def for_another_tenant(self) -> "About":
        """Return it as another tenant may see it, who has the same inputs: it names them by their digests alone."""
        unnamed = {"checkpoint": self.facts.checkpoint, "dataset": f"sha256:{self.facts.rows}"}
        own = {"origin": self.origin.model_copy(update=unnamed), "created_at": datetime.now(UTC)}
        return self.model_copy(update=own)
