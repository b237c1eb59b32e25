"""Statistics as they are kept: `statistics/<address>/` holds safetensors files, and `about.json` says what they are.

The worker writes them, the API lists them and hands them out.
"""

import hashlib
import json
import re
from typing import Annotated

from pydantic import AwareDatetime, Field

from worker.engine.catalog.methods import Statistic
from worker.engine.catalog.primitives.strict import Strict

FOLDER = "statistics"
"""Within the data folder."""
ABOUT = "about.json"
ADDRESS = re.compile("[0-9a-f]{64}")
FORMAT = 3  # raise it when the same facts would give other numbers


class Tokens(Strict):
    """All that a row's tokens follow from, beside its texts."""

    tokenizer: str
    """sha256 over the tokenizer's files."""
    inputs: list[str]
    """The tokenizer's outputs that the model takes."""
    max_length: int
    versions: dict[str, str]
    """Of the libraries that make the tokens."""


class Facts(Strict):
    """All that a statistic follows from: the same facts are the same statistic. None where something does not count."""

    statistic: Statistic
    checkpoint: str
    """Digest of the checkpoint."""
    rows: str
    """sha256 over the rows' texts, in order, and over their labels where these are read."""
    tokens: Tokens
    precision: str
    estimator: str | None = None
    seed: int | None = None
    """Draws the labels of the estimator `sampled`."""
    population: int | None = None
    """Rows of the data set, which standard errors depend on."""
    paper: bool | None = None
    """Whether batches are those of the published code."""

    @property
    def address(self) -> str:
        """sha256 of the facts, hex."""
        content = {"format": FORMAT, **self.model_dump(mode="json", exclude_none=True)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Origin(Strict):
    """Where a statistic was first measured, for people: no part of its address."""

    checkpoint: str
    """Reference of the checkpoint."""
    dataset: str
    """Reference of the data set."""
    examples: int
    """Rows."""
    batch_tokens: int | None = None
    """Padded tokens that were computed together, of scores of mask nodes."""


class KeptFile(Strict):
    name: Annotated[str, Field(pattern=r"^\d{5}\.safetensors$")]
    bytes: int
    sha256: str


class About(Strict):
    """`about.json`."""

    facts: Facts
    origin: Origin
    files: list[KeptFile]
    """The statistic's parts, in their order."""
    created_at: AwareDatetime

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)
