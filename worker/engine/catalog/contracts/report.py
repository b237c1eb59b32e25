"""The result of a finished merge: the job's `result`, and `report.json` in the artifact."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from worker.engine.catalog.contracts.spec import MetricName
from worker.engine.catalog.methods import Statistic
from worker.engine.catalog.primitives.paths import Told
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.values import PerTensor

MANIFEST = "manifest.json"
"""The artifact's list of all its other files, with bytes and sha256; written last."""
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser may do for the report page (Content-Security-Policy): show it."""


class MeasuredModel(Strict):
    """The common part of results about a model."""

    name: str
    checkpoint: str
    """The reference as accepted."""
    commit: str | None = None
    """Of a checkpoint from the hub."""
    digest: str
    """sha256 over the names and sha256 of the checkpoint's weight files and config."""
    examples: int
    """Rows that were measured."""
    batch_tokens: int | None = None
    """Padded tokens that were computed together for its scores; null where the method has none, or parts differ."""
    score_seconds: float
    score_cached: bool
    """Whether all of its statistics were there from an earlier job, or from another that ran at the same time."""


class ModelResult(MeasuredModel):
    aligned_examples: int
    """Rows on which its head was aligned to the merged backbone; 0 when it was kept as it was."""
    weight_share: float | None
    """Mean merge weight over all owned slices. Of methods that do not weight slices by scores, lambda's share, and of
    slerp t's, which is the mean over all merged parameters where it differs between them. Null where only the data tell
    what a model weighs: model_stock, sce."""
    weight_error: float | None = None
    """Root mean square, over all nodes, of the standard error of its merge weights; null where there is none to tell.
    From fewer than a few hundred rows it is too small to be believed."""
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """Its own values of the method's parameters."""


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
    """Metric of the plain, unweighted average of the same checkpoints, with the expert's own head."""
    merged: float
    """Metric of the model in the artifact; its head may have been refitted."""
    merged_kept_head: float
    """Metric of the merge with the expert's own head as it was."""
    retention: float | None
    """merged / expert; null where the expert's metric is not positive."""
    interval: tuple[float, float]
    """95 % bootstrap percentile interval of `merged` over rows."""
    intervals: dict[Version, tuple[float, float]]
    """The same interval for each version; that of `merged` equals `interval`."""
    differences: dict[Version, Difference]
    """`merged` minus each other version, by a paired bootstrap: each resample draws the same rows for both."""


class CandidateMetric(Strict):
    """The metric that a candidate keeps of one expert, on the held-out rows."""

    metric: MetricName
    value: float
    interval: tuple[float, float]
    """95 % bootstrap percentile interval over rows; all candidates are on the same resamples."""
    retention: float | None
    """value / the expert's own; null where that is not positive."""


class Candidate(Strict):
    """A line of the table of `auto`: a model that could have been published, on the held-out rows."""

    name: str
    """Unique: the method's, `plain average`, `expert NAME` for a backbone that nobody merged."""
    kind: Literal["method", "average", "expert"]
    method: dict[str, Any] | None
    """All parameters, of the method's best trial; null for an expert."""
    weights: dict[str, PerTensor[float]]
    """lambda of each model."""
    align_ridge: float | None
    """Ridge of head alignment; null if no head was aligned."""
    trial: int | None
    """Its number; null for what is not searched for."""
    metrics: dict[str, CandidateMetric]
    """By model."""
    mean_retention: float | None
    min_retention: float | None
    behind: Difference | None
    """Mean retention of the chosen one minus this one's, by a paired bootstrap over each model's rows."""
    chosen: bool
    """Whether the artifact has this one."""


class Proposed(Strict):
    """Method and parameters of a trial."""

    number: int
    """Number of the trial, from 0 in order."""
    candidate: str
    """Name of its line in the table."""
    parameters: dict[str, Any]
    """The parameters of the trial; weights as `weight NAME`."""
    seconds: float


class FailedTrial(Proposed):
    error: Told
    """Why it failed, as numbers that are not finite, or a matrix that cannot be solved for."""


class Trial(Proposed):
    """A merge that was made and looked at."""

    rows: int
    """Search rows of the model that has most, on which it was evaluated."""
    retentions: dict[str, float]
    """By model, on these rows."""
    smoothed: dict[str, float]
    """The same of the metric where a prediction counts as partly right, by its distance from the border to another."""
    objective: float
    """Mean or least of `smoothed`, lower by what `retentions` lack to the models' `min_retention`."""
    pruned: bool
    """Whether it was given up before all search rows."""


class Search(Strict):
    """How `auto` found what it chose."""

    objective: Literal["mean_retention", "min_retention"]
    search_rows: dict[str, int]
    held_out_rows: dict[str, int]
    """By model, of its evaluation; no row is in both."""
    min_retention: dict[str, float]
    """The floors that were asked for, by model."""
    feasible: bool
    """Whether the chosen one reaches them on the search rows."""
    chosen: int
    """Number of the trial."""
    trials: list[Trial]
    failed: Annotated[list[FailedTrial], Field(default_factory=list)]
    """Merges that could not be made."""

    @property
    def best(self) -> Trial:
        """The one that was chosen."""
        return next(trial for trial in self.trials if trial.number == self.chosen)


def mean_and_least(metrics: Iterable[MetricResult | CandidateMetric]) -> tuple[float | None, float | None]:
    """Of the retentions of those models that have one; None where none has."""
    retentions = [metric.retention for metric in metrics if metric.retention is not None]
    return (sum(retentions) / len(retentions), min(retentions)) if retentions else (None, None)


class StoppingPoint(Strict):
    examples: int
    """Rows of each model, or all of a model that has fewer."""
    error: float
    """The largest of `errors`."""
    errors: dict[str, float]
    """By score name: root mean square, over the name's nodes, of the standard error of the merge weights; of the model
    for which it is largest."""


class Stopping(Strict):
    """How well the merge weights are known."""

    tolerance: float | None
    """Of `examples: "auto"`; null where the number of rows was given."""
    reached: bool | None
    """Whether the last error is within the tolerance; null where there is none."""
    curve: list[StoppingPoint]
    """At 256, 512, 1024 rows and so on, as far as it is known, and at the last."""


class Timings(Strict):
    queue_seconds: float = 0.0
    load_seconds: float = 0.0
    score_seconds: float = 0.0
    search_seconds: float = 0.0
    merge_seconds: float = 0.0
    align_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    interference_seconds: float = 0.0
    publish_seconds: float = 0.0


class JobResult(Strict):
    """The common part of results of every kind."""

    method: dict[str, Any]
    """The method as it ran, with `auto` resolved, and without `precision` if no model was run."""
    timings: Timings
    peak_memory_bytes: int
    device: str
    notes: list[Told]
    """Notes for the reader: first those that put a number in question, as labels whose order is not certain; then those
    of what was done, as rows that were truncated."""


class MergeSummary(JobResult):
    """A merge's result, without how `auto` found it."""

    models: list[ModelResult]
    metrics: dict[str, MetricResult] | None
    mean_retention: float | None
    min_retention: float | None
    stopping: Stopping | None = None
    """Present for methods that weight by scores of mask nodes, except with the preset `paper`."""


class MergeResult(MergeSummary):
    candidates: list[Candidate] | None = None
    """For `auto`: each method's best, the plain average and the single experts, all on the same held-out rows."""
    search: Search | None = None
    """The search of `auto`."""


class ScoresFile(Strict):
    """A statistic as it is kept; it can be fetched until the store needs its room for others."""

    statistic: Statistic
    digest: str
    """Digest of everything that the statistic follows from, as `GET /scores` lists it."""
    href: str
    bytes: int


class ScoredModel(MeasuredModel):
    estimator: str | None
    """The estimator, with `auto` resolved; null if the method takes no gradients."""
    stopping: Stopping | None = None
    """How well the merge weights would be known, were it merged with a model of the same scores, errors and weight; of
    methods that weight by the scores of mask nodes, but for the preset `paper`."""
    scores: list[ScoresFile]


class ScoreResult(JobResult):
    models: list[ScoredModel]
