"""What a request says of a merge's output."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from app.contracts.targets import MOST_TARGETS, Target
from worker.engine.catalog.contracts.spec import (
    ALIGN_RIDGE,
    ALIGNMENT_ROWS,
    LEAST_ALIGNMENT_ROWS,
    MOST_ALIGNMENT_ROWS,
    Dtype,
    Heads,
    OutputSpec,
    VocabularyPolicy,
)
from worker.engine.catalog.primitives.tokens import TokenSettings


def _listed(value: object) -> object:
    """Return the places of a request as a list. Records of the last release have null."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


class Output(TokenSettings):
    dtype: Dtype = "auto"
    """Data type in which merged tensors are stored; `auto` keeps the inputs' own."""
    heads: Heads | None = None
    """Treatment of heads. `per_model`: the merged backbone gets each model's own head, in `models/`. `merged`: heads
    are merged like all other tensors, to one model in `model/`, for which classifiers need equal labels. Default:
    `per_model` for classifiers of architectures with a table, `merged` for all others, such as language models."""
    align_heads: bool = True
    """Whether to refit each kept head to the merged backbone, on the model's own `dataset` and without labels. With the
    preset `paper` it is false by default. It has no effect, and is shown as false, where heads are merged."""
    align_ridge: Annotated[float, Field(gt=0, le=100)] = ALIGN_RIDGE
    """Strength that holds an aligned head to its former weights, in units of the mean square of its inputs. `auto`
    searches for it, and only accepts the default here."""
    alignment_rows: Annotated[int, Field(ge=LEAST_ALIGNMENT_ROWS, le=MOST_ALIGNMENT_ROWS)] = ALIGNMENT_ROWS
    """Largest number of rows of each model's `dataset` that its head is aligned on; where there are fewer, all of them.
    Rows that the model is also evaluated on do not count."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Largest size of a file of weights."""
    vocabulary: VocabularyPolicy = "error"
    """Treatment of models whose tokenizers differ: `error` refuses them; `base` keeps the vocabulary of the base, or of
    the first model where no base is named; `union` appends the other models' further tokens to that."""
    config_from: str | None = None
    """Name of the model, or `base`, whose configuration and tokenizer are published. Models may then differ in settings
    that no shape shows, such as the base of rotary positions, their scaling, windows or the epsilon of norms; without
    it, such models are refused. Each published model keeps its own labels."""
    chat_template: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """The published chat template: Jinja, or `auto` for the one that most models have. Null: the published tokenizer's
    own."""
    interference: bool = True
    """Whether to compare the models' differences from the base for the report, which reads the checkpoints once more.
    It has no effect where no base is named."""
    publish: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list, max_length=MOST_TARGETS)
    """Further places to publish the merge at, a list or one: `hf:ORG/NAME`, `s3:BUCKET/PREFIX`,
    `mlflow:SERVER/MODEL[@ALIAS]`. The
    service's settings say which there are. What `accept` refuses is published at none of them."""

    @property
    def alignment(self) -> dict[str, float]:
        """The settings of head alignment that differ from their defaults."""
        defaults = {"align_ridge": ALIGN_RIDGE, "alignment_rows": ALIGNMENT_ROWS}
        return {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}

    @property
    def spec(self) -> OutputSpec:
        """The settings of the output that the engine needs."""
        return OutputSpec.model_validate(self.model_dump(include=set(OutputSpec.model_fields)))

    @field_validator("publish")
    @classmethod
    def _are_places(cls, targets: list[str]) -> list[str]:
        if len({Target.parse(target).place for target in targets}) < len(targets):
            raise ValueError("it names a place twice")
        return targets

    @field_validator("chat_template")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is not None and template != "auto" and "{" not in template:
            raise ValueError("it is neither Jinja nor auto; give the template itself")
        return template

    @model_validator(mode="after")
    def _tokens_are_merged(self) -> Self:
        asked = [name for name in ("vocabulary_of", "tokens", "pad_to_multiple_of") if getattr(self, name)]
        if asked and self.vocabulary == "error":
            raise ValueError(f"{asked[0]} needs vocabulary 'base' or 'union', which merge tokens")
        if self.vocabulary_of is not None and self.vocabulary == "union":
            raise ValueError("vocabulary_of needs vocabulary 'base'; 'union' keeps all")
        return self
