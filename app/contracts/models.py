"""The models of a request, with their data sets."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator

from worker.engine.catalog.data.spec import Columns, Generation, Name
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, Weight, takes_part
from worker.engine.catalog.tasks import MetricName


class Dataset(Columns):
    """Rows, with or without labels."""

    source: str
    """Reference to a JSON lines, CSV or Parquet file, or to a data set on the hub."""
    config: Name | None = None
    """Configuration of a data set on the hub, if it has several."""
    split: Name | None = None
    """Split of a data set on the hub, if it has several."""


class Evaluation(Dataset, Generation):
    """Rows on which expert, plain average and merge are compared."""

    label: Name | None = None
    """Column of the labels; default: `label`, and none where labels are the row's own tokens."""
    metric: MetricName | None = None
    """Metric to compare; default: accuracy for classification of rows or words, f1 for several labels at once and for
    answers to questions, pearson for regression, perplexity for language models."""


class MeasuredModelRequest(Strict):
    """A model as every kind of job names it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Unique name, which is also that of the model's folder or file in the artifact."""
    checkpoint: str
    """Reference to a folder written by `save_pretrained`, to a repository on the hub, or to a model of an earlier job;
    in a merge also to a LoRA adapter of `base`."""
    dataset: Dataset | None = None
    """Rows that the model is measured on, if the method measures."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if set(name) == {"."}:
            raise ValueError("a name of dots alone cannot be a folder")
        return name

    @property
    def takes_part(self) -> bool:
        return True

    @property
    def given(self) -> Mapping[str, str]:
        """References to the statistics that are not measured, by name."""
        return {}


class GivenStatistics(Strict):
    """References to statistics of a model that are not measured: to a safetensors file, or a folder or repository of
    the files that a checkpoint has. Tensors are named and shaped as the checkpoint's."""

    fisher: str | None = None
    """Fisher information of every parameter, for the method `fisher`; such are the second moments that Adam keeps."""

    @property
    def references(self) -> dict[str, str]:
        """The references that are given, by the statistic's name."""
        return {name: reference for name, reference in self if reference is not None}


class ModelRequest(MeasuredModelRequest):
    weight: PerTensor[Weight] = DEFAULT_WEIGHT
    """Weight of this model in the merge, lambda; 0 leaves it out. Below 0 it is subtracted, in methods that add up
    models or task vectors. `auto` tries a third to three times of it, unless a model has a list or filters."""
    parameters: Annotated[dict[str, PerTensor[float]], Field(default_factory=dict)]
    """This model's own values of the method's parameters that `per_model` of `GET /methods` names. Where none of its
    filters matches a tensor, the method's value counts."""
    statistics: GivenStatistics = GivenStatistics()
    """Statistics that are read from files, and not measured."""
    evaluation: Evaluation | None = None
    """Rows that merge and expert are compared on; null: none."""
    min_retention: Annotated[float, Field(ge=0, le=2)] | None = None
    """Share of this expert's metric that a merge chosen by `auto` must keep, if any trial does."""

    @property
    def takes_part(self) -> bool:
        return takes_part(self.weight)

    @property
    def given(self) -> Mapping[str, str]:
        return self.statistics.references


class ScoredModelRequest(MeasuredModelRequest):
    dataset: Dataset
    """Rows that the model is measured on."""
