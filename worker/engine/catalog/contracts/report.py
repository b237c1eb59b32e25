"""The result of a finished merge: the job's `result`, and `report.json` in the artifact."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from worker.engine.catalog.contracts.publication import Publication
from worker.engine.catalog.methods import StatisticName
from worker.engine.catalog.primitives.paths import Told
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.values import PerTensor
from worker.engine.catalog.tasks import MetricName

MANIFEST = "manifest.json"
"""The artifact's list of all its other files, with bytes and sha256; written last."""
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of the report page: a browser may show it and nothing more."""


class GivenStatisticReport(Strict):
    source: str
    """Reference of the file, or of the folder of files, as the job was accepted with it."""
    digest: str
    """sha256 of the file; of several files, over their names and sha256."""


class ModelReport(Strict):
    """The common part of results about a model."""

    name: str
    """The model's name in the request."""
    checkpoint: str
    """The checkpoint's reference as the job was accepted with it."""
    commit: str | None = None
    """Commit of a checkpoint from the hub."""
    digest: str
    """sha256 over the names and sha256 of the checkpoint's weight files and config."""
    license: str | None = None
    """Licence that the checkpoint's own card states, as the hub names it; null where it states none."""
    examples: int
    """Number of rows that were measured."""
    batch_tokens: int | None = None
    """Number of padded tokens that were computed together for its scores; null where the method has no scores, or parts
    of them were computed with different numbers."""
    score_seconds: float
    """Time that measuring the model took, in seconds; near 0 where its statistics were kept."""
    score_cached: bool
    """Whether another job, an earlier or a simultaneous one, had measured all of its statistics."""


class ModelResult(ModelReport):
    aligned_examples: int
    """Number of rows on which its head was aligned to the merged backbone; 0 when it was kept as it was."""
    weight_share: float | None
    """Mean merge weight over all owned slices. For methods that do not weight slices by scores it is lambda's share,
    and for slerp t's; where these differ between merged parameters, it is their mean. Null for model_stock and sce,
    whose weights follow from the tensors' values."""
    weight_error: float | None = None
    """Root mean square, over all nodes, of the standard error of its merge weights; null where it has none. It is an
    underestimate if fewer than a few hundred rows were measured."""
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """The model's own values of the method's parameters."""
    statistics: dict[StatisticName, GivenStatisticReport] = Field(default_factory=dict)
    """Statistics that were read from files, and not measured, by name."""


Version = Literal["base", "expert", "best_expert", "average", "merged_kept_head", "merged"]
"""The models whose predictions of the same rows are compared."""


class Difference(Strict):
    value: float
    """The difference."""
    interval: tuple[float, float]
    """95 % interval of the difference, by a paired bootstrap over rows."""


class BestExpert(Strict):
    """The single expert that is best on some rows."""

    name: str
    """Name of the expert."""
    value: float
    """Its metric on these rows."""


class MetricResult(Strict):
    metric: MetricName
    """Name of the metric that all versions are compared by."""
    examples: int
    """Number of rows that were evaluated."""
    expert: float
    """Metric of the expert itself, before the merge."""
    average: float
    """Metric of the plain, unweighted average of the same checkpoints, with the expert's own head."""
    merged: float
    """Metric of the model in the artifact; its head may have been refitted."""
    merged_kept_head: float | None
    """Metric of the merge with the expert's own head as it was; null where heads are merged."""
    retention: float | None
    """merged / expert, or expert / merged where less is better; null where one of them is not positive."""
    interval: tuple[float, float]
    """95 % bootstrap percentile interval of `merged` over rows."""
    intervals: dict[Version, tuple[float, float]]
    """The same kind of interval for each version; that of `merged` equals `interval`."""
    differences: dict[Version, Difference]
    """`merged` minus each other version, by a paired bootstrap: each resample draws the same rows for both."""
    base: float | None = None
    """Metric of the base; null where heads are kept per model, or no base is named that has the same head."""
    best_expert: BestExpert | None = None
    """The best on these rows of all experts, this model included; null where heads are kept per model."""
    answer_tokens: dict[Version, float] | None = None
    """Mean number of tokens that each version writes for a row; null where the metric is not of what it writes."""
    answers_fit: dict[Version, float] | None = None
    """Share of each version's answers in which the evaluation's pattern is found; null where it states none."""

    def value_of(self, version: Version) -> float | None:
        """Return the metric of a version, if there is one."""
        if version == "best_expert":
            return None if self.best_expert is None else self.best_expert.value
        value: float | None = getattr(self, version)
        return value


class CandidateMetric(Strict):
    """The metric that a candidate keeps of one expert, on the held-out rows."""

    metric: MetricName
    """Name of the metric."""
    value: float
    """The candidate's metric on the held-out rows."""
    interval: tuple[float, float]
    """95 % bootstrap percentile interval over rows; all candidates are evaluated on the same resamples."""
    retention: float | None
    """value / the expert's own metric, or the reverse where less is better; null where one of them is not positive."""
    answer_tokens: float | None = None
    """Mean number of tokens that it writes for a row; null where the metric is not of what it writes."""


class Candidate(Strict):
    """A row of the table of `auto`: a model that could have been published, evaluated on the held-out rows."""

    name: str
    """Unique name: that of the method, or of a baseline: `plain average`, `plain task arithmetic`, `expert NAME` for
    the backbone of a single expert, `base`."""
    kind: Literal["method", "average", "task_arithmetic", "expert", "base"]
    """What the candidate is: a method that was searched for, or a baseline."""
    method: dict[str, Any] | None
    """All parameters of the method's best trial, or of the plain merge; null for an expert and the base."""
    weights: dict[str, PerTensor[float]]
    """Each model's weight, lambda; 0 for all in the base."""
    align_ridge: float | None
    """Ridge of head alignment; null if no head was aligned."""
    trial: int | None
    """Number of the best trial; null for candidates that are not searched for."""
    metrics: dict[str, CandidateMetric]
    """Metrics by model."""
    mean_retention: float | None
    """Mean of the models' retentions; null where no model has one."""
    min_retention: float | None
    """Least of the models' retentions; null where no model has one."""
    behind: Difference | None
    """Mean retention of the chosen candidate minus this one's, by a paired bootstrap over each model's rows."""
    chosen: bool
    """Whether the artifact has this candidate."""


class Proposed(Strict):
    """Method and parameters of a trial."""

    number: int
    """Number of the trial, from 0 in order."""
    candidate: str
    """Name of the candidate that was tried."""
    parameters: dict[str, Any]
    """Parameters of the trial; the weight of a model is `weight NAME`."""
    seconds: float
    """Time that the trial took, in seconds."""


class FailedTrial(Proposed):
    error: Told
    """Reason for the failure, such as numbers that are not finite, or a matrix that cannot be solved for."""


class Trial(Proposed):
    """A merge that was made and evaluated."""

    rows: int
    """Number of search rows on which it was evaluated, of the model that has most."""
    retentions: dict[str, float]
    """Retention of each model on these rows."""
    smoothed: dict[str, float]
    """Retention of the smoothed metric, in which a prediction is partly right by its distance from the decision border,
    by model."""
    objective: float
    """Mean or least of `smoothed`, lowered by the amounts by which `retentions` miss the models' `min_retention`."""
    pruned: bool
    """Whether it was given up before it was evaluated on all search rows."""


class Search(Strict):
    """The search by which `auto` chose a merge."""

    objective: Literal["mean_retention", "min_retention"]
    """What the search makes as large as it can."""
    search_rows: dict[str, int]
    """Number of rows of each model's evaluation that trials are evaluated on."""
    held_out_rows: dict[str, int]
    """Number of held-out rows of each model's evaluation. No row is also a search row."""
    min_retention: dict[str, float]
    """Least retention that was asked for, by model."""
    feasible: bool
    """Whether the chosen trial reaches these on the search rows."""
    chosen: int
    """Number of the chosen trial."""
    trials: list[Trial]
    """All merges that were made and evaluated, in their order."""
    failed: Annotated[list[FailedTrial], Field(default_factory=list)]
    """Merges that could not be made."""

    @property
    def best(self) -> Trial:
        """The trial that was chosen."""
        return next(trial for trial in self.trials if trial.number == self.chosen)


def mean_and_least(metrics: Iterable[MetricResult | CandidateMetric]) -> tuple[float | None, float | None]:
    """Return the mean and the least of the retentions; None where no model has one."""
    retentions = [metric.retention for metric in metrics if metric.retention is not None]
    return (sum(retentions) / len(retentions), min(retentions)) if retentions else (None, None)


class StoppingPoint(Strict):
    examples: int
    """Number of rows of each model; a model that has fewer counts with all."""
    error: float
    """The largest of `errors`."""
    errors: dict[str, float]
    """Root mean square, over a score name's nodes, of the standard error of the merge weights, for the model for which
    it is largest; by score name."""


class Stopping(Strict):
    """Accuracy of the merge weights."""

    tolerance: float | None
    """Tolerance of `examples: "auto"`; null where the number of rows was given."""
    reached: bool | None
    """Whether the last error is within the tolerance; null where there is no tolerance."""
    curve: list[StoppingPoint]
    """Errors at 256, 512, 1024 rows and so on, as far as they are known, and at the last row."""


class Timings(Strict):
    queue_seconds: float = 0.0
    """Seconds from acceptance to the start of the first attempt."""
    load_seconds: float = 0.0
    """Reading and checking checkpoints and rows."""
    score_seconds: float = 0.0
    """Measuring statistics of the models."""
    search_seconds: float = 0.0
    """Trials of `auto`."""
    merge_seconds: float = 0.0
    """Merging tensors and writing them."""
    align_seconds: float = 0.0
    """Refitting heads or layers."""
    evaluate_seconds: float = 0.0
    """Evaluating expert, average and merge."""
    interference_seconds: float = 0.0
    """Comparing the models' differences from the base."""
    publish_seconds: float = 0.0
    """Checking and publishing the artifact."""


class JobResult(Strict):
    """The common part of all jobs' results."""

    method: dict[str, Any]
    """The method as it ran: values of `auto` are resolved, and `precision` is left out if no model was run."""
    timings: Timings
    """Times of the job's steps, in seconds."""
    peak_memory_bytes: int
    """Most memory that the engine process held during the job."""
    device: str
    """Device that computed, such as `cpu` or `cuda`."""
    notes: list[Told]
    """Notes for the reader. Doubts come first, which put a number in question, such as labels whose order is not
    certain; then notes of what was done, such as rows that were truncated."""


class MergeSummary(JobResult):
    """A merge's result, without the search and the candidates of `auto`."""

    models: list[ModelResult]
    """What was found of each model."""
    metrics: dict[str, MetricResult] | None
    """Expert, average and merge on each model's evaluation rows, by model; null where nothing was evaluated."""
    mean_retention: float | None
    """Mean of the models' retentions; null where no model has one."""
    min_retention: float | None
    """Least of the models' retentions; null where no model has one."""
    accepted: bool | None = None
    """Whether the merge reaches what `accept` asks for and, if `auto` chose it, beats what `must_beat` names and writes
    as it must. It is judged on the evaluation rows, of `auto` on their held-out half; null where nothing is asked
    for."""
    stopping: Stopping | None = None
    """Present for methods that weight by scores of mask nodes, except with the preset `paper`."""
    published: list[Publication] = Field(default_factory=list)
    """What became of each place that `output.publish` names. The artifact is complete whatever became of them."""


class MergeResult(MergeSummary):
    candidates: list[Candidate] | None = None
    """Candidates of `auto`: each method's best trial, and the baselines, all evaluated on the same held-out rows."""
    search: Search | None = None
    """The search of `auto`."""


class ScoresFile(Strict):
    """A statistic that is kept. It can be fetched until the store needs its room for others."""

    statistic: StatisticName
    """Kind of the statistic."""
    digest: str
    """Digest of everything that the statistic follows from, as `GET /scores` lists it."""
    href: str
    """Path at which it is downloaded."""
    bytes: int
    """Size of its files."""


class ScoredModel(ModelReport):
    estimator: str | None
    """The estimator that was used; null if the method takes no gradients."""
    stopping: Stopping | None = None
    """Accuracy that the merge weights would have in a merge with a model of the same scores, errors and weight. Present
    for methods that weight by scores of mask nodes, except with the preset `paper`."""
    scores: list[ScoresFile]
    """The statistics that are kept of the model."""


class ShardResult(Strict):
    """What a shard of a job's scoring did; the statistics are in the store."""

    seconds: float
    """Time that measuring took."""


class ScoreResult(JobResult):
    models: list[ScoredModel]
    """What was measured of each model."""
