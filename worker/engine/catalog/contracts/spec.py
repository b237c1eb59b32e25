"""The engine's input: a job with every reference already resolved to a path."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.licences import stated_licence
from worker.engine.catalog.data.spec import DatasetSpec, Generation, HubSource
from worker.engine.catalog.methods import AutoParameters, BaseParameters, Method
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.tokens import TokenSettings
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, takes_part
from worker.engine.catalog.tasks import MetricName

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Heads = Literal["per_model", "merged"]
VocabularyPolicy = Literal["error", "union", "base"]
ALIGNMENT_ROWS = 512
"""Largest number of rows that a head is aligned on, unless another one is asked for."""
ALIGN_RIDGE = 0.1
"""Strength that holds an aligned head to its former weights, in units of the mean square of its inputs."""
LEAST_ALIGNMENT_ROWS = 16
"""Least number of distinct rows that a head is aligned on; with fewer it is kept as it was."""
MOST_ALIGNMENT_ROWS = 100_000
"""Largest number that may be asked for: their tokens, and a search's features of them, are held in memory."""


class EvaluationSpec(DatasetSpec, Generation):
    metric: MetricName


class CheckpointSpec(Strict):
    """A local folder, or a repository of the hub."""

    source: str
    path: Path | None = None
    hub: HubSource | None = None
    """Repository of the checkpoint; None for a local folder."""
    state: str | None = None
    """Value of `checkpoint_state` when the job was accepted."""
    root: Path | None = None
    """Folder under which the checkpoint's files must lie, after following links; None for any."""
    license: str | None = None
    """Licence of a model that an earlier job made; None where the checkpoint's own card states it."""
    sha256: dict[str, str] = Field(default_factory=dict)
    """Digests, in hexadecimal, that files must have, by their names; those with which an earlier job wrote them."""

    def licence(self, info: CheckpointInfo) -> str | None:
        """Return the licence of the checkpoint; None where none is stated."""
        return self.license or stated_licence(info.path)


class ModelSpec(CheckpointSpec):
    name: str
    weight: PerTensor[float] = DEFAULT_WEIGHT
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """The model's own values of the method's parameters, see `MethodParameters.of_model`."""
    dataset: DatasetSpec | None = None
    statistics: dict[str, CheckpointSpec] = Field(default_factory=dict)
    """Files of statistics that are not measured, by the statistic's name."""
    evaluation: EvaluationSpec | None = None
    min_retention: float | None = None
    """Share of its metric that the merge chosen by `auto` must keep."""

    @property
    def takes_part(self) -> bool:
        """Whether its weight is not 0 for at least one tensor."""
        return takes_part(self.weight)


class OutputSpec(TokenSettings):
    dtype: Dtype = "auto"
    heads: Heads | None = None
    """Treatment of heads; None: by kind, see `plan_merge`."""
    align_heads: bool = False
    align_ridge: float = ALIGN_RIDGE
    alignment_rows: int = ALIGNMENT_ROWS
    max_shard_bytes: int = 5_000_000_000
    vocabulary: VocabularyPolicy = "error"
    config_from: str | None = None
    """Name of the model, or `base`, whose settings are taken if models differ in settings that no shape shows."""
    chat_template: str | None = None
    interference: bool = True


class StoreSpec(Strict):
    """The folder in which statistics are kept for later merges, and its size limit."""

    folder: Path
    max_bytes: int
    others: tuple[Path, ...] = ()
    """Other folders of statistics. What a job needs by its digest is linked from them instead of measured again."""
    tenant: str = "default"
    """Tenant whose statistics these are, where machines have them in common."""


def models_beside(evaluates: bool, aligns: bool, method: BaseParameters) -> int:
    """Return the number of models that are held beside the experts: the merge, the plain average, the method's own."""
    return max(method.models_beside, 2 if evaluates else 1 if aligns else 0)


def given_of_all(models: Iterable[Collection[str]]) -> frozenset[str]:
    """Return the names of the statistics that files have of every model, from those of each model."""
    given = [frozenset(names) for names in models]
    return frozenset.intersection(*given) if given else frozenset()


class Acceptance(Strict):
    """What a merge must reach on its evaluation rows to be accepted. What does not is written all the same."""

    min_mean_retention: Annotated[float, Field(ge=0, le=2)] | None = None
    """Least mean retention over the models that are evaluated."""
    min_retention: Annotated[float, Field(ge=0, le=2)] | None = None
    """Least retention of every model that is evaluated."""
    metrics: Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(default_factory=dict)]
    """Least value of a model's metric, or the largest where less is better, by model."""


class SharedScoring(Strict):
    """What is known of a job's scoring that was cut into shards, see `worker.engine.jobs.cutting`."""

    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds that shards have measured each model for, by its name."""
    elapsed_seconds: float = 0.0
    """Time from the cut to the end of the last shard."""
    batch_tokens: dict[str, int] = Field(default_factory=dict)
    """Numbers of padded tokens that the job computes together, by the address of a model's scores."""


class JobSpec(Strict):
    """The common part of all jobs' specifications.

    `recipe` is the request that reproduces the job, and is stored in the artifact as it is.
    """

    name: str
    models: list[ModelSpec]
    method: SerializeAsAny[Annotated[Method | AutoParameters, Field(discriminator="name")]]
    recipe: dict[str, Any]
    folder: Path
    """Folder in which the artifact is assembled; empty and private to this attempt."""
    store: StoreSpec | None = None
    """Store of statistics; None: they are computed and forgotten."""
    shard_seconds: float | None = None
    """Seconds of scoring for a worker at a time, if longer scoring is cut into shards; None: it is not cut."""
    shared: SharedScoring = SharedScoring()

    def rows_wanted(self, model: ModelSpec) -> tuple[int, int]:
        """Return how many of the first rows of a model's data set are measured at most, and how many its head needs."""
        return self.method.rows_measured(model.statistics) if model.takes_part else 0, 0

    @property
    def rows_to_read(self) -> list[DatasetSpec]:
        """Return the data sets of models that take part, on which they are measured or aligned, and the evaluations."""
        return [m.dataset for m in self.models if m.dataset and any(self.rows_wanted(m))]

    @property
    def loads_models(self) -> bool:
        return bool(self.rows_to_read)

    @property
    def checkpoints(self) -> list[CheckpointSpec]:
        return list(self.models)

    @property
    def given_statistics(self) -> list[CheckpointSpec]:
        """Files of the statistics of models that take part."""
        return [spec for model in self.models if model.takes_part for spec in model.statistics.values()]

    @property
    def given_of_all(self) -> frozenset[str]:
        """Names of the statistics that files have of every model that takes part."""
        return given_of_all(model.statistics for model in self.models if model.takes_part)

    @property
    def models_beside(self) -> int:
        """Number of models that are held beside those that the job names."""
        return 0

    @property
    def evaluations(self) -> list[EvaluationSpec | None]:
        """The evaluation of each model, if it is evaluated; empty where none is."""
        return []

    @property
    def names_the_hub(self) -> bool:
        return any(c.hub for c in (*self.checkpoints, *self.given_statistics)) or any(
            rows.hub for rows in self.rows_to_read
        )


class ScoreSpec(JobSpec):
    """A job that measures statistics of models, each by itself."""

    kind: Literal["scores"] = "scores"


class ShardWork(Strict):
    """A part of a job's scoring that any worker can do."""

    model: str
    """Name of the model."""
    method: SerializeAsAny[Annotated[Method, Field(discriminator="name")]]
    """The method that measures it, with the precision of the job."""
    statistics: tuple[str, ...]
    also: tuple[str, ...] = ()
    """Statistics that are kept too if they take no pass of their own."""
    pieces: tuple[int, int] | None = None
    """The first piece of the model's rows and the one after the last, if only their sums are wanted; None: all rows."""
    batch_tokens: int | None = None
    """Number of padded tokens that are computed together; None where it decides no bit of other shards."""
    examples: int
    """Number of rows to go through, for the progress; each counts once a pass."""


class ShardSpec(JobSpec):
    """A shard of a job's scoring. Its one model is measured as a job of scores does it; it makes no artifact."""

    kind: Literal["shard"] = "shard"
    base: CheckpointSpec | None = None
    """The model that an adapter adapts."""
    work: ShardWork

    @property
    def checkpoints(self) -> list[CheckpointSpec]:
        return [*super().checkpoints, *([self.base] if self.base else ())]


class MergeSpec(JobSpec):
    """A job that merges models."""

    kind: Literal["merge"] = "merge"
    base: CheckpointSpec | None = None
    """The common ancestor, for methods that merge differences from it."""
    output: OutputSpec
    slices: list[OutputSlice] | None = None
    """Slices of the result; None: all layers, or those of the method."""
    notes: tuple[str, ...] = ()
    """Notes with which the result begins."""
    strict_filters: bool = True
    """Whether a filter that matches no tensor is refused; if not, the result has a note of it."""
    evaluate: bool
    accept: Acceptance | None = None
    journal: Path | None = None
    """File in which `auto` keeps its trials for an attempt after this one; None: they are forgotten."""

    def rows_wanted(self, model: ModelSpec) -> tuple[int, int]:
        measured, _ = super().rows_wanted(model)
        return measured, self.output.alignment_rows if self.output.align_heads and model.dataset else 0

    @property
    def rows_to_read(self) -> list[DatasetSpec]:
        return [*super().rows_to_read, *(m.evaluation for m in self.models if m.evaluation and self.evaluate)]

    @property
    def evaluations(self) -> list[EvaluationSpec | None]:
        return [model.evaluation if self.evaluate else None for model in self.models]

    @property
    def aligns(self) -> bool:
        return self.output.align_heads and any(model.dataset for model in self.models)

    @property
    def compares(self) -> bool:
        """Whether the models' task vectors are compared: there is a base, and two models take part at least."""
        return self.output.interference and self.base is not None and sum(m.takes_part for m in self.models) > 1

    @property
    def checkpoints(self) -> list[CheckpointSpec]:
        return [*super().checkpoints, *([self.base] if self.base else ())]

    @property
    def models_beside(self) -> int:
        return models_beside(self.evaluates, self.aligns, self.method)

    @property
    def evaluates(self) -> bool:
        return self.evaluate and any(model.evaluation for model in self.models)
