"""What a finished merge says of itself: the job's `result`, and `report.json` in the artifact."""

from typing import Any, Literal

from worker.engine.catalog.methods import Statistic
from worker.engine.catalog.spec import MetricName
from worker.engine.catalog.strict import Strict

MANIFEST = "manifest.json"
"""The artifact's list of all its other files, with bytes and sha256; written last."""


class MeasuredModel(Strict):
    """What results of every kind say of a model."""

    name: str
    checkpoint: str
    """The reference as accepted."""
    commit: str | None = None
    """Of a checkpoint from the hub."""
    digest: str
    """sha256 over the names and sha256 of the checkpoint's weight files and config."""
    examples: int
    """Rows that were measured."""
    score_seconds: float
    score_cached: bool
    """Whether all of its statistics were there from an earlier job, or from another that ran at the same time."""


class ModelResult(MeasuredModel):
    aligned_examples: int
    """Rows on which its head was aligned to the merged backbone; 0 when it was kept as it was."""
    weight_share: float
    """Mean merge weight over all owned slices; of methods that do not weight slices by scores, lambda's share."""


Version = Literal["expert", "average", "merged_kept_head", "merged"]
"""The models whose predictions of the same rows are compared."""


class Difference(Strict):
    value: float
    interval: tuple[float, float]


class MetricResult(Strict):
    metric: MetricName
    examples: int
    """Rows of the evaluation."""
    expert: float
    average: float
    """Of the plain, unweighted average of the same checkpoints with the expert's own head."""
    merged: float
    """Of the model in the artifact; its head may have been refitted."""
    merged_kept_head: float
    """Of the merge with the expert's own head as it was."""
    retention: float | None
    """merged / expert; null where the expert's metric is not positive."""
    interval: tuple[float, float]
    """Of `merged`: 95 % bootstrap percentile interval over rows."""
    intervals: dict[Version, tuple[float, float]]
    """The same of each version; `merged` has that of `interval`."""
    differences: dict[Version, Difference]
    """`merged` minus each other version, by a paired bootstrap: each resample draws the same rows for both."""


class Timings(Strict):
    queue_seconds: float = 0.0
    load_seconds: float = 0.0
    score_seconds: float = 0.0
    merge_seconds: float = 0.0
    align_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    publish_seconds: float = 0.0


class JobResult(Strict):
    """What results of every kind say of the work."""

    method: dict[str, Any]
    """As run, with `auto` resolved."""
    timings: Timings
    peak_memory_bytes: int
    device: str
    notes: list[str]
    """What a reader should know: rows that were truncated, labels that were mapped by name."""


class MergeResult(JobResult):
    models: list[ModelResult]
    metrics: dict[str, MetricResult] | None
    mean_retention: float | None
    min_retention: float | None
    candidates: list[dict[str, Any]] | None = None


class ScoresFile(Strict):
    """A statistic as it is kept; it can be fetched until the store needs its room for others."""

    statistic: Statistic
    digest: str
    """Of all that it follows from, as `GET /scores` lists it."""
    href: str
    bytes: int


class ScoredModel(MeasuredModel):
    estimator: str | None
    """With `auto` resolved; null where the method takes no gradients."""
    scores: list[ScoresFile]


class ScoreResult(JobResult):
    models: list[ScoredModel]
