"""What is known of a method without running it."""

from dataclasses import dataclass
from typing import Any, Literal

from worker.engine.catalog.strict import Strict


class MethodParameters(Strict):
    """Parameters common to all methods."""

    name: str
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Forward and backward passes: bfloat16 where the device has matrix units for it, else float32."""
    scale: float = 1.0
    """The merge's distance from the base, `theta_0 + scale * (theta - theta_0)`; other than 1 it needs a base."""

    @property
    def needs_scores(self) -> bool:
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether computing the scores reads the data set's labels."""
        return False

    @property
    def batch_rows(self) -> int | None:
        """Rows of a batch where the method prescribes them; None where batches keep to a budget of tokens."""
        return None


@dataclass(frozen=True)
class MethodEntry:
    name: str
    formula: str
    source: str
    needs: tuple[str, ...]
    parameters: type[MethodParameters]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "formula": self.formula,
            "source": self.source,
            "needs": list(self.needs),
            "parameters": self.parameters.model_json_schema(),
        }
