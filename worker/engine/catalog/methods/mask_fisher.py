"""`mask_fisher`: each slice weighted by the Fisher information of the mask node that owns it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from worker.engine.catalog.methods.entry import Choice, GradientParameters, MethodEntry, Range, Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share

# The published rule in this method's own terms; see worker/engine/merging/methods/paper.py for who owns what under it.
PAPER = {"estimator": "empirical", "normalize": "none", "precision": "float32", "floor": 0.0}

PAPER_BATCH_ROWS = 32
TOLERANCE = 0.1

Normalize = Literal["layer", "model", "none"]


class ScoringParameters(GradientParameters):
    """Parameters of methods that weight slices by the scores of mask nodes."""

    examples: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto"] = 2048
    """Rows of each data set that are scored; `auto` stops when the merge weights are known to `tolerance`."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Standard error of the merge weights, in the root mean square over a layer's nodes, at which `examples: "auto"`
    stops; 0.1 when absent."""
    batch_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """Padded tokens that are computed together; `auto` finds the fastest by trying. It changes scores by rounding only;
    the number that is in the manifest gives the same bits again."""
    normalize: Normalize = "layer"
    """Scores are divided by their layer's mean, or by their L2 norm over the model, per kind of node."""
    rest: Literal["uniform", "model"] = "uniform"
    """Weights of what no node owns: lambda alone, or the mean model-normalised score of its block (or of the model)."""
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
        return frozenset({Statistic.MASK_FISHER})

    @property
    def scoring(self) -> "ScoringParameters":
        return self

    @property
    def asked_batch_tokens(self) -> int | None:
        return None if self.batch_tokens == "auto" else self.batch_tokens

    @property
    def most_batch_tokens(self) -> int:
        return self.asked_batch_tokens or super().most_batch_tokens


class MaskFisherParameters(ScoringParameters):
    name: Literal["mask_fisher"] = "mask_fisher"
    preset: Literal["paper"] | None = None
    """`paper` reproduces the published code number for number and fixes estimator, normalize, rest and floor."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fixes_its_parameters(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "paper":
            for name, value in PAPER.items():
                if data.get(name, value) != value:
                    raise ValueError(f"preset 'paper' fixes {name} to {value!r}; leave it out")
            if data.get("examples") == "auto":
                raise ValueError("preset 'paper' sums squares of batch means, which have no error bars to stop by")
            if data.get("batch_tokens", "auto") != "auto":
                raise ValueError(f"preset 'paper' computes {PAPER_BATCH_ROWS} rows together; leave batch_tokens out")
            if data.get("rest", "uniform") != "uniform":
                raise ValueError("preset 'paper' has its own rule for what no node owns; leave rest out")
            return {**data, **PAPER}
        return data

    @property
    def aligns_heads(self) -> bool:
        return self.preset is None

    @property
    def batch_rows(self) -> int | None:
        return PAPER_BATCH_ROWS if self.preset == "paper" else None


MASK_FISHER = MethodEntry(
    name="mask_fisher",
    formula="theta_s = theta_1,s + sum_j w_j,s (theta_j,s - theta_1,s), w_j,s = lambda_j F_j,s / sum_k lambda_k F_k,s",
    source="Thennal et al. 2024, Fisher Mask Nodes for Language Model Merging, arXiv 2403.09891; "
    "ownership per node and normalisation per layer are this project's",
    needs=("dataset",),
    parameters=MaskFisherParameters,
    search={
        "normalize": Choice(("layer", "model")),
        "rest": Choice(("uniform", "model")),
        "floor": Range(1e-3, 1.0, log=True),
        "scale": Range(0.8, 1.25),
    },
)
