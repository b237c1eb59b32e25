"""`mask_fisher`: each slice weighted by the Fisher information of the mask node that owns it."""

from typing import Any, Literal

from pydantic import model_validator

from worker.engine.catalog.methods.entry import Choice, MethodEntry, Range
from worker.engine.catalog.methods.parameters import ScoringParameters

# The published rule in this method's own parameters; worker/engine/merging/methods/paper.py has its owners of slices.
PAPER = {"estimator": "empirical", "normalize": "none", "precision": "float32", "floor": 0.0}

PAPER_BATCH_ROWS = 32


class MaskFisherParameters(ScoringParameters):
    name: Literal["mask_fisher"] = "mask_fisher"
    preset: Literal["paper"] | None = None
    """Preset of parameters: `paper` reproduces the published code number for number, and fixes estimator, normalize,
    rest and floor."""

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
