"""The engine's input: a job with every reference already resolved to a path."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializeAsAny, model_validator

from worker.engine.catalog.methods import AutoParameters, BaseParameters, Method
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, takes_part

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Heads = Literal["per_model", "merged"]
VocabularyPolicy = Literal["error", "union", "base"]
ALIGNMENT_ROWS = 512
"""Rows that a head is aligned on, at most."""
ALIGN_RIDGE = 0.1
"""How strongly an aligned head is held to what it was, in units of the mean square of its inputs."""
LEAST_ALIGNMENT_ROWS = 16
"""Distinct rows; on fewer a head is kept as it was."""
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class TokenSource(Strict):
    """The row of one token of the output."""

    source: Literal["own", "model", "base", "zero"] = "own"
    """Whose row it is: each model's own, one model's, the base's, or zeros. Any but the first counts for models that
    lack the token, and with `force` for all."""
    model: Annotated[str, Field(max_length=64)] | None = None
    """Name of the model."""
    token: Annotated[str, Field(max_length=1000)] | None = None
    """The token whose row it is there; null: the token itself."""
    id: Annotated[int, Field(ge=0)] | None = None
    """The row's number there, instead of a token."""
    force: bool = False

    @model_validator(mode="after")
    def _is_one_row(self) -> Self:
        if (self.source == "model") != (self.model is not None):
            raise ValueError("give model with the source model, and with no other")
        if self.source in ("own", "zero") and (self.token is not None or self.id is not None):
            raise ValueError("token and id are of a row of a model or of the base")
        if self.source == "own" and self.force:
            raise ValueError("each model has its own row anyway; give force with another source")
        if self.token is not None and self.id is not None:
            raise ValueError("give either token or id")
        return self


class Tokens(Strict):
    """A recipe's settings of the output's tokens, if vocabularies are merged."""

    vocabulary_of: Annotated[str, Field(max_length=64)] | None = None
    """Name of the model whose vocabulary `base` keeps, and whose tokenizer is published; null: the base's, or the first
    model's where no base is named."""
    tokens: Annotated[dict[str, TokenSource], Field(max_length=10_000)] | None = None
    """Rows of single tokens. One that the vocabulary lacks is added to it."""
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """The number of rows of embedding matrices is a multiple of this; added rows are the mean of all others."""


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("two labels have the same name")
    return names


class Columns(Strict):
    """Which columns of a data set are read, and which of its rows."""

    text: Name = "text"
    text_pair: Name | None = None
    label: Name | None = None
    """Column of the labels; absent for unlabelled text."""
    label_names: Annotated[list[str], AfterValidator(_unique)] | None = None
    """What the data set calls its label ids 0, 1, …; matched by name to the checkpoint's labels."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Rows to use; null for all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Which rows, and in which order."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of a row; longer ones are truncated. Default: the model's limit."""


class HubSource(Strict):
    """A repository on the Hugging Face hub, at one commit."""

    repository: str
    commit: str


class DatasetSpec(Columns):
    """Rows of a local file, or of a data set on the hub."""

    source: str
    path: Path | None = None
    root: Path | None = None
    """Folder that the file must lie in, after following links; None for any."""
    hub: HubSource | None = None
    config: str | None = None
    split: str | None = None


class EvaluationSpec(DatasetSpec):
    metric: MetricName


class CheckpointSpec(Strict):
    """A local folder, or a repository of the hub."""

    source: str
    path: Path | None = None
    hub: HubSource | None = None
    """Where the checkpoint is when it is no local folder."""
    state: str | None = None
    """`checkpoint_state` when the job was accepted."""
    root: Path | None = None
    """Folder that the checkpoint's files must lie under, after following links; None for any."""


class ModelSpec(CheckpointSpec):
    name: str
    weight: PerTensor[float] = DEFAULT_WEIGHT
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """Its own values of the method's, see `MethodParameters.of_model`."""
    dataset: DatasetSpec | None = None
    evaluation: EvaluationSpec | None = None
    min_retention: float | None = None
    """The share of its metric that the merge chosen by `auto` must keep."""

    @property
    def takes_part(self) -> bool:
        """Whether its weight is other than 0 for any tensor."""
        return takes_part(self.weight)


class OutputSpec(Tokens):
    dtype: Dtype = "auto"
    heads: Heads | None = None
    """None: by kind, see `plan_merge`."""
    align_heads: bool = False
    align_ridge: float = ALIGN_RIDGE
    max_shard_bytes: int = 5_000_000_000
    vocabulary: VocabularyPolicy = "error"
    config_from: str | None = None
    """Name of the model, or `base`, whose settings count if models differ in settings that no shape shows."""
    chat_template: str | None = None
    interference: bool = True


class StoreSpec(Strict):
    """Where statistics are kept for later merges, and how much of them."""

    folder: Path
    max_bytes: int


def models_beside(evaluates: bool, aligns: bool, method: BaseParameters) -> int:
    """Models that are held beside the experts: the method's own, or else the merge and the plain average beside it."""
    return max(method.models_beside, 2 if evaluates else 1 if aligns else 0)


class JobSpec(Strict):
    """What jobs of every kind have in common. `recipe` is the request that reproduces the job, stored in the artifact
    as it is."""

    name: str
    models: list[ModelSpec]
    method: SerializeAsAny[Annotated[Method | AutoParameters, Field(discriminator="name")]]
    recipe: dict[str, Any]
    folder: Path
    """Where the artifact is assembled; empty and private to this attempt."""
    store: StoreSpec | None = None
    """None: statistics are computed and forgotten."""

    def rows_wanted(self, model: ModelSpec) -> tuple[int, int]:
        """How many of the first rows of the model's data set are measured at most, and its head is aligned on."""
        return self.method.most_examples if model.takes_part else 0, 0

    @property
    def rows_to_read(self) -> list[DatasetSpec]:
        """Data sets to measure on, of models that take part, or to align heads on, and evaluations to make."""
        return [m.dataset for m in self.models if m.dataset and any(self.rows_wanted(m))]

    @property
    def loads_models(self) -> bool:
        return bool(self.rows_to_read)

    @property
    def checkpoints(self) -> list[CheckpointSpec]:
        return list(self.models)

    @property
    def models_beside(self) -> int:
        """Models that are held beside those that the job names."""
        return 0

    @property
    def names_the_hub(self) -> bool:
        return any(c.hub for c in self.checkpoints) or any(rows.hub for rows in self.rows_to_read)


class ScoreSpec(JobSpec):
    """Statistics of models, each by itself."""

    kind: Literal["scores"] = "scores"


class MergeSpec(JobSpec):
    """A whole merge."""

    kind: Literal["merge"] = "merge"
    base: CheckpointSpec | None = None
    """The common ancestor, for methods that merge differences from it."""
    output: OutputSpec
    slices: list[OutputSlice] | None = None
    """The slices of the result; None: all layers, or those of the method."""
    notes: tuple[str, ...] = ()
    """Notes that the result begins with."""
    strict_filters: bool = True
    """Whether a filter that matches no tensor was refused; if not, there is a note of it."""
    evaluate: bool
    journal: Path | None = None
    """Where `auto` keeps what it tried, for an attempt after this one; None: it is forgotten."""

    def rows_wanted(self, model: ModelSpec) -> tuple[int, int]:
        measured, _ = super().rows_wanted(model)
        return measured, ALIGNMENT_ROWS if self.output.align_heads and model.dataset else 0

    @property
    def rows_to_read(self) -> list[DatasetSpec]:
        return [*super().rows_to_read, *(m.evaluation for m in self.models if m.evaluation and self.evaluate)]

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
