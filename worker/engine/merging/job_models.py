"""The models of a job, with the rows and the statistics that merging and searching need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.contracts.spec import EvaluationSpec, ModelSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import GRAM, PARAMETER_FISHER
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.inputs.examples import Example
from worker.engine.merging.given_statistics import GivenStatistic
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.stopping import Scored
from worker.engine.models.loading import ModelCache
from worker.engine.scoring.measure import Measured
from worker.engine.scoring.sample import Sample


@dataclass(frozen=True)
class ModelRows:
    """A model's rows, by their purpose. No row to fit to and no searched row is also in `evaluation`."""

    sample: Sample | None = None
    """Rows to measure."""
    fitted: Sequence[Example] = ()
    """Rows to fit layers to."""
    alignment: Sequence[Example] = ()
    """Rows to align the head on."""
    alignment_texts: Sequence[Row] = ()
    """Texts of `alignment`, for a merge with another tokenizer."""
    searched: Sequence[Example] = ()
    """Rows of the evaluation that `auto` searches on."""
    evaluation: Sequence[Example] = ()
    """Rows of the evaluation on which the result is judged."""
    evaluation_texts: Sequence[Row] = ()
    """Texts of `evaluation`, where vocabularies may differ."""
    truncated: Sequence[str] = ()
    """A note if some of `fitted` were truncated."""


@dataclass(frozen=True)
class JobModel:
    """A model of a job: its specification, checkpoint and rows, and its statistics so far."""

    spec: ModelSpec
    info: CheckpointInfo
    digest: str
    """Digest of the checkpoint."""
    given: Mapping[str, GivenStatistic] = field(default_factory=dict)
    """Statistics that are not measured, by name."""
    rows: ModelRows = field(default_factory=ModelRows)
    measured: Measured = field(default_factory=Measured)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def takes_part(self) -> bool:
        return self.spec.takes_part

    @property
    def for_method(self) -> MeasuredModel:
        """The model as a merge method sees it."""
        measured = self.measured
        return MeasuredModel(
            self.spec.weight,
            measured.scores,
            measured.of(GRAM),
            self.given.get(PARAMETER_FISHER) or measured.of(PARAMETER_FISHER),
            self.spec.parameters,
            measured.statistics,
        )

    @property
    def scored(self) -> Scored | None:
        """The model's scores, from which errors follow; None when it has no scores with errors."""
        if self.rows.sample is None or not self.measured.sums:
            return None
        return Scored(self.spec.weight, self.measured.sums, self.rows.sample.population)

    @property
    def dataset(self) -> DatasetSpec:
        """The model's data set. Raises InvalidDataset where it names none."""
        if self.spec.dataset is None:
            raise InvalidDataset(self.name, "no data set; the method needs one for every model")
        return self.spec.dataset

    @property
    def evaluation(self) -> EvaluationSpec:
        """The model's evaluation. Raises InvalidDataset where it names none."""
        if self.spec.evaluation is None:
            raise InvalidDataset(self.name, "no evaluation; method auto needs one for every model")
        return self.spec.evaluation


def experts_of(models: Sequence[JobModel], cache: ModelCache) -> list[Expert]:
    """Load the models that take part, with the rows that layers are fitted to."""
    return [
        Expert(cache.get(model.info), model.spec.weight, model.rows.fitted, model.dataset.source)
        for model in models
        if model.takes_part
    ]
