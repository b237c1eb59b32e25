"""Base classes of methods' parameters, which answer every question that other modules have about a method."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from worker.engine.catalog.methods.statistic import RunningModels, Statistic
from worker.engine.catalog.primitives.slices import Slice
from worker.engine.catalog.primitives.strict import Strict
from worker.engine.catalog.primitives.values import (
    EVERY_NAME,
    PerTensor,
    Share,
    TensorPlace,
    filters_of,
    value_at,
    values_of,
)

if TYPE_CHECKING:
    from worker.engine.catalog.methods.auto import AutoParameters

BATCH_TOKENS = 2048
"""Number of padded tokens in a batch, where no better number is known."""
LARGEST_BATCH_TOKENS = 4096
"""Largest number of padded tokens in a batch that is tried on a CPU."""


def _node_fisher_bytes(running: RunningModels) -> int:
    """Count the bytes of a backward pass. In bfloat16 they include the model's rounded weights."""
    rounded = max(running.models) // 2 if running.value_bytes == 2 else 0
    return running.activations(running.tokens) + rounded


NODE_FISHER = Statistic("mask_fisher", _node_fisher_bytes)
"""Fisher information of the mask nodes."""

Scale = Annotated[float, Field(ge=-10, le=10)]

MOST_AUTO_EXAMPLES = 16_384
"""Largest number of rows of each data set that `examples: "auto"` measures."""
TOLERANCE = 0.1
Normalize = Literal["layer", "model", "none"]


class BaseParameters(Strict):
    """The needs of a method: of one that merges, and of `auto`, which tries several of them."""

    per_model: ClassVar[tuple[str, ...]] = ()
    """Names of the `PerTensor` parameters for which a model may have values of its own."""
    takes_negative_weights: ClassVar[bool] = False

    name: str
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of forward and backward passes. `auto`: bfloat16 where the device has matrix units for it, else
    float32."""

    @property
    def methods(self) -> "Sequence[MethodParameters]":
        """The methods that are run: the method itself, or the candidates of `auto`."""
        raise NotImplementedError

    @property
    def search(self) -> "AutoParameters | None":
        """These parameters, if they are those of a search over several methods; None for a method that merges."""
        return None

    @property
    def stacked_slices(self) -> Sequence[Slice]:
        """The slices of models that the method stacks instead of merging models; empty for all other methods."""
        return ()

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset()

    @property
    def most_examples(self) -> int:
        """Largest number of rows of each data set that are measured."""
        return 0

    def rows_measured(self, given: Collection[str]) -> int:
        """Return the largest number of rows that are measured of a model.

        Args:
            given: names of the model's statistics that are not measured, because files have them.
        """
        return max((one.most_examples for one in self.methods if one.is_measured(given)), default=0)

    def reads_labels(self, given: Collection[str]) -> bool:
        """Return whether measuring a model, of which files have the statistics `given`, reads its rows' labels."""
        return any(one.needs_labels for one in self.methods if one.is_measured(given))

    @property
    def needs_base(self) -> bool:
        return False

    @property
    def weighs_models(self) -> bool:
        """Whether the models' weights influence the merge; otherwise they must be equal."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether computing the statistics reads the data set's labels."""
        return False

    @property
    def merges_rows(self) -> bool:
        """Whether some rows of a tensor can be merged without the others; otherwise all of it is held at once."""
        return True

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        """Return the bytes that merging the whole weight of a linear layer takes besides its versions.

        Those of solving with Gram matrices are counted with the statistic.
        """
        return 0

    @property
    def selects_by_rank(self) -> bool:
        """Whether the method looks for values of a given rank in a tensor."""
        return False

    @property
    def refits_layers(self) -> bool:
        """Whether linear layers are refitted to their inputs in the merge, which keeps all experts loaded."""
        return False

    @property
    def refits_every_form(self) -> bool:
        """Whether these may be of an encoder and a decoder or of mixtures of experts, not of one plain stack alone."""
        return False

    @property
    def aligns_heads(self) -> bool:
        """Whether kept heads are aligned to the merge unless a request says otherwise."""
        return True

    @property
    def models_beside(self) -> int:
        """Number of models that the method itself holds beside the experts.

        Where layers are refitted, these are the merge, the merge that it starts from, and the changes.
        """
        return 3 if self.refits_layers else 0

    @property
    def most_batch_tokens(self) -> int:
        """Number of padded tokens in the largest batch on a CPU, if no row is longer."""
        return LARGEST_BATCH_TOKENS

    @property
    def batch_rows(self) -> int | None:
        """Number of rows in a batch if the method prescribes it; None if batches keep to a budget of tokens."""
        return None


class MethodParameters(BaseParameters):
    """Parameters common to all methods."""

    measuring: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that say how models are measured, and have no effect where none is."""

    scale: PerTensor[Scale] = 1.0
    """Factor of the merge's distance from the base, `theta_0 + scale * (theta - theta_0)`; any but 1 needs a base."""

    @property
    def methods(self) -> "Sequence[MethodParameters]":
        return [self]

    def is_measured(self, given: Collection[str]) -> bool:
        """Return whether rows of a model are read that has the statistics `given`: not if these are all it needs."""
        return not self.statistics or not self.statistics <= {*given}

    @property
    def idle(self) -> Mapping[str, str]:
        """The parameters that have no effect beside the values of others, each with the reason, which follows its name.

        A value of these other than the default is refused, and recipes, cards and reports leave them out.
        """
        return {}

    @model_validator(mode="after")
    def _no_idle_parameter_is_given(self) -> Self:
        for name, why in self.idle.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {why}; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_parameters(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialized(self).items() if name not in self.idle}

    @property
    def settings(self) -> dict[str, object]:
        """The values of all parameters, by their path in a recipe; those of a start are there too."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    @property
    def starts_from(self) -> "MethodParameters | None":
        """The method whose merge is refitted, if layers are, with the values that it shares with this one."""
        return None

    @property
    def as_asked(self) -> "Mapping[tuple[str, ...], MethodParameters]":
        """The parameters of this method and of its start, if it has one, by their places in this method's."""
        return {(): self}

    @property
    def counts_scale(self) -> bool:
        """Whether a factor of all of a model's statistics changes its weight in the merge."""
        return False

    @property
    def gradients(self) -> "GradientParameters | None":
        """These parameters, if measuring takes gradients of a label's likelihood; else None."""
        return None

    @property
    def scoring(self) -> "ScoringParameters | None":
        """These parameters, if slices are weighted by the scores of mask nodes; else None."""
        return None

    @property
    def asked_batch_tokens(self) -> int | None:
        """Number of padded tokens that are computed together, if the method sets it; None: the fastest number."""
        return None

    @property
    def needs_base_by(self) -> str:
        """The setting for which a method needs a base that needs none otherwise."""
        return "a scale other than 1"

    @property
    def needs_table(self) -> bool:
        """Whether linear layers are told from other tensors, which takes the architecture's table, though nothing is
        measured."""
        return False

    @property
    def estimated(self) -> str | None:
        """What is estimated instead of being measured, as the subject of a note; None if nothing is."""
        return None

    @property
    def needs_base(self) -> bool:
        return any(value != 1 for value in values_of(self.scale, type(self).model_fields["scale"].default))

    def at(self, name: str, place: TensorPlace) -> float:
        """Return the value of the `PerTensor` parameter `name` for one tensor; its default where no filter matches."""
        return value_at(getattr(self, name), place, type(self).model_fields[name].default)

    def of_model(self, own: Mapping[str, PerTensor[float]]) -> Self:
        """Return the parameters of a model that has some values of its own; these count where no filter of it matches.

        Args:
            own: the model's own values, by names in `per_model`.

        Raises:
            ValidationError: a value is out of the parameter's bounds.
        """
        if not own:
            return self
        given = self.model_dump()
        for name, value in own.items():
            of_all = given[name] if filters_of(getattr(self, name)) else [{"filter": EVERY_NAME, "value": given[name]}]
            filters = [entry.model_dump() for entry in filters_of(value)]
            given[name] = [*filters, *of_all] if filters else value
        return type(self).model_validate(given)

    def shares(self, weights: Sequence[float], place: TensorPlace) -> Sequence[float] | None:
        """Return each model's share in the merge of one tensor, summing to 1, or all 0 where all weights are 0.

        None means that there are no shares: they depend on the tensors' values, or a weight is below 0.

        Args:
            weights: weights of the models that take part.
        """
        total = sum(weights)
        return None if min(weights) < 0 else [weight / total if total else 0.0 for weight in weights]

    def weights_problem(self, weights: Sequence[float]) -> str | None:
        """Say what is wrong with the models' weights of one tensor; the caller's sentence goes on "for tensor ..."."""
        return None if any(weights) else "the weights of all models are 0"

    def distance(self, place: TensorPlace) -> float:
        """Return the value of `scale` for one tensor."""
        return self.at("scale", place)


LEAST_SUM = 1e-8
"""Least sum of weights, relative to their size, that may be a divisor; less is the rounding error of 0."""


def cancels(weights: Sequence[float]) -> bool:
    """Return whether there are weights, and their sum is 0 up to rounding."""
    return abs(sum(weights)) < LEAST_SUM * max(1.0, *map(abs, weights))


class MeasuringParameters(MethodParameters):
    """Parameters of methods that measure every model on its rows."""

    measuring: ClassVar[tuple[str, ...]] = ("examples",)

    examples: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] = 512
    """Number of rows of each data set that are measured."""

    @model_validator(mode="after")
    def _auto_stops_by_scores(self) -> Self:
        if self.examples == "auto" and NODE_FISHER not in self.statistics:
            raise ValueError(f"examples 'auto' stops by scores of mask nodes, and {self.name} has none; give a number")
        return self

    @property
    def most_examples(self) -> int:
        return MOST_AUTO_EXAMPLES if self.examples == "auto" else self.examples


class GradientParameters(MeasuringParameters):
    """Parameters of methods that measure Fisher information."""

    measuring: ClassVar[tuple[str, ...]] = (*MeasuringParameters.measuring, "estimator", "seed")

    estimator: Literal["auto", "expected", "sampled", "empirical"] = "auto"
    """Label whose log-likelihood is differentiated. `auto`: `expected` for up to 8 labels, else `sampled`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed from which the labels of the estimator `sampled` are drawn."""

    @property
    def idle(self) -> Mapping[str, str]:
        if self.estimator in ("auto", "sampled"):
            return super().idle
        return {**super().idle, "seed": f"draws labels, and the estimator {self.estimator!r} draws none"}

    @property
    def gradients(self) -> "GradientParameters":
        return self

    @property
    def needs_labels(self) -> bool:
        return self.estimator == "empirical"


class ScoringParameters(GradientParameters):
    """Parameters of methods that weight slices by the scores of mask nodes."""

    measuring: ClassVar[tuple[str, ...]] = (*GradientParameters.measuring, "tolerance", "batch_tokens")

    examples: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] = 2048
    """Number of rows of each data set that are scored; `auto` stops when the merge weights are known to `tolerance`."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Standard error of the merge weights, in the root mean square over a layer's nodes, at which `examples: "auto"`
    stops; 0.1 when absent."""
    batch_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """Number of padded tokens that are computed together; `auto` finds the fastest by trials. It changes scores only by
    rounding; the number in the manifest gives the same bits again."""
    normalize: Normalize = "layer"
    """Divisor of scores: their layer's mean, or their L2 norm over the model, for each kind of node."""
    rest: Literal["uniform", "model"] = "uniform"
    """Merge weights of tensors that no node owns: lambda alone, or lambda times the mean model-normalised score of the
    layer (or of the model)."""
    floor: PerTensor[Share] = 1e-3
    """Least score of a node, as a share of its layer's mean."""

    @model_validator(mode="before")
    @classmethod
    def _auto_has_a_tolerance(cls, data: Any) -> Any:
        if isinstance(data, dict):
            tolerance = data.get("tolerance")
            if data.get("examples") == "auto":
                return {**data, "tolerance": TOLERANCE if tolerance is None else tolerance}
            if tolerance is not None:
                raise ValueError("tolerance says when examples 'auto' stops; ask for that, or leave tolerance out")
        return data

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({NODE_FISHER})

    @property
    def scoring(self) -> "ScoringParameters":
        return self

    @property
    def asked_batch_tokens(self) -> int | None:
        return None if self.batch_tokens == "auto" else self.batch_tokens

    @property
    def most_batch_tokens(self) -> int:
        return self.asked_batch_tokens or super().most_batch_tokens
