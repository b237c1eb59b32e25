"""`karcher`: the mean of the models' directions on the sphere, with the mean of their lengths."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters


class KarcherParameters(MethodParameters):
    name: Literal["karcher"] = "karcher"
    max_iter: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Largest number of steps of the iteration."""
    tol: Annotated[float, Field(gt=0, lt=1)] = 1e-9
    """Length of a step, in radians, below which it is the last one."""


KARCHER = MethodEntry(
    name="karcher",
    formula="theta = [sum_j w_j |theta_j|] m, m = argmin_(|m| = 1) sum_j w_j angle(m, theta_j)^2, "
    "w_j = lambda_j / sum_k lambda_k, of each tensor",
    source="Karcher 1977, Riemannian center of mass and mollifier smoothing, doi 10.1002/cpa.3160300502; "
    "Buss & Fillmore 2001, Spherical averages, doi 10.1145/502122.502124",
    needs=(),
    parameters=KarcherParameters,
    search={"scale": Range(0.8, 1.25)},
)
